"""CompleteTasks, FailTasks, ReleaseTasks: tokens, replays, follow-ups, retries. G3 and G4 of the design."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from contract.client import Client, Refused, code
from contract.conftest import new_line
from contract.line import SOON, WORKER, Line, seconds, text
from google.protobuf.timestamp_pb2 import Timestamp
from pace import undisturbed

from retinue.workqueue.v1 import task_pb2

WAYS = ("complete", "fail", "release")
INLINE = 256 * 1024


def settle(line: Line, way: str, lease: Any, **fields: Any) -> Any:
    return getattr(line, way)(lease, **fields)


def lose(line: Line, operator: Client, how: str) -> task_pb2.Lease:
    """A lease whose token is stale, while the task lives on (or not)."""
    line.put()
    lease = line.take_one(lease_duration=seconds(1 if how == "expired" else 30))
    if how == "expired":
        line.take_one()
    elif how == "released":
        line.release(lease)
        line.take_one()
    elif how == "failed":
        line.fail(lease, retry_delay_duration=seconds(0))
        line.take_one()
    elif how == "redriven":
        line.fail(lease, final=True)
        operator.RedriveTasks(task_ids=[lease.task_id])
        line.take_one()
    elif how == "deleted":
        line.complete(lease)
        operator.DeleteTasks(task_ids=[lease.task_id])
    elif how == "queue deleted":
        operator.DeleteQueue(queue_id=line.id, force=True)
    return lease


# Success


def test_a_completion_keeps_the_result(line: Line) -> None:
    lease = line.lend()
    assert not line.complete(lease, result=text("out")).HasField("status")
    task = line.get(lease.task_id)
    assert (task.state, task.result, task.attempt) == (task_pb2.TASK_STATE_SUCCEEDED, text("out"), 1)


def test_a_completion_without_result_leaves_none(line: Line) -> None:
    lease = line.lend()
    line.complete(lease)
    assert not line.get(lease.task_id).HasField("result")


@pytest.mark.parametrize("size", [INLINE, INLINE + 1])
def test_a_result_over_256_kib_is_refused_and_the_lease_still_held(line: Line, size: int) -> None:
    lease = line.lend()
    status = line.complete(lease, result=text("x" * size)).status
    assert status.reason == ("PAYLOAD_TOO_LARGE" if size > INLINE else "")
    if size > INLINE:
        assert code(status) == "RESOURCE_EXHAUSTED"
        assert line.state(lease.task_id) == "LEASED"
        assert not line.complete(lease).HasField("status")


def test_completions_answer_item_by_item_in_order(line: Line) -> None:
    line.put_many(4)
    leases = line.take(4)
    line.release(leases[2])
    results = line.app.CompleteTasks(completions=[{"lease_token": x.lease_token} for x in leases]).results
    assert [r.status.reason for r in results] == ["", "", "ALREADY_FINALIZED", ""]


def test_one_token_twice_in_a_batch_is_completed_once(line: Line) -> None:
    lease = line.lend()
    spec = line.spec()
    completion = {"lease_token": lease.lease_token, "follow_ups": [spec]}
    first, second = line.app.CompleteTasks(completions=[completion, completion]).results
    assert not first.HasField("status")
    assert not second.HasField("status")
    assert (len(first.follow_up_task_ids), len(second.follow_up_task_ids)) == (1, 0)
    assert len(line.take(10)) == 1


# Repeating (G4) and stale tokens


@pytest.mark.parametrize("way", WAYS)
def test_the_same_outcome_again_is_ok_and_changes_nothing(line: Line, way: str) -> None:
    lease = line.lend()
    first = settle(line, way, lease)
    assert not first.HasField("status")
    before = line.get(lease.task_id)
    again = settle(line, way, lease)
    assert not again.HasField("status")
    assert line.get(lease.task_id).attempt == before.attempt


def test_a_repeated_completion_keeps_the_first_result(line: Line) -> None:
    lease = line.lend()
    line.complete(lease, result=text("first"))
    assert not line.complete(lease, result=text("second")).HasField("status")
    assert line.get(lease.task_id).result == text("first")


def test_a_repeated_completion_enqueues_its_follow_ups_once(line: Line) -> None:
    lease = line.lend()
    first = line.complete(lease, follow_ups=[line.spec()])
    assert line.get(first.follow_up_task_ids[0]).parent_task_id == lease.task_id
    assert list(line.complete(lease, follow_ups=[line.spec()]).follow_up_task_ids) == []
    assert len(line.take(10)) == 1


def test_a_repeated_failure_tells_again_what_became_of_the_task(line: Line) -> None:
    lease = line.lend()
    states = [line.fail(lease, retry_delay_duration=seconds(60)).state for _ in range(2)]
    assert states == [task_pb2.TASK_STATE_RETRYING] * 2


def test_a_repeated_final_failure_tells_again_that_the_task_is_dead(line: Line) -> None:
    lease = line.lend()
    assert [line.fail(lease, final=True).state for _ in range(2)] == [task_pb2.TASK_STATE_DEAD] * 2


def test_a_failure_repeated_after_its_backoff_still_says_retrying(line: Line) -> None:
    with line.watch() as watch:
        lease = line.lend()
        line.fail(lease, retry_delay_duration=seconds(0))
        watch.until("READY")
    again = line.fail(lease)
    assert not again.HasField("status")
    assert again.state == task_pb2.TASK_STATE_RETRYING


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(WAYS, 2)))
def test_another_outcome_of_a_lease_that_ended_is_refused(line: Line, first: str, second: str) -> None:
    lease = line.lend()
    settle(line, first, lease)
    before = line.get(lease.task_id)
    result = settle(line, second, lease)
    assert (code(result.status), result.status.reason) == ("FAILED_PRECONDITION", "ALREADY_FINALIZED")
    assert result.status.message
    assert line.get(lease.task_id) == before


@pytest.mark.parametrize("how", ["expired", "released", "failed", "redriven", "deleted", "queue deleted"])
def test_a_stale_token_settles_and_extends_nothing(line: Line, operator: Client, how: str) -> None:
    lease = lose(line, operator, how)
    for way in (*WAYS, "extend"):
        status = settle(line, way, lease).status
        assert (code(status), status.reason) == ("FAILED_PRECONDITION", "LEASE_LOST"), way
    live = {"released", "expired", "failed", "redriven"}
    assert [task.state for task in line.tasks()] == [task_pb2.TASK_STATE_LEASED] * (how in live)


def test_a_token_is_stale_as_soon_as_its_lease_expired_even_if_no_one_else_has_the_task(line: Line) -> None:
    with line.watch() as watch:
        line.put()
        lease = line.take_one(lease_duration=seconds(1))
        watch.until("LEASE_EXPIRED")
    for way in (*WAYS, "extend"):
        assert settle(line, way, lease).status.reason == "LEASE_LOST"
    assert line.state(lease.task_id) == "READY"


def test_a_token_of_no_lease_is_malformed_or_lost_but_never_accepted(line: Line) -> None:
    lease = line.lend()
    for at in range(len(lease.lease_token)):
        token = bytearray(lease.lease_token)
        token[at] ^= 1
        try:
            [result] = line.app.CompleteTasks(completions=[{"lease_token": bytes(token)}]).results
        except Refused as error:
            assert error.fields == {"completions[0].lease_token"}  # noqa: PT017 - one of two answers
        else:
            assert result.status.reason == "LEASE_LOST"
    assert line.state(lease.task_id) == "LEASED"


def test_the_lease_epoch_grows_with_every_lease_and_never_falls(line: Line, operator: Client) -> None:
    line.put()
    epochs = []
    for way in ("release", "fail", "release", "redrive", "release"):
        lease = line.take_one()
        epochs.append(lease.lease_epoch)
        if way == "redrive":
            line.fail(lease, final=True)
            operator.RedriveTasks(task_ids=[lease.task_id])
        else:
            settle(line, way, lease, **({"retry_delay_duration": seconds(0)} if way == "fail" else {}))
    assert epochs == sorted(set(epochs))


def test_two_workers_with_one_token_race_and_exactly_one_is_accepted(line: Line, other_app: Client) -> None:
    for _ in range(20):
        lease = line.lend()
        item = [{"lease_token": lease.lease_token}]
        calls = [
            line.app.begin("CompleteTasks", completions=item),
            other_app.begin("FailTasks", failures=item),
            line.app.begin("ReleaseTasks", releases=item),
        ]
        reasons = [call.result().results[0].status.reason for call in calls]
        assert sorted(reasons) == ["", "ALREADY_FINALIZED", "ALREADY_FINALIZED"]
        for ready in line.take(1):
            line.complete(ready)


def test_many_completions_of_one_token_at_once_enqueue_one_follow_up(line: Line, other_app: Client) -> None:
    lease = line.lend()
    completion = {"lease_token": lease.lease_token, "follow_ups": [line.spec()]}
    apps = (line.app, other_app) * 10
    calls = [app.begin("CompleteTasks", completions=[completion]) for app in apps]
    results = [call.result().results[0] for call in calls]
    assert not any(r.HasField("status") for r in results)
    assert sum(len(r.follow_up_task_ids) for r in results) == 1
    assert len(line.take(10)) == 1


# Follow-ups


def test_follow_ups_come_with_the_completion_and_know_their_parent(line: Line) -> None:
    lease = line.lend()
    other = new_line(line.app)
    result = line.complete(lease, follow_ups=[line.spec(task_type="a"), other.spec(task_type="b")])
    tasks = [line.get(task_id) for task_id in result.follow_up_task_ids]
    assert [(t.queue_id, t.spec.task_type) for t in tasks] == [(line.id, "a"), (other.id, "b")]
    assert {t.parent_task_id for t in tasks} == {lease.task_id}
    assert [t.task_id for t in line.tasks(parent_task_id=lease.task_id)] == [tasks[0].task_id]


def test_a_hundred_follow_ups_are_taken(line: Line) -> None:
    lease = line.lend()
    assert len(line.complete(lease, follow_ups=[line.spec()] * 100).follow_up_task_ids) == 100


@pytest.mark.parametrize("why", ["TASK_EXISTS", "IDEMPOTENCY_CONFLICT", "PAYLOAD_TOO_LARGE", "BLOB_NOT_FOUND"])
def test_a_refused_follow_up_keeps_the_lease_and_enqueues_nothing(line: Line, why: str) -> None:
    lease = line.lend()
    other = new_line(line.app)
    other.put(task_id=f"{other.id}.a", idempotency_key="k")
    bad = {
        "TASK_EXISTS": other.spec(task_id=f"{other.id}.a"),
        "IDEMPOTENCY_CONFLICT": other.spec(idempotency_key="k", input=text("x")),
        "PAYLOAD_TOO_LARGE": other.spec(input=text("x" * (INLINE + 1))),
        "BLOB_NOT_FOUND": other.spec(input=task_pb2.Payload(blob=task_pb2.BlobRef(blob_id="0" * 64))),
    }[why]
    result = line.complete(lease, result=text("out"), follow_ups=[other.spec(), bad, other.spec()])
    assert result.status.reason == why
    assert list(result.follow_up_task_ids) == []
    assert len(other.tasks()) == 1
    task = line.get(lease.task_id)
    assert (task.state, task.HasField("result")) == (task_pb2.TASK_STATE_LEASED, False)
    assert not line.complete(lease, follow_ups=[other.spec()]).HasField("status")


def test_a_refused_follow_up_does_not_hold_up_the_other_completions(line: Line) -> None:
    line.put_many(3)
    taken = line.put(task_id=f"{line.id}.taken", priority=-1)
    leases = line.take(3)
    completions = [{"lease_token": x.lease_token, "follow_ups": [line.spec(priority=-2)]} for x in leases]
    completions[1] |= {"follow_ups": [line.spec(priority=-2), line.spec(task_id=taken)]}
    results = line.app.CompleteTasks(completions=completions).results
    assert [r.status.reason for r in results] == ["", "TASK_EXISTS", ""]
    assert [len(r.follow_up_task_ids) for r in results] == [1, 0, 1]
    assert {line.state(lease.task_id) for lease in leases} == {"SUCCEEDED", "LEASED"}


def test_a_result_blob_that_is_not_there_keeps_the_lease(line: Line) -> None:
    lease = line.lend()
    blob = task_pb2.Payload(blob=task_pb2.BlobRef(blob_id="0" * 64))
    assert line.complete(lease, result=blob).status.reason == "BLOB_NOT_FOUND"
    assert line.state(lease.task_id) == "LEASED"


def test_a_lost_lease_is_told_before_what_is_wrong_with_its_follow_ups(line: Line) -> None:
    lease = line.lend()
    line.release(lease)
    line.take_one()
    blob = task_pb2.Payload(blob=task_pb2.BlobRef(blob_id="0" * 64))
    assert line.complete(lease, result=blob).status.reason == "LEASE_LOST"
    assert line.complete(lease, follow_ups=[line.spec(input=blob)]).status.reason == "LEASE_LOST"


def test_a_follow_up_under_a_taken_key_gives_the_existing_task(line: Line) -> None:
    other = new_line(line.app)
    task_id = other.put(idempotency_key="k")
    result = line.complete(line.lend(), follow_ups=[other.spec(idempotency_key="k")])
    assert list(result.follow_up_task_ids) == [task_id]


# Failure


def test_a_failure_is_recorded_and_the_task_retried(line: Line) -> None:
    lease = line.lend()
    forged = {"reason": "OOM", "message": "no room", "attempt": 99, "record_time": Timestamp(seconds=1)}
    result = line.fail(lease, failure=forged, retry_delay_duration=seconds(60))
    assert (result.HasField("status"), result.state) == (False, task_pb2.TASK_STATE_RETRYING)
    task = line.get(lease.task_id)
    assert (task.state, task.attempt) == (task_pb2.TASK_STATE_RETRYING, 1)
    assert (task.last_failure.reason, task.last_failure.message, task.last_failure.attempt) == ("OOM", "no room", 1)
    assert task.last_failure.record_time.seconds > 1_600_000_000


def test_a_retry_delay_replaces_the_backoff(line: Line) -> None:
    lease = line.lend(retry_policy={"initial_backoff_duration": seconds(3600)})
    line.fail(lease, retry_delay_duration=seconds(0.2))
    task = line.get(lease.task_id)
    assert task.ready_time.ToMilliseconds() - task.last_failure.record_time.ToMilliseconds() == 200
    assert line.take_one().attempt == 2


def test_a_failed_task_waits_for_a_backoff_within_its_ceiling(line: Line) -> None:
    policy = {"initial_backoff_duration": seconds(1), "backoff_multiplier": 100, "max_backoff_duration": seconds(2)}
    for _ in range(20):
        lease = line.lend(retry_policy=policy)
        line.fail(lease)
        task = line.get(lease.task_id)
        waits = task.ready_time.ToMilliseconds() - task.last_failure.record_time.ToMilliseconds()
        assert 0 <= waits <= 1_000
        line.app.CancelTasks(task_ids=[lease.task_id])


def test_without_backoff_a_failed_task_is_ready_at_once(line: Line) -> None:
    lease = line.lend(retry_policy={"initial_backoff_duration": seconds(0)})
    line.fail(lease)
    assert line.take_one(wait=SOON).task_id == lease.task_id


def test_a_task_is_dead_when_no_attempt_is_left(line: Line) -> None:
    task_id = line.put(retry_policy={"max_attempts": 3, "initial_backoff_duration": seconds(0)})
    states = []
    for attempt in (1, 2, 3):
        lease = line.take_one()
        assert (lease.attempt, lease.max_attempts) == (attempt, 3)
        states.append(line.fail(lease).state)
    assert states == [task_pb2.TASK_STATE_RETRYING] * 2 + [task_pb2.TASK_STATE_DEAD]
    task = line.get(task_id)
    assert (task.state, task.attempt) == (task_pb2.TASK_STATE_DEAD, 3)
    assert task.HasField("end_time")


def test_a_final_failure_is_dead_at_once(line: Line) -> None:
    lease = line.lend()
    assert line.fail(lease, final=True, retry_delay_duration=seconds(0)).state == task_pb2.TASK_STATE_DEAD
    assert line.state(lease.task_id) == "DEAD"


def test_the_queues_policy_rules_where_the_task_says_nothing(made: Callable[..., Line]) -> None:
    line = made(retry_policy={"max_attempts": 1})
    assert line.fail(line.lend()).state == task_pb2.TASK_STATE_DEAD
    own = line.lend(retry_policy={"max_attempts": 2, "initial_backoff_duration": seconds(0)})
    assert line.fail(own).state == task_pb2.TASK_STATE_RETRYING


# Release


def test_a_released_task_is_ready_again_and_the_attempt_not_counted(line: Line) -> None:
    lease = line.lend()
    line.release(lease)
    task = line.get(lease.task_id)
    assert (task.state, task.attempt, task.lease_expirations) == (task_pb2.TASK_STATE_READY, 0, 0)
    assert line.take_one().attempt == 1


def test_a_released_task_keeps_its_place_in_the_line(line: Line) -> None:
    ids = line.put_many(3)
    line.release(line.take_one())
    assert [lease.task_id for lease in line.take(3)] == ids


def test_a_release_may_be_delayed(line: Line) -> None:
    def delayed() -> tuple[Line, str]:
        own = new_line(line.app)
        lease = own.lend()
        own.release(lease, delay_duration=seconds(0.3))
        assert own.state(lease.task_id) == "SCHEDULED"
        assert own.take() == []
        return own, lease.task_id

    own, task_id = undisturbed(delayed, within_s=0.25)
    assert own.take_one().task_id == task_id


# Attempts and expirations are counted apart


def test_failures_releases_and_expirations_are_counted_apart(line: Line) -> None:
    line.put()
    line.fail(line.take_one(), retry_delay_duration=seconds(0))
    line.release(line.take_one())
    line.take_one(lease_duration=seconds(1))
    lease = line.take_one()
    task = line.get(lease.task_id)
    assert (task.attempt, task.lease_expirations, task.lease_epoch) == (2, 1, 4)


def test_settlements_of_one_batch_see_what_came_before_them(line: Line) -> None:
    line.put_many(2)
    leases = line.take(2, worker_id=WORKER)
    failures = [{"lease_token": x.lease_token, "final": True} for x in (leases[0], leases[0], leases[1])]
    results = line.app.FailTasks(failures=failures).results
    assert [r.state for r in results] == [task_pb2.TASK_STATE_DEAD] * 3
