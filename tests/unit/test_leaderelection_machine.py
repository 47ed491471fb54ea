"""Any story at all: servers that are killed, apps that live, hang and vanish, ways to the engine that are cut.

After every step: at most one app holds an unexpired deadline (G2), and tokens only rise (G1). Apps obey the rules and
nothing else; what the server tells them may arrive at any later time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.leaderelection_core import App, HeldClock, Server, Store, rest

from retinue_server.leaderelection.core.requests import Elected, OnDisconnect
from retinue_server.runtime.errors import RetinueError

APPS = 4
SERVERS = 2
LEASE_MS, APP_LEASE_MS = 2_000, 600


class Story(RuleBasedStateMachine):
    """Four apps on two servers."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = HeldClock()
        self.store = Store(self.clock)
        self.servers: list[Server] = []
        self.apps: list[App] = []
        self.open: set[int] = set()
        self.hung: set[int] = set()
        self.last_token = 0

    def run(self, act: Callable[[], Any]) -> None:
        async def go() -> None:
            try:
                result = act()
                if asyncio.iscoroutine(result):
                    await result
            except RetinueError:  # the engine is cut, a name is taken: it says so, and nothing changed
                pass
            await rest()

        self.runner.run(go())

    @initialize()
    def begin(self) -> None:
        self.servers = [Server(self.store, f"s{number}", drain_ms=2_000) for number in range(SERVERS)]
        for server in self.servers:
            self.run(server.elections.start)
        self.apps = [
            self.servers[number % SERVERS].app(f"a{number}", lease_ms=LEASE_MS, app_lease_ms=APP_LEASE_MS)
            for number in range(APPS)
        ]
        for number in range(APPS):
            self.start(number, number % SERVERS)
        self.live(250)

    def teardown(self) -> None:
        for server in self.servers:
            self.run(server.elections.stop)
        self.runner.close()

    app = st.integers(0, APPS - 1)
    server = st.integers(0, SERVERS - 1)

    @rule(number=app, at=server)
    def start(self, number: int, at: int) -> None:
        """Anew, or in the session it had: on its server or, as if that had been restarted, on the other."""
        if number in self.open:
            return
        self.apps[number].server = self.servers[at]
        self.run(self.apps[number].start)
        self.open.add(number)

    @rule(number=app)
    def forget(self, number: int) -> None:
        """It will begin a new session next time."""
        if number not in self.open:
            self.apps[number].session_id = ""

    @rule(ms=st.sampled_from([100, 300, 700, 1_500, 2_500]))
    def live(self, ms: int) -> None:
        """Time passes; who is not hung shows that it lives, and hears what it is told."""
        for _ in range(ms // 100):
            self.run(lambda: self.clock.advance(100))
            for number in sorted(self.open - self.hung):
                if self.clock.boot_ms % 200 == 0:
                    self.run(self.apps[number].beat)
                self.run(self.apps[number].read)
            self.one_leader_at_most()

    @rule(ms=st.sampled_from([1, 50, 250, 900]))
    def silence(self, ms: int) -> None:
        """Time passes, and nobody says a word."""
        self.run(lambda: self.clock.advance(ms))

    @rule(number=app)
    def hang(self, number: int) -> None:
        """It neither speaks nor listens; when it wakes it finds all that it was told."""
        self.hung ^= {number}

    @rule(number=app)
    def beat_unheard(self, number: int) -> None:
        """It speaks, and the answer waits."""
        if number in self.open:
            self.run(self.apps[number].beat)

    @rule(number=app)
    def vanish(self, number: int) -> None:
        """Its stream ends; it may live on, and obeys its deadline."""
        if number in self.open:
            self.open.discard(number)
            self.run(self.apps[number].vanish)

    @rule(number=app)
    def resign(self, number: int) -> None:
        """Its work has stopped."""
        if number in self.open:
            app = self.apps[number]
            app.deadline_ms = 0
            self.run(lambda: self._resigned(app))
            self.open.discard(number)

    async def _resigned(self, app: App) -> None:
        leaving = asyncio.create_task(app.server.elections.leave(app.session))
        await rest()
        app.vanish()
        if not leaving.done():
            leaving.cancel()
        app.session_id = ""

    @rule(number=app, healthy=st.booleans())
    def health(self, number: int, healthy: bool) -> None:  # noqa: FBT001 - drawn
        self.apps[number].healthy = healthy

    @rule(at=server, cut=st.booleans())
    def cut(self, at: int, cut: bool) -> None:  # noqa: FBT001 - drawn
        """The way to the engine."""
        self.servers[at].engine.cut = cut

    @rule(at=server, deaf=st.booleans())
    def deafen(self, at: int, deaf: bool) -> None:  # noqa: FBT001 - drawn
        """What is written is written, and the answer is lost."""
        self.servers[at].engine.deaf = deaf

    @rule()
    def cut_off_the_leader(self) -> None:
        """For longer than the engine's lease, while others stand by."""
        leaders = [app for app in self.apps if app.leads]
        if leaders:
            leaders[0].server.engine.cut = True
            self.live(2 * LEASE_MS)
            leaders[0].server.engine.cut = False

    @rule()
    def restart_the_leaders_server(self) -> None:
        """Its app finds its session again, and is gone before it hears so."""
        leaders = [number for number, app in enumerate(self.apps) if app.leads]
        if leaders and leaders[0] in self.open:
            self.kill_server(self.servers.index(self.apps[leaders[0]].server))
            self.start(leaders[0], self.servers.index(self.apps[leaders[0]].server))
            self.vanish(leaders[0])
            self.live(APP_LEASE_MS)

    @rule()
    def step_down(self) -> None:
        self.run(lambda: self.servers[0].elections.ask_step_down("e", None))

    @precondition(lambda self: len(self.servers) == SERVERS)
    @rule(at=server)
    def kill_server(self, at: int) -> None:
        """The process is gone with all it knew; another takes its place."""
        self.run(self.servers[at].elections.stop)
        for number in sorted(self.open):
            if self.apps[number].server is self.servers[at]:
                self.open.discard(number)
        self.servers[at] = Server(self.store, f"s{at}", drain_ms=2_000)
        self.run(self.servers[at].elections.start)
        for app in self.apps:
            if app.server not in self.servers:
                app.server = self.servers[at]

    @invariant()
    def one_leader_at_most(self) -> None:
        leaders = [app.name for app in self.apps if app.leads]
        assert len(leaders) <= 1, leaders

    @invariant()
    def tokens_rise(self) -> None:
        for app in self.apps:
            tokens = [event.leadership.token.value for event in app.events if isinstance(event, Elected)]
            assert tokens == sorted(tokens)
        terms = self.store.memory._terms.get("e", [])
        values = [term.epoch for term in terms]
        assert values == sorted(set(values))


Story.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # the story as it was found: making it short takes minutes
)
TestStory = Story.TestCase

__all__ = ["OnDisconnect", "TestStory"]
