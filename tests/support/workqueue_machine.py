"""One hypothesis machine for the work queue: the same random story on one or more engines.

The engines must answer alike, and what they answer must keep the guarantees: epochs only grow, at most one completion
of a task is accepted, a completed task is never leased again, and counts tell the truth.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec import Struct
from msgspec.structs import astuple, replace

from retinue_server.runtime.errors import RetinueError
from retinue_server.workqueue.core.requests import (
    Complete,
    Enqueue,
    Extend,
    Fail,
    LeaseAsk,
    LeaseRef,
    NewTask,
    Release,
    Reschedule,
    Selection,
)
from retinue_server.workqueue.engine import (
    Engine,
    Failure,
    QueueState,
    RetryOverrides,
    State,
    TaskBody,
    TaskFilter,
    TaskRow,
)
from support.workqueue_core import SECOND, Bench

QUEUES = st.sampled_from(["q", "q", "q", "r"])
TASKS = st.builds(
    NewTask,
    queue_id=QUEUES,
    body=st.builds(
        TaskBody,
        input=st.sampled_from([b"", b"x", b"y"]),
        labels=st.sampled_from([{}, {"a": "1"}]),
        retry=st.sampled_from([None, RetryOverrides(max_attempts=2, initial_backoff_ms=500)]),
    ),
    task_id=st.sampled_from([*[""] * 8, "mine", "yours"]),
    priority=st.integers(-2, 2),
    delay_ms=st.sampled_from([*[None] * 5, 2 * SECOND]),
    expire_delay_ms=st.sampled_from([*[None] * 5, 20 * SECOND]),
    attempt_ms=st.sampled_from([*[None] * 5, 15 * SECOND]),
    idempotency_key=st.sampled_from([*[""] * 5, "k"]),
)


class QueueMachine(RuleBasedStateMachine):
    """The story; a subclass says on which engines it is played."""

    def engines(self) -> list[Engine]:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stores = self.engines()
        self.runner.run(self._start())
        self.leases: list[LeaseRef] = []
        self.own: dict[tuple[Bench, LeaseRef], LeaseRef] = {}
        """The same lease as each engine numbers it."""
        self.epochs: Counter[int] = Counter()
        self.completed: dict[int, LeaseRef] = {}
        self.known: list[str] = []

    async def _start(self) -> None:
        for store in self.stores:
            await store.start()
        self.benches = [Bench(store) for store in self.stores]

    def teardown(self) -> None:
        for store in self.stores:
            self.runner.run(store.stop())
        self.runner.close()

    def all(self, act: Callable[[Bench], Awaitable[Any]]) -> Any:
        """Plays an act on every engine; the one answer."""
        return self.each(act)[0]

    def each(self, act: Callable[[Bench], Awaitable[Any]]) -> list[Any]:
        """The same; the answers, which differ in nothing but seq."""
        answers = [self.runner.run(self._answer(act, bench)) for bench in self.benches]
        for answer in answers[1:]:
            assert plain(answer) == plain(answers[0]), f"{answer}\n{answers[0]}"
        return answers

    @staticmethod
    async def _answer(act: Callable[[Bench], Awaitable[Any]], bench: Bench) -> Any:
        try:
            return await act(bench)
        except RetinueError as error:
            return error

    @initialize()
    def some_work(self) -> None:
        self.enqueue([NewTask("q"), NewTask("q"), NewTask("q", priority=1)], atomic=False, request="")

    @rule(
        tasks=st.lists(TASKS, min_size=1, max_size=4), atomic=st.booleans(), request=st.sampled_from([*[""] * 5, "r1"])
    )
    def enqueue(self, tasks: list[NewTask], atomic: bool, request: str) -> None:  # noqa: FBT001 - hypothesis passes by name
        asked = Enqueue(tuple(tasks), atomic, request, repr(tasks).encode())
        results = self.all(lambda b: b.queue.enqueue(asked))
        if not isinstance(results, RetinueError):
            self.known += [r.task_id for r in results if r.error is None]

    @rule(
        queue_id=QUEUES,
        count=st.integers(1, 3),
        lease_ms=st.sampled_from([None, SECOND]),
        request=st.sampled_from([*[""] * 5, "l"]),
    )
    def lease(self, queue_id: str, count: int, lease_ms: int | None, request: str) -> None:
        ask = LeaseAsk(queue_id, "w", count, lease_ms, request)
        answers = self.each(lambda b: b.queue.lease(ask))
        for (task, *_), *others in zip(*answers, strict=True):
            ref = LeaseRef.of(task.row)
            for bench, other in zip(self.benches, ((task,), *others), strict=True):
                self.own[bench, ref] = LeaseRef.of(other[0].row)
            assert ref in self.leases or task.row.lease_epoch > self.epochs[task.row.seq]
            assert task.row.seq not in self.completed, "a completed task is never leased again"
            self.epochs[task.row.seq] = task.row.lease_epoch
            self.leases.append(ref)

    @rule(data=st.data(), follow_ups=st.lists(TASKS, max_size=2))
    def complete(self, data: st.DataObject, follow_ups: list[NewTask]) -> None:
        if not self.leases:
            return
        ref = data.draw(st.sampled_from(self.leases))
        settled = self.all(lambda b: b.end(Complete(self.own[b, ref], b"out", "", tuple(follow_ups))))
        if settled.error is None:
            assert self.completed.setdefault(ref.seq, ref) == ref, "at most one accepted completion"
            self.known += settled.follow_ups

    @rule(data=st.data(), final=st.booleans())
    def fail(self, data: st.DataObject, final: bool) -> None:  # noqa: FBT001 - hypothesis passes by name
        if self.leases:
            ref = data.draw(st.sampled_from(self.leases))
            self.all(lambda b: b.end(Fail(self.own[b, ref], Failure("R", "m"), final)))

    @rule(data=st.data(), delay_ms=st.sampled_from([0, 0, 0, 3 * SECOND]))
    def release(self, data: st.DataObject, delay_ms: int) -> None:
        if self.leases:
            ref = data.draw(st.sampled_from(self.leases[-3:]))
            self.all(lambda b: b.end(Release(self.own[b, ref], delay_ms)))

    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        if self.leases:
            ref = data.draw(st.sampled_from(self.leases))
            self.all(lambda b: b.queue.extend([Extend(self.own[b, ref])]))

    @rule(ms=st.sampled_from([1, SECOND, SECOND, 10 * SECOND, 31 * SECOND]), swept=st.booleans())
    def time_passes(self, ms: int, swept: bool) -> None:  # noqa: FBT001 - hypothesis passes by name
        for bench in self.benches:
            bench.clock.advance(ms)
        if swept:
            self.all(lambda b: b.queue.sweep())

    @rule()
    def restart(self) -> None:
        for bench in self.benches:
            bench.clock.lease_ms = 1_000
        self.all(lambda b: b.queue.recover())

    @rule(data=st.data(), verb=st.sampled_from(["cancel", "redrive", "redrive", "delete"]), dry=st.booleans())
    def operate(self, data: st.DataObject, verb: str, dry: bool) -> None:  # noqa: FBT001 - hypothesis passes by name
        by_id: bool = data.draw(st.booleans())
        if self.known and by_id:
            asked = Selection((data.draw(st.sampled_from(self.known)), "none"), dry_run=dry)
        else:
            wanted = TaskFilter(
                queue_id=data.draw(st.sampled_from(["q", "r", "r"])),
                labels=data.draw(st.sampled_from([{}, {"a": "1"}])),
            )
            asked = Selection(wanted=wanted, max_count=2, dry_run=dry)
        self.all(lambda b: getattr(b.queue, verb)(asked))

    @rule(data=st.data(), delay_ms=st.sampled_from([None, 0, 5 * SECOND]), priority=st.sampled_from([None, 3]))
    def reschedule(self, data: st.DataObject, delay_ms: int | None, priority: int | None) -> None:
        if self.known:
            task_id = data.draw(st.sampled_from(self.known))
            self.all(lambda b: b.queue.reschedule(Reschedule(task_id, None, delay_ms, priority)))

    @rule(queue_id=QUEUES, state=st.sampled_from([*[QueueState.ACTIVE] * 6, QueueState.PAUSED, QueueState.DRAINING]))
    def queue_state(self, queue_id: str, state: QueueState) -> None:
        self.all(lambda b: b.queue.set_queue_state(queue_id, state))

    @rule(queue_id=st.just("r"), finished=st.booleans())
    def purge(self, queue_id: str, finished: bool) -> None:  # noqa: FBT001 - hypothesis passes by name
        self.all(lambda b: b.queue.purge(queue_id, include_finished=finished))

    @invariant()
    def the_store_is_as_the_counts_say(self) -> None:
        page, _ = self.all(lambda b: b.queue.page(TaskFilter(), None, 500))
        reports = self.all(lambda b: b.queue.reports([]))
        counts = Counter((task.row.queue_id, task.row.state) for task in page)
        told = {(r.queue.queue_id, state): n for r in reports for state, n in r.counts.items() if n}
        assert told == dict(counts)

    @invariant()
    def rows_are_in_order(self) -> None:
        for row, _ in self.all(lambda b: b.queue.page(TaskFilter(), None, 500))[0]:
            assert row.attempt >= 0
            assert (row.lease_until is not None) == (row.state == State.LEASED)
            assert (row.end_ms is not None) == (
                row.state in (State.SUCCEEDED, State.DEAD, State.CANCELLED, State.EXPIRED)
            )
            if row.seq in self.completed:
                assert row.state == State.SUCCEEDED
                assert row.lease_epoch == self.completed[row.seq].epoch


def plain(answer: Any) -> Any:
    """An answer with errors as values and without seq, so that two can be compared."""
    if isinstance(answer, TaskRow):
        return replace(answer, seq=0)
    if isinstance(answer, RetinueError):
        return type(answer).__name__, answer.reason, answer.message, answer.metadata
    if isinstance(answer, Struct):
        return plain(astuple(answer))
    if isinstance(answer, (list, tuple)):
        return [plain(item) for item in answer]
    if isinstance(answer, dict):
        return {key: plain(item) for key, item in answer.items()}
    return answer
