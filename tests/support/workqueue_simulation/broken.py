"""Broken variants of the work queue, each with the claim that it breaks: what the simulation must find."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import msgspec
from msgspec.structs import replace

from retinue_server.workqueue.core import rules, steps
from retinue_server.workqueue.core.queue import WorkQueue
from retinue_server.workqueue.core.requests import Complete, Enqueue, Settlement
from retinue_server.workqueue.core.waiting import Waiters
from retinue_server.workqueue.engine import Instant, State, TaskRow
from retinue_server.workqueue.sweeper import Sweeper
from support.workqueue_simulation import model
from support.workqueue_simulation.engine import SimulatedEngine
from support.workqueue_simulation.server import Parts


class Broken(NamedTuple):
    """A variant: other parts, or the core with something else in its place."""

    name: str
    claim: str
    parts: Parts = Parts()
    patches: tuple[tuple[Any, str, Any], ...] = ()
    shows: int = 0
    """A seed by which it showed; those from here on are played first."""

    def in_place(self) -> AbstractContextManager[None]:
        """The breakage lasts for a `with`."""
        return _patched(self.patches)


@contextmanager
def _patched(patches: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    applied = [mock.patch.object(*patch) for patch in patches]
    for patch in applied:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(applied):
            patch.stop()


class HastyEngine(SimulatedEngine):
    """Answers before the sync."""

    async def _commit(self, group: Sequence[Any]) -> None:
        for job in group:
            job.answer()
        await super()._commit(group)


class ForgetfulQueue(WorkQueue):
    """Follow-ups and remembered requests in a commit of their own."""

    async def settle(self, asked: Sequence[Settlement], found: Any = ()) -> list[steps.Settled]:
        bare = [replace(item, follow_ups=()) if isinstance(item, Complete) else item for item in asked]
        results = await super().settle(bare, found)
        for item, result in zip(asked, results, strict=True):
            if isinstance(item, Complete) and item.follow_ups and result.error is None:
                await super().enqueue(Enqueue(item.follow_ups))
        return results


class TwoCommitsQueue(WorkQueue):
    """Remembers a request after the commit that took its tasks in."""

    async def enqueue(self, asked: Enqueue, found: Any = ()) -> list[steps.Enqueued]:
        known = await self.engine.read(lambda view: view.request(asked.request_id))  # type: ignore[attr-defined] # every store here can
        if known is not None:
            return await super().enqueue(asked, found)
        results = await super().enqueue(replace(asked, request_id=""), found)
        await self._write(lambda tx, ctx: _remember(tx, asked, results, ctx))
        return results


def _remember(tx: Any, asked: Enqueue, results: list[steps.Enqueued], ctx: steps.Context) -> None:
    reply = msgspec.json.encode([(r.task_id, r.existing, None) for r in results])
    tx.save_request(asked.request_id, asked.fingerprint, reply, ctx.now.wall_ms + steps.REQUEST_MEMORY_MS)


class CarelessSweeper(Sweeper):
    """Starts without recovering leases."""

    async def start(self) -> None:
        with mock.patch.object(self._queue, "recover", self._queue.count):
            await super().start()


def _refunded_twice(released: Callable[..., TaskRow]) -> Callable[..., TaskRow]:
    def twice(row: TaskRow, *rest: Any) -> TaskRow:
        after = released(row, *rest)
        return replace(after, attempt=after.attempt - 1) if after.attempt < row.attempt else after

    return twice


def _lapsed_uncounted(row: TaskRow, *rest: Any) -> Any:
    after, failure = _LAPSED(row, *rest)
    return replace(after, lease_expirations=row.lease_expirations), failure


_LAPSED = rules.lapsed


class MutteringQueue(WorkQueue):
    """Tells nobody what a cancelled caller wrote."""

    def _see_through(self, work: asyncio.Future[Any], then: Callable[[Any], None] = lambda _: None) -> None:
        work.add_done_callback(lambda work: work.cancelled() or work.exception())


@contextmanager
def _keeps_its_wake_up(self: Waiters[Any], key: Any) -> Iterator[asyncio.Event]:
    """A waiter that could not take what it was woken for lets nobody else know."""
    event = asyncio.Event()
    line = self._waiting.setdefault(key, deque())
    line.append(event)
    try:
        yield event
    finally:
        line.remove(event)
        if event.is_set():
            self.wake(key, 1)
        if not line and self._waiting.get(key) is line:
            del self._waiting[key]


def _any_latest(row: TaskRow | None, epoch: int, nonce: int) -> bool:
    return row is not None


def _leased_is_live(row: TaskRow, now: Instant) -> bool:
    return row.state == State.LEASED


BROKEN = (
    Broken("answers before the sync", model.DURABLE, Parts(engine=HastyEngine)),
    Broken("does not compare tokens", model.ONCE, patches=((rules, "holds", _any_latest),)),
    Broken("does not look at the time of a lease", model.ONCE, patches=((rules, "is_live", _leased_is_live),)),
    Broken("refunds an attempt twice", model.COUNTED, patches=((rules, "released", _refunded_twice(rules.released)),)),
    Broken("does not count expired leases", model.COUNTED, patches=((rules, "lapsed", _lapsed_uncounted),)),
    Broken("enqueues follow-ups in a second commit", model.FOLLOW_UPS, Parts(queue=ForgetfulQueue)),
    Broken("remembers requests in a second commit", model.REPLAYS, Parts(queue=TwoCommitsQueue)),
    Broken("forgets the requests of leases", model.REPLAYS, patches=((steps, "_live_leases", lambda *_: []),)),
    Broken("does not recover leases", model.EXPLAINED, Parts(sweeper=CarelessSweeper)),
    Broken("recovers leases as they were", model.EXPLAINED, patches=((rules, "recovered", lambda row, *_: row),)),
    Broken("never sweeps lapsed leases", model.ENDS, patches=((steps, "_sweep_lapsed", lambda *_: 0),)),
    Broken("wakes nobody", model.PROMPT, patches=((Waiters, "wake", lambda *_: None),)),
    Broken("tells nobody what a cancelled caller wrote", model.PROMPT, Parts(queue=MutteringQueue), shows=88),
    Broken(
        "drops a wake-up when a look fails",
        model.PROMPT,
        patches=((Waiters, "waiting", _keeps_its_wake_up),),
        shows=416,
    ),
)
