"""The core of leader election on engines in memory, under a clock that the test holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from retinue_server.leaderelection.core.clock import Instant
from retinue_server.leaderelection.core.elections import Elections
from retinue_server.leaderelection.core.requests import (
    Ack,
    Elected,
    Event,
    IsDead,
    Liveness,
    Lost,
    OnDisconnect,
    Standing,
    Token,
)
from retinue_server.leaderelection.core.session import Outbox, Session
from retinue_server.leaderelection.engine import Claim, EndReason, Granted, Hold, Record, Refused
from retinue_server.leaderelection.engines.memory import MemoryEngine
from retinue_server.runtime.errors import Reason, Unavailable

T = TypeVar("T")
_TURNS = 25
"""More turns of the loop than anything here takes to come to rest."""


class HeldClock:
    """Time passes when the test says so."""

    def __init__(self) -> None:
        self.boot_ms = 1_000_000
        self._waiting: list[tuple[asyncio.Event, int]] = []

    def now(self) -> Instant:
        return Instant(1_700_000_000_000 + self.boot_ms, self.boot_ms)

    async def wait(self, woken: asyncio.Event, until_ms: int | None) -> None:
        if until_ms is not None and until_ms <= self.boot_ms:
            await asyncio.sleep(0)
            return
        entry = (woken, 1 << 62 if until_ms is None else until_ms)
        self._waiting.append(entry)
        try:
            await woken.wait()
        finally:
            self._waiting.remove(entry)

    async def advance(self, ms: int) -> None:
        """Lets time pass, stopping wherever something is due."""
        end = self.boot_ms + ms
        await rest()
        while (due := min((until for _, until in self._waiting), default=end + 1)) <= end:
            self.boot_ms = max(self.boot_ms, due)
            for event, until in self._waiting:
                if until <= self.boot_ms:
                    event.set()
            await rest()
        self.boot_ms = end
        await rest()


async def rest() -> None:
    """Returns when nothing more happens at this time."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


class Store:
    """One memory that the engines of several servers share; each way to it can be cut."""

    def __init__(self, clock: HeldClock) -> None:
        self.clock = clock
        self.memory = MemoryEngine(lambda: clock.boot_ms)
        self.engines: list[CutEngine] = []
        self._drawn = 0

    def chance(self, size: int) -> bytes:
        """Never the same twice."""
        self._drawn += 1
        return self._drawn.to_bytes(size)

    def engine(self) -> CutEngine:
        """Another server's."""
        made = CutEngine(self)
        self.engines.append(made)
        return made


class CutEngine:
    """Passes everything on, unless it is cut: then nothing gets through, or only the answers are lost."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.capabilities = store.memory.capabilities
        self.cut = self.deaf = False
        self.refusal: Exception | None = None
        self.renewals: list[int] = []
        self._told: Callable[[str], None] = lambda _: None
        self._watched: set[str] = set()

    async def start(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        """Nothing to do."""

    def listen(self, told: Callable[[str], None]) -> None:
        self._told = told

    def watch(self, election_id: str) -> None:
        self._watched.add(election_id)

    def unwatch(self, election_id: str) -> None:
        self._watched.discard(election_id)

    def hear(self, election_id: str) -> None:
        """Another server changed something."""
        if not self.cut and election_id in self._watched:
            self._told(election_id)

    def _through(self) -> None:
        if self.cut:
            raise Unavailable("cut", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=1)
        if self.refusal is not None:
            raise self.refusal

    def _back(self, result: T, *changed: str) -> T:
        for engine in self._store.engines:
            for election_id in changed:
                engine.hear(election_id)
        if self.deaf:
            raise Unavailable("the answer was lost", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=1)
        return result

    async def claim(self, claim: Claim, watched: str | None = None) -> Granted | Refused:
        self._through()
        before = await self._store.memory.read(claim.election_id)
        outcome = await self._store.memory.claim(claim, watched)
        new = isinstance(outcome, Granted) and (before is None or before.epoch != outcome.record.epoch)
        return self._back(outcome, *([claim.election_id] if new else []))

    async def withdraw(self, election_id: str, session_id: str) -> None:
        self._through()

    async def renew(self, holds: Sequence[Hold]) -> Sequence[Record | None]:
        self._through()
        self.renewals.append(len(holds))
        return self._back(await self._store.memory.renew(holds))

    async def release(self, hold: Hold, reason: EndReason, wall_ms: int) -> bool:
        self._through()
        return self._back(await self._store.memory.release(hold, reason, wall_ms), hold.election_id)

    async def proclaim(self, hold: Hold, value: str) -> Record | None:
        self._through()
        return self._back(await self._store.memory.proclaim(hold, value), hold.election_id)

    async def ask_step_down(self, election_id: str, epoch: int) -> Record | None:
        self._through()
        return self._back(await self._store.memory.ask_step_down(election_id, epoch), election_id)

    async def read(self, election_id: str) -> Record | None:
        self._through()
        return self._back(await self._store.memory.read(election_id))

    async def records(self, after: str, limit: int) -> Sequence[Record]:
        self._through()
        return self._back(await self._store.memory.records(after, limit))

    async def terms(self, election_id: str, before: int | None, limit: int) -> Sequence[object]:
        self._through()
        return self._back(await self._store.memory.terms(election_id, before, limit))


class App:
    """A candidate that obeys the rules: it stamps before it sends, and believes its deadline alone."""

    def __init__(self, server: Server, name: str, **options: object) -> None:
        self.server, self.name = server, name
        self.options = options
        self.session: Session
        self.outbox: Outbox
        self.sequence = 0
        self._stamps: dict[int, int] = {}
        self.deadline_ms = 0
        self.token: Token | None = None
        self.events: list[Event] = []
        self.session_id = ""
        self.healthy = True

    @property
    def leads(self) -> bool:
        """By its deadline."""
        return self.server.clock.boot_ms < self.deadline_ms

    def start(self, is_dead: IsDead | None = None, election: str = "e") -> App:
        """Opens a stream."""
        self.sequence = 0
        self._stamps = {0: self.server.clock.boot_ms}
        asked = Standing(election, self.name, self.session_id, **self.options)  # type: ignore[arg-type] # a dict of keywords
        self.session, self.outbox = self.server.elections.begin(asked, is_dead)
        self.session_id = self.session.session_id
        return self

    def beat(self) -> None:
        """Sends a heartbeat."""
        self.sequence += 1
        self._stamps[self.sequence] = self.server.clock.boot_ms
        self.server.elections.heartbeat(self.session, self.sequence, healthy=self.healthy)

    def vanish(self) -> None:
        """The stream ends, without a word."""
        self.server.elections.end(self.session, self.outbox)

    async def read(self) -> list[Event]:
        """What came meanwhile, the deadline moved as it says."""
        await rest()
        came: list[Event] = []
        while not self.outbox.empty:
            came += await self.outbox.take()
        for event in came:
            self._learn(event)
        self.events += came
        return came

    def _learn(self, event: Event) -> None:
        if isinstance(event, Elected):
            held = event.leadership
            self.token = held.token
            self.deadline_ms = max(self.deadline_ms, self._stamps[held.sequence] + held.valid_ms)
        elif isinstance(event, Ack) and event.valid_ms is not None:
            self.deadline_ms = max(self.deadline_ms, self._stamps[event.sequence] + event.valid_ms)

    async def saw(self, kind: type[T]) -> list[T]:
        """Events of a kind so far."""
        await self.read()
        return [event for event in self.events if isinstance(event, kind)]

    async def lost(self) -> list[EndReason]:
        """Why it lost leadership, so far."""
        return [event.reason for event in await self.saw(Lost)]


class Server:
    """One server on the store."""

    def __init__(self, store: Store, name: str = "s", **options: object) -> None:
        self.clock = store.clock
        self.engine = store.engine()
        self.server_id = f"{name.encode().hex():0<12}"[:12]
        self._made = 0
        self.elections = Elections(
            self.engine,  # type: ignore[arg-type] # a fake
            clock=self.clock,
            server_id=self.server_id,
            chance=store.chance,
            **options,  # type: ignore[arg-type] # a dict of keywords
        )

    def app(self, name: str, **options: object) -> App:
        """A candidate on this server."""
        return App(self, name, **options)


__all__ = ["App", "HeldClock", "Liveness", "OnDisconnect", "Server", "Store", "rest"]
