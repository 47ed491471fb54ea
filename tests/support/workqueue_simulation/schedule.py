"""One seed's world: what is in it, what goes wrong in it, and what the model says of its history."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import NamedTuple

from retinue_server.runtime.errors import RetinueError
from retinue_server.workqueue.core.requests import SettingsPatch
from retinue_server.workqueue.engine import FINISHED, QueueState, RetryOverrides
from support.simulation.chance import Chance
from support.simulation.clocks import WallClock
from support.simulation.loop import SimulatedLoop
from support.simulation.network import CALM, Network, Weather
from support.simulation.records import History, Noted
from support.workqueue_simulation.clients import Client, Conduct, Operator, Producer, Taste, Worker
from support.workqueue_simulation.engine import POINTS, CrashPlan, Disk, Latency
from support.workqueue_simulation.model import UNSEEN, Model, Violation
from support.workqueue_simulation.server import Parts, Server, World

CALM_S = 120.0
"""How long after the last fault all tasks must have ended: a dozen leases, backoffs and delays one after the other."""


class Verdict(NamedTuple):
    """What came of a schedule."""

    seed: int
    violations: list[Violation]
    history: History
    steps: int


def play(seed: int, parts: Parts | None = None) -> Verdict:
    """Runs one schedule; the same seed gives the same history."""
    schedule = Schedule(seed, parts or Parts())
    try:
        return schedule.play()
    finally:
        schedule.world.loop.close()


@dataclass(frozen=True)
class Plan:
    """What goes wrong in a schedule, and how often; each seed turns on its own choice."""

    until_s: float
    faults: tuple[str, ...]
    pause_s: float
    crash_points: float

    @classmethod
    def draw(cls, chance: Chance) -> Plan:
        """By chance."""
        faults = ("crash", "stop", "stall", "kill worker", "stall worker", "partition", "clock")
        return cls(
            chance.between(3, 8),
            tuple(name for name in faults if chance.happens(0.4)),
            chance.among((0.3, 1.0, 3.0)),
            chance.among((0.0, 0.7, 1.0)),
        )


class Schedule:
    """See the module."""

    def __init__(self, seed: int, parts: Parts) -> None:
        self.seed = seed
        self.chance = chance = Chance(seed)
        loop = SimulatedLoop(chance, shuffled=chance.happens(0.7))  # type: ignore[abstract] # no files, sockets, threads
        history = History()
        network = Network(loop, chance, history, RetinueError, CALM)
        disk = Disk(history, loop.time)
        self.world = World(loop, chance, history, network, WallClock(loop.time), disk, parts, Latency())
        self.world.quiet = chance.happens(0.2)
        self.plan = Plan.draw(chance)
        self._servers = 0
        self._zero_ms = chance.whole(1_000, 100_000)
        self._server: Server | None = None
        self._workers: list[Worker] = []
        self._producers: list[Producer] = []
        self._clients: list[Client] = []
        self._some_worker = 0

    def play(self) -> Verdict:
        """All of it."""
        loop = self.world.loop
        loop.create_task(self._conduct())
        ended = loop.run(self.plan.until_s + CALM_S)
        model = Model()
        for record in self.world.history.records:
            model.tell(record)
        model.finish(ended=ended)
        if error := loop.failure():
            model.broken(UNSEEN, repr(error))
        model.compare(self.world.disk.tables["_rows"])
        return Verdict(self.seed, model.violations, self.world.history, loop.steps)

    async def _conduct(self) -> None:
        self._boot()
        await self._begin()
        end = self.world.loop.time() + self.plan.until_s
        while (left := end - self.world.loop.time()) > 0:
            await asyncio.sleep(min(left, self.chance.between(0, 2 * self.plan.pause_s)))
            if self.plan.faults and left > 0:
                self._fault(self.chance.among(self.plan.faults))
        await self._calm()

    # The beginning

    async def _begin(self) -> None:
        """Queues first, in good weather; then everybody comes."""
        chance, world = self.chance, self.world
        operator = Operator(world, "boot", ())
        retry = RetryOverrides(chance.whole(2, 4), 100, 800)
        full = chance.among((0, 0, 4))
        await operator.node.spawn(self._make_queues(operator, retry, full))
        self._set_weather()
        self._populate()
        for client in self._clients:
            client.node.spawn(client.run())

    async def _make_queues(self, operator: Operator, retry: RetryOverrides, full: int) -> None:
        lease_ms = self.chance.among((1_000, 1_500, 2_500))
        await operator.call("create_queue", "q", SettingsPatch(lease_ms, 0, retry, 3, max_tasks=full), tries=1000)
        await operator.call("create_queue", "r", SettingsPatch(1_000, 1_200, retry, 2), tries=1000)

    def _set_weather(self) -> None:
        chance, world = self.chance, self.world

        def sometimes(most: float) -> float:
            return chance.between(0, most) if chance.happens(0.4) else 0.0

        world.network.weather = Weather(
            slow=sometimes(0.3),
            lose_request=sometimes(0.2),
            lose_reply=sometimes(0.3),
            duplicate=sometimes(0.3),
            half_open=sometimes(1.0),
        )
        world.haste = sometimes(0.5)
        world.latency = Latency(slow=sometimes(0.4), refuse=sometimes(0.3))
        if world.quiet:
            world.haste, world.latency = 0.5, Latency(slow=0.5, refuse=0.2)
        if self._server is not None:
            self._server.disk_is(world.latency)
            self._plan_crash(self._server.plan)

    def _populate(self) -> None:
        chance, world = self.chance, self.world

        def sometimes(most: float) -> float:
            return chance.between(0, most) if chance.happens(0.4) else 0.0

        batches = (1, 1) if world.quiet else (1, 4)
        taste = Taste(*(sometimes(0.6) for _ in range(7)))
        ways = ("fail", "final", "release", "vanish", "late", "long")
        weights = (("complete", 1.0), *((way, sometimes(0.6)) for way in ways))
        self._conduct_of_workers = Conduct(weights, sometimes(1.0), sometimes(0.5))
        for number in range(chance.whole(1, 2)):
            self._producers.append(Producer(world, f"producer{number}", taste, chance.whole(*batches)))
        self._clients += self._producers
        for queue_id in ("q", "r", *chance.among(((), ("q",), ("q", "r"), ("q", "q")))):
            self._clients.append(self._new_worker(queue_id))
        verbs = tuple(verb for verb in ("cancel", "redrive", "delete", "reschedule", "close") if chance.happens(0.35))
        if verbs:
            self._clients.append(Operator(world, "operator", verbs))

    def _new_worker(self, queue_id: str) -> Worker:
        self._some_worker += 1
        name = f"worker{self._some_worker}"
        worker = Worker(self.world, name, queue_id, self._conduct_of_workers, self.chance.whole(1, 3))
        self._workers.append(worker)
        return worker

    # Servers

    def _boot(self) -> None:
        plan = CrashPlan()
        if self._servers and not self.world.calm:
            self._plan_crash(plan)
        self._servers += 1
        self._server = Server(self.world, self._servers, self._zero_ms, plan, self._server_died)
        self._server.boot()

    def _plan_crash(self, plan: CrashPlan) -> None:
        if self.chance.happens(self.plan.crash_points):
            plan.point, plan.passes = self.chance.among(POINTS), self.chance.whole(1, 25)

    def _server_died(self) -> None:
        """Another starts after a while: on the same boot, after a reboot, or on another machine."""
        self._server = None
        now_ms = int(self.world.loop.time() * 1000)
        self._zero_ms = self.chance.among(
            (self._zero_ms, self.chance.whole(0, 5_000) - now_ms, self.chance.whole(0, 10**7))
        )
        pause = self.chance.among((0.01, 0.2, 1.0, self.chance.between(0, 3)))
        self.world.loop.outside(pause, self._boot)

    # Faults

    def _fault(self, name: str) -> None:
        chance, server = self.chance, self._server
        if name == "clock":
            self._jump()
        elif name == "partition":
            self._partition(chance.among(self._clients))
        elif name in ("kill worker", "stall worker"):
            self._hurt(chance.among(self._workers), kill=name == "kill worker")
        elif server is not None and not server.node.stalled:
            self._hurt_server(name, server)

    def _hurt_server(self, name: str, server: Server) -> None:
        if name == "crash":
            server.crash("at some time")
        elif name == "stall":
            server.stall(self.chance.among((0.1, 1.0, 3.0)))
        elif server.serving:
            server.node.spawn(server.stop())

    def _jump(self) -> None:
        ms = self.chance.among((-4_000, -300, 300, 4_000, 60_000, 600_000))
        if abs(self.world.wall.offset_ms + ms) < 1_800_000:  # requests are remembered for an hour
            self.world.wall.jump(ms)
            self._note("clock", f"the wall clock jumps by {ms} ms")

    def _partition(self, client: Client) -> None:
        network, name = self.world.network, client.node.name
        sides = self.chance.among(((network.mute,), (network.deaf,), (network.mute, network.deaf)))
        for side in sides:
            side.add(name)
        self._note(name, "is cut off, " + ("one way" if len(sides) == 1 else "both ways"))
        self.world.loop.outside(self.chance.among((0.3, 2.0, 8.0)), self._heal, name)

    def _heal(self, name: str) -> None:
        self.world.network.mute.discard(name)
        self.world.network.deaf.discard(name)
        self._note(name, "is no longer cut off")

    def _hurt(self, worker: Worker, *, kill: bool) -> None:
        if kill:
            self._kill(worker)
        elif not worker.node.stalled:
            worker.node.stall()
            self._note(worker.node.name, "stalls")
            self.world.loop.outside(self.chance.between(0.1, 4), self._wake, worker)

    def _kill(self, worker: Worker) -> None:
        worker.node.kill()
        self._note(worker.node.name, "dies")
        self.world.network.reset_client(worker.node)
        self._workers.remove(worker)
        self._clients.remove(worker)
        heir = self._new_worker(worker.queue_id)
        self._clients.append(heir)
        self.world.loop.outside(self.chance.among((0.1, 1.0, 8.0)), self._start, heir)

    @staticmethod
    def _start(worker: Worker) -> None:
        worker.node.spawn(worker.run())

    def _wake(self, worker: Worker) -> None:
        if not worker.node.dead:
            self._note(worker.node.name, "goes on")
            worker.node.resume()

    def _note(self, node: str, what: str) -> None:
        self.world.history.add(Noted(self.world.loop.time(), node, what))

    # The end

    async def _calm(self) -> None:
        """Faults stop; then all that was taken in must end."""
        world = self.world
        self._note("world", "faults stop")
        world.network.weather, world.latency, world.calm, world.haste = CALM, Latency(), True, 0.0
        world.network.mute.clear()
        world.network.deaf.clear()
        world.wall.settle()
        self._note("clock", "the wall clock is right")
        if self._server is not None:
            self._server.disk_is(world.latency)
            self._server.no_crash()
        operator = Operator(world, "end", ())
        await operator.node.spawn(operator.open())
        while not self._all_ended():
            await asyncio.sleep(0.25)
            if any(queue.state != QueueState.ACTIVE for queue in world.disk.tables["_queues"].values()):
                await operator.node.spawn(operator.open())  # a late request of before has closed it again
        world.loop.finished = True

    def _all_ended(self) -> bool:
        rows = self.world.disk.tables["_rows"].values()
        return all(producer.done for producer in self._producers) and all(row.state in FINISHED for row in rows)
