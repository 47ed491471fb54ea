"""Who uses the queue in a simulated world: producers, workers, operators; honest in calm, otherwise as the seed says.

They repeat a call as the client helpers do: the same request_id, the same token, with backoff, until it is answered.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import Any

from retinue_server.runtime.errors import Reason, ResourceExhausted, RetinueError, Unavailable
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
    Settlement,
)
from retinue_server.workqueue.core.steps import Granted
from retinue_server.workqueue.engine import (
    FINISHED,
    REDRIVABLE,
    WAITING,
    Failure,
    QueueState,
    RetryOverrides,
    State,
    TaskBody,
    TaskFilter,
)
from support.simulation.loop import Node
from support.simulation.network import Cut, TimedOut
from support.workqueue_simulation.server import World

QUEUES = ("q", "r")
_CALM_POLL_MS = 30_000


class GaveUpError(Exception):
    """No answer in all the time that the caller had."""


class Client:
    """A process that calls the queue."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.chance = world, world.chance
        self.node = Node(world.loop, name)
        self._requests = itertools.count(1)

    async def run(self) -> None:
        """What it does from its start on."""
        raise NotImplementedError

    def request_id(self) -> str:
        """A new one."""
        return f"{self.node.name}-{next(self._requests)}"

    async def call(self, verb: str, *args: Any, timeout_s: float = 2.0, tries: int = 8, patient: bool = False) -> Any:
        """Calls until there is an answer; raises what the server refused it with, or GaveUpError."""
        wait = 0.1
        for _ in itertools.count() if self.world.calm else range(tries):
            hasty = not (patient and self.world.quiet) and self.chance.happens(self.world.haste)
            try:
                return await self.world.network.call(
                    self.node,
                    verb,
                    args,
                    self.chance.between(0.001, self.chance.among((0.02, 0.4))) if hasty else timeout_s,
                )
            except (Cut, TimedOut, Unavailable):
                pass
            except ResourceExhausted as error:
                if error.reason == Reason.QUEUE_FULL:
                    raise
            await asyncio.sleep(wait * self.chance.between(0.5, 1))
            wait = min(wait * 2, 2.0)
        raise GaveUpError


@dataclass(frozen=True)
class Taste:
    """What a schedule's tasks are like: probabilities."""

    delay: float = 0.0
    expiry: float = 0.0
    priority: float = 0.0
    key: float = 0.0
    retry: float = 0.0
    attempt: float = 0.0
    atomic: float = 0.0


class Producer(Client):
    """Enqueues so many batches, and waits for some of the tasks to end."""

    def __init__(self, world: World, name: str, taste: Taste, batches: int) -> None:
        super().__init__(world, name)
        self._taste, self._batches = taste, batches
        self._gap_s = world.chance.among((0.3, 1.5, 4.0))
        self._tasks = itertools.count(1)
        self.done = False

    async def run(self) -> None:
        """All of it."""
        for _ in range(self._batches):
            await asyncio.sleep(self.chance.between(0, self._gap_s))
            try:
                await self._enqueue()
            except (GaveUpError, RetinueError):
                continue
        self.done = True

    async def _enqueue(self) -> None:
        tasks = tuple(self._task() for _ in range(self.chance.whole(1, 4)))
        request_id = self.request_id()
        asked = Enqueue(tasks, self.chance.happens(self._taste.atomic), request_id, request_id.encode())
        results = await self.call("enqueue", asked)
        taken = [r.task_id for r in results if r.error is None]
        if taken and self.chance.happens(0.4):
            wait_ms = self.chance.among((0, 2_000, 8_000))
            await self.call("wait", self.chance.among(taken), wait_ms, timeout_s=wait_ms / 1000 + 2, tries=2)

    def _task(self) -> NewTask:
        chance, taste = self.chance, self._taste
        name = f"{self.node.name}.{next(self._tasks)}"
        keyed = chance.happens(taste.key)
        return NewTask(
            queue_id=chance.among(QUEUES),
            body=TaskBody(
                input=f"key of {self.node.name}".encode() if keyed else name.encode(),
                retry=RetryOverrides(max_attempts=chance.whole(1, 4)) if chance.happens(taste.retry) else None,
            ),
            priority=chance.whole(-1, 1) if chance.happens(taste.priority) else 0,
            delay_ms=chance.whole(1, 3_000) if chance.happens(taste.delay) else None,
            expire_delay_ms=chance.whole(3_001, 8_000) if chance.happens(taste.expiry) else None,
            attempt_ms=chance.whole(200, 2_500) if chance.happens(taste.attempt) else None,
            idempotency_key=f"k{self.node.name}" if keyed else "",
        )


@dataclass(frozen=True)
class Conduct:
    """How a schedule's workers treat their tasks: relative weights, and what else they do."""

    weights: tuple[tuple[str, float], ...] = (("complete", 1.0),)
    follow_ups: float = 0.0
    again: float = 0.0
    """That an outcome is sent again, or another after it."""

    def choose(self, fraction: float) -> str:
        """One of the ways."""
        left = fraction * sum(weight for _, weight in self.weights)
        for name, weight in self.weights:
            left -= weight
            if left < 0:
                return name
        return "complete"


class Worker(Client):
    """Leases, works, and ends leases; or lets them lapse, or comes back too late."""

    def __init__(self, world: World, name: str, queue_id: str, conduct: Conduct, max_tasks: int) -> None:
        super().__init__(world, name)
        self.queue_id, self._conduct, self._max_tasks = queue_id, conduct, max_tasks
        self._streams = world.chance.happens(0.4)

    async def run(self) -> None:
        """For ever."""
        while True:
            leases = await self._lease()
            work = [asyncio.ensure_future(self._attempt(granted)) for granted in leases]
            if work and (self.world.calm or self.chance.happens(0.8)):
                await asyncio.wait(work)
            elif not work:
                await asyncio.sleep(self.chance.between(0.01, 0.2))

    async def _lease(self) -> list[Granted]:
        patient = self.world.calm or self.world.quiet
        wait_ms = _CALM_POLL_MS if patient else self.chance.among((0, 1_000, 5_000, 10_000, 10_000))
        lease_ms = self.chance.among((None, None, 1_000, 3_000))
        if self._streams:
            return await self._stream(LeaseAsk(self.queue_id, self.node.name, self._max_tasks, lease_ms), wait_ms)
        ask = LeaseAsk(self.queue_id, self.node.name, self._max_tasks, lease_ms, self.request_id())
        timeout_s = wait_ms / 1000 + self.chance.among((2.0, 2.0, 2.0, -0.2 if wait_ms else 2.0))
        try:
            tries = self.chance.among((1, 3))
            granted: list[Granted] = await self.call(
                "lease", ask, wait_ms, timeout_s=timeout_s, tries=tries, patient=True
            )
        except GaveUpError:
            await self._pause()
            return []
        return granted

    async def _stream(self, ask: LeaseAsk, lives_ms: int) -> list[Granted]:
        """What a stream brings, until it breaks; then another is opened, without a word on the leases of the first."""
        try:
            granted: list[Granted] = await self.world.network.call(self.node, "stream", (ask,), 1 + lives_ms / 1000)
        except (Cut, TimedOut, RetinueError):
            await self._pause()
            return []
        return granted

    async def _pause(self) -> None:
        """After a call that failed: a while, or as long as a container takes that is started again and again."""
        await asyncio.sleep(0.2 if self.world.calm else self.chance.among((0.0, 0.1, 6.0)))

    async def _attempt(self, granted: Granted) -> None:
        lease, lasts_s = LeaseRef.of(granted.task.row), granted.lease_left_ms / 1000
        way = "complete" if self.world.calm else self._conduct.choose(self.chance.fraction())
        await asyncio.sleep(self.chance.between(0, 0.1))
        if way == "vanish":
            return
        if way == "late":
            await asyncio.sleep(lasts_s * self.chance.between(0.7, 1.8))
            way = "complete"
        elif way == "long":
            await self._hold(lease, lasts_s)
            way = "complete"
        await self._end(self._outcome(way, lease, granted))

    async def _hold(self, lease: LeaseRef, lasts_s: float) -> None:
        """Longer than a lease, extending it; a worker that was told that it lost it may not believe it."""
        for _ in range(self.chance.whole(2, 6)):
            await asyncio.sleep(lasts_s / 3)
            lease_ms = self.chance.among((None, None, 1_500))
            try:
                [extended] = await self.call("extend", (Extend(lease, lease_ms),), timeout_s=lasts_s / 3, tries=2)
            except GaveUpError:
                continue
            if extended.error is not None or extended.cancel_requested:
                return

    def _outcome(self, way: str, lease: LeaseRef, granted: Granted) -> Settlement:
        chance = self.chance
        if way == "fail":
            delay_ms = chance.among((None, None, 100))
            return Fail(lease, Failure("WHY", "because"), final=False, delay_ms=delay_ms)
        if way == "final":
            return Fail(lease, Failure("WHY", "for good"), final=True)
        if way == "release":
            return Release(lease, chance.among((0, 0, 500)))
        return Complete(lease, b"out", "", self._follow_ups(granted))

    def _follow_ups(self, granted: Granted) -> tuple[NewTask, ...]:
        name = granted.task.body.input.decode()
        if name.count(">") >= 2 or not self.chance.happens(self._conduct.follow_ups):
            return ()
        names = [f"{name}>{granted.task.row.task_id}.{i}" for i in range(self.chance.whole(1, 2))]
        return tuple(NewTask(self.chance.among(QUEUES), TaskBody(input=text.encode())) for text in names)

    async def _end(self, outcome: Settlement) -> None:
        for _ in range(3):
            try:
                [settled] = await self.call("settle", (outcome,))
            except GaveUpError:
                return
            if settled.error is None or settled.error.reason != Reason.QUEUE_FULL:
                break
            await asyncio.sleep(self.chance.between(0.1, 0.5))
        else:
            outcome = Fail(outcome.lease, Failure("QUEUE_FULL", "no room for what comes next"))
            await self._end(outcome)
        if self.chance.happens(self._conduct.again):
            await self._end_again(outcome)

    async def _end_again(self, outcome: Settlement) -> None:
        """The same outcome once more, or another for the same lease."""
        await asyncio.sleep(self.chance.among((0.0, 0.01, 1.0, 4.0)))
        if self.chance.happens(0.3):
            outcome = Release(outcome.lease) if isinstance(outcome, (Complete, Fail)) else Complete(outcome.lease)
        try:
            await self.call("settle", (outcome,))
        except GaveUpError:
            return


class Operator(Client):
    """Cancels, redrives, reschedules, deletes, pauses and drains while faults last; then opens all queues."""

    def __init__(self, world: World, name: str, verbs: tuple[str, ...]) -> None:
        super().__init__(world, name)
        self._verbs = verbs

    async def run(self) -> None:
        """Until calm."""
        while not self.world.calm:
            await asyncio.sleep(self.chance.between(0.2, 2))
            try:
                await getattr(self, "_" + self.chance.among(self._verbs))()
            except (GaveUpError, RetinueError):
                continue

    async def open(self) -> None:
        """All queues give and take again."""
        for queue_id in QUEUES:
            await self.call("set_queue_state", queue_id, QueueState.ACTIVE)

    async def _some(self, states: tuple[State, ...]) -> Selection:
        wanted = TaskFilter(queue_id=self.chance.among(QUEUES), states=states)
        if self.chance.happens(0.5):
            return Selection(wanted=wanted, max_count=self.chance.whole(1, 3))
        tasks, _ = await self.call("page", wanted, None, 5)
        return Selection(tuple(task.row.task_id for task in tasks) or ("none",))

    async def _cancel(self) -> None:
        await self.call("cancel", await self._some((*WAITING, State.LEASED)))

    async def _redrive(self) -> None:
        await self.call("redrive", await self._some(REDRIVABLE))

    async def _delete(self) -> None:
        await self.call("delete", await self._some(FINISHED))

    async def _reschedule(self) -> None:
        some = await self._some(WAITING)
        for task_id in some.task_ids[:1]:
            delay_ms, priority = self.chance.among((None, 0, 1_000)), self.chance.among((None, 2))
            await self.call("reschedule", Reschedule(task_id, None, delay_ms, priority))

    async def _close(self) -> None:
        queue_id = self.chance.among(QUEUES)
        await self.call("set_queue_state", queue_id, self.chance.among((QueueState.PAUSED, QueueState.DRAINING)))
        await asyncio.sleep(self.chance.between(0.1, 3))
        await self.call("set_queue_state", queue_id, QueueState.ACTIVE)
