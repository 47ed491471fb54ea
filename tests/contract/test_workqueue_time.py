"""What time brings: expired leases, attempt deadlines, retention; WaitTask and RescheduleTask."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from contract.client import Client, Refused
from contract.conftest import new_line
from contract.line import LONG, SOON, Line, in_time, seconds, text
from google.protobuf.timestamp_pb2 import Timestamp

from retinue.workqueue.v1 import task_pb2

FAR = 3600


def from_now(value: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.now(UTC) + timedelta(seconds=value))
    return stamp


# Expired leases


def test_an_expired_lease_gives_the_task_to_another_worker_and_costs_no_attempt(line: Line) -> None:
    line.put()
    began = time.monotonic()
    first = line.take_one(lease_duration=seconds(1), worker_id="first")
    second = line.take_one(worker_id="second")
    assert 0.9 <= time.monotonic() - began < SOON
    assert (second.task_id, second.attempt) == (first.task_id, 1)
    assert second.lease_epoch > first.lease_epoch
    assert second.lease_token != first.lease_token
    task = line.get(first.task_id)
    assert (task.attempt, task.lease_expirations, task.worker_id) == (1, 1, "second")
    assert not task.HasField("last_failure")


def test_a_task_that_kills_its_workers_is_dead_after_its_lease_expirations(made: Callable[..., Line]) -> None:
    line = made(max_lease_expirations=2, lease_duration=seconds(1))
    task_id = line.put()
    line.take_one()
    line.take_one()
    task = line.ended(task_id)
    assert (task.state, task.lease_expirations, task.attempt) == (task_pb2.TASK_STATE_DEAD, 2, 0)
    assert task.last_failure.reason == "LEASE_EXPIRED"


def test_a_cancelled_task_is_cancelled_when_its_lease_expires(line: Line) -> None:
    line.put()
    lease = line.take_one(lease_duration=seconds(1))
    line.app.CancelTasks(task_ids=[lease.task_id])
    assert line.ended(lease.task_id).state == task_pb2.TASK_STATE_CANCELLED
    assert line.complete(lease).status.reason == "LEASE_LOST"


# Attempt deadlines


def test_an_attempt_past_its_deadline_failed_and_is_retried(line: Line) -> None:
    task_id = line.put(
        attempt_duration=seconds(0.1), retry_policy={"max_attempts": 2, "initial_backoff_duration": seconds(0)}
    )
    first, second = line.take_one(lease_duration=seconds(60)), line.take_one()
    assert first.attempt_duration == seconds(0.1)
    assert [first.attempt, second.attempt] == [1, 2]
    assert line.complete(first).status.reason == "LEASE_LOST"
    task = line.ended(task_id)
    assert (task.state, task.attempt, task.lease_expirations) == (task_pb2.TASK_STATE_DEAD, 2, 0)
    assert (task.last_failure.reason, task.last_failure.attempt) == ("ATTEMPT_DEADLINE", 2)


def test_extending_does_not_save_an_attempt_from_its_deadline(line: Line) -> None:
    task_id = line.put(attempt_duration=seconds(0.4), retry_policy={"max_attempts": 1})
    lease = line.take_one()
    assert line.extend(lease, lease_duration=seconds(60)).lease_duration.ToMilliseconds() <= 400
    assert line.ended(task_id).state == task_pb2.TASK_STATE_DEAD


def test_the_queues_attempt_duration_holds_for_tasks_without_one(made: Callable[..., Line]) -> None:
    line = made(attempt_duration=seconds(0.1), retry_policy={"max_attempts": 1})
    line.put()
    lease = line.take_one()
    assert lease.attempt_duration == seconds(0.1)
    assert line.ended(lease.task_id).last_failure.reason == "ATTEMPT_DEADLINE"


def test_a_cancelled_task_is_cancelled_when_its_attempt_is_over(line: Line) -> None:
    lease = line.lend(attempt_duration=seconds(0.3))
    line.app.CancelTasks(task_ids=[lease.task_id])
    assert line.ended(lease.task_id).state == task_pb2.TASK_STATE_CANCELLED


# Retention


@pytest.mark.parametrize("state", ["SUCCEEDED", "CANCELLED", "EXPIRED", "DEAD"])
def test_a_finished_task_is_deleted_when_its_retention_is_over(made: Callable[..., Line], state: str) -> None:
    short, long = seconds(0.3), seconds(FAR)
    dead = state == "DEAD"
    line = made(retention_duration=long if dead else short, dead_retention_duration=short if dead else long)
    with line.watch() as watch:
        task_id = line.put(**({"expire_duration": seconds(0.05)} if state == "EXPIRED" else {}))
        lease = None
        if state in ("SUCCEEDED", "DEAD"):
            lease = line.take_one()
            line.fail(lease, final=True) if dead else line.complete(lease)
        if state == "CANCELLED":
            line.app.CancelTasks(task_ids=[task_id])
        ended = watch.until(state).event_time.ToMilliseconds()
        assert watch.until("DELETED", task_id).event_time.ToMilliseconds() - ended >= 300
    with pytest.raises(Refused) as error:
        line.get(task_id)
    assert error.value.reason == "TASK_NOT_FOUND"
    if lease is not None:
        assert line.complete(lease).status.reason == "LEASE_LOST"


# WaitTask


def test_a_wait_ends_as_soon_as_the_task_does(line: Line, other_app: Client) -> None:
    lease = line.lend()
    waiting = [line.app.begin("WaitTask", task_id=lease.task_id, wait_duration=seconds(LONG)) for _ in range(3)]
    began = time.monotonic()
    other_app.CompleteTasks(completions=[{"lease_token": lease.lease_token, "result": text("out")}])
    for call in waiting:
        task = call.result().task
        assert (task.state, task.result) == (task_pb2.TASK_STATE_SUCCEEDED, text("out"))
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize("how", ["cancel", "dead", "expire"])
def test_a_wait_ends_with_every_terminal_state(line: Line, how: str) -> None:
    task_id = line.put(**({"expire_duration": seconds(0.2)} if how == "expire" else {}))
    waiting = line.app.begin("WaitTask", task_id=task_id, wait_duration=seconds(LONG))
    if how == "cancel":
        line.app.CancelTasks(task_ids=[task_id])
    if how == "dead":
        line.fail(line.take_one(), final=True)
    state = {
        "cancel": task_pb2.TASK_STATE_CANCELLED,
        "dead": task_pb2.TASK_STATE_DEAD,
        "expire": task_pb2.TASK_STATE_EXPIRED,
    }
    assert waiting.result().task.state == state[how]


def test_a_wait_for_a_finished_task_answers_at_once(line: Line) -> None:
    lease = line.lend()
    line.complete(lease)
    began = time.monotonic()
    assert line.ended(lease.task_id).state == task_pb2.TASK_STATE_SUCCEEDED
    assert time.monotonic() - began < SOON


def test_without_a_wait_the_task_comes_as_it_stands(line: Line) -> None:
    task_id = line.put(input=text("in"))
    task = line.app.WaitTask(task_id=task_id).task
    assert (task.state, task.spec.input) == (task_pb2.TASK_STATE_READY, text("in"))


@pytest.mark.engines("sqlite")
def test_a_wait_that_is_over_gives_the_task_as_it_stands(line: Line) -> None:
    task_id = line.put()
    began = time.monotonic()
    assert line.ended(task_id, wait=0.3).state == task_pb2.TASK_STATE_READY
    assert 0.3 <= time.monotonic() - began < SOON


@pytest.mark.engines("sqlite")
def test_a_wait_ends_200_ms_before_the_callers_deadline(line: Line) -> None:
    task_id = line.put()

    def waited() -> float:
        began = time.monotonic()
        call = line.app.begin("WaitTask", timeout=1.0, task_id=task_id, wait_duration=seconds(60))
        assert call.result().task.state == task_pb2.TASK_STATE_READY
        return time.monotonic() - began

    assert in_time(waited) >= 0.6


def test_a_wait_for_an_unknown_task_is_refused(line: Line) -> None:
    with pytest.raises(Refused) as error:
        line.ended("no-such-task")
    assert (error.value.code, error.value.reason) == ("NOT_FOUND", "TASK_NOT_FOUND")
    assert error.value.metadata == {"task_id": "no-such-task"}


@pytest.mark.parametrize("how", ["DeleteTasks", "PurgeQueue", "DeleteQueue"])
def test_a_wait_ends_with_not_found_when_the_task_is_deleted(line: Line, operator: Client, how: str) -> None:
    task_id = line.put()
    waiting = line.app.begin("WaitTask", task_id=task_id, wait_duration=seconds(LONG))
    assert line.app.GetTask(task_id=task_id)  # the server has seen the call before this one on the same connection
    began = time.monotonic()
    if how == "DeleteTasks":
        operator.DeleteTasks(task_ids=[task_id])
    if how == "PurgeQueue":
        operator.PurgeQueue(queue_id=line.id)
    if how == "DeleteQueue":
        operator.DeleteQueue(queue_id=line.id, force=True)
    with pytest.raises(Refused) as error:
        waiting.result()
    assert (error.value.code, error.value.reason) == ("NOT_FOUND", "TASK_NOT_FOUND")
    assert time.monotonic() - began < SOON


def test_a_wait_outlasts_a_retry(line: Line) -> None:
    task_id = line.put()
    waiting = line.app.begin("WaitTask", task_id=task_id, wait_duration=seconds(LONG))
    line.fail(line.take_one(), retry_delay_duration=seconds(0.1))
    line.complete(line.take_one())
    assert waiting.result().task.state == task_pb2.TASK_STATE_SUCCEEDED


# RescheduleTask


def test_a_scheduled_task_can_be_made_ready_now(line: Line) -> None:
    task_id = line.put(delay_duration=seconds(FAR), input=text("in"))
    task = line.app.RescheduleTask(task_id=task_id, delay_duration=seconds(0)).task
    assert (task.task_id, task.state) == (task_id, task_pb2.TASK_STATE_READY)
    assert not task.spec.HasField("input")
    assert line.take_one().input == text("in")


def test_a_ready_task_can_be_put_off(line: Line) -> None:
    task_id = line.put()
    stamp = from_now(FAR)
    task = line.app.RescheduleTask(task_id=task_id, schedule_time=stamp).task
    assert task.state == task_pb2.TASK_STATE_SCHEDULED
    assert abs(task.ready_time.ToMilliseconds() - stamp.ToMilliseconds()) <= 1
    assert line.take() == []
    line.app.RescheduleTask(task_id=task_id, schedule_time=from_now(0.4))
    assert line.take_one().task_id == task_id


def test_a_retrying_task_can_be_made_ready_now(line: Line) -> None:
    lease = line.lend()
    line.fail(lease, retry_delay_duration=seconds(FAR))
    line.app.RescheduleTask(task_id=lease.task_id, schedule_time=from_now(-5))
    assert line.take_one().attempt == 2


def test_rescheduling_changes_the_priority_and_leaves_the_time(line: Line) -> None:
    scheduled = line.put(delay_duration=seconds(FAR))
    before = line.get(scheduled).ready_time
    task = line.app.RescheduleTask(task_id=scheduled, priority=9).task
    assert (task.spec.priority, task.state, task.ready_time) == (9, task_pb2.TASK_STATE_SCHEDULED, before)
    first, last = line.put(), line.put(priority=5)
    line.app.RescheduleTask(task_id=first, priority=10)
    assert [lease.task_id for lease in line.take(2)] == [first, last]


def test_rescheduling_may_set_the_priority_to_zero(line: Line) -> None:
    task_id = line.put(priority=5)
    assert line.app.RescheduleTask(task_id=task_id, priority=0).task.spec.priority == 0


def test_rescheduling_the_time_leaves_the_priority(line: Line) -> None:
    task_id = line.put(priority=5)
    assert line.app.RescheduleTask(task_id=task_id, delay_duration=seconds(9)).task.spec.priority == 5


def test_rescheduling_again_is_safe(line: Line) -> None:
    task_id = line.put()
    stamp = from_now(FAR)
    first, second = (line.app.RescheduleTask(task_id=task_id, schedule_time=stamp) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("state", ["LEASED", "SUCCEEDED", "DEAD", "CANCELLED"])
def test_a_leased_or_finished_task_can_not_be_rescheduled(line: Line, state: str) -> None:
    lease = line.lend()
    if state == "SUCCEEDED":
        line.complete(lease)
    if state == "DEAD":
        line.fail(lease, final=True)
    if state == "CANCELLED":
        line.app.CancelTasks(task_ids=[lease.task_id])
        line.release(lease)
    before = line.get(lease.task_id)
    with pytest.raises(Refused) as error:
        line.app.RescheduleTask(task_id=lease.task_id, priority=5)
    assert (error.value.code, error.value.reason) == ("FAILED_PRECONDITION", "ILLEGAL_TRANSITION")
    assert error.value.metadata is not None
    assert error.value.metadata["state"] == state
    assert line.get(lease.task_id) == before


def test_an_unknown_task_can_not_be_rescheduled(app: Client) -> None:
    with pytest.raises(Refused) as error:
        app.RescheduleTask(task_id="no-such-task", priority=1)
    assert (error.value.code, error.value.reason) == ("NOT_FOUND", "TASK_NOT_FOUND")


def test_due_tasks_become_ready_in_the_order_of_their_priority(line: Line) -> None:
    other = new_line(line.app)
    low = line.put(delay_duration=seconds(0.1))
    high = line.put(delay_duration=seconds(0.2), priority=1)
    other.ended(other.put(expire_duration=seconds(0.4)))
    assert [lease.task_id for lease in line.take(2)] == [high, low]


def test_among_equals_the_older_task_goes_first_even_if_it_became_ready_later(line: Line) -> None:
    other = new_line(line.app)
    older = line.put(delay_duration=seconds(0.2))
    younger = line.put()
    other.ended(other.put(expire_duration=seconds(0.4)))
    assert [lease.task_id for lease in line.take(2)] == [older, younger]
