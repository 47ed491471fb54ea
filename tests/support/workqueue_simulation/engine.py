"""The Engine port on a simulated disk: group commit with a write and a sync, and a crash at every point between them.

The rows live in the memory engine's store. What a step changed is noted; a group's notes are written, then synced.
A crash keeps what was synced; of a group that was written and not synced it keeps all or nothing.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from retinue_server.runtime.errors import Reason, ResourceExhausted, RetinueError, Unavailable
from retinue_server.workqueue.engine import (
    Capabilities,
    Durability,
    Instant,
    QueueRow,
    State,
    Transaction,
    View,
)
from retinue_server.workqueue.engines import memory
from retinue_server.workqueue.engines.groups import GROUP, Step, answer
from support.simulation.chance import Chance
from support.simulation.records import History, Noted
from support.workqueue_simulation.history import REFUSED, Changed, QueueChanged

T = TypeVar("T")
_TABLES = ("_queues", "_rows", "_bodies", "_seqs", "_keys", "_requests")
_GONE: Any = object()

POINTS = ("before the step", "before the write", "before the sync", "before the answer", "after the answer")
"""Where a crash may be planned."""


class _Note(NamedTuple):
    """One entry of one table that a step set or removed."""

    table: str
    key: Any
    before: Any
    value: Any
    step: int
    now: Instant


class Store(memory._Store):
    """The memory engine's store, which also notes what each step changed."""

    def __init__(self, tables: dict[str, dict[Any, Any]] | None = None) -> None:
        super().__init__()
        for name in _TABLES:
            getattr(self, name).update(tables[name] if tables else {})
        self._names = {id(getattr(self, name)): name for name in _TABLES}
        self._next_seq = max(self._rows, default=0) + 1
        self._line_up()
        self.notes: list[_Note] = []
        self.step, self.begun = 0, Instant(0, 0)

    def _line_up(self) -> None:
        """Who is ready, in order: after a start, and after a group that took some of them was undone."""
        self._heaps.clear()
        for row in self._rows.values():
            if row.state == State.READY:
                heapq.heappush(self._heaps.setdefault(row.queue_id, []), memory._order(row))

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        mark = len(self.notes)
        try:
            with super().savepoint():
                yield
        except BaseException:
            del self.notes[mark:]
            self._line_up()
            raise

    def _set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        note = _Note(self._names[id(table)], key, table.get(key), value, self.step, self.begun)
        super()._set(table, key, value)
        self.notes.append(note)

    def _drop(self, table: dict[Any, Any], key: Any) -> None:
        note = _Note(self._names[id(table)], key, table.get(key), _GONE, self.step, self.begun)
        super()._drop(table, key)
        self.notes.append(note)


class Disk:
    """What outlives a crash."""

    def __init__(self, history: History, time: Callable[[], float]) -> None:
        self._history, self._time = history, time
        self.tables: dict[str, dict[Any, Any]] = {name: {} for name in _TABLES}
        self._written: list[_Note] = []
        self._writer = ""
        self._steps = itertools.count(1)
        self.view = memory._Store()
        """Reads what is durable."""
        for name, table in self.tables.items():
            setattr(self.view, name, table)

    def next_step(self) -> int:
        """Steps are numbered over all incarnations."""
        return next(self._steps)

    def write(self, notes: Sequence[_Note], writer: str) -> None:
        """Handed to the operating system; no more."""
        self._written, self._writer = list(notes), writer

    def sync(self) -> None:
        """What was written is durable."""
        written, self._written = self._written, []
        at = self._time()
        for note in written:
            table = self.tables[note.table]
            if note.value is _GONE:
                table.pop(note.key, None)
            else:
                table[note.key] = note.value
        for note in written:
            self._tell(note, at)

    def crash(self, *, survives: bool) -> bool:
        """Power is lost: what was not synced survives, or not. Whether there was anything."""
        unsynced = bool(self._written)
        if survives:
            self.sync()
        self._written = []
        return unsynced

    def _tell(self, note: _Note, at: float) -> None:
        if note.table == "_rows":
            after = None if note.value is _GONE else note.value
            body = self.tables["_bodies"].get(note.key) if note.before is None else None
            self._history.add(Changed(at, self._writer, note.step, note.now, note.before, after, body))
        elif note.table == "_queues":
            queue: QueueRow = note.before if note.value is _GONE else note.value
            self._history.add(QueueChanged(at, self._writer, note.step, queue))


@dataclass(frozen=True)
class Latency:
    """How long the disk takes, in seconds; `slow` is the probability that it takes `slow_s` instead."""

    write_s: float = 0.0
    sync_s: float = 0.004
    slow: float = 0.0
    slow_s: float = 0.3
    refuse: float = 0.0
    """That a group is refused: disk full, or out of reach."""


@dataclass
class CrashPlan:
    """Crash when a point has been passed so many times."""

    point: str = ""
    passes: int = 0

    def comes(self, point: str) -> bool:
        """Whether it is now."""
        if point != self.point:
            return False
        self.passes -= 1
        return self.passes == 0


class SimulatedEngine:
    """See the module. `crash` kills the server that this runs in."""

    capabilities = Capabilities("simulated", Durability.DISK)

    def __init__(  # noqa: PLR0917 - explicit constructors
        self,
        disk: Disk,
        chance: Chance,
        history: History,
        clock: Callable[[], Instant],
        latency: Latency,
        plan: CrashPlan,
        crash: Callable[[str], None],
        name: str,
    ) -> None:
        self._disk, self._chance, self._history, self._clock = disk, chance, history, clock
        self.latency, self._plan, self._crash, self._name = latency, plan, crash, name
        self._store = Store(disk.tables)
        self._steps: list[Step] = []
        self._news = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._writer = asyncio.create_task(self._write_groups())

    async def stop(self) -> None:
        """Writes what is still to be written."""
        while self._steps:
            await asyncio.sleep(0.01)

    async def write(self, step: Callable[[Transaction], T]) -> T:
        job = Step(step)
        self._steps.append(job)
        self._news.set()
        result: T = await asyncio.shield(job.done)
        return result

    def room(self) -> None:
        """Memory has no end here."""

    async def read(self, query: Callable[[View], T]) -> T:
        await asyncio.sleep(self._chance.among((0, 0, 0.001)))
        return query(self._disk.view)

    async def _write_groups(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._steps:
                await self._write_group()

    async def _write_group(self) -> None:
        await self._point("before the step")
        group = self._steps[:GROUP]
        try:
            with self._store.savepoint():
                self._run(group)
                self._refuse()
        except _Refused:
            full = self._chance.happens(0.5)
            for job in group:
                job.fail(_disk_full() if full else _unavailable())
        else:
            await self._commit(group)
        del self._steps[: len(group)]
        answer(group)
        if self._plan.comes("after the answer"):
            asyncio.get_running_loop().call_later(self._chance.between(0, 0.02), self._crash, "after the answer")

    def _run(self, group: Sequence[Step]) -> None:
        for job in group:
            self._store.step, self._store.begun = self._disk.next_step(), self._clock()
            job.run(self._store)
            if job.error is not None and not isinstance(job.error, RetinueError):
                raise job.error

    def _refuse(self) -> None:
        if not self._chance.happens(self.latency.refuse):
            return
        self._history.add(Noted(asyncio.get_running_loop().time(), self._name, REFUSED))
        raise _Refused

    async def _commit(self, group: Sequence[Step]) -> None:
        await self._point("before the write")
        notes, self._store.notes = self._store.notes, []
        await self._takes(self.latency.write_s)
        self._disk.write(notes, self._name)
        await self._point("before the sync")
        await self._takes(self.latency.sync_s)
        self._disk.sync()
        await self._point("before the answer")

    async def _takes(self, seconds: float) -> None:
        slow = self._chance.happens(self.latency.slow)
        await asyncio.sleep(self.latency.slow_s if slow else seconds)

    async def _point(self, point: str) -> None:
        if self._plan.comes(point):
            self._crash(point)
            await asyncio.sleep(0)  # never comes back: the node is dead


class _Refused(Exception):
    """A group that was not written."""


def _disk_full() -> RetinueError:
    return ResourceExhausted("cannot write: the disk is full", reason=Reason.DISK_FULL, retry_ms=1_000)


def _unavailable() -> RetinueError:
    return Unavailable("cannot write: try again", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=500)
