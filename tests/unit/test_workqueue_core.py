"""The work queue's rules, one claim a test, on the memory engine under a clock that the test holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.workqueue_core import SECOND, Bench

from retinue_server.runtime.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Reason,
    Unavailable,
)
from retinue_server.workqueue.core import rules
from retinue_server.workqueue.core.events import EventRing, EventType, Ledger
from retinue_server.workqueue.core.requests import (
    Complete,
    Enqueue,
    Extend,
    LeaseAsk,
    LeaseRef,
    NewTask,
    Reschedule,
    Selection,
    SettingsPatch,
)
from retinue_server.workqueue.engine import (
    QueueState,
    RetryOverrides,
    RetryPolicy,
    State,
    TaskBody,
    TaskFilter,
    TaskRow,
    Transaction,
)
from retinue_server.workqueue.engines.memory import MemoryEngine

T = TypeVar("T")


@pytest.fixture
def bench() -> Bench:
    return Bench(MemoryEngine())


# Leases


async def test_a_lease_counts_an_attempt_and_raises_the_epoch(bench: Bench) -> None:
    await bench.put()
    first = (await bench.take())[0].task.row
    await bench.release(LeaseRef.of(first))
    second = (await bench.take())[0].task.row
    assert (first.attempt, first.lease_epoch) == (1, 1)
    assert (second.attempt, second.lease_epoch) == (1, 2), "released: the attempt is refunded, the epoch is not"


async def test_an_expired_lease_is_lost_even_before_it_is_swept(bench: Bench) -> None:
    await bench.put()
    lease = await bench.take_one()
    bench.clock.advance(30 * SECOND)
    error = (await bench.complete(lease)).error
    assert error is not None
    assert error.reason == Reason.LEASE_LOST


async def test_an_expired_lease_gives_the_task_back_uncounted(bench: Bench) -> None:
    [task_id] = await bench.put()
    await bench.take_one()
    await bench.pass_time(30 * SECOND)
    row = (await bench.get(task_id)).row
    assert (row.state, row.attempt, row.lease_expirations) == (State.READY, 0, 1)


async def test_a_task_that_costs_three_leases_is_dead(bench: Bench) -> None:
    [task_id] = await bench.put()
    for _ in range(3):
        await bench.take_one()
        await bench.pass_time(30 * SECOND)
    task = await bench.get(task_id)
    assert (task.row.state, task.row.lease_expirations) == (State.DEAD, 3)
    assert task.body.failure is not None
    assert task.body.failure.reason == rules.LEASE_EXPIRED


async def test_extending_counts_from_now(bench: Bench) -> None:
    await bench.put()
    lease = await bench.take_one()
    bench.clock.advance(20 * SECOND)
    [extended] = await bench.queue.extend([Extend(lease)])
    assert extended.lease_ms == 30 * SECOND
    bench.clock.advance(29 * SECOND)
    assert (await bench.complete(lease)).error is None


async def test_extending_does_not_reach_past_the_attempt_deadline(bench: Bench) -> None:
    [task_id] = await bench.put(NewTask("q", attempt_ms=40 * SECOND))
    lease = await bench.take_one()
    bench.clock.advance(20 * SECOND)
    [extended] = await bench.queue.extend([Extend(lease)])
    assert extended.lease_ms == 20 * SECOND
    await bench.pass_time(20 * SECOND)
    task = await bench.get(task_id)
    assert (task.row.state, task.row.attempt, task.row.lease_expirations) == (State.RETRYING, 1, 0)
    assert task.body.failure is not None
    assert task.body.failure.reason == rules.ATTEMPT_DEADLINE


async def test_a_restart_gives_live_leases_one_full_term_uncounted(bench: Bench) -> None:
    [task_id] = await bench.put()
    lease = await bench.take_one()
    again = Bench(bench.queue.engine)
    again.clock.wall_ms += 3600 * SECOND
    again.clock.lease_ms = 3
    await again.queue.recover()
    again.clock.advance(29 * SECOND)
    assert (await again.complete(lease)).error is None
    assert (await again.get(task_id)).row.lease_expirations == 0


async def test_a_restart_leaves_what_is_left_of_the_attempt(bench: Bench) -> None:
    [task_id] = await bench.put(NewTask("q", attempt_ms=100 * SECOND))
    await bench.take_one()
    again = Bench(bench.queue.engine)
    again.clock.wall_ms += 95 * SECOND
    await again.queue.recover()
    await again.pass_time(5 * SECOND)
    assert (await again.get(task_id)).row.state == State.RETRYING


async def test_the_same_lease_request_gives_the_same_leases_again(bench: Bench) -> None:
    await bench.put(NewTask("q"), NewTask("q"))
    ask = LeaseAsk("q", "w", request_id="r")
    first = await bench.queue.lease(ask)
    assert await bench.queue.lease(ask) == first
    other = await bench.queue.lease(LeaseAsk("q", "w", request_id="s"))
    assert other[0].task.row.task_id != first[0].task.row.task_id


async def test_a_cancelled_caller_gives_its_leases_back(bench: Bench) -> None:
    [task_id] = await bench.put()
    leasing = asyncio.ensure_future(bench.queue.try_lease(LeaseAsk("q", "w")))
    await asyncio.sleep(0)
    leasing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leasing
    granted = await bench.queue.lease(LeaseAsk("q", "other"), 5_000)
    assert (granted[0].task.row.task_id, granted[0].task.row.attempt) == (task_id, 1)


async def test_a_cancelled_caller_that_may_repeat_its_request_finds_its_leases(bench: Bench) -> None:
    await bench.put()
    ask = LeaseAsk("q", "w", request_id="r")
    leasing = asyncio.ensure_future(bench.queue.try_lease(ask))
    await asyncio.sleep(0)
    leasing.cancel()
    [again] = await bench.queue.lease(ask)
    with pytest.raises(asyncio.CancelledError):
        await leasing
    await bench.queue.sweep()  # whatever was to be done for the cancelled call comes before it
    assert (await bench.complete(LeaseRef.of(again.task.row))).error is None


async def test_a_waiting_worker_wakes_up_when_a_task_comes(bench: Bench) -> None:
    waiting = asyncio.ensure_future(bench.queue.lease(LeaseAsk("q", "w"), 60_000))
    await asyncio.sleep(0)
    [task_id] = await bench.put()
    assert (await waiting)[0].task.row.task_id == task_id


async def test_a_waiter_that_goes_away_passes_its_wake_up_on(bench: Bench) -> None:
    first = asyncio.ensure_future(bench.queue.lease(LeaseAsk("q", "w1"), 60_000))
    second = asyncio.ensure_future(bench.queue.lease(LeaseAsk("q", "w2"), 60_000))
    await asyncio.sleep(0)
    await bench.put()
    first.cancel()
    assert len(await second) == 1


class SlowEngine(MemoryEngine):
    """Answers when the test says so, or refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.answers, self.holds = asyncio.Event(), asyncio.Event()
        self.answers.set()
        self.refuses: int | None = None
        """Which of the next writes is refused, counted from 0."""

    async def write(self, step: Callable[[Transaction], T]) -> T:
        if self.refuses is not None:
            self.refuses -= 1
            if self.refuses < 0:
                self.refuses = None
                raise Unavailable("not now", retry_ms=500)
        result = await super().write(step)
        if not self.answers.is_set():
            self.holds.set()
            await self.answers.wait()
        return result


async def test_what_a_cancelled_caller_wrote_is_told_to_those_who_wait(bench: Bench) -> None:
    bench.queue.engine = engine = SlowEngine()
    waiting = asyncio.ensure_future(bench.queue.lease(LeaseAsk("q", "w"), 60_000))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    engine.answers.clear()
    enqueuing = asyncio.ensure_future(bench.put())
    await engine.holds.wait()
    enqueuing.cancel()
    await asyncio.wait([enqueuing])
    engine.answers.set()
    async with asyncio.timeout(60):
        assert len(await waiting) == 1


async def test_an_end_that_its_worker_did_not_await_is_told_to_those_who_wait(bench: Bench) -> None:
    bench.queue.engine = engine = SlowEngine()
    [task_id] = await bench.put()
    lease = await bench.take_one()
    waiting = asyncio.ensure_future(bench.queue.wait(task_id, 60_000))
    await asyncio.sleep(0)
    engine.answers.clear()
    completing = asyncio.ensure_future(bench.complete(lease))
    await engine.holds.wait()
    completing.cancel()
    await asyncio.wait([completing])
    engine.answers.set()
    async with asyncio.timeout(60):
        assert (await waiting).row.state == State.SUCCEEDED


async def test_a_waiter_whose_look_fails_passes_its_wake_up_on(bench: Bench) -> None:
    bench.queue.engine = engine = SlowEngine()
    first = asyncio.ensure_future(bench.queue.lease(LeaseAsk("q", "w1"), 60_000))
    second = asyncio.ensure_future(bench.queue.lease(LeaseAsk("q", "w2"), 60_000))
    for _ in range(10):  # both look, find nothing and wait
        await asyncio.sleep(0)
    engine.refuses = 1
    await bench.put()
    with pytest.raises(Unavailable):
        await first
    async with asyncio.timeout(60):
        assert len(await second) == 1


# Ending


async def test_a_repeated_completion_is_accepted_again_and_changes_nothing(bench: Bench) -> None:
    [task_id] = await bench.put()
    lease = await bench.take_one()
    await bench.complete(lease, NewTask("next"))
    ended = (await bench.get(task_id)).row
    bench.clock.advance(SECOND)
    again = await bench.complete(lease, NewTask("next"))
    assert again.error is None
    assert (await bench.get(task_id)).row == ended
    assert len(await bench.take(10, "next")) == 1


@pytest.mark.parametrize("first", ["complete", "fail", "release"])
@pytest.mark.parametrize("then", ["complete", "fail", "release"])
async def test_a_lease_ends_one_way_only(bench: Bench, first: str, then: str) -> None:
    await bench.put()
    lease = await bench.take_one()
    assert (await getattr(bench, first)(lease)).error is None
    error = (await getattr(bench, then)(lease)).error
    assert (error is None) == (first == then)
    if error:
        assert error.reason == Reason.ALREADY_FINALIZED


async def test_an_old_token_is_lost_once_the_task_is_leased_again(bench: Bench) -> None:
    await bench.put()
    old = await bench.take_one()
    await bench.release(old)
    new = await bench.take_one()
    for end in (bench.complete, bench.fail, bench.release):
        error = (await end(old)).error
        assert error is not None
        assert error.reason == Reason.LEASE_LOST
    assert (await bench.complete(new)).error is None


async def test_a_guessed_nonce_is_no_token(bench: Bench) -> None:
    await bench.put()
    lease = await bench.take_one()
    assert (await bench.complete(lease._replace(nonce=lease.nonce + 1))).error is not None
    assert (await bench.complete(lease)).error is None


async def test_follow_ups_come_with_the_completion_and_know_their_parent(bench: Bench) -> None:
    [task_id] = await bench.put()
    settled = await bench.complete(await bench.take_one(), NewTask("next"), NewTask("next"))
    assert len(settled.follow_ups) == 2
    assert (await bench.get(settled.follow_ups[0])).row.parent_task_id == task_id


async def test_a_refused_follow_up_refuses_the_completion_and_the_lease_is_still_held(bench: Bench) -> None:
    await bench.put(NewTask("q"), NewTask("other", task_id="taken"))
    lease = await bench.take_one()
    refused = await bench.complete(lease, NewTask("next", task_id="new"), NewTask("next", task_id="taken"))
    assert refused.error is not None
    assert refused.error.reason == Reason.TASK_EXISTS
    assert await bench.take(10, "next") == []
    assert (await bench.complete(lease, NewTask("next", task_id="new"))).error is None


async def test_one_refused_item_does_not_hold_up_the_others(bench: Bench) -> None:
    await bench.put(NewTask("q"), NewTask("q"))
    one, two = (LeaseRef.of(g.task.row) for g in await bench.take(2))
    results = await bench.queue.settle([Complete(one._replace(nonce=1)), Complete(two), Complete(two)])
    assert [r.error is None for r in results] == [False, True, True]


async def test_a_failed_task_is_retried_after_its_backoff(bench: Bench) -> None:
    [task_id] = await bench.put()
    await bench.fail(await bench.take_one())
    assert (await bench.get(task_id)).row.state == State.RETRYING
    await bench.pass_time(SECOND - 1)
    assert await bench.take() == []
    await bench.pass_time(1)
    assert (await bench.take())[0].task.row.attempt == 2


async def test_the_last_attempt_leaves_the_task_dead(bench: Bench) -> None:
    [task_id] = await bench.put(NewTask("q", TaskBody(retry=RetryOverrides(max_attempts=2, initial_backoff_ms=0))))
    for state in (State.RETRYING, State.DEAD):
        settled = await bench.fail(await bench.take_one())
        assert settled.state == state
        await bench.pass_time(0)
    assert (await bench.get(task_id)).body.failure.message == "because"  # type: ignore[union-attr]


async def test_a_final_failure_leaves_the_task_dead_at_once(bench: Bench) -> None:
    await bench.put()
    assert (await bench.fail(await bench.take_one(), final=True)).state == State.DEAD


async def test_a_worker_may_say_when_to_retry(bench: Bench) -> None:
    await bench.put()
    await bench.fail(await bench.take_one(), delay_ms=5 * SECOND)
    await bench.pass_time(4 * SECOND)
    assert await bench.take() == []
    await bench.pass_time(SECOND)
    assert len(await bench.take()) == 1


@given(
    attempt=st.integers(1, 1000),
    jitter=st.floats(0, 1, exclude_max=True),
    policy=st.builds(
        RetryPolicy,
        max_attempts=st.just(5),
        initial_backoff_ms=st.integers(0, 10**9),
        max_backoff_ms=st.integers(0, 10**10),
        multiplier=st.floats(1, 100),
    ),
)
def test_backoff_never_exceeds_its_ceiling(attempt: int, jitter: float, policy: RetryPolicy) -> None:
    assert 0 <= rules.backoff_ms(policy, attempt, jitter) <= policy.max_backoff_ms


def test_backoff_doubles_up_to_its_ceiling() -> None:
    policy = RetryPolicy(initial_backoff_ms=1000, max_backoff_ms=5000)
    assert [rules.backoff_ms(policy, n, 1.0) for n in range(1, 5)] == [1000, 2000, 4000, 5000]


# Producers


async def test_the_same_key_with_the_same_input_gives_the_same_task(bench: Bench) -> None:
    task = NewTask("q", TaskBody(b"in"), idempotency_key="k")
    [first] = await bench.put(task)
    [again] = await bench.queue.enqueue(Enqueue((task,)))
    assert (again.task_id, again.existing) == (first, True)


@pytest.mark.parametrize(("body", "reject"), [(b"in", True), (b"other", False), (b"other", True)])
async def test_a_taken_key_is_refused_for_another_input_or_on_wish(bench: Bench, body: bytes, reject: bool) -> None:  # noqa: FBT001 - a case
    [first] = await bench.put(NewTask("q", TaskBody(b"in"), idempotency_key="k"))
    task = NewTask("q", TaskBody(body), idempotency_key="k", reject_conflict=reject)
    [result] = await bench.queue.enqueue(Enqueue((task,)))
    assert result.error is not None
    assert (result.error.reason, result.error.metadata["task_id"]) == (Reason.IDEMPOTENCY_CONFLICT, first)


async def test_a_key_is_taken_within_one_batch_too(bench: Bench) -> None:
    task = NewTask("q", idempotency_key="k")
    one, two = await bench.queue.enqueue(Enqueue((task, task)))
    assert (one.existing, two.existing, one.task_id == two.task_id) == (False, True, True)


async def test_an_atomic_batch_is_taken_whole_or_not_at_all(bench: Bench) -> None:
    await bench.put(NewTask("q", task_id="taken"))
    with pytest.raises(Exception, match="taken") as refused:
        await bench.queue.enqueue(Enqueue((NewTask("q"), NewTask("q", task_id="taken")), atomic=True))
    assert refused.value.metadata["index"] == "1"  # type: ignore[attr-defined]
    assert len(await bench.take(10)) == 1


async def test_a_repeated_request_enqueues_once(bench: Bench) -> None:
    asked = Enqueue((NewTask("q"), NewTask("q")), request_id="r", fingerprint=b"f")
    assert await bench.queue.enqueue(asked) == await bench.queue.enqueue(asked)
    assert len(await bench.take(10)) == 2


async def test_a_request_id_stands_for_one_request(bench: Bench) -> None:
    await bench.queue.enqueue(Enqueue((NewTask("q"),), request_id="r", fingerprint=b"f"))
    with pytest.raises(Exception, match="request_id") as refused:
        await bench.queue.enqueue(Enqueue((NewTask("q"),), request_id="r", fingerprint=b"g"))
    assert refused.value.reason == Reason.REQUEST_CONFLICT  # type: ignore[attr-defined]


async def test_a_full_queue_takes_no_more_than_it_may_hold(bench: Bench) -> None:
    await bench.queue.create_queue("q", SettingsPatch(max_tasks=2))
    results = await bench.queue.enqueue(Enqueue((NewTask("q"),) * 3))
    assert [r.error.reason if r.error else None for r in results] == [None, None, Reason.QUEUE_FULL]
    await bench.complete(await bench.take_one())
    assert (await bench.queue.enqueue(Enqueue((NewTask("q"),))))[0].error is None


async def test_a_strict_server_does_not_make_queues() -> None:
    bench = Bench(MemoryEngine(), strict=True)
    [result] = await bench.queue.enqueue(Enqueue((NewTask("q"),)))
    assert result.error is not None
    assert result.error.reason == Reason.QUEUE_NOT_FOUND


async def test_a_task_without_its_blob_is_refused_and_the_others_are_taken(bench: Bench) -> None:
    lacking = NewTask("q", TaskBody(b"x", input_blob="0" * 64))
    results = await bench.queue.enqueue(Enqueue((NewTask("q"), lacking, NewTask("q"))))
    assert [r.error.reason if r.error else None for r in results] == [None, Reason.BLOB_NOT_FOUND, None]
    assert len(await bench.take(10)) == 2


async def test_a_delayed_task_waits_for_its_time(bench: Bench) -> None:
    await bench.put(NewTask("q", delay_ms=5 * SECOND))
    assert await bench.take() == []
    await bench.pass_time(5 * SECOND)
    assert len(await bench.take()) == 1


async def test_a_task_that_nobody_starts_in_time_expires(bench: Bench) -> None:
    [task_id] = await bench.put(NewTask("q", expire_delay_ms=5 * SECOND))
    bench.clock.advance(5 * SECOND)
    assert await bench.take() == [], "not even before it is swept"
    await bench.queue.sweep()
    assert (await bench.get(task_id)).row.state == State.EXPIRED


async def test_a_task_past_its_expiry_does_not_hide_the_one_behind_it(bench: Bench) -> None:
    await bench.put(NewTask("q", expire_delay_ms=5 * SECOND), NewTask("q", expire_delay_ms=5 * SECOND))
    [behind] = await bench.put()
    bench.clock.advance(5 * SECOND)
    assert [granted.task.row.task_id for granted in await bench.take()] == [behind]


async def test_an_expiry_does_not_end_a_lease(bench: Bench) -> None:
    await bench.put(NewTask("q", expire_delay_ms=5 * SECOND))
    lease = await bench.take_one()
    await bench.pass_time(6 * SECOND)
    assert (await bench.complete(lease)).error is None


async def test_every_violation_is_named_and_nothing_is_changed(bench: Bench) -> None:
    bad = NewTask("no spaces", priority=5000, delay_ms=-1, idempotency_key="k" * 300)
    with pytest.raises(InvalidArgument) as refused:
        await bench.queue.enqueue(Enqueue((NewTask("q"), bad)))
    fields = {v.field for v in refused.value.violations}
    assert fields == {f"tasks[1].{name}" for name in ("queue_id", "priority", "delay_duration", "idempotency_key")}
    assert await bench.queue.queues("", 10) == ([], False)


# Operators


async def test_a_waiting_task_is_cancelled_at_once(bench: Bench) -> None:
    [task_id] = await bench.put()
    await bench.queue.cancel(Selection((task_id,)))
    assert (await bench.get(task_id)).row.state == State.CANCELLED
    assert await bench.take() == []


async def test_a_leased_task_is_asked_to_stop_and_a_completion_that_comes_first_counts(bench: Bench) -> None:
    [task_id] = await bench.put()
    lease = await bench.take_one()
    await bench.queue.cancel(Selection((task_id,)))
    [extended] = await bench.queue.extend([Extend(lease)])
    assert extended.cancel_requested
    assert (await bench.complete(lease)).state == State.SUCCEEDED


@pytest.mark.parametrize("end", ["fail", "release", "lapse"])
async def test_a_cancelled_lease_that_ends_otherwise_ends_the_task(bench: Bench, end: str) -> None:
    [task_id] = await bench.put()
    lease = await bench.take_one()
    await bench.queue.cancel(Selection((task_id,)))
    await (bench.pass_time(30 * SECOND) if end == "lapse" else getattr(bench, end)(lease))
    assert (await bench.get(task_id)).row.state == State.CANCELLED


async def test_a_redriven_task_starts_afresh_with_a_higher_epoch(bench: Bench) -> None:
    [task_id] = await bench.put()
    await bench.fail(await bench.take_one(), final=True)
    await bench.queue.redrive(Selection((task_id,)))
    row = (await bench.take())[0].task.row
    assert (row.attempt, row.lease_epoch) == (1, 2)


async def test_a_succeeded_task_is_not_redriven(bench: Bench) -> None:
    [task_id] = await bench.put()
    await bench.complete(await bench.take_one())
    selected = await bench.queue.redrive(Selection((task_id, "none")))
    reasons = {task: error.reason for task, error in selected.errors.items()}
    assert reasons == {task_id: Reason.ILLEGAL_TRANSITION, "none": Reason.TASK_NOT_FOUND}


async def test_a_selection_by_filter_counts_and_a_dry_run_only_counts(bench: Bench) -> None:
    await bench.put(*[NewTask("q")] * 5)
    dry = await bench.queue.cancel(Selection(wanted=TaskFilter(queue_id="q"), max_count=3, dry_run=True))
    assert dry.count == 3
    assert len(await bench.take(2)) == 2
    assert (await bench.queue.delete(Selection(wanted=TaskFilter(queue_id="q")))).count == 3


async def test_rescheduling_moves_a_waiting_task_and_no_other(bench: Bench) -> None:
    [task_id] = await bench.put(NewTask("q", delay_ms=60 * SECOND))
    await bench.queue.reschedule(Reschedule(task_id, delay_ms=0, priority=7))
    assert (await bench.take())[0].task.row.priority == 7
    with pytest.raises(FailedPrecondition):
        await bench.queue.reschedule(Reschedule(task_id, delay_ms=0))


async def test_a_paused_queue_takes_but_does_not_give(bench: Bench) -> None:
    await bench.put()
    await bench.queue.set_queue_state("q", QueueState.PAUSED)
    await bench.put()
    assert await bench.take() == []
    waiting = asyncio.ensure_future(bench.queue.lease(LeaseAsk("q", "w", 5), 60_000))
    await asyncio.sleep(0)
    await bench.queue.set_queue_state("q", QueueState.ACTIVE)
    assert len(await waiting) == 2


async def test_a_draining_queue_gives_but_takes_only_follow_ups(bench: Bench) -> None:
    await bench.put()
    await bench.queue.set_queue_state("q", QueueState.DRAINING)
    [refused] = await bench.queue.enqueue(Enqueue((NewTask("q"),)))
    assert refused.error is not None
    assert refused.error.reason == Reason.QUEUE_DRAINING
    assert (await bench.complete(await bench.take_one(), NewTask("q"))).error is None
    assert len(await bench.take()) == 1


async def test_purging_spares_what_workers_have(bench: Bench) -> None:
    await bench.put(*[NewTask("q")] * 3)
    lease = await bench.take_one()
    assert await bench.queue.purge("q", include_finished=True) == 2
    assert (await bench.complete(lease)).error is None


async def test_finished_tasks_go_when_their_retention_is_over(bench: Bench) -> None:
    [task_id] = await bench.put()
    await bench.complete(await bench.take_one())
    await bench.pass_time(24 * 3600 * SECOND - 1)
    assert (await bench.get(task_id)).row.state == State.SUCCEEDED
    await bench.pass_time(1)
    with pytest.raises(NotFound):
        await bench.get(task_id)


async def test_waiting_ends_when_the_task_does(bench: Bench) -> None:
    [task_id] = await bench.put()
    lease = await bench.take_one()
    waiting = asyncio.ensure_future(bench.queue.wait(task_id, 60_000))
    await asyncio.sleep(0)
    await bench.complete(lease)
    assert (await waiting).row.state == State.SUCCEEDED


# Events


def ledger_of(count: int) -> Ledger:
    ledger = Ledger(0)
    row = TaskRow(1, "a", "q", State.READY, 0, 0, 0)
    ledger.add_all(EventType.READY, [row] * count)
    return ledger


async def test_a_watcher_reads_on_from_where_it_was() -> None:
    ring = EventRing(4)
    ring.publish(ledger_of(3).events)
    assert len(await ring.after(1)) == 2


async def test_a_watcher_that_falls_behind_is_told_so() -> None:
    ring = EventRing(4)
    ring.publish(ledger_of(6).events)
    assert len(await ring.after(2)) == 4
    with pytest.raises(OutOfRange):
        await ring.after(1)
    with pytest.raises(OutOfRange):
        await ring.after(7)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_token_or_none(data: bytes) -> None:
    ref = LeaseRef.parse(data)
    assert ref is None or ref.token() == data
