"""LeaseTasks and ExtendLeases: who gets what, how long, and how waiting ends."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from contract.client import TIMEOUT, Client, Pending, Refused, code
from contract.conftest import new_line
from contract.line import LONG, SOON, WORKER, Line, in_time, seconds, text
from pace import undisturbed

from retinue.workqueue.v1 import task_pb2

LIMIT = 3 * 1024 * 1024


def begin(line: Line, wait: float = LONG, timeout: float = TIMEOUT, **fields: object) -> Pending:
    return line.app.begin(
        "LeaseTasks",
        timeout=timeout,
        **{"queue_id": line.id, "worker_id": WORKER, "wait_duration": seconds(wait)} | fields,
    )


def test_a_lease_tells_the_worker_what_it_needs(line: Line) -> None:
    task_id = line.put(
        input=text("in"),
        labels={"a": "b"},
        task_type="resize",
        retry_policy={"max_attempts": 3},
        attempt_duration=seconds(60),
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )
    lease = line.take_one(lease_duration=seconds(2))
    assert (lease.task_id, lease.queue_id, lease.task_type) == (task_id, line.id, "resize")
    assert (lease.input, dict(lease.labels)) == (text("in"), {"a": "b"})
    assert (lease.attempt, lease.lease_epoch, lease.max_attempts) == (1, 1, 3)
    assert (lease.lease_duration, lease.attempt_duration) == (seconds(2), seconds(60))
    assert lease.traceparent.startswith("00-0af7")
    assert 1 <= len(lease.lease_token) <= 64


def test_a_lease_takes_the_queues_durations_where_it_has_none_of_its_own(made: Callable[..., Line]) -> None:
    line = made(lease_duration=seconds(7), attempt_duration=seconds(50), retry_policy={"max_attempts": 9})
    lease = line.lend()
    assert (lease.lease_duration, lease.attempt_duration, lease.max_attempts) == (seconds(7), seconds(50), 9)


def test_a_lease_of_a_new_queue_lasts_thirty_seconds_without_attempt_limit(line: Line) -> None:
    lease = line.lend()
    assert (lease.lease_duration, lease.HasField("attempt_duration"), lease.max_attempts) == (seconds(30), False, 5)


def test_a_lease_never_outlasts_its_attempt(line: Line) -> None:
    assert line.lend(attempt_duration=seconds(5)).lease_duration == seconds(5)


def test_a_leased_task_shows_who_has_it(line: Line) -> None:
    lease = line.lend()
    task = line.get(lease.task_id)
    assert (task.state, task.worker_id, task.attempt) == (task_pb2.TASK_STATE_LEASED, WORKER, 1)
    assert task.HasField("start_time")
    line.complete(lease)
    task = line.get(lease.task_id)
    assert task.worker_id == ""
    assert task.HasField("end_time")


def test_without_max_tasks_one_task_is_given(line: Line) -> None:
    line.put_many(3)
    assert len(line.app.LeaseTasks(queue_id=line.id, worker_id=WORKER).leases) == 1


def test_a_thousand_tasks_are_given_at_once(line: Line) -> None:
    ids = line.put_many(1_000)
    assert [lease.task_id for lease in line.take(1_000)] == ids


def test_the_tokens_of_one_call_differ(line: Line) -> None:
    line.put_many(50)
    assert len({lease.lease_token for lease in line.take(50)}) == 50


def test_a_queue_without_tasks_answers_at_once_when_no_wait_is_asked_for(line: Line) -> None:
    began = time.monotonic()
    assert line.take() == []
    line.complete(line.lend())
    assert line.take() == []
    assert time.monotonic() - began < SOON


@pytest.mark.engines("sqlite")
def test_a_wait_in_vain_ends_with_ok_and_nothing_after_the_wait(line: Line) -> None:
    began = time.monotonic()
    assert line.take(wait=0.4) == []
    assert 0.35 <= time.monotonic() - began < SOON


@pytest.mark.engines("sqlite")
def test_a_wait_in_vain_ends_200_ms_before_the_callers_deadline(line: Line) -> None:
    def waited() -> float:
        began = time.monotonic()
        assert list(begin(line, wait=60, timeout=1.0).result().leases) == []
        return time.monotonic() - began

    assert in_time(waited) >= 0.6


@pytest.mark.engines("sqlite")
def test_a_deadline_under_200_ms_answers_at_once(line: Line) -> None:
    def leased() -> bool:
        task_id = line.put()
        return [lease.task_id for lease in begin(line, wait=60, timeout=0.19).result().leases] == [task_id]

    assert in_time(leased)


def test_a_waiting_worker_gets_a_task_as_soon_as_it_comes(line: Line, other_app: Client) -> None:
    waiting = begin(line)
    began = time.monotonic()
    [result] = other_app.EnqueueTasks(tasks=[line.spec()]).results
    assert [lease.task_id for lease in waiting.result().leases] == [result.task_id]
    assert time.monotonic() - began < SOON


def test_a_waiting_worker_answers_with_the_first_task_not_with_a_full_batch(line: Line) -> None:
    waiting = begin(line, max_tasks=100)
    line.put()
    assert len(waiting.result().leases) == 1


@pytest.mark.parametrize("way", ["release", "fail", "due", "redrive", "reschedule", "follow_up", "expiry"])
def test_a_waiting_worker_wakes_up_however_a_task_becomes_ready(line: Line, operator: Client, way: str) -> None:
    source = new_line(line.app)
    lease = line.lend() if way in ("release", "fail", "redrive") else source.lend()
    if way == "expiry":
        lease = line.lend()
        line.extend(lease, lease_duration=seconds(1))
    if way == "redrive":
        line.fail(lease, final=True)
    if way == "reschedule":
        task_id = line.put(delay_duration=seconds(3600))
    waiting = begin(line)
    if way == "release":
        line.release(lease)
    if way == "fail":
        line.fail(lease, retry_delay_duration=seconds(0.1))
    if way == "due":
        line.put(delay_duration=seconds(0.2))
    if way == "redrive":
        operator.RedriveTasks(task_ids=[lease.task_id])
    if way == "reschedule":
        line.app.RescheduleTask(task_id=task_id, delay_duration=seconds(0))
    if way == "follow_up":
        source.complete(lease, follow_ups=[line.spec()])
    assert len(waiting.result().leases) == 1


def test_waiting_workers_share_what_comes(line: Line) -> None:
    waiting = [begin(line) for _ in range(20)]
    ids = line.put_many(20)
    leased = [lease.task_id for call in waiting for lease in call.result().leases]
    assert sorted(leased) == sorted(ids)


def test_a_worker_that_waited_in_vain_takes_no_ones_task(line: Line) -> None:
    gone = [begin(line) for _ in range(5)]
    for call in gone:
        call.cancel()
    staying = begin(line)
    line.put()
    assert [lease.attempt for lease in staying.result().leases] == [1]


def test_a_wait_that_is_cancelled_while_a_task_comes_loses_nothing(line: Line) -> None:
    """Whether the answer was under way when the worker gave up, only the network knows; then the lease expires."""
    for _ in range(10):
        waiting = begin(line, lease_duration=seconds(1))
        putting = line.app.begin("EnqueueTasks", tasks=[line.spec()])
        waiting.cancel()
        lease = line.take_one()
        assert (lease.task_id, lease.attempt) == (putting.result().results[0].task_id, 1)
        line.complete(lease)


def test_fifty_workers_at_once_get_disjoint_tasks(line: Line) -> None:
    ids = line.put_many(200)
    calls = [begin(line, max_tasks=4, worker_id=f"w{i}") for i in range(50)]
    leased = [lease.task_id for call in calls for lease in call.result().leases]
    assert sorted(leased) == sorted(ids)


def test_producers_and_workers_at_once_lose_and_double_nothing(line: Line) -> None:
    def work(_: int) -> list[str]:
        done: list[str] = []
        while True:
            is_last = all(future.done() for future in producing)
            leases = line.take(7, wait=0.5)
            if not leases:
                if is_last:
                    return done
                continue
            results = line.app.CompleteTasks(completions=[{"lease_token": x.lease_token} for x in leases]).results
            assert not any(r.HasField("status") for r in results)
            done += [lease.task_id for lease in leases]

    with ThreadPoolExecutor(10) as pool:
        producing = [pool.submit(line.put_many, 20) for _ in range(10)]
        working = [pool.submit(work, i) for i in range(5)]
        put = [task_id for future in producing for task_id in future.result()]
        assert sorted(task_id for future in working for task_id in future.result()) == sorted(put)


def test_a_reply_is_cut_at_3_mib_and_the_rest_stays_in_the_queue(line: Line) -> None:
    spec = line.spec(input=text("x" * 200_000))
    for _ in range(2):
        line.app.EnqueueTasks(tasks=[spec] * 15)
    seen = []
    while (reply := line.app.LeaseTasks(queue_id=line.id, worker_id=WORKER, max_tasks=100)).leases:
        assert reply.ByteSize() <= LIMIT
        seen.append([lease.task_id for lease in reply.leases])
    assert len(seen[0]) > 5
    assert len({task_id for ids in seen for task_id in ids}) == sum(map(len, seen)) == 30


def wide_spec(line: Line) -> task_pb2.TaskSpec:
    """A small input under labels as wide as they may be."""
    return line.spec(labels={f"{i:064}": "\U0001f642" * 256 for i in range(16)})


def test_a_reply_full_of_wide_labels_is_cut_at_3_mib(line: Line) -> None:
    for _ in range(2):
        line.app.EnqueueTasks(tasks=[wide_spec(line)] * 150)
    seen = []
    while leases := line.app.LeaseTasks(queue_id=line.id, worker_id=WORKER, max_tasks=1_000).leases:
        seen += [lease.task_id for lease in leases]
    assert len(set(seen)) == len(seen) == 300


# Repeating


def test_a_repeated_request_id_gives_the_live_leases_again(line: Line) -> None:
    line.put_many(5)
    request_id = uuid.uuid4().hex
    first = line.take(3, request_id=request_id)
    assert [x.lease_token for x in line.take(3, request_id=request_id)] == [x.lease_token for x in first]
    line.complete(first[1])
    again = line.take(3, request_id=request_id)
    assert [x.lease_token for x in again] == [first[0].lease_token, first[2].lease_token]
    assert [x.attempt for x in again] == [1, 1]
    assert len(line.take(10)) == 2


def test_a_repeated_request_id_tells_how_long_the_leases_last_now(line: Line) -> None:
    line.put()
    request_id = uuid.uuid4().hex
    line.take(request_id=request_id, lease_duration=seconds(60))
    marker_line = new_line(line.app)
    marker_line.ended(marker_line.put(expire_duration=seconds(0.3)))
    [again] = line.take(request_id=request_id)
    assert 1_000 < again.lease_duration.ToMilliseconds() <= 59_700


def test_a_repeated_request_id_gives_the_live_leases_of_a_paused_queue(line: Line, operator: Client) -> None:
    line.put()
    request_id = uuid.uuid4().hex
    first = line.take(request_id=request_id)
    operator.PauseQueue(queue_id=line.id)
    assert [x.lease_token for x in line.take(request_id=request_id)] == [x.lease_token for x in first]


def test_different_request_ids_give_different_leases(line: Line) -> None:
    line.put_many(2)
    one, other = (line.take(request_id=uuid.uuid4().hex) for _ in range(2))
    assert one[0].task_id != other[0].task_id


# Extending


def test_an_extension_counts_from_now(line: Line) -> None:
    lease = line.lend()
    assert line.extend(lease, lease_duration=seconds(5)).lease_duration == seconds(5)
    assert line.extend(lease, lease_duration=seconds(3600)).lease_duration == seconds(3600)


def test_an_extension_keeps_a_short_lease_alive(line: Line) -> None:
    marker_line = new_line(line.app)

    def kept() -> None:
        own = new_line(line.app)
        task_id = own.put()
        lease = own.take_one(lease_duration=seconds(2))
        for _ in range(3):
            marker_line.ended(marker_line.put(expire_duration=seconds(0.8)))
            assert not own.extend(lease).HasField("status")
        assert own.get(task_id).lease_expirations == 0
        assert not own.complete(lease).HasField("status")

    undisturbed(kept, within_s=2)


def test_an_extension_without_duration_is_as_long_as_the_lease_was_granted(line: Line) -> None:
    line.put()
    lease = line.take_one(lease_duration=seconds(10))
    assert line.extend(lease).lease_duration == seconds(10)
    line.extend(lease, lease_duration=seconds(2))
    assert line.extend(lease).lease_duration == seconds(10)


def test_an_extension_never_reaches_beyond_the_attempt(line: Line) -> None:
    lease = line.lend(attempt_duration=seconds(5))
    assert line.extend(lease, lease_duration=seconds(60)).lease_duration.ToMilliseconds() <= 5_000


def test_extensions_answer_item_by_item(line: Line) -> None:
    line.put_many(3)
    leases = line.take(3)
    line.complete(leases[1])
    results = line.app.ExtendLeases(extensions=[{"lease_token": x.lease_token} for x in leases]).results
    assert [r.status.reason for r in results] == ["", "LEASE_LOST", ""]
    assert code(results[1].status) == "FAILED_PRECONDITION"


def test_an_extension_tells_that_the_task_was_cancelled(line: Line) -> None:
    lease = line.lend()
    assert not line.extend(lease).cancel_requested
    line.app.CancelTasks(task_ids=[lease.task_id])
    assert line.extend(lease).cancel_requested


# Durations set to zero are not unset


@pytest.mark.engines("sqlite")
def test_a_lease_of_no_length_is_refused(line: Line) -> None:
    lease = line.lend()
    with pytest.raises(Refused) as error:
        line.take(lease_duration=seconds(0))
    assert error.value.fields == {"lease_duration"}
    with pytest.raises(Refused) as error:
        line.extend(lease, lease_duration=seconds(0))
    assert error.value.fields == {"extensions[0].lease_duration"}
