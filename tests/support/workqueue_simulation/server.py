"""The coordinator in a simulated world: one incarnation after the other of the real WorkQueue and its sweeper."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from retinue_server.runtime.errors import RetinueError, Unavailable
from retinue_server.workqueue.core import queue as core
from retinue_server.workqueue.core.requests import LeaseAsk
from retinue_server.workqueue.core.steps import Granted
from retinue_server.workqueue.engine import Instant
from retinue_server.workqueue.sweeper import Sweeper
from support.simulation.chance import Chance
from support.simulation.clocks import BootClock, WallClock
from support.simulation.loop import Node, SimulatedLoop
from support.simulation.network import Network
from support.simulation.records import History
from support.workqueue_core import NoBlobs
from support.workqueue_simulation.engine import CrashPlan, Disk, Latency, SimulatedEngine
from support.workqueue_simulation.history import Booted, Ended, Resumed, Serving, Stalled

BLOB_IDLE_MS = 3_600_000
_DRAIN = 100
"""How often a server that stops looks whether all is answered."""


@dataclass(frozen=True)
class Parts:
    """What a server is made of; a broken variant has another."""

    engine: Callable[..., SimulatedEngine] = SimulatedEngine
    queue: Callable[..., core.WorkQueue] = core.WorkQueue
    sweeper: Callable[[core.WorkQueue, int], Sweeper] = Sweeper


@dataclass
class World:
    """What every part of a simulated world can reach."""

    loop: SimulatedLoop
    chance: Chance
    history: History
    network: Network
    wall: WallClock
    disk: Disk
    parts: Parts
    latency: Latency = field(default_factory=Latency)
    task_ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    haste: float = 0.0
    """That a caller has hardly any time for a call."""
    quiet: bool = False
    """Little happens, so that nothing makes good what was forgotten: few tasks, patient workers, hasty producers."""
    calm: bool = False
    """Faults have stopped."""


class Server:
    """A process that serves the queue: `node`, until it crashes."""

    def __init__(self, world: World, number: int, zero_ms: int, plan: CrashPlan, died: Callable[[], None]) -> None:
        self.node = Node(world.loop, f"server{number}")
        self._world, self._died = world, died
        self._boot = BootClock(world.loop.time, zero_ms)
        self.plan = plan
        self._engine: SimulatedEngine | None = None
        self._serving = False
        self.queue: core.WorkQueue

    def now(self) -> Instant:
        """Both clocks."""
        return Instant(self._world.wall.now_ms(), self._boot.now_ms())

    def boot(self) -> None:
        """Starts."""
        self._world.history.add(Booted(self._world.loop.time(), self.node.name, self._boot.zero_ms))
        self.node.spawn(self._run())

    async def _run(self) -> None:
        """As wiring.py puts it together; serves once the sweeper has recovered the leases."""
        world, chance = self._world, self._world.chance
        self._engine = engine = world.parts.engine(
            world.disk, chance, world.history, self.now, world.latency, self.plan, self.crash, self.node.name
        )
        luck = core.Chance(self._make_ids, lambda: chance.bits(62), chance.fraction)
        self.queue = world.parts.queue(engine, NoBlobs(), clock=self.now, chance=luck)
        await engine.start()
        self._sweeper = world.parts.sweeper(self.queue, BLOB_IDLE_MS)
        try:
            await self._sweeper.start()
        except RetinueError as error:  # a process that can't start ends, and is started again
            self.crash(str(error))
            return
        world.history.add(Serving(world.loop.time(), self.node.name))
        self._serving = True
        world.network.host(self)

    def _make_ids(self, count: int, now_ms: int) -> list[str]:
        return [f"t{next(self._world.task_ids)}" for _ in range(count)]

    async def serve(self, verb: str, args: tuple[Any, ...]) -> Any:
        """A call, as service.py makes it."""
        if self.queue.stopping:
            raise Unavailable("the server is stopping", retry_ms=500)
        if verb == "stream":
            return await self._grant(*args)
        return await getattr(self.queue, verb)(*args)

    async def _grant(self, ask: LeaseAsk) -> list[Granted]:
        """The first leases of a stream, however long they take, by the same calls of the core as stream.py."""
        while not self.queue.stopping:
            with self.queue.waiting_for_work(ask.queue_id) as woken:
                granted = await self.queue.try_lease(ask)
                if granted:
                    return granted
                if not self.queue.stopping:
                    await woken.wait()
                    woken.clear()
        return []

    def crash(self, why: str) -> None:
        """SIGKILL, and the power is lost with it."""
        if self.node.dead:
            return
        world = self._world
        self.node.kill()
        survives = world.chance.happens(0.5)
        how = "; what was not synced " + ("survives" if survives else "is lost")
        unsynced = world.disk.crash(survives=survives)
        world.history.add(Ended(world.loop.time(), self.node.name, f"crash: {why}{how if unsynced else ''}"))
        self._gone()

    async def stop(self) -> None:
        """SIGTERM: waits end, what is under way is answered, then the process ends."""
        await self.queue.quiesce()
        for _ in range(_DRAIN):
            if not self._world.network.busy:
                break
            await asyncio.sleep(0.01)
        await self._sweeper.stop()
        if self._engine is not None:
            await self._engine.stop()
        self._world.history.add(Ended(self._world.loop.time(), self.node.name, "stopped"))
        self.node.kill()
        self._gone()

    def _gone(self) -> None:
        self._world.network.host(None)
        self._world.network.reset_server(self.node)
        self._died()

    @property
    def serving(self) -> bool:
        """Whether it takes calls."""
        return self._serving and not self.node.dead and not self.queue.stopping

    def disk_is(self, latency: Latency) -> None:
        """From now on the disk is that fast."""
        if self._engine is not None:
            self._engine.latency = latency

    def no_crash(self) -> None:
        """What was planned does not happen."""
        self.plan.point = ""

    def stall(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        self.node.stall()
        self._world.history.add(Stalled(self._world.loop.time(), self.node.name))
        self._world.loop.outside(seconds, self._resume)

    def _resume(self) -> None:
        if not self.node.dead:
            self._world.history.add(Resumed(self._world.loop.time(), self.node.name))
            self.node.resume()
