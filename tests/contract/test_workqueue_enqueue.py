"""EnqueueTasks: batches, request ids, idempotency keys, order, times."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from contract.client import Client, Refused, code
from contract.conftest import new_line
from contract.line import Line, seconds, text
from google.protobuf import struct_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from pace import undisturbed

from retinue.workqueue.v1 import task_pb2

INLINE = 256 * 1024
REJECT = task_pb2.CONFLICT_POLICY_REJECT


def from_now(value: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.now(UTC) + timedelta(seconds=value))
    return stamp


def test_a_queue_springs_into_being_with_its_first_task(app: Client, line: Line) -> None:
    with pytest.raises(Refused) as error:
        app.GetQueue(queue_id=line.id)
    assert error.value.reason == "QUEUE_NOT_FOUND"
    line.put()
    assert app.GetQueue(queue_id=line.id).queue.queue_id == line.id


def test_a_task_is_ready_at_once_and_knows_what_the_producer_said(line: Line) -> None:
    said: dict[str, Any] = {
        "input": text("in"),
        "priority": 7,
        "labels": {"env": "test", "a/b": ""},
        "idempotency_key": "key",
        "task_type": "resize",
        "retry_policy": {"max_attempts": 2, "initial_backoff_duration": seconds(3), "backoff_multiplier": 1.5},
        "attempt_duration": seconds(60),
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "expire_time": from_now(3600),
    }
    task = line.get(line.put(task_id=f"{line.id}/1", **said))
    assert task.state == task_pb2.TASK_STATE_READY
    assert (task.attempt, task.lease_expirations, task.lease_epoch) == (0, 0, 0)
    assert task.spec.expire_time.ToMilliseconds() == -(-said["expire_time"].ToNanoseconds() // 1_000_000)
    task.spec.expire_time.CopyFrom(said["expire_time"])
    assert task.spec == line.spec(task_id=f"{line.id}/1", **said)


def test_a_task_tells_its_start_by_its_ready_time(line: Line) -> None:
    stamp = Timestamp(seconds=int(datetime.now(UTC).timestamp()) + 3600)
    assert line.get(line.put(schedule_time=stamp)).ready_time == stamp


def test_every_kind_of_payload_comes_out_as_it_went_in(line: Line) -> None:
    value = struct_pb2.Value(struct_value=struct_pb2.Struct())
    value.struct_value.update({"a": [1.5, None, True, {"b": "ü"}]})
    payloads = [
        task_pb2.Payload(data=b"\x00\xff", content_type="image/png"),
        task_pb2.Payload(text="ü\x00🙂"),
        task_pb2.Payload(json=value),
        task_pb2.Payload(data=b""),
    ]
    for payload in payloads:
        line.put(input=payload)
        lease = line.take_one()
        assert lease.input == payload
        line.complete(lease, result=payload)
        task = line.get(lease.task_id)
        assert (task.spec.input, task.result) == (payload, payload)


def test_a_task_id_that_the_server_makes_is_as_legal_as_a_chosen_one(line: Line) -> None:
    task_id = line.put()
    assert 1 <= len(task_id) <= 128
    assert set(task_id) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:/-")


@pytest.mark.engines("sqlite")
def test_the_trace_context_comes_from_the_calls_metadata_unless_the_spec_has_one(line: Line) -> None:
    of_call = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    of_spec = "00-11111111111111111111111111111111-2222222222222222-00"
    specs = [line.spec(), line.spec(traceparent=of_spec)]
    line.app.begin("EnqueueTasks", metadata=[("traceparent", of_call)], tasks=specs).result()
    assert [lease.traceparent for lease in line.take(2)] == [of_call, of_spec]


@pytest.mark.engines("sqlite")
def test_a_malformed_trace_context_in_the_metadata_fails_no_call(line: Line) -> None:
    pending = line.app.begin("EnqueueTasks", metadata=[("traceparent", "x" * 200)], tasks=[line.spec()])
    assert not pending.result().results[0].HasField("status")


def test_a_batch_answers_item_by_item_in_order(line: Line) -> None:
    taken = line.put(task_id=f"{line.id}.taken")
    specs = [line.spec(), line.spec(task_id=taken), line.spec(input=text("x" * (INLINE + 1))), line.spec()]
    first, exists, too_large, last = line.app.EnqueueTasks(tasks=specs).results
    assert not first.HasField("status")
    assert not last.HasField("status")
    assert (code(exists.status), exists.status.reason) == ("ALREADY_EXISTS", "TASK_EXISTS")
    assert exists.status.message
    assert exists.task_id == taken
    assert (code(too_large.status), too_large.status.reason) == ("RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE")
    assert {task.task_id for task in line.tasks()} == {taken, first.task_id, last.task_id}


def test_a_refused_task_without_an_id_is_not_given_one(line: Line) -> None:
    [result] = line.app.EnqueueTasks(tasks=[line.spec(input=text("x" * (INLINE + 1)))]).results
    assert result.task_id == ""


def test_a_batch_of_a_thousand_is_taken(line: Line) -> None:
    assert len(set(line.put_many(1_000))) == 1_000


def test_one_task_id_twice_in_a_batch_is_taken_once(line: Line) -> None:
    first, second = line.app.EnqueueTasks(tasks=[line.spec(task_id=f"{line.id}.a")] * 2).results
    assert not first.HasField("status")
    assert second.status.reason == "TASK_EXISTS"


def test_a_batch_feeds_several_queues(app: Client, line: Line) -> None:
    other = new_line(app)
    app.EnqueueTasks(tasks=[line.spec(), other.spec(), line.spec()])
    assert (len(line.tasks()), len(other.tasks())) == (2, 1)


def test_an_atomic_batch_with_a_refused_item_takes_nothing(app: Client, line: Line) -> None:
    taken = line.put()
    with pytest.raises(Refused) as error:
        app.EnqueueTasks(atomic=True, tasks=[line.spec(), line.spec(), line.spec(task_id=taken), line.spec()])
    assert (error.value.code, error.value.reason) == ("ALREADY_EXISTS", "TASK_EXISTS")
    assert error.value.metadata == {"index": "2", "task_id": taken}
    assert [task.task_id for task in line.tasks()] == [taken]


def test_an_atomic_batch_with_a_refused_item_makes_no_queue(app: Client, line: Line) -> None:
    with pytest.raises(Refused):
        app.EnqueueTasks(atomic=True, tasks=[line.spec(), line.spec(input=text("x" * (INLINE + 1)))])
    with pytest.raises(Refused) as error:
        app.GetQueue(queue_id=line.id)
    assert error.value.reason == "QUEUE_NOT_FOUND"


def test_an_atomic_batch_without_refusals_is_taken_whole(line: Line) -> None:
    results = line.app.EnqueueTasks(atomic=True, tasks=[line.spec()] * 3).results
    assert {r.task_id for r in results} == {t.task_id for t in line.tasks()}


@pytest.mark.parametrize("atomic", [False, True])
def test_a_repeated_request_id_gives_the_same_answer_and_takes_nothing_more(line: Line, *, atomic: bool) -> None:
    asked = {"tasks": [line.spec(), line.spec()], "request_id": uuid.uuid4().hex, "atomic": atomic}
    first, second = (line.app.EnqueueTasks(**asked) for _ in range(2))
    assert first == second
    assert len(line.tasks()) == 2


def test_a_repeated_request_id_gives_the_same_answer_even_if_items_were_refused(line: Line) -> None:
    asked = {"tasks": [line.spec(), line.spec(input=text("x" * (INLINE + 1)))], "request_id": uuid.uuid4().hex}
    first, second = (line.app.EnqueueTasks(**asked) for _ in range(2))
    assert len(line.tasks()) == 1
    assert first == second


def test_a_repeated_request_id_gives_the_same_answer_even_if_a_blob_was_missing(line: Line) -> None:
    lost = task_pb2.Payload(blob=task_pb2.BlobRef(blob_id=uuid.uuid4().hex * 2))
    asked = {"tasks": [line.spec(), line.spec(input=lost)], "request_id": uuid.uuid4().hex}
    first, second = (line.app.EnqueueTasks(**asked) for _ in range(2))
    assert len(line.tasks()) == 1
    assert first == second


def test_concurrent_repetitions_of_a_request_take_its_tasks_once(line: Line) -> None:
    asked = {"tasks": [line.spec()], "request_id": uuid.uuid4().hex}
    pending = [line.app.begin("EnqueueTasks", **asked) for _ in range(10)]
    assert len({call.result().results[0].task_id for call in pending}) == 1
    assert len(line.tasks()) == 1


def test_a_repeated_request_id_remembers_across_the_end_of_its_tasks(line: Line) -> None:
    asked = {"tasks": [line.spec()], "request_id": uuid.uuid4().hex}
    first = line.app.EnqueueTasks(**asked)
    line.complete(line.take_one())
    assert line.app.EnqueueTasks(**asked) == first
    assert line.take() == []


def test_a_request_id_of_another_request_is_a_conflict(line: Line) -> None:
    request_id = uuid.uuid4().hex
    line.app.EnqueueTasks(tasks=[line.spec()], request_id=request_id)
    with pytest.raises(Refused) as error:
        line.app.EnqueueTasks(tasks=[line.spec(priority=1)], request_id=request_id)
    assert (error.value.code, error.value.reason) == ("ALREADY_EXISTS", "REQUEST_CONFLICT")
    assert len(line.tasks()) == 1


def test_an_atomic_batch_that_was_refused_may_be_repeated_under_its_request_id(line: Line) -> None:
    line.put(task_id=f"{line.id}.a")
    asked = {"tasks": [line.spec(task_id=f"{line.id}.a")], "request_id": uuid.uuid4().hex, "atomic": True}
    for _ in range(2):
        with pytest.raises(Refused) as error:
            line.app.EnqueueTasks(**asked)
        assert error.value.reason == "TASK_EXISTS"


# Idempotency keys


def test_a_taken_key_with_the_same_input_gives_the_existing_task(line: Line) -> None:
    task_id = line.put(idempotency_key="k", input=text("a"))
    [again] = line.app.EnqueueTasks(tasks=[line.spec(idempotency_key="k", input=text("a"))]).results
    assert (again.task_id, again.existing, again.HasField("status")) == (task_id, True, False)
    assert len(line.tasks()) == 1


@pytest.mark.parametrize(("policy", "value"), [(REJECT, "a"), (REJECT, "b"), (0, "b"), (1, "b")])
def test_a_taken_key_is_a_conflict_under_reject_or_with_another_input(line: Line, policy: int, value: str) -> None:
    task_id = line.put(idempotency_key="k", input=text("a"))
    spec = line.spec(idempotency_key="k", input=text(value), conflict_policy=policy)
    [result] = line.app.EnqueueTasks(tasks=[spec]).results
    assert (code(result.status), result.status.reason) == ("ALREADY_EXISTS", "IDEMPOTENCY_CONFLICT")
    assert (result.task_id, result.existing) == (task_id, False)
    assert len(line.tasks()) == 1


def test_a_key_holds_within_a_batch(line: Line) -> None:
    first, second = line.app.EnqueueTasks(tasks=[line.spec(idempotency_key="k")] * 2).results
    assert (first.existing, second.existing) == (False, True)
    assert first.task_id == second.task_id


def test_a_key_is_unique_in_its_queue_only(app: Client, line: Line) -> None:
    assert line.put(idempotency_key="k") != new_line(app).put(idempotency_key="k")


def test_a_key_lasts_as_long_as_its_finished_task_is_kept(operator: Client, line: Line) -> None:
    task_id = line.put(idempotency_key="k")
    line.complete(line.take_one())
    assert line.put(idempotency_key="k") == task_id
    operator.DeleteTasks(task_ids=[task_id])
    assert line.put(idempotency_key="k") != task_id


def test_an_atomic_batch_tells_the_conflicting_task(line: Line) -> None:
    task_id = line.put(idempotency_key="k", input=text("a"))
    with pytest.raises(Refused) as error:
        line.app.EnqueueTasks(atomic=True, tasks=[line.spec(idempotency_key="k", input=text("b"))])
    assert error.value.metadata == {"index": "0", "task_id": task_id}


def test_an_existing_task_does_not_fail_an_atomic_batch(line: Line) -> None:
    task_id = line.put(idempotency_key="k")
    specs = [line.spec(idempotency_key="k"), line.spec()]
    results = line.app.EnqueueTasks(atomic=True, tasks=specs).results
    assert [r.existing for r in results] == [True, False]
    assert results[0].task_id == task_id


# Payload limit


@pytest.mark.parametrize("kind", ["data", "text"])
def test_an_inline_payload_of_256_kib_is_taken(line: Line, kind: str) -> None:
    content = b"x" * INLINE if kind == "data" else "x" * INLINE
    line.put(input={kind: content, "content_type": "text/plain"})


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("kind", ["data", "text", "json"])
def test_an_inline_payload_over_256_kib_is_refused_for_good(line: Line, kind: str) -> None:
    content = "x" * (INLINE + 1)
    value = {"data": content.encode(), "text": content, "json": struct_pb2.Value(string_value=content)}[kind]
    with pytest.raises(Refused) as error:
        line.app.EnqueueTasks(atomic=True, tasks=[line.spec(input={kind: value})])
    assert (error.value.code, error.value.reason) == ("RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE")
    assert error.value.retry_s is None


# Order and time


def test_higher_priority_goes_first_then_older(line: Line) -> None:
    specs = [line.spec(task_type=f"{p}{i}", priority=p) for i, p in enumerate((0, 5, -5, 5, 0, 1000, -1000))]
    line.app.EnqueueTasks(tasks=specs)
    taken = [lease.task_type for lease in (*line.take(3), *line.take(10))]
    assert taken == ["10005", "51", "53", "00", "04", "-52", "-10006"]


def test_equal_tasks_are_leased_in_the_order_they_came(line: Line) -> None:
    ids = [line.put() for _ in range(10)] + line.put_many(10)
    assert [lease.task_id for lease in line.take(20)] == ids


def test_a_delayed_task_becomes_ready_when_its_delay_is_over(line: Line) -> None:
    def delayed() -> tuple[Line, str, float]:
        own, before = new_line(line.app), time.monotonic()
        task_id = own.put(delay_duration=seconds(0.3))
        task = own.get(task_id)
        assert task.state == task_pb2.TASK_STATE_SCHEDULED
        assert (task.ready_time.ToMilliseconds() - task.create_time.ToMilliseconds()) == 300
        assert own.take() == []
        return own, task_id, before

    own, task_id, before = undisturbed(delayed, within_s=0.25)
    assert own.take_one().task_id == task_id
    assert time.monotonic() - before >= 0.29


def test_a_scheduled_task_becomes_ready_at_its_time(line: Line) -> None:
    def scheduled() -> tuple[Line, str, Timestamp]:
        own, stamp = new_line(line.app), from_now(0.3)
        task_id = own.put(schedule_time=stamp)
        assert own.state(task_id) == "SCHEDULED"
        return own, task_id, stamp

    own, task_id, stamp = undisturbed(scheduled, within_s=0.25)
    own.take_one()
    task = own.get(task_id)
    assert task.start_time.ToNanoseconds() >= stamp.ToNanoseconds() // 1_000_000 * 1_000_000


def test_a_schedule_time_in_the_past_means_now(line: Line) -> None:
    assert line.state(line.put(schedule_time=from_now(-3600))) == "READY"


def test_a_task_becomes_expired_at_its_time(line: Line) -> None:
    with line.watch() as watch:
        in_time = undisturbed(lambda: line.put(expire_time=from_now(0.3)), within_s=0.25)
        in_span = line.put(expire_duration=seconds(0.3))
        scheduled = line.put(delay_duration=seconds(60), expire_time=from_now(120))
        assert {watch.until("EXPIRED").task_id for _ in range(2)} == {in_time, in_span}
    assert line.take() == []
    assert line.state(scheduled) == "SCHEDULED"
    assert line.get(in_time).HasField("end_time")


def test_a_scheduled_task_may_expire_before_it_is_leased(line: Line) -> None:
    task_id = line.put(delay_duration=seconds(0.1), expire_duration=seconds(0.3))
    assert line.ended(task_id).state == task_pb2.TASK_STATE_EXPIRED


def lent(line: Line) -> task_pb2.Lease:
    """Of a task that expires soon."""

    def leased() -> task_pb2.Lease:
        line.put(expire_duration=seconds(0.2))
        [lease] = line.take()
        return lease

    return undisturbed(leased, within_s=0.15)


def test_a_leased_task_does_not_expire(line: Line) -> None:
    marker_line = new_line(line.app)
    lease = lent(line)
    marker_line.ended(marker_line.put(expire_duration=seconds(0.4)))
    assert line.state(lease.task_id) == "LEASED"
    assert not line.complete(lease).HasField("status")


def test_a_task_that_comes_back_after_its_time_is_expired(line: Line) -> None:
    marker_line = new_line(line.app)
    lease = lent(line)
    marker_line.ended(marker_line.put(expire_duration=seconds(0.4)))
    line.release(lease)
    assert line.ended(lease.task_id).state == task_pb2.TASK_STATE_EXPIRED


def test_an_enqueue_event_comes_before_all_others_of_its_task(line: Line) -> None:
    with line.watch() as watch:
        line.complete(line.lend())
        assert watch.names(3) == ["ENQUEUED", "LEASED", "SUCCEEDED"]
