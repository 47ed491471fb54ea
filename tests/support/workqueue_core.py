"""A work queue core under a clock and a chance that the test holds; for tests of rules and engines."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from retinue_server.workqueue.core.queue import Chance, WorkQueue
from retinue_server.workqueue.core.requests import Complete, Enqueue, Fail, LeaseAsk, LeaseRef, NewTask, Release
from retinue_server.workqueue.engine import BlobStat, Failure, Instant, Task

if TYPE_CHECKING:
    from retinue_server.workqueue.core import steps
    from retinue_server.workqueue.core.requests import Settlement
    from retinue_server.workqueue.engine import BlobWriter, Engine

SECOND = 1_000
START_MS = 1_700_000_000_000


@dataclass
class Clock:
    """Both clocks, moved by hand."""

    wall_ms: int = START_MS
    lease_ms: int = 5_000

    def __call__(self) -> Instant:
        return Instant(self.wall_ms, self.lease_ms)

    def advance(self, ms: int) -> None:
        """Both go on together."""
        self.wall_ms += ms
        self.lease_ms += ms


@dataclass
class Luck:
    """Ids and nonces count up; the jitter is what the test says."""

    jitter: float = 1.0
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _nonces: itertools.count[int] = field(default_factory=lambda: itertools.count(1000))

    def chance(self) -> Chance:
        return Chance(
            ids=lambda count, _: [f"t{next(self._ids)}" for _ in range(count)],
            nonce=lambda: next(self._nonces),
            jitter=lambda: self.jitter,
        )


class NoBlobs:
    """A blob store that has whatever is asked for and keeps nothing."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def upload(self) -> BlobWriter:
        raise NotImplementedError

    async def stat(self, blob_id: str) -> BlobStat | None:
        return None if blob_id == "0" * 64 else BlobStat(blob_id, 1, 0)

    async def read(self, blob_id: str, offset: int, size: int) -> bytes:
        return b""

    async def idle(self, age_ms: int, limit: int) -> list[str]:
        return []

    async def delete(self, blob_id: str, age_ms: int) -> None: ...

    async def room(self) -> None: ...


class Bench:
    """A queue with short words for what tests do most."""

    def __init__(self, engine: Engine, *, strict: bool = False) -> None:
        self.clock, self.luck = Clock(), Luck()
        self.queue = WorkQueue(engine, NoBlobs(), clock=self.clock, chance=self.luck.chance(), strict_queues=strict)

    async def put(self, *tasks: NewTask) -> list[str]:
        """Enqueues; the ids."""
        results = await self.queue.enqueue(Enqueue(tasks or (NewTask("q"),)))
        assert all(r.error is None for r in results), results
        return [r.task_id for r in results]

    async def take(self, count: int = 1, queue_id: str = "q", lease_ms: int | None = None) -> list[steps.Granted]:
        """Leases what is ready."""
        return await self.queue.lease(LeaseAsk(queue_id, "w", count, lease_ms))

    async def take_one(self, lease_ms: int | None = None) -> LeaseRef:
        """Leases the next task."""
        return LeaseRef.of((await self.take(1, lease_ms=lease_ms))[0].task.row)

    async def end(self, item: Settlement) -> steps.Settled:
        """Settles one lease."""
        return (await self.queue.settle([item]))[0]

    async def complete(self, lease: LeaseRef, *follow_ups: NewTask) -> steps.Settled:
        return await self.end(Complete(lease, b"", "", follow_ups))

    async def fail(self, lease: LeaseRef, *, final: bool = False, delay_ms: int | None = None) -> steps.Settled:
        return await self.end(Fail(lease, Failure("WHY", "because"), final, delay_ms))

    async def release(self, lease: LeaseRef, delay_ms: int = 0) -> steps.Settled:
        return await self.end(Release(lease, delay_ms))

    async def pass_time(self, ms: int) -> None:
        """Time passes, and what it brings is done."""
        self.clock.advance(ms)
        await self.queue.sweep()

    async def get(self, task_id: str) -> Task:
        return await self.queue.get(task_id)
