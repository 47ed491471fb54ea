"""Every limit of the contract: what is over it is INVALID_ARGUMENT, names every violation and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from contract.client import Client, Refused
from contract.line import Line, seconds, text
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from pace import undisturbed

from retinue.workqueue.v1 import task_pb2

DAY = 86_400
YEAR = 365 * DAY
SMILE = "\U0001f642"


def from_now(value: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.now(UTC) + timedelta(seconds=value))
    return stamp


def label_count(count: int) -> dict[str, str]:
    return {f"k{i}": "v" for i in range(count)}


# What a task may be, and what not: fields of the spec, and the violations below `tasks[i]`.

GOOD_SPECS: dict[str, dict[str, Any]] = {
    "longest task_id": {"task_id": "a" * 100 + ":/-._" * 5},
    "lowest priority": {"priority": -1000},
    "highest priority": {"priority": 1000},
    "longest delay": {"delay_duration": seconds(3650 * DAY)},
    "past start": {"schedule_time": Timestamp(seconds=-1)},
    "longest expiry": {"expire_duration": seconds(3650 * DAY)},
    "shortest expiry": {"expire_duration": seconds(0.001), "delay_duration": seconds(0)},
    "sixteen labels": {"labels": label_count(16)},
    "longest label": {"labels": {"k" * 64: SMILE * 256}},
    "longest key": {"idempotency_key": SMILE * 256},
    "longest type": {"task_type": SMILE * 128},
    "content type": {"input": {"content_type": "x" * 128, "text": ""}},
    "shortest attempt": {"attempt_duration": seconds(0.1)},
    "longest attempt": {"attempt_duration": seconds(30 * DAY)},
    "fewest attempts": {"retry_policy": {"max_attempts": 1}},
    "most attempts": {"retry_policy": {"max_attempts": 1000}},
    "no backoff": {"retry_policy": {"initial_backoff_duration": seconds(0), "max_backoff_duration": seconds(0)}},
    "longest backoff": {
        "retry_policy": {"initial_backoff_duration": seconds(7 * DAY), "max_backoff_duration": seconds(30 * DAY)}
    },
    "flattest backoff": {"retry_policy": {"backoff_multiplier": 1}},
    "steepest backoff": {"retry_policy": {"backoff_multiplier": 100}},
    "policy by number": {"conflict_policy": 2},
}

BAD_SPECS: list[tuple[dict[str, Any], set[str]]] = [
    ({"queue_id": ""}, {"queue_id"}),
    ({"queue_id": "-a"}, {"queue_id"}),
    ({"queue_id": "a/b"}, {"queue_id"}),
    ({"queue_id": "a\n"}, {"queue_id"}),
    ({"queue_id": "ä"}, {"queue_id"}),
    ({"queue_id": "a" * 129}, {"queue_id"}),
    ({"task_id": "a b"}, {"task_id"}),
    ({"task_id": "a\x00"}, {"task_id"}),
    ({"task_id": "a" * 129}, {"task_id"}),
    ({"priority": -1001}, {"priority"}),
    ({"priority": 1001}, {"priority"}),
    ({"priority": -(1 << 31)}, {"priority"}),
    ({"schedule_time": from_now(11 * YEAR)}, {"schedule_time"}),
    ({"schedule_time": Timestamp(nanos=-1)}, {"schedule_time"}),
    ({"schedule_time": Timestamp(nanos=1_000_000_000)}, {"schedule_time"}),
    ({"schedule_time": Timestamp(seconds=1 << 62)}, {"schedule_time"}),
    ({"delay_duration": seconds(-0.001)}, {"delay_duration"}),
    ({"delay_duration": seconds(11 * YEAR)}, {"delay_duration"}),
    ({"delay_duration": Duration(seconds=1, nanos=-1)}, {"delay_duration"}),
    ({"delay_duration": Duration(seconds=-(1 << 62))}, {"delay_duration"}),
    ({"expire_time": from_now(-1)}, {"expire_time"}),
    ({"expire_time": from_now(5_000), "delay_duration": seconds(10_000)}, {"expire_time"}),
    ({"expire_time": from_now(5_000), "schedule_time": from_now(10_000)}, {"expire_time"}),
    ({"expire_time": Timestamp(nanos=-1)}, {"expire_time"}),
    ({"expire_duration": seconds(0)}, {"expire_duration"}),
    ({"expire_duration": seconds(-1)}, {"expire_duration"}),
    ({"expire_duration": seconds(5_000), "delay_duration": seconds(10_000)}, {"expire_duration"}),
    ({"expire_duration": seconds(5_000), "schedule_time": from_now(10_000)}, {"expire_duration"}),
    ({"labels": label_count(17)}, {"labels"}),
    ({"labels": {"": "v"}}, {"labels[]"}),
    ({"labels": {"a b": "v"}}, {"labels[a b]"}),
    ({"labels": {"k" * 65: "v"}}, {f"labels[{'k' * 64}]"}),
    ({"labels": {"a": "v" * 257, "b:": "w"}}, {"labels[a]", "labels[b:]"}),
    ({"idempotency_key": "k" * 257}, {"idempotency_key"}),
    ({"conflict_policy": 3}, {"conflict_policy"}),
    ({"conflict_policy": -1}, {"conflict_policy"}),
    ({"task_type": "t" * 129}, {"task_type"}),
    ({"input": {"content_type": "x" * 129}}, {"input.content_type"}),
    ({"input": {"json": {"number_value": math.nan}}}, {"input.json"}),
    ({"input": {"json": {"list_value": {"values": [{"number_value": -math.inf}]}}}}, {"input.json"}),
    ({"input": {"json": {"struct_value": {"fields": {"a": {"number_value": math.inf}}}}}}, {"input.json"}),
    ({"input": {"blob": {"blob_id": "A" * 64}}}, {"input.blob.blob_id"}),
    ({"attempt_duration": seconds(0)}, {"attempt_duration"}),
    ({"attempt_duration": seconds(0.099)}, {"attempt_duration"}),
    ({"attempt_duration": seconds(30 * DAY + 1)}, {"attempt_duration"}),
    ({"retry_policy": {"max_attempts": -1}}, {"retry_policy.max_attempts"}),
    ({"retry_policy": {"max_attempts": 1001}}, {"retry_policy.max_attempts"}),
    ({"retry_policy": {"initial_backoff_duration": seconds(-1)}}, {"retry_policy.initial_backoff_duration"}),
    ({"retry_policy": {"initial_backoff_duration": seconds(7 * DAY + 1)}}, {"retry_policy.initial_backoff_duration"}),
    ({"retry_policy": {"max_backoff_duration": seconds(-1)}}, {"retry_policy.max_backoff_duration"}),
    ({"retry_policy": {"max_backoff_duration": seconds(30 * DAY + 1)}}, {"retry_policy.max_backoff_duration"}),
    ({"retry_policy": {"backoff_multiplier": 0.99}}, {"retry_policy.backoff_multiplier"}),
    ({"retry_policy": {"backoff_multiplier": -2}}, {"retry_policy.backoff_multiplier"}),
    ({"retry_policy": {"backoff_multiplier": 100.1}}, {"retry_policy.backoff_multiplier"}),
    ({"retry_policy": {"backoff_multiplier": math.nan}}, {"retry_policy.backoff_multiplier"}),
    ({"retry_policy": {"backoff_multiplier": math.inf}}, {"retry_policy.backoff_multiplier"}),
    ({"traceparent": "x" * 200}, {"traceparent"}),
    (
        {"queue_id": "!", "priority": 2000, "task_type": "t" * 200, "delay_duration": seconds(-1)},
        {"queue_id", "priority", "task_type", "delay_duration"},
    ),
]


def numbered(rows: list[Any]) -> list[Any]:
    """Parameters whose ids say which row of the table it is, and what is in it."""
    names = ["-".join("+".join(part) if isinstance(part, dict) else part for part in row[:-1]) for row in rows]
    return [pytest.param(*row, id=f"{i}-{name}") for i, (row, name) in enumerate(zip(rows, names, strict=True))]


def invalid(call: Callable[[], Any]) -> set[str]:
    """The fields that INVALID_ARGUMENT names, each with an explanation."""
    with pytest.raises(Refused) as error:
        call()
    assert (error.value.code, error.value.reason, error.value.domain) == (
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
        "retinue",
    )
    assert error.value.message
    assert all(why for _, why in error.value.violations)
    return error.value.fields


@pytest.mark.parametrize("fields", GOOD_SPECS.values(), ids=GOOD_SPECS)
def test_a_task_at_the_limit_is_taken(line: Line, fields: dict[str, Any]) -> None:
    if "task_id" in fields:
        fields = {"task_id": (line.id + fields["task_id"])[-128:]}
    line.put(**fields)


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(("fields", "wrong"), numbered(BAD_SPECS))
def test_a_task_over_a_limit_fails_the_whole_batch(line: Line, fields: dict[str, Any], wrong: set[str]) -> None:
    tasks = [line.spec(), line.spec(**fields), line.spec(priority=5000)]
    expected = {f"tasks[1].{field}" for field in wrong} | {"tasks[2].priority"}
    assert invalid(lambda: line.app.EnqueueTasks(tasks=tasks)) == expected
    assert line.tasks() == []


@pytest.mark.engines("sqlite")
def test_a_follow_up_over_a_limit_fails_the_whole_batch(line: Line) -> None:
    line.put_many(2)
    good, bad = line.take(2)
    follow_ups = [line.spec(), line.spec(priority=-2000, labels={"a b": ""})]
    completions = [
        {"lease_token": good.lease_token},
        {"lease_token": bad.lease_token, "follow_ups": follow_ups},
        {"lease_token": b"x" * 25},
    ]
    assert invalid(lambda: line.app.CompleteTasks(completions=completions)) == {
        "completions[1].follow_ups[1].priority",
        "completions[1].follow_ups[1].labels[a b]",
        "completions[2].lease_token",
    }
    assert {task.state for task in line.tasks()} == {task_pb2.TASK_STATE_LEASED}


def items(count: int) -> list[dict[str, Any]]:
    return [{}] * count


# The other requests of apps; `{queue}` is the test's queue.

BAD_APP: list[tuple[str, dict[str, Any], set[str]]] = [
    ("EnqueueTasks", {}, {"tasks"}),
    ("EnqueueTasks", {"tasks": [{"queue_id": "{queue}"}] * 1_001}, {"tasks"}),
    ("EnqueueTasks", {"tasks": [{"queue_id": "{queue}"}], "request_id": "r" * 129}, {"request_id"}),
    ("EnqueueTasks", {"request_id": "r" * 129}, {"tasks", "request_id"}),
    ("GetTask", {}, {"task_id"}),
    ("GetTask", {"task_id": "a b"}, {"task_id"}),
    ("GetTask", {"task_id": "a" * 129}, {"task_id"}),
    ("ListTasks", {"page_size": -1}, {"page_size"}),
    ("ListTasks", {"page_size": 501}, {"page_size"}),
    ("ListTasks", {"filter": {"queue_id": "!"}, "page_size": 501}, {"filter.queue_id", "page_size"}),
    ("ListTasks", {"filter": {"states": [0, 1, 99]}}, {"filter.states[0]", "filter.states[2]"}),
    ("ListTasks", {"filter": {"labels": label_count(17)}}, {"filter.labels"}),
    ("ListTasks", {"filter": {"parent_task_id": "a b"}}, {"filter.parent_task_id"}),
    ("ListTasks", {"filter": {"created_after_time": Timestamp(nanos=-1)}}, {"filter.created_after_time"}),
    ("ListTasks", {"filter": {"created_before_time": Timestamp(seconds=1 << 60)}}, {"filter.created_before_time"}),
    *(("ListTasks", {"filter": {"labels": {key: "x"}}}, {f"filter.labels[{key}]"}) for key in ("\\", "a\0b", "", '"')),
    ("CancelTasks", {"filter": {"labels": {"\\": "x"}}, "max_count": 1}, {"filter.labels[\\]"}),
    ("ListTasks", {"page_size": 501, "page_token": "x"}, {"page_size", "page_token"}),
    ("WaitTask", {}, {"task_id"}),
    ("WaitTask", {"task_id": "", "wait_duration": seconds(60.001)}, {"task_id", "wait_duration"}),
    ("WaitTask", {"task_id": "a", "wait_duration": seconds(-1)}, {"wait_duration"}),
    ("CancelTasks", {}, {"task_ids"}),
    ("CancelTasks", {"task_ids": ["a"] * 1_001}, {"task_ids"}),
    ("CancelTasks", {"task_ids": ["a"], "filter": {"queue_id": "{queue}"}}, {"task_ids"}),
    ("CancelTasks", {"task_ids": ["a", "", "b c"]}, {"task_ids[1]", "task_ids[2]"}),
    ("CancelTasks", {"filter": {"queue_id": "{queue}"}, "max_count": -1}, {"max_count"}),
    ("CancelTasks", {"filter": {"queue_id": "!"}, "max_count": 10_001}, {"filter.queue_id", "max_count"}),
    ("RescheduleTask", {"priority": 1}, {"task_id"}),
    ("RescheduleTask", {"task_id": "a", "priority": 1001}, {"priority"}),
    ("RescheduleTask", {"task_id": "a", "delay_duration": seconds(-1)}, {"delay_duration"}),
    ("RescheduleTask", {"task_id": "a", "delay_duration": seconds(11 * YEAR)}, {"delay_duration"}),
    ("RescheduleTask", {"task_id": "a b", "schedule_time": from_now(11 * YEAR)}, {"task_id", "schedule_time"}),
    ("LeaseTasks", {}, {"queue_id", "worker_id"}),
    ("LeaseTasks", {"queue_id": "{queue}"}, {"worker_id"}),
    ("LeaseTasks", {"queue_id": "{queue}", "worker_id": "w" * 129}, {"worker_id"}),
    ("LeaseTasks", {"queue_id": "{queue}", "worker_id": "w", "max_tasks": -1}, {"max_tasks"}),
    ("LeaseTasks", {"queue_id": "{queue}", "worker_id": "w", "max_tasks": 1_001}, {"max_tasks"}),
    ("LeaseTasks", {"queue_id": "{queue}", "worker_id": "w", "wait_duration": seconds(60.001)}, {"wait_duration"}),
    ("LeaseTasks", {"queue_id": "{queue}", "worker_id": "w", "wait_duration": seconds(-0.1)}, {"wait_duration"}),
    ("LeaseTasks", {"queue_id": "{queue}", "worker_id": "w", "lease_duration": seconds(0.999)}, {"lease_duration"}),
    (
        "LeaseTasks",
        {"queue_id": "{queue}", "worker_id": "w", "lease_duration": seconds(43_200.001)},
        {"lease_duration"},
    ),
    ("LeaseTasks", {"queue_id": "{queue}", "worker_id": "w", "request_id": "r" * 129}, {"request_id"}),
    ("ExtendLeases", {}, {"extensions"}),
    ("ExtendLeases", {"extensions": items(2)}, {"extensions[0].lease_token", "extensions[1].lease_token"}),
    ("CompleteTasks", {}, {"completions"}),
    ("CompleteTasks", {"completions": items(1)}, {"completions[0].lease_token"}),
    ("FailTasks", {}, {"failures"}),
    ("FailTasks", {"failures": items(1)}, {"failures[0].lease_token"}),
    ("ReleaseTasks", {}, {"releases"}),
    ("ReleaseTasks", {"releases": items(1)}, {"releases[0].lease_token"}),
    ("GetQueue", {}, {"queue_id"}),
    ("ListQueues", {"page_size": 501}, {"page_size"}),
    ("ListQueues", {"page_size": -1}, {"page_size"}),
    ("GetQueueStats", {"queue_ids": ["a"] * 501}, {"queue_ids"}),
    ("GetQueueStats", {"queue_ids": ["a", "!"]}, {"queue_ids[1]"}),
]


def filled(fields: Any, line: Line) -> Any:
    """The fields with the queue's name put in."""
    if isinstance(fields, dict):
        return {key: filled(value, line) for key, value in fields.items()}
    if isinstance(fields, list):
        return [filled(value, line) for value in fields]
    return line.id if isinstance(fields, str) and fields == "{queue}" else fields


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(("rpc", "fields", "wrong"), numbered(BAD_APP))
def test_a_request_over_a_limit_is_refused(line: Line, rpc: str, fields: dict[str, Any], wrong: set[str]) -> None:
    task_id = line.put()
    before = line.get(task_id)
    assert invalid(lambda: getattr(line.app, rpc)(**filled(fields, line))) == wrong
    assert [task.task_id for task in line.tasks()] == [task_id]
    assert line.get(task_id) == before


# Items of settlements and extensions beside a good one.

BAD_ITEMS: list[tuple[str, str, dict[str, Any], set[str]]] = [
    ("ExtendLeases", "extensions", {"lease_duration": seconds(0.999)}, {"lease_duration"}),
    ("ExtendLeases", "extensions", {"lease_duration": seconds(43_201)}, {"lease_duration"}),
    (
        "ExtendLeases",
        "extensions",
        {"lease_duration": seconds(-1), "lease_token": b""},
        {"lease_duration", "lease_token"},
    ),
    ("CompleteTasks", "completions", {"result": {"content_type": "x" * 129}}, {"result.content_type"}),
    ("CompleteTasks", "completions", {"result": {"blob": {}}}, {"result.blob.blob_id"}),
    ("FailTasks", "failures", {"failure": {"reason": "r" * 129}}, {"failure.reason"}),
    ("FailTasks", "failures", {"failure": {"message": "m" * 4_097}}, {"failure.message"}),
    ("FailTasks", "failures", {"retry_delay_duration": seconds(-1)}, {"retry_delay_duration"}),
    ("FailTasks", "failures", {"retry_delay_duration": seconds(30 * DAY + 1)}, {"retry_delay_duration"}),
    (
        "FailTasks",
        "failures",
        {"failure": {"reason": "r" * 129, "message": "m" * 4_097}},
        {"failure.reason", "failure.message"},
    ),
    ("ReleaseTasks", "releases", {"delay_duration": seconds(-1)}, {"delay_duration"}),
    ("ReleaseTasks", "releases", {"delay_duration": seconds(30 * DAY + 1)}, {"delay_duration"}),
    ("ReleaseTasks", "releases", {"lease_token": b"x" * 25}, {"lease_token"}),
]


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(("rpc", "kind", "fields", "wrong"), numbered(BAD_ITEMS))
def test_an_item_over_a_limit_fails_the_whole_batch(
    line: Line, rpc: str, kind: str, fields: dict[str, Any], wrong: set[str]
) -> None:
    line.put_many(2)
    good, bad = ({"lease_token": lease.lease_token} for lease in line.take(2))
    before = line.tasks()
    assert invalid(lambda: getattr(line.app, rpc)(**{kind: [good, bad | fields]})) == {f"{kind}[1].{w}" for w in wrong}
    assert line.tasks() == before


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(
    ("rpc", "kind"),
    [
        ("ExtendLeases", "extensions"),
        ("CompleteTasks", "completions"),
        ("FailTasks", "failures"),
        ("ReleaseTasks", "releases"),
    ],
)
def test_a_batch_of_1001_settlements_is_refused(line: Line, rpc: str, kind: str) -> None:
    item = {"lease_token": line.lend().lease_token}
    assert invalid(lambda: getattr(line.app, rpc)(**{kind: [item] * 1_001})) == {kind}
    assert not any(task.state != task_pb2.TASK_STATE_LEASED for task in line.tasks())


@pytest.mark.engines("sqlite")
def test_follow_ups_are_limited_for_one_completion_and_for_a_batch(line: Line) -> None:
    line.put_many(11)
    tokens = [lease.lease_token for lease in line.take(11)]
    many = [{"lease_token": tokens[0], "follow_ups": [line.spec()] * 101}]
    assert invalid(lambda: line.app.CompleteTasks(completions=many)) == {"completions[0].follow_ups"}
    too_many = [{"lease_token": token, "follow_ups": [line.spec()] * 91} for token in tokens]
    assert invalid(lambda: line.app.CompleteTasks(completions=too_many)) == {"completions"}
    assert len(line.tasks()) == 11


def test_settlements_at_their_limits_are_taken(line: Line) -> None:
    longest = {"failure": {"reason": SMILE * 128, "message": SMILE * 4_096}}
    assert not line.fail(line.lend(), **longest, retry_delay_duration=seconds(30 * DAY)).HasField("status")
    assert not line.release(line.lend(), delay_duration=seconds(30 * DAY)).HasField("status")

    def extended() -> task_pb2.Lease:
        lease = line.lend()
        for length in (1, 43_200):
            assert line.extend(lease, lease_duration=seconds(length)).lease_duration == seconds(length)
        return lease

    lease = undisturbed(extended, within_s=0.9)
    completion = {"result": task_pb2.Payload(text="", content_type="x" * 128)}
    assert not line.complete(lease, **completion).HasField("status")


# What operators ask.

BAD_SETTINGS: list[tuple[dict[str, Any], set[str]]] = [
    ({"lease_duration": seconds(0)}, {"lease_duration"}),
    ({"lease_duration": seconds(0.999)}, {"lease_duration"}),
    ({"lease_duration": seconds(43_201)}, {"lease_duration"}),
    ({"attempt_duration": seconds(0.099)}, {"attempt_duration"}),
    ({"attempt_duration": seconds(-1)}, {"attempt_duration"}),
    ({"attempt_duration": seconds(30 * DAY + 1)}, {"attempt_duration"}),
    ({"retry_policy": {"max_attempts": 1001}}, {"retry_policy.max_attempts"}),
    ({"retry_policy": {"backoff_multiplier": 0.5}}, {"retry_policy.backoff_multiplier"}),
    ({"retry_policy": {"initial_backoff_duration": seconds(8 * DAY)}}, {"retry_policy.initial_backoff_duration"}),
    ({"retry_policy": {"max_backoff_duration": seconds(31 * DAY)}}, {"retry_policy.max_backoff_duration"}),
    ({"max_lease_expirations": -1}, {"max_lease_expirations"}),
    ({"max_lease_expirations": 1001}, {"max_lease_expirations"}),
    ({"retention_duration": seconds(-1)}, {"retention_duration"}),
    ({"retention_duration": seconds(YEAR + 1)}, {"retention_duration"}),
    ({"dead_retention_duration": seconds(YEAR + 1)}, {"dead_retention_duration"}),
    ({"max_tasks": -1}, {"max_tasks"}),
    ({"max_tasks": -1, "max_lease_expirations": 1001}, {"max_tasks", "max_lease_expirations"}),
]


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(("settings", "wrong"), numbered(BAD_SETTINGS))
def test_settings_over_a_limit_are_refused(
    operator: Client, line: Line, settings: dict[str, Any], wrong: set[str]
) -> None:
    expected = {f"settings.{field}" for field in wrong}
    assert invalid(lambda: operator.CreateQueue(queue_id=line.id, settings=settings)) == expected
    assert invalid(lambda: operator.CreateQueue(queue_id="!", settings=settings)) == expected | {"queue_id"}
    line.put()
    before = operator.GetQueue(queue_id=line.id)
    assert invalid(lambda: operator.UpdateQueue(queue_id=line.id, settings=settings)) == expected
    assert operator.GetQueue(queue_id=line.id) == before


def test_settings_at_their_limits_are_taken(operator: Client, line: Line) -> None:
    lowest = {
        "lease_duration": seconds(1),
        "attempt_duration": seconds(0.1),
        "max_lease_expirations": 1,
        "retention_duration": seconds(0),
        "dead_retention_duration": seconds(0),
        "max_tasks": 0,
    }
    highest = {
        "lease_duration": seconds(43_200),
        "attempt_duration": seconds(30 * DAY),
        "max_lease_expirations": 1000,
        "retention_duration": seconds(YEAR),
        "dead_retention_duration": seconds(YEAR),
        "max_tasks": 1 << 40,
    }
    operator.CreateQueue(queue_id=line.id, settings=lowest)
    settings = operator.UpdateQueue(queue_id=line.id, settings=highest).queue.settings
    assert (settings.lease_duration, settings.max_tasks) == (seconds(43_200), 1 << 40)


BAD_OPERATOR: list[tuple[str, dict[str, Any], set[str]]] = [
    *((rpc, {"queue_id": name}, {"queue_id"}) for name in ("", "!") for rpc in (
        "CreateQueue", "UpdateQueue", "DeleteQueue", "PauseQueue", "ResumeQueue", "DrainQueue", "PurgeQueue"
    )),
    *((rpc, *rest) for rpc in ("RedriveTasks", "DeleteTasks") for rest in (
        ({}, {"task_ids"}),
        ({"task_ids": ["a"], "filter": {}}, {"task_ids"}),
        ({"task_ids": ["a"] * 1_001}, {"task_ids"}),
        ({"task_ids": ["a", "b c"]}, {"task_ids[1]"}),
        ({"filter": {}, "max_count": -1}, {"max_count"}),
        ({"filter": {"states": [77]}, "max_count": 10_001}, {"filter.states[0]", "max_count"}),
    )),
]  # fmt: skip


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(("rpc", "fields", "wrong"), numbered(BAD_OPERATOR))
def test_an_operators_request_over_a_limit_is_refused(
    operator: Client, rpc: str, fields: dict[str, Any], wrong: set[str]
) -> None:
    assert invalid(lambda: getattr(operator, rpc)(**fields)) == wrong


@pytest.mark.engines("sqlite")
def test_more_violations_than_fit_are_counted(line: Line) -> None:
    tasks = [line.spec(priority=5000, labels={"a b": ""})] * 1_000
    with pytest.raises(Refused) as error:
        line.app.EnqueueTasks(tasks=tasks)
    found = error.value
    assert found.metadata is not None
    assert len(found.violations) + int(found.metadata["omitted"]) == 2_000
    assert len(found.violations) > 10
    assert sum(len(field) + len(why) for field, why in found.violations) < 6 * 1024


@pytest.mark.engines("sqlite")
def test_a_violation_of_a_huge_field_stays_small(line: Line) -> None:
    with pytest.raises(Refused) as error:
        line.app.EnqueueTasks(tasks=[line.spec(labels={"x y" * 50_000: "v"}, task_type="t" * 100_000)])
    assert error.value.code == "INVALID_ARGUMENT"
    assert len(error.value.violations) == 2


def test_waits_and_leases_at_their_limits_are_taken(line: Line) -> None:
    line.put(input=text(""))
    lease = line.take_one(wait=60, lease_duration=seconds(43_200), worker_id="w" * 128, request_id=line.id + "r" * 90)
    assert lease.lease_duration == seconds(43_200)
    assert line.ended(lease.task_id, wait=0.001).state == task_pb2.TASK_STATE_LEASED
