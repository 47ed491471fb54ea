"""ListTasks and ListQueues: filters, pages, what a page leaves out."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from contract.client import Client, Refused
from contract.conftest import new_line
from contract.line import Line, seconds, text
from google.protobuf.timestamp_pb2 import Timestamp

from retinue.workqueue.v1 import task_pb2

LIMIT = 3 * 1024 * 1024


def pages(client: Client, rpc: str, items: str, **fields: Any) -> list[list[Any]]:
    found, token = [], ""
    while True:
        page = getattr(client, rpc)(page_token=token, **fields)
        found.append(list(getattr(page, items)))
        assert page.ByteSize() <= LIMIT
        token = page.next_page_token
        if not token:
            return found


def ids(tasks: list[task_pb2.Task]) -> list[str]:
    return [task.task_id for task in tasks]


def stamp_ms(value: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMilliseconds(value)
    return stamp


def test_tasks_come_newest_first_without_inputs_and_results(line: Line) -> None:
    put = [line.put(input=text("in"), labels={"a": "b"}, task_type="t") for _ in range(3)]
    line.complete(line.take_one(), result=text("out"))
    listed = line.tasks()
    assert ids(listed) == put[::-1]
    for task in listed:
        assert not task.spec.HasField("input")
        assert not task.HasField("result")
        assert (task.spec.task_type, dict(task.spec.labels)) == ("t", {"a": "b"})


@pytest.mark.parametrize("size", [1, 3, 7, 500])
def test_pages_together_hold_every_task_once(line: Line, size: int) -> None:
    put = line.put_many(14)
    found = pages(line.app, "ListTasks", "tasks", filter={"queue_id": line.id}, page_size=size)
    assert ids([task for page in found for task in page]) == put[::-1]
    assert all(len(page) <= size for page in found)


def test_a_page_without_size_holds_fifty(line: Line) -> None:
    line.put_many(60)
    assert [len(p) for p in pages(line.app, "ListTasks", "tasks", filter={"queue_id": line.id})] == [50, 10]


def test_the_last_page_has_no_token(line: Line) -> None:
    line.put_many(3)
    assert line.app.ListTasks(filter={"queue_id": line.id}, page_size=3).next_page_token == ""


def test_tasks_that_come_meanwhile_are_not_in_later_pages(line: Line) -> None:
    put = line.put_many(4)
    first = line.app.ListTasks(filter={"queue_id": line.id}, page_size=2)
    line.put_many(3)
    second = line.app.ListTasks(filter={"queue_id": line.id}, page_size=9, page_token=first.next_page_token)
    assert ids([*first.tasks, *second.tasks]) == put[::-1]


def test_a_page_goes_on_although_its_last_task_was_deleted(line: Line, operator: Client) -> None:
    put = line.put_many(4)
    first = line.app.ListTasks(filter={"queue_id": line.id}, page_size=2)
    operator.DeleteTasks(task_ids=[put[2], put[1]])
    second = line.app.ListTasks(filter={"queue_id": line.id}, page_size=9, page_token=first.next_page_token)
    assert ids(list(second.tasks)) == [put[0]]


def test_a_page_is_cut_at_3_mib(line: Line) -> None:
    labels = {f"{i:064}": "\U0001f642" * 256 for i in range(16)}
    put = []
    for _ in range(2):
        put += line.put_many(150, labels=labels)
    found = pages(line.app, "ListTasks", "tasks", filter={"queue_id": line.id}, page_size=500)
    assert len(found) > 1
    assert ids([task for page in found for task in page]) == put[::-1]


def test_a_filter_picks_by_every_field(line: Line) -> None:
    plain = line.put()
    typed = line.put(task_type="t", labels={"a": "1", "b": "2"})
    other = line.put(task_type="u", labels={"a": "1"})
    line.app.CancelTasks(task_ids=[other])
    assert ids(line.tasks(task_type="t")) == [typed]
    assert ids(line.tasks(labels={"a": "1"})) == [other, typed]
    assert ids(line.tasks(labels={"a": "1", "b": "2"})) == [typed]
    assert ids(line.tasks(labels={"a": "2"})) == []
    assert ids(line.tasks(labels={"c": ""})) == []
    assert ids(line.tasks(states=[task_pb2.TASK_STATE_CANCELLED])) == [other]
    assert ids(line.tasks(states=[task_pb2.TASK_STATE_CANCELLED, task_pb2.TASK_STATE_READY])) == [other, typed, plain]
    assert ids(line.tasks(states=[task_pb2.TASK_STATE_CANCELLED], task_type="t")) == []


def test_a_label_with_an_empty_value_is_not_a_missing_label(line: Line) -> None:
    line.put()
    labelled = line.put(labels={"a": ""})
    assert ids(line.tasks(labels={"a": ""})) == [labelled]


def test_label_filters_take_keys_and_values_literally(line: Line) -> None:
    odd = {"a.b": "x\"'%_\\", "a/b": "[0]"}
    line.put(labels={"a": "x"})
    task_id = line.put(labels=odd)
    assert ids(line.tasks(labels=odd)) == [task_id]
    assert ids(line.tasks(labels={"a.b": "x%"})) == []


def test_a_filter_picks_by_parent_across_queues(line: Line) -> None:
    other = new_line(line.app)
    lease = line.lend()
    [child] = line.complete(lease, follow_ups=[other.spec()]).follow_up_task_ids
    assert ids(list(line.app.ListTasks(filter={"parent_task_id": lease.task_id}).tasks)) == [child]


def test_times_of_creation_are_from_inclusive_to_exclusive(line: Line) -> None:
    task_id = line.put()
    at = line.get(task_id).create_time.ToMilliseconds()
    assert ids(line.tasks(created_after_time=stamp_ms(at))) == [task_id]
    assert ids(line.tasks(created_after_time=stamp_ms(at + 1))) == []
    assert ids(line.tasks(created_before_time=stamp_ms(at))) == []
    assert ids(line.tasks(created_before_time=stamp_ms(at + 1))) == [task_id]


def test_without_a_filter_all_tasks_are_listed(line: Line) -> None:
    task_id = line.put()
    assert task_id in ids(list(line.app.ListTasks(page_size=500).tasks))


def test_an_unknown_queue_has_no_tasks(line: Line) -> None:
    assert line.tasks() == []


# Queues


def test_queues_come_by_name_and_pages_hold_every_one(operator: Client) -> None:
    stem = f"zz-{uuid.uuid4().hex}"
    names = [f"{stem}-{i}" for i in (3, 1, 2)]
    for name in names:
        operator.CreateQueue(queue_id=name)
    found = [q.queue_id for page in pages(operator, "ListQueues", "queues", page_size=2) for q in page]
    assert [name for name in found if name.startswith(stem)] == sorted(names)
    assert found == sorted(found)
    assert len(set(found)) == len(found)


# Page tokens


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("rpc", ["ListTasks", "ListQueues"])
@pytest.mark.parametrize("token", ["x", "!!", "eyJhIjoxfQ", "bnVsbA", "W10", "A" * 5_000, "ü", "\x00"])
def test_a_page_token_that_is_none_is_malformed(app: Client, rpc: str, token: str) -> None:
    with pytest.raises(Refused) as error:
        getattr(app, rpc)(page_token=token)
    assert (error.value.code, error.value.fields) == ("INVALID_ARGUMENT", {"page_token"})


def test_a_page_token_of_another_list_is_expired(line: Line, operator: Client) -> None:
    line.put_many(2)
    token = line.app.ListTasks(filter={"queue_id": line.id}, page_size=1).next_page_token
    with pytest.raises(Refused) as error:
        operator.ListQueues(page_token=token)
    assert (error.value.code, error.value.reason) == ("OUT_OF_RANGE", "PAGE_TOKEN_EXPIRED")


def test_a_page_token_of_another_filter_is_expired(line: Line) -> None:
    line.put_many(2)
    token = line.app.ListTasks(filter={"queue_id": line.id}, page_size=1).next_page_token
    with pytest.raises(Refused) as error:
        line.app.ListTasks(filter={"queue_id": line.id, "task_type": "t"}, page_token=token)
    assert (error.value.code, error.value.reason) == ("OUT_OF_RANGE", "PAGE_TOKEN_EXPIRED")


def test_scheduled_tasks_are_listed_as_such(line: Line) -> None:
    task_id = line.put(delay_duration=seconds(3600))
    assert ids(line.tasks(states=[task_pb2.TASK_STATE_SCHEDULED])) == [task_id]
