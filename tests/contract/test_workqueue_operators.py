"""WorkQueueAdminService: queues, bulk work, statistics, roles."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from contract.client import METHODS, Client, Refused, code
from contract.conftest import new_line
from contract.line import Line, seconds, text

from retinue.workqueue.v1 import queue_pb2, task_pb2

FAR = 3600
OPEN_TO_APPS = {"GetQueue", "ListQueues", "GetQueueStats", "WatchEvents", "GetCapabilities"}
ADMIN = [m.name for m in METHODS.values() if m.containing_service.name == "WorkQueueAdminService"]
BULK = ("CancelTasks", "RedriveTasks", "DeleteTasks")


def stats(line: Line) -> queue_pb2.QueueStats:
    found: queue_pb2.QueueStats = line.app.GetQueueStats(queue_ids=[line.id]).stats[0]
    return found


def populate(line: Line) -> dict[str, str]:
    """One task in every state; their ids."""
    put = line.put
    ids = {"CANCELLED": put(), "EXPIRED": put(expire_duration=seconds(0.05))}
    line.app.CancelTasks(task_ids=[ids["CANCELLED"]])
    line.ended(ids["EXPIRED"])
    for state in ("SUCCEEDED", "DEAD", "RETRYING", "LEASED"):
        lease = line.lend()
        ids[state] = lease.task_id
        if state == "SUCCEEDED":
            line.complete(lease)
        if state == "DEAD":
            line.fail(lease, final=True)
        if state == "RETRYING":
            line.fail(lease, retry_delay_duration=seconds(FAR))
    return ids | {"SCHEDULED": put(delay_duration=seconds(FAR)), "READY": put()}


def states(line: Line, ids: dict[str, str]) -> dict[str, str]:
    """Where the tasks of `populate` stand now, those that are gone left out."""
    there = {task.task_id for task in line.tasks()}
    return {was: line.state(task_id) for was, task_id in ids.items() if task_id in there}


# Roles


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("rpc", sorted(set(ADMIN) - OPEN_TO_APPS))
def test_an_app_may_not_do_an_operators_work(app: Client, line: Line, rpc: str) -> None:
    line.put()
    fields = {"task_ids": ["a"]} if rpc in BULK else {"queue_id": line.id}
    with pytest.raises(Refused) as error:
        getattr(app, rpc)(**fields)
    assert (error.value.code, error.value.reason) == ("PERMISSION_DENIED", "ROLE_REQUIRED")
    assert stats(line).ready == 1
    assert stats(line).state == queue_pb2.QUEUE_STATE_ACTIVE


@pytest.mark.engines("sqlite")
def test_a_call_beyond_the_callers_role_tells_both_roles(app: Client, line: Line) -> None:
    with pytest.raises(Refused) as error:
        app.CreateQueue(queue_id=line.id)
    assert error.value.metadata == {"required": "operator", "role": "app"}


def test_an_app_may_read_what_operators_read(line: Line) -> None:
    line.put()
    assert line.app.GetQueue(queue_id=line.id).queue.queue_id == line.id
    assert stats(line).ready == 1
    assert line.app.ListQueues().queues
    assert line.app.GetCapabilities().engine
    with line.watch() as watch:
        assert watch.token


def test_an_operator_may_do_an_apps_work(operator: Client, line: Line) -> None:
    as_operator = Line(operator, line.id)
    assert not as_operator.complete(as_operator.lend()).HasField("status")


# Queues


def test_a_queue_has_the_settings_it_was_made_with_and_the_defaults(made: Callable[..., Line]) -> None:
    line = made(lease_duration=seconds(5), retry_policy={"max_attempts": 2})
    queue = line.app.GetQueue(queue_id=line.id).queue
    policy = task_pb2.RetryPolicy(
        max_attempts=2,
        initial_backoff_duration=seconds(1),
        max_backoff_duration=seconds(300),
        backoff_multiplier=2,
    )
    assert queue.settings == queue_pb2.QueueSettings(
        lease_duration=seconds(5),
        attempt_duration=seconds(0),
        retry_policy=policy,
        max_lease_expirations=3,
        retention_duration=seconds(24 * 3600),
        dead_retention_duration=seconds(14 * 24 * 3600),
        max_tasks=0,
    )
    assert queue.state == queue_pb2.QUEUE_STATE_ACTIVE
    assert queue.HasField("create_time")


def test_a_queue_that_sprang_into_being_has_the_defaults(line: Line, operator: Client) -> None:
    line.put()
    assert operator.CreateQueue(queue_id=line.id).queue == line.app.GetQueue(queue_id=line.id).queue


def test_making_a_queue_again_with_the_same_settings_is_ok(operator: Client, line: Line) -> None:
    asked = {"queue_id": line.id, "settings": {"lease_duration": seconds(9)}}
    first, second = (operator.CreateQueue(**asked) for _ in range(2))
    assert first == second


def test_making_a_queue_again_with_other_settings_is_refused(operator: Client, made: Callable[..., Line]) -> None:
    line = made(lease_duration=seconds(9))
    with pytest.raises(Refused) as error:
        operator.CreateQueue(queue_id=line.id, settings={"lease_duration": seconds(8)})
    assert (error.value.code, error.value.reason) == ("ALREADY_EXISTS", "QUEUE_EXISTS")
    assert line.app.GetQueue(queue_id=line.id).queue.settings.lease_duration == seconds(9)


def test_an_update_changes_what_is_set_and_leaves_the_rest(operator: Client, made: Callable[..., Line]) -> None:
    line = made(lease_duration=seconds(9), retry_policy={"max_attempts": 7}, max_tasks=5, attempt_duration=seconds(8))
    before = line.app.GetQueue(queue_id=line.id).queue.settings
    settings = {"retry_policy": {"backoff_multiplier": 3}, "max_tasks": 0, "attempt_duration": seconds(0)}
    for _ in range(2):
        after = operator.UpdateQueue(queue_id=line.id, settings=settings).queue.settings
        assert after.retry_policy.max_attempts == 7
        assert after.retry_policy.backoff_multiplier == 3
        assert (after.max_tasks, after.attempt_duration) == (0, seconds(0))
        assert after.lease_duration == before.lease_duration


def test_waiting_tasks_follow_new_settings_and_leases_keep_theirs(operator: Client, made: Callable[..., Line]) -> None:
    line = made(lease_duration=seconds(20))
    line.put_many(2)
    old = line.take_one()
    operator.UpdateQueue(
        queue_id=line.id, settings={"lease_duration": seconds(40), "retry_policy": {"max_attempts": 1}}
    )
    new = line.take_one()
    assert (new.lease_duration, new.max_attempts) == (seconds(40), 1)
    assert line.extend(old).lease_duration == seconds(20)


@pytest.mark.parametrize(
    "rpc", ["GetQueue", "UpdateQueue", "DeleteQueue", "PauseQueue", "ResumeQueue", "DrainQueue", "PurgeQueue"]
)
def test_an_unknown_queue_is_not_found(operator: Client, line: Line, rpc: str) -> None:
    with pytest.raises(Refused) as error:
        getattr(operator, rpc)(queue_id=line.id)
    assert (error.value.code, error.value.reason) == ("NOT_FOUND", "QUEUE_NOT_FOUND")
    assert error.value.metadata == {"queue_id": line.id}


def test_a_paused_queue_takes_tasks_and_gives_none_and_its_leases_go_on(operator: Client, line: Line) -> None:
    lease = line.lend()
    for _ in range(2):
        assert operator.PauseQueue(queue_id=line.id).queue.state == queue_pb2.QUEUE_STATE_PAUSED
    line.put()
    assert line.take(wait=0.1) == []
    assert not line.extend(lease).HasField("status")
    assert not line.complete(lease).HasField("status")
    waiting = line.app.begin("LeaseTasks", queue_id=line.id, worker_id="w", wait_duration=seconds(15))
    for _ in range(2):
        assert operator.ResumeQueue(queue_id=line.id).queue.state == queue_pb2.QUEUE_STATE_ACTIVE
    assert len(waiting.result().leases) == 1


def test_a_draining_queue_refuses_tasks_and_gives_those_it_has(operator: Client, line: Line) -> None:
    line.put()
    for _ in range(2):
        assert operator.DrainQueue(queue_id=line.id).queue.state == queue_pb2.QUEUE_STATE_DRAINING
    [result] = line.app.EnqueueTasks(tasks=[line.spec()]).results
    assert (code(result.status), result.status.reason) == ("FAILED_PRECONDITION", "QUEUE_DRAINING")
    lease = line.take_one()
    assert len(line.complete(lease, follow_ups=[line.spec()]).follow_up_task_ids) == 1
    follow_up = line.take_one()
    line.fail(follow_up, retry_delay_duration=seconds(0))
    assert line.take_one().attempt == 2
    operator.ResumeQueue(queue_id=line.id)
    line.put()


def test_a_full_queue_refuses_tasks_until_one_is_finished(made: Callable[..., Line]) -> None:
    line = made(max_tasks=2)
    first, second, third = line.app.EnqueueTasks(tasks=[line.spec()] * 3).results
    assert (first.HasField("status"), second.HasField("status")) == (False, False)
    assert (code(third.status), third.status.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    lease = line.take_one()
    with pytest.raises(Refused) as error:
        line.app.EnqueueTasks(atomic=True, tasks=[line.spec()])
    assert error.value.reason == "QUEUE_FULL"
    assert error.value.retry_s
    line.complete(lease)
    line.put()


def test_a_full_queue_refuses_follow_ups_and_the_lease_is_kept(made: Callable[..., Line]) -> None:
    line = made(max_tasks=1)
    lease = line.lend()
    assert line.complete(lease, follow_ups=[line.spec()]).status.reason == "QUEUE_FULL"
    assert line.state(lease.task_id) == "LEASED"


def test_purging_deletes_what_waits_and_leaves_leased_and_finished_tasks(operator: Client, line: Line) -> None:
    ids = populate(line)
    assert operator.PurgeQueue(queue_id=line.id).deleted_tasks == 3
    assert set(states(line, ids)) == {"LEASED", "SUCCEEDED", "DEAD", "CANCELLED", "EXPIRED"}
    assert operator.PurgeQueue(queue_id=line.id).deleted_tasks == 0
    assert operator.PurgeQueue(queue_id=line.id, include_finished=True).deleted_tasks == 4
    assert set(states(line, ids)) == {"LEASED"}


def test_purging_takes_more_than_one_step_where_it_must(operator: Client, line: Line) -> None:
    for _ in range(2):
        line.put_many(1_000)
    line.put_many(100)
    assert operator.PurgeQueue(queue_id=line.id).deleted_tasks == 2_100
    assert stats(line).ready == 0


def test_a_queue_with_tasks_is_deleted_by_force_only(operator: Client, line: Line) -> None:
    lease = line.lend()
    line.put()
    with pytest.raises(Refused) as error:
        operator.DeleteQueue(queue_id=line.id)
    assert (error.value.code, error.value.reason) == ("FAILED_PRECONDITION", "QUEUE_NOT_EMPTY")
    assert error.value.metadata is not None
    assert error.value.metadata["tasks"] == "2"
    assert operator.DeleteQueue(queue_id=line.id, force=True).deleted_tasks == 2
    assert line.complete(lease).status.reason == "LEASE_LOST"
    with pytest.raises(Refused) as error:
        operator.DeleteQueue(queue_id=line.id, force=True)
    assert error.value.reason == "QUEUE_NOT_FOUND"


def test_an_empty_queue_is_deleted_and_may_come_again(operator: Client, made: Callable[..., Line]) -> None:
    line = made(lease_duration=seconds(9))
    assert operator.DeleteQueue(queue_id=line.id).deleted_tasks == 0
    assert line.lend().lease_duration == seconds(30)


# Statistics


def test_statistics_count_the_tasks_of_every_state(line: Line) -> None:
    populate(line)
    found = stats(line)
    counts = {f.name: getattr(found, f.name) for f in found.DESCRIPTOR.fields}
    expected = dict.fromkeys(s.lower() for s in populate_names()) | {}
    assert {name: counts[name] for name in expected} == dict.fromkeys(expected, 1)
    assert found.workers == 1
    assert found.state == queue_pb2.QUEUE_STATE_ACTIVE


def populate_names() -> list[str]:
    return [name.removeprefix("TASK_STATE_") for name in task_pb2.TaskState.keys()[1:]]


def test_statistics_tell_how_long_the_oldest_ready_task_waits(line: Line) -> None:
    other, began = new_line(line.app), time.monotonic()
    line.put()
    other.ended(other.put(expire_duration=seconds(0.3)))
    line.put()
    told = stats(line).oldest_ready_duration.ToMilliseconds()
    assert 250 <= told <= (time.monotonic() - began) * 1000 + 10
    line.take(2)
    assert stats(line).oldest_ready_duration.ToMilliseconds() == 0


def test_statistics_count_workers_not_leases(line: Line) -> None:
    line.put_many(4)
    line.take(2, worker_id="a")
    line.take(2, worker_id="b")
    assert (stats(line).workers, stats(line).leased) == (2, 4)


def test_statistics_of_several_queues_come_in_order(line: Line) -> None:
    other = new_line(line.app)
    line.put()
    other.put()
    ids = sorted((line.id, other.id), reverse=True)
    assert [s.queue_id for s in line.app.GetQueueStats(queue_ids=ids).stats] == ids
    assert {line.id, other.id} <= {s.queue_id for s in line.app.GetQueueStats().stats}


def test_statistics_of_an_unknown_queue_are_not_found(line: Line) -> None:
    with pytest.raises(Refused) as error:
        stats(line)
    assert (error.value.code, error.value.reason) == ("NOT_FOUND", "QUEUE_NOT_FOUND")


# Cancel, redrive, delete


def bulk(operator: Client, rpc: str, **fields: Any) -> Any:
    return getattr(operator, rpc)(**fields)


EXPECTED = {
    "CancelTasks": {
        "READY": "CANCELLED",
        "SCHEDULED": "CANCELLED",
        "RETRYING": "CANCELLED",
        "LEASED": "LEASED",
        "CANCELLED": "CANCELLED",
    },
    "RedriveTasks": {"DEAD": "READY", "CANCELLED": "READY", "EXPIRED": "READY"},
    "DeleteTasks": dict.fromkeys(
        ("READY", "SCHEDULED", "RETRYING", "SUCCEEDED", "DEAD", "CANCELLED", "EXPIRED"), "gone"
    ),
}


@pytest.mark.parametrize("rpc", BULK)
def test_bulk_work_by_id_answers_task_by_task(operator: Client, line: Line, rpc: str) -> None:
    ids = populate(line)
    names = [*ids, "nobody"]
    wanted = [*ids.values(), "nobody"]
    dry = bulk(operator, rpc, task_ids=wanted, dry_run=True)
    assert states(line, ids) == {state: state for state in ids}
    done = bulk(operator, rpc, task_ids=wanted)
    assert done == dry
    assert [r.task_id for r in done.results] == wanted
    reasons = {state: r.status.reason for state, r in zip(names, done.results, strict=True) if r.HasField("status")}
    legal = EXPECTED[rpc]
    illegal = {state: "ILLEGAL_TRANSITION" for state in ids if state not in legal}
    assert reasons == illegal | {"nobody": "TASK_NOT_FOUND"}
    assert done.count == len(legal)
    after = states(line, ids)
    assert {state: after.get(state, "gone") for state in legal} == legal
    assert all(after[state] == state for state in illegal)


@pytest.mark.parametrize("rpc", BULK)
def test_bulk_work_by_filter_takes_the_oldest_that_may_be_taken(operator: Client, line: Line, rpc: str) -> None:
    ids = populate(line)
    more = {f"more{i}": line.put() for i in range(2)}
    if rpc == "RedriveTasks":
        line.app.CancelTasks(task_ids=list(more.values()))
    wanted = {"queue_id": line.id}
    dry = bulk(operator, rpc, filter=wanted, dry_run=True)
    takes = {"CancelTasks": 6, "RedriveTasks": 5, "DeleteTasks": 9}[rpc]
    assert (dry.count, list(dry.results)) == (takes, [])
    some = bulk(operator, rpc, filter=wanted, max_count=takes - 1)
    assert some.count == takes - 1
    left = line.state(more["more1"])
    assert left == ("CANCELLED" if rpc == "RedriveTasks" else "READY")
    assert bulk(operator, rpc, filter=wanted).count == (2 if rpc == "CancelTasks" else 1)
    assert len(ids) == 8


def test_bulk_work_follows_the_filters_states(operator: Client, line: Line) -> None:
    ids = populate(line)
    wanted = {"queue_id": line.id, "states": [task_pb2.TASK_STATE_DEAD, task_pb2.TASK_STATE_SUCCEEDED]}
    assert operator.RedriveTasks(filter=wanted).count == 1
    assert operator.CancelTasks(filter=wanted).count == 0
    assert operator.DeleteTasks(filter=wanted).count == 1
    assert states(line, ids)["DEAD"] == "READY"
    assert "SUCCEEDED" not in states(line, ids)


def test_cancelling_twice_is_ok(line: Line) -> None:
    waiting, lease = line.put(delay_duration=seconds(FAR)), line.lend()
    for _ in range(2):
        done = line.app.CancelTasks(task_ids=[waiting, lease.task_id])
        assert not any(r.HasField("status") for r in done.results)
    assert line.get(lease.task_id).cancel_requested


@pytest.mark.parametrize(("way", "state"), [("complete", "SUCCEEDED"), ("fail", "CANCELLED"), ("release", "CANCELLED")])
def test_a_cancelled_task_ends_with_its_lease(line: Line, way: str, state: str) -> None:
    lease = line.lend()
    line.app.CancelTasks(task_ids=[lease.task_id])
    result = getattr(line, way)(lease)
    assert not result.HasField("status")
    if way == "fail":
        assert result.state == task_pb2.TASK_STATE_CANCELLED
    task = line.get(lease.task_id)
    assert (line.state(lease.task_id), task.cancel_requested) == (state, False)


def test_an_app_cancels_tasks_by_filter(line: Line) -> None:
    line.put_many(3, labels={"a": "b"})
    line.put()
    assert line.app.CancelTasks(filter={"queue_id": line.id, "labels": {"a": "b"}}).count == 3
    assert stats(line).ready == 1


def test_a_redriven_task_starts_anew_under_a_higher_epoch(operator: Client, line: Line) -> None:
    line.put(retry_policy={"max_attempts": 1}, input=text("in"))
    first = line.take_one()
    line.fail(first)
    operator.RedriveTasks(task_ids=[first.task_id])
    task = line.get(first.task_id)
    assert (task.state, task.attempt, task.lease_expirations) == (task_pb2.TASK_STATE_READY, 0, 0)
    assert task.lease_epoch == first.lease_epoch
    assert not task.HasField("end_time")
    second = line.take_one()
    assert (second.attempt, second.input) == (1, text("in"))
    assert second.lease_epoch > first.lease_epoch


def test_a_redriven_expired_task_does_not_expire_again(operator: Client, line: Line) -> None:
    task_id = line.put(expire_duration=seconds(0.05))
    line.ended(task_id)
    operator.RedriveTasks(task_ids=[task_id])
    assert line.take_one().task_id == task_id


def test_the_same_id_twice_is_counted_once(operator: Client, line: Line) -> None:
    task_id = line.put()
    done = operator.DeleteTasks(task_ids=[task_id, task_id])
    assert done.count == 1
    assert [r.task_id for r in done.results] == [task_id, task_id]


def test_a_deleted_task_is_gone(operator: Client, line: Line) -> None:
    task_id = line.put(task_id=f"{line.id}.a")
    operator.DeleteTasks(task_ids=[task_id])
    assert line.take() == []
    with pytest.raises(Refused) as error:
        line.get(task_id)
    assert error.value.reason == "TASK_NOT_FOUND"
    assert line.put(task_id=task_id) == task_id


# Capabilities


def test_capabilities_tell_the_limits_in_force(app: Client) -> None:
    can = app.GetCapabilities()
    assert (can.max_batch_items, can.max_payload_bytes) == (1_000, 256 * 1024)
    assert can.max_blob_bytes > 0
    assert can.durability != 0
    assert can.server_version
    assert can.HasField("drain_duration")


CHANGES: dict[str, Callable[[Line, task_pb2.Lease], dict[str, Any]]] = {
    "EnqueueTasks": lambda line, lease: {"tasks": [line.spec()]},
    "CancelTasks": lambda line, lease: {"task_ids": ["a"]},
    "RescheduleTask": lambda line, lease: {"task_id": line.put(), "priority": 1},
    "LeaseTasks": lambda line, lease: {"queue_id": line.id, "worker_id": "w"},
    "ExtendLeases": lambda line, lease: {"extensions": [{"lease_token": lease.lease_token}]},
    "CompleteTasks": lambda line, lease: {"completions": [{"lease_token": lease.lease_token}]},
    "FailTasks": lambda line, lease: {"failures": [{"lease_token": lease.lease_token}]},
    "ReleaseTasks": lambda line, lease: {"releases": [{"lease_token": lease.lease_token}]},
    "CreateQueue": lambda line, lease: {"queue_id": line.id},
    "UpdateQueue": lambda line, lease: {"queue_id": line.id},
    "PauseQueue": lambda line, lease: {"queue_id": line.id},
    "ResumeQueue": lambda line, lease: {"queue_id": line.id},
    "DrainQueue": lambda line, lease: {"queue_id": line.id},
    "PurgeQueue": lambda line, lease: {"queue_id": line.id},
    "DeleteQueue": lambda line, lease: {"queue_id": line.id, "force": True},
    "RedriveTasks": lambda line, lease: {"task_ids": ["a"]},
    "DeleteTasks": lambda line, lease: {"task_ids": ["a"]},
}


@pytest.mark.parametrize("rpc", CHANGES)
def test_every_change_tells_how_durable_its_ok_is(operator: Client, line: Line, rpc: str) -> None:
    lease = line.lend()
    call = operator.begin(rpc, **CHANGES[rpc](line, lease))
    call.result()
    level = operator.GetCapabilities().durability
    assert call.trailing().get("retinue-durability") == {1: "memory", 2: "os", 3: "disk"}[level]
