"""The work queue's use cases: each checks what is asked, runs one step and tells who waits."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from retinue_server.runtime.errors import NotFound, Reason, Violation
from retinue_server.workqueue.core import limits, rules, steps
from retinue_server.workqueue.core.events import ENDS, STARTS, EventRing, EventType, Ledger, Noted
from retinue_server.workqueue.core.requests import (
    Complete,
    Enqueue,
    Extend,
    LeaseAsk,
    LeaseRef,
    Release,
    Reschedule,
    Selection,
    SettingsPatch,
    Settlement,
)
from retinue_server.workqueue.core.waiting import Alarm, Patience, Waiters
from retinue_server.workqueue.engine import (
    FINISHED,
    BlobStore,
    Engine,
    Instant,
    QueueRow,
    QueueSettings,
    QueueState,
    QueueTotals,
    Room,
    State,
    Task,
    TaskFilter,
    Transaction,
    View,
)

T = TypeVar("T")

Found = Sequence[Violation]
"""What the translation from the wire has found wrong already, to be told together with what the limits find."""


def read_clocks() -> Instant:
    """Wall time, and the boot clock: it counts suspended time and never steps."""
    return Instant(time.time_ns() // 1_000_000, time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000)


def make_ids(count: int, now_ms: int) -> list[str]:
    """Task ids that sort by time: 12 hexadecimal digits of milliseconds and 16 of chance."""
    chance = os.urandom(8 * count).hex()
    prefix = f"{now_ms:012x}"
    return [prefix + chance[i : i + 16] for i in range(0, 16 * count, 16)]


def _bits(count: int) -> int:
    """So many bits of the system's randomness, 64 at most."""
    return int.from_bytes(os.urandom(8)) >> (64 - count)


COUNT_INTERVAL_S = 5.0


class Chance(Struct, frozen=True):
    """Where ids, token nonces and jitter come from; tests give their own."""

    ids: Callable[[int, int], list[str]] = make_ids
    nonce: Callable[[], int] = lambda: _bits(62)
    jitter: Callable[[], float] = lambda: _bits(53) * 2.0**-53
    """At least 0 and less than 1."""


_CHANCE = Chance()


class QueueReport(Struct, frozen=True):
    """What statistics tell of a queue."""

    queue: QueueRow
    counts: dict[State, int]
    totals: QueueTotals


class WorkQueue:
    """All queues of one server."""

    def __init__(
        self,
        engine: Engine,
        blobs: BlobStore,
        *,
        clock: Callable[[], Instant] = read_clocks,
        chance: Chance = _CHANCE,
        strict_queues: bool = False,
        drain_ms: int = 10_000,
    ) -> None:
        self.engine = engine
        self.blobs = blobs
        self.events = EventRing()
        self.strict_queues = strict_queues
        self.drain_ms = drain_ms
        self.stopped = asyncio.Event()
        """Set by `quiesce`: the server is stopping."""
        self._clock, self._chance = clock, chance
        self._ready: Waiters[str] = Waiters()
        self._ended: Waiters[str] = Waiters()
        self.happened: Counter[tuple[str, EventType]] = Counter()
        """Events by queue since the start, for metrics."""
        self.counted: list[QueueReport] = []
        """All queues as they were counted last, a few seconds ago at most, for metrics."""
        self.rooms: dict[str, Room] = {}
        """What was left for tasks and blobs then, where that is known."""
        self._count_again = 0.0
        self._alarm = Alarm()
        self._background: set[asyncio.Future[Any]] = set()

    def now(self) -> Instant:
        """Now, on both clocks."""
        return self._clock()

    @property
    def stopping(self) -> bool:
        """Whether nothing is leased any more."""
        return self.stopped.is_set()

    # Producers

    async def enqueue(self, asked: Enqueue, found: Found = ()) -> list[steps.Enqueued]:
        """Takes tasks in; see EnqueueTasks."""
        limits.refuse("enqueue", [*found, *limits.enqueue(asked, self.now().wall_ms)])
        lacking = await self._lacking(task.body.input_blob for task in asked.tasks)
        ids = self._chance.ids(len(asked.tasks), self.now().wall_ms)
        return await self._write(lambda tx, ctx: steps.enqueue(tx, asked, ids, lacking, ctx))

    async def get(self, task_id: str) -> Task:
        """One task, whole."""
        limits.refuse("find the task", list(limits.task_id(task_id)))

        def query(view: View) -> Task | None:
            row = view.by_id([task_id]).get(task_id)
            return Task(row, view.bodies([row.seq])[row.seq]) if row else None

        task = await self.engine.read(query)
        if task is None:
            raise steps.task_not_found(task_id)
        return task

    async def page(
        self, wanted: TaskFilter, before_seq: int | None, page_size: int, found: Found = ()
    ) -> tuple[list[Task], bool]:
        """Matching tasks below `before_seq`, newest first, and whether there are more."""
        limits.refuse("list tasks", [*found, *limits.task_filter(wanted), *limits.page_size(page_size)])
        size = page_size or limits.DEFAULT_PAGE
        tasks = await self.engine.read(lambda view: view.page(wanted, before_seq, size + 1))
        return tasks[:size], len(tasks) > size

    async def wait(self, task_id: str, wait_ms: int, time_left_ms: int | None = None, found: Found = ()) -> Task:
        """The task once it has ended, or as it stands after the wait."""
        limits.refuse("wait", [*found, *limits.task_id(task_id), *limits.wait(wait_ms)])
        patience = Patience(limits.reply_in_time(wait_ms, time_left_ms))
        with self._ended.waiting(task_id) as woken:
            task = await self.get(task_id)
            while task.row.state not in FINISHED and not self.stopping and await patience.until(woken):
                task = await self.get(task_id)
        return task

    async def cancel(self, asked: Selection, found: Found = ()) -> steps.Selected:
        """Ends tasks that are not finished; see CancelTasks."""
        limits.refuse("cancel", [*found, *limits.selection(asked)])
        return await self._write(lambda tx, ctx: steps.cancel(tx, asked, ctx))

    async def reschedule(self, asked: Reschedule, found: Found = ()) -> Task:
        """Gives a waiting task another time or priority."""
        limits.refuse("reschedule", [*found, *limits.reschedule(asked, self.now().wall_ms)])
        row = await self._write(lambda tx, ctx: steps.reschedule(tx, asked, ctx))
        return await self.get(row.task_id)

    # Workers

    async def lease(
        self, asked: LeaseAsk, wait_ms: int = 0, time_left_ms: int | None = None, found: Found = ()
    ) -> list[steps.Granted]:
        """Ready tasks, waiting for the first; see LeaseTasks."""
        limits.refuse("lease", [*found, *limits.lease(asked), *limits.wait(wait_ms)])
        patience = Patience(limits.reply_in_time(wait_ms, time_left_ms))
        with self._ready.waiting(asked.queue_id) as woken:
            leased = await self.try_lease(asked)
            while not leased and not self.stopping and await patience.until(woken):
                leased = await self.try_lease(asked)
        return leased

    async def try_lease(self, asked: LeaseAsk) -> list[steps.Granted]:
        """Ready tasks, or none.

        Leases that a cancelled caller can't take go back at once, unless it named its request: then it may be repeating
        it already, and these leases are the answer.
        """
        if self.stopping:
            return []
        nonce = self._chance.nonce()
        back = _keep if asked.request_id else self._give_back
        leased = await self._write(lambda tx, ctx: steps.lease(tx, asked, nonce, ctx), unheard=back)
        if len(leased) == asked.max_tasks:
            self._ready.wake(asked.queue_id, 1)
        return leased

    def waiting_for_work(self, queue_id: str) -> AbstractContextManager[asyncio.Event]:
        """A context whose event is set when the queue may have something (the stream's way to wait)."""
        return self._ready.waiting(queue_id)

    def _give_back(self, granted: list[steps.Granted]) -> None:
        if granted:
            self._see_through(asyncio.ensure_future(self.give_back(granted)))

    async def give_back(self, granted: Sequence[steps.Granted]) -> None:
        """Releases leases whose answer can't be delivered."""
        back = [Release(LeaseRef.of(task.row)) for task, *_ in granted]
        await self._write(lambda tx, ctx: steps.settle(tx, back, (), {}, ctx))

    async def extend(self, asked: Sequence[Extend], found: Found = ()) -> list[steps.Extended]:
        """Makes leases last longer; see ExtendLeases."""
        limits.refuse("extend", [*found, *limits.extend(asked)])
        return await self._write(lambda tx, ctx: steps.extend(tx, asked, ctx))

    async def settle(self, asked: Sequence[Settlement], found: Found = ()) -> list[steps.Settled]:
        """Ends leases; see CompleteTasks, FailTasks, ReleaseTasks."""
        limits.refuse("settle", [*found, *limits.settle(asked, self.now().wall_ms)])
        rich = [item for item in asked if isinstance(item, Complete) and (item.follow_ups or item.result_blob)]
        follow_ups = [task for item in rich for task in item.follow_ups]
        ids = self._chance.ids(len(follow_ups), self.now().wall_ms) if follow_ups else ()
        blobs = (*(item.result_blob for item in rich), *(task.body.input_blob for task in follow_ups))
        lacking = await self._lacking(blobs)
        return await self._write(lambda tx, ctx: steps.settle(tx, asked, ids, lacking, ctx))

    # Operators

    async def create_queue(self, queue_id: str, patch: SettingsPatch, found: Found = ()) -> QueueRow:
        """Makes a queue."""
        limits.refuse("create the queue", [*found, *limits.queue_id(queue_id), *limits.settings(patch)])
        queue = QueueRow(queue_id, QueueState.ACTIVE, patched(QueueSettings(), patch), self.now().wall_ms)
        return await self._write(lambda tx, _: steps.create_queue(tx, queue))

    async def update_queue(self, queue_id: str, patch: SettingsPatch, found: Found = ()) -> QueueRow:
        """Changes the settings that are named."""
        limits.refuse("update the queue", [*found, *limits.queue_id(queue_id), *limits.settings(patch)])
        return await self._write(
            lambda tx, _: steps.change_queue(tx, queue_id, lambda q: replace(q, settings=patched(q.settings, patch)))
        )

    async def set_queue_state(self, queue_id: str, state: QueueState) -> QueueRow:
        """Pauses, drains or resumes."""
        limits.refuse("change the queue", list(limits.queue_id(queue_id)))
        queue = await self._write(lambda tx, _: steps.change_queue(tx, queue_id, lambda q: replace(q, state=state)))
        self._ready.wake_all()
        return queue

    async def delete_queue(self, queue_id: str, *, force: bool) -> int:
        """Removes a queue; how many tasks went with it."""
        limits.refuse("delete the queue", list(limits.queue_id(queue_id)))
        purged = await self.purge(queue_id, include_finished=True) if force else 0
        return purged + await self._write(lambda tx, ctx: steps.delete_queue(tx, queue_id, force=force, ctx=ctx))

    async def purge(self, queue_id: str, *, include_finished: bool) -> int:
        """Deletes the queue's tasks that no worker has, in steps; how many."""
        limits.refuse("purge the queue", list(limits.queue_id(queue_id)))
        total = 0
        while count := await self._write(
            lambda tx, ctx: steps.purge(tx, queue_id, include_finished=include_finished, ctx=ctx)
        ):
            total += count
        return total

    async def redrive(self, asked: Selection, found: Found = ()) -> steps.Selected:
        """Makes dead, cancelled and expired tasks ready again."""
        limits.refuse("redrive", [*found, *limits.selection(asked)])
        return await self._write(lambda tx, ctx: steps.redrive(tx, asked, ctx))

    async def delete(self, asked: Selection, found: Found = ()) -> steps.Selected:
        """Removes tasks that no worker has."""
        limits.refuse("delete", [*found, *limits.selection(asked)])
        return await self._write(lambda tx, ctx: steps.delete(tx, asked, ctx))

    async def queue(self, queue_id: str) -> QueueRow:
        """One queue."""
        limits.refuse("find the queue", list(limits.queue_id(queue_id)))
        queue = await self.engine.read(lambda view: view.queue(queue_id))
        if queue is None:
            raise steps.queue_not_found(queue_id)
        return queue

    async def queues(self, after: str, page_size: int, found: Found = ()) -> tuple[list[QueueRow], bool]:
        """Queues by name, and whether there are more."""
        limits.refuse("list queues", [*found, *limits.page_size(page_size)])
        size = page_size or limits.DEFAULT_PAGE
        queues = await self.engine.read(lambda view: view.queues(after, size + 1))
        return queues[:size], len(queues) > size

    async def reports(self, queue_ids: Sequence[str]) -> list[QueueReport]:
        """Statistics of these queues, or of all (500 at most)."""
        if len(queue_ids) > limits.MAX_PAGE:
            limits.refuse("count", list(limits.batch(len(queue_ids), "queue_ids", limits.MAX_PAGE)))
        limits.refuse("count", [v for i, q in enumerate(queue_ids) for v in limits.queue_id(q, f"queue_ids[{i}]")])

        def query(view: View) -> list[QueueReport]:
            queues = [steps.require_queue(view, q) for q in queue_ids] or view.queues("", limits.MAX_PAGE)
            return [QueueReport(q, view.counts(q.queue_id), view.totals(q.queue_id)) for q in queues]

        return await self.engine.read(query)

    async def count(self) -> None:
        """Counts all queues, and the room for more, for metrics, if the last time was not just now."""
        clock = asyncio.get_running_loop().time
        began = clock()
        if began >= self._count_again:
            self.counted = await self.reports([])
            rooms = {"tasks": self.engine.room(), "blobs": await self.blobs.room()}
            self.rooms = {what: room for what, room in rooms.items() if room is not None}
            self._count_again = clock() + max(COUNT_INTERVAL_S, 20 * (clock() - began))

    # Time

    async def recover(self) -> None:
        """At start, before anything is served: gives live leases one full term, unless their clock went on."""
        after: int | None = None if self.engine.capabilities.own_clock else 0
        while after is not None:
            after = await self._write(partial(steps.recover, after_seq=after))

    async def sweep(self) -> None:
        """Does what time has brought."""
        self._alarm.clear()
        while await self._write(steps.sweep):
            pass
        self._alarm.set(await self._write(lambda tx, _: tx.next_times()))

    async def sweep_is_due(self) -> None:
        """Returns when there is something to sweep, or after a while."""
        await self._alarm.rings(self.now)

    async def collect_blobs(self, age_ms: int) -> int:
        """Removes blobs that were idle for so long and that no task refers to; how many."""
        idle = await self.blobs.idle(age_ms, 1_000)
        used = await self.engine.read(lambda view: view.referenced(idle))
        doomed = [blob_id for blob_id in idle if blob_id not in used]
        for blob_id in doomed:
            await self.blobs.delete(blob_id, age_ms)
        return len(doomed)

    async def quiesce(self) -> None:
        """Ends every wait, so that the server can stop; nothing is leased any more."""
        self.stopped.set()
        self._ready.wake_all()
        self._ended.wake_all()
        self.events.close()

    # Other coordinators

    def hear_ready(self, queue_id: str, count: int) -> None:
        """Another coordinator made tasks ready."""
        self._ready.wake(queue_id, count)

    async def look_again(self) -> None:
        """Finds, for those who wait, what others did and no news told."""
        if not self.engine.capabilities.many_coordinators:
            return
        for queue_id in self._ready.waited_for():
            self._ready.wake(queue_id, 1)
        if waited := self._ended.waited_for():
            rows = await self.engine.read(lambda view: view.by_id(waited))
            for task_id in waited:
                if task_id not in rows or rows[task_id].state in FINISHED:
                    self._ended.wake(task_id, 1 << 30)

    # Shared

    async def _write(
        self, step: Callable[[Transaction, steps.Context], T], *, unheard: Callable[[T], None] = lambda _: None
    ) -> T:
        """Runs a step and, once it is durable, publishes what it did.

        A caller that is cancelled changes nothing of that: the step takes effect, and who waits for it must be told;
        `unheard` then gets the answer.
        """

        def run(tx: Transaction) -> tuple[T, list[Noted]]:
            now = tx.now() or self.now()
            ctx = steps.Context(now, Ledger(now.wall_ms), self._chance.jitter, self.strict_queues)
            return step(tx, ctx), ctx.ledger.events

        def publish(written: tuple[T, list[Noted]]) -> T:
            self._publish(written[1])
            return written[0]

        writing = asyncio.ensure_future(self.engine.write(run))
        try:
            written = await asyncio.shield(writing)
        except asyncio.CancelledError:
            self._see_through(writing, lambda written: unheard(publish(written)))
            raise
        return publish(written)

    def _see_through(self, work: asyncio.Future[T], then: Callable[[T], None] = lambda _: None) -> None:
        """Lets work end that nobody awaits; its errors were for the caller who went."""

        def ended(work: asyncio.Future[T]) -> None:
            self._background.discard(work)
            if not work.cancelled() and work.exception() is None:
                then(work.result())

        self._background.add(work)
        work.add_done_callback(ended)

    def _publish(self, events: list[Noted]) -> None:
        self.events.publish(events)
        self._alarm.note([row for _, row, _ in events])
        if self._ended:
            for kind, row, _ in events:
                if kind in ENDS:
                    self._ended.wake(row.task_id, 1 << 30)
        alike = Counter([(row.queue_id, kind, row.state) for kind, row, _ in events])
        for (queue_id, kind, state), count in alike.items():
            self.happened[queue_id, kind] += count
            if state is State.READY and kind in STARTS:
                self._ready.wake(queue_id, count)

    async def _lacking(self, blob_ids: Iterable[str]) -> steps.Lacking:
        """Those of the blobs that are not there; the others live on for a while."""
        asked = {blob_id for blob_id in blob_ids if blob_id}
        return {blob_id: blob_not_found(blob_id) for blob_id in asked if await self.blobs.stat(blob_id) is None}


def _keep(_: list[steps.Granted]) -> None:
    """What is done with leases that may be asked for again."""


def patched(settings: QueueSettings, patch: SettingsPatch) -> QueueSettings:
    """The settings with those that the patch names."""
    said = {name: value for name in patch.__struct_fields__ if (value := getattr(patch, name)) is not None}
    if patch.retry is not None:
        said["retry"] = rules.effective_retry(settings.retry, patch.retry)
    return replace(settings, **said)


def blob_not_found(blob_id: str) -> NotFound:
    """BLOB_NOT_FOUND."""
    return NotFound(f"cannot find blob {blob_id}: upload it first", reason=Reason.BLOB_NOT_FOUND, blob_id=blob_id)
