"""The core of scatter/gather over leaves that the test plays, under a clock that the test holds."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from retinue_server.runtime.errors import RetinueError
from retinue_server.scattergather.core.pool import Topology
from retinue_server.scattergather.core.requests import STRICT, Ask, Malformed, Policy, Reply
from retinue_server.scattergather.core.root import Answer, Root
from retinue_server.scattergather.core.scatter import ScatterError
from retinue_server.scattergather.core.topology import Pool, Shard
from retinue_server.scattergather.engine import Done, Metadata, Target

_TURN_S = 0.0001
"""What a turn takes while there are calls to begin."""


async def rest() -> None:
    """Returns when nothing more happens at this time."""
    loop: Any = asyncio.get_running_loop()
    await asyncio.sleep(0)
    while loop._ready:  # whatever is due; in fixed numbers of turns the loop would be most of what a story costs
        await asyncio.sleep(0)


class _Timer:
    def __init__(self, do: Callable[[], None]) -> None:
        self.do: Callable[[], None] | None = do

    def cancel(self) -> None:
        self.do = None


class HeldClock:
    """Time passes when the test says so."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._timers: list[tuple[float, int, _Timer]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    def wall_ms(self) -> int:
        return int(1_700_000_000_000 + self._now * 1000)

    def at(self, when: float, do: Callable[[], None]) -> _Timer:
        timer = _Timer(do)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def soon(self, do: Callable[[], None]) -> object:
        self._now += _TURN_S
        return asyncio.get_running_loop().call_soon(do)

    async def advance(self, seconds: float) -> None:
        """Lets time pass, stopping wherever something is due."""
        end = self._now + seconds
        await rest()
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            if timer.do is not None:
                timer.do()
            await rest()
        self._now = end
        await rest()

    @property
    def timers(self) -> int:
        """How many are set."""
        return sum(timer.do is not None for _, _, timer in self._timers)


@dataclass
class PlayedCall:
    """A call to a leaf; the test answers it."""

    address: str
    data: bytes
    timeout_s: float
    metadata: Metadata
    done: Done
    cancelled: bool = False
    ended: bool = False

    async def reply(self, data: bytes = b"") -> None:
        """It replies, also when nobody waits any more."""
        self.ended = True
        self.done(0, "", data)
        await rest()

    async def fail(self, code: int, message: str = "it failed") -> None:
        self.ended = True
        self.done(code, message, None)
        await rest()

    @property
    def open(self) -> bool:
        return not (self.cancelled or self.ended)


@dataclass
class PlayedLine:
    """A line; connected unless the test says otherwise."""

    leaves: PlayedLeaves
    target: Target
    changed: Callable[[], None]
    connected: bool = True
    closed: bool = False

    def call(self, data: bytes, timeout_s: float, metadata: Metadata, done: Done) -> Callable[[], None]:
        assert not self.closed
        call = PlayedCall(self.target.address, data, timeout_s, metadata, done)
        self.leaves.calls.append(call)

        def cancel() -> None:
            assert call.open, "it is cancelled once, and while it runs"
            call.cancelled = True

        return cancel

    def close(self) -> None:
        self.closed = True


@dataclass
class PlayedLeaves:
    """The leaves: every call is kept for the test."""

    calls: list[PlayedCall] = field(default_factory=list)
    lines: list[PlayedLine] = field(default_factory=list)

    def open(self, target: Target, changed: Callable[[], None]) -> PlayedLine:
        line = PlayedLine(self, target, changed)
        self.lines.append(line)
        return line

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def to(self, address: str) -> PlayedCall:
        """The latest call to an endpoint."""
        return next(call for call in reversed(self.calls) if call.address == address)

    @property
    def open_calls(self) -> list[PlayedCall]:
        return [call for call in self.calls if call.open]


class Told:
    """Discovery: the test says what is found."""

    def __init__(self) -> None:
        self.watched: dict[str, Callable[[Sequence[str]], None]] = {}

    def watch(self, name: str, found: Callable[[Sequence[str]], None]) -> Callable[[], None]:
        self.watched[name] = found
        return partial(self._forget, name)

    def _forget(self, name: str) -> None:
        del self.watched[name]

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Echo:
    """A question whose data says for whom it is, and which attempt it is."""

    def data(self, shards: Sequence[Shard], attempt: int) -> bytes:
        return f"{'+'.join(shard.shard_id for shard in shards)}#{attempt}".encode()

    def metadata(self, shards: Sequence[Shard], attempt: int) -> Metadata:
        return ()

    def read(self, data: bytes) -> Reply:
        if data == b"!":
            raise Malformed("it is a !")
        return Reply(data)


@dataclass
class Played:
    """A root over played leaves."""

    clock: HeldClock
    leaves: PlayedLeaves
    told: Told
    root: Root

    def serve(self, *shards: Shard, **settings: Any) -> None:
        self.root.apply([Pool("p", shards, **settings)])

    def ask(self, policy: Policy = STRICT, **asked: Any) -> asyncio.Task[Answer]:
        """Begins a request."""
        topology: Topology = self.root.topology("p")
        question = asked.pop("question", None) or Echo()
        ask = Ask("p", self.root.new_id(), topology, question, policy=policy, **asked)
        return asyncio.create_task(self.root.scatter(ask, [], lambda answer: answer))

    @property
    def live(self) -> Any:
        return self.root.pools["p"].live

    def is_clean(self) -> None:
        """Nothing is left of any request."""
        assert not self.leaves.open_calls
        assert (self.live.open_calls, self.live.unsent, self.live.running) == (0, 0, 0)
        assert all(r.in_flight == 0 for m in self.live.topology.members for r in m.replicas)


def played() -> Played:
    """Within a running loop."""
    clock, leaves, told = HeldClock(), PlayedLeaves(), Told()
    root = Root("root", leaves, {"dns": told}, None, clock)  # type: ignore[arg-type] # no merges of users here
    return Played(clock, leaves, told, root)


def shard(shard_id: str, *addresses: str, weight: int = 1) -> Shard:
    """A shard; its one endpoint is named as it is, if none are given."""
    return Shard(shard_id, addresses or (f"{shard_id}:1",), weight)


async def error_of(task: asyncio.Task[Answer]) -> ScatterError:
    """What a request failed with."""
    await rest()
    assert task.done()
    error = task.exception()
    assert isinstance(error, ScatterError)
    return error


async def refusal_of(task: asyncio.Task[Answer]) -> RetinueError:
    await rest()
    assert task.done()
    error = task.exception()
    assert isinstance(error, RetinueError)
    return error


async def answer_of(task: asyncio.Task[Answer]) -> Answer:
    """What a request was answered."""
    await rest()
    assert task.done()
    return task.result()
