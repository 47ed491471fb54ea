"""One run: three candidates on one engine, faults from a seed, and what they believed meanwhile."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from retinue.leaderelection.v1 import leaderelection_service_pb2 as api
from retinue.leaderelection.v1 import leaderelection_service_pb2_grpc as rpc
from support.election_faults import clocks
from support.election_faults.candidates import Candidate
from support.election_faults.checks import Finding, check
from support.election_faults.clocks import Clock
from support.election_faults.engines import ELECTION, Engine
from support.election_faults.history import Belief, Fault, Interval, Reader, Write, intervals
from support.election_faults.register import Register
from support.election_faults.schedule import LINK, OF_ENGINE, Kind, Step, schedule
from support.faults.proxy import Mode, Proxy
from support.history.recorder import boot_ns

APP_LEASE_S = 0.5
SLACK_S = 15.0
"""Not a goal: what shows, on a busy machine, that nobody is stuck."""
_STUCK_S = 60.0
_S = 1_000_000_000
_ON_LEADER = 0.8
_MODES = {
    Kind.LATE_APP: Mode.LATE_REPLIES,
    Kind.LATE_ENGINE: Mode.LATE_REPLIES,
    Kind.HELD_APP: Mode.REQUESTS_ONLY,
    Kind.HELD_ENGINE: Mode.REQUESTS_ONLY,
    Kind.HALF_OPEN_APP: Mode.HALF_OPEN,
    Kind.HALF_OPEN_ENGINE: Mode.HALF_OPEN,
}


@dataclass(frozen=True)
class Broken:
    """The rule that is broken on purpose: by the servers (in tests/faults/broken_elections.py), or by the apps."""

    server: str = ""
    app: str = ""


class Trial:
    """Three candidates; a context that ends them all."""

    def __init__(
        self, where: Path, engine: Engine, seed: int, broken: Broken = Broken(), app_lease_s: float = APP_LEASE_S
    ) -> None:
        (where / "history").mkdir()
        self._reader = Reader(where / "history")
        self._register = Register(where / "register")
        self._engine, self._seed, self._app_lease_s = engine, seed, app_lease_s
        self._chance = random.Random(seed)
        self.candidates = [
            Candidate(where, n, engine, app_lease_s, server=broken.server, app=broken.app) for n in range(3)
        ]
        self.faults: list[Fault] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._register)
            for candidate in self.candidates:
                stack.enter_context(candidate)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # What is known

    @property
    def bound_s(self) -> float:
        """Within it somebody must lead again."""
        return self._engine.lease_s * 1.1 + self._app_lease_s + SLACK_S

    @property
    def beliefs(self) -> list[Belief]:
        return self._reader.look()

    @property
    def deaths(self) -> dict[str, int]:
        return {name: at for candidate in self.candidates for name, at in candidate.deaths.items()}

    def terms(self) -> list[Interval]:
        return intervals(self.beliefs, self.deaths)

    def leader(self) -> tuple[Candidate, int] | None:
        """Who leads by its own belief, and its token."""
        now = boot_ns()
        for term in reversed(self.terms()):
            for candidate in self.candidates:
                if candidate.name == term.who and term.begin <= now < term.end:
                    return candidate, term.token
        return None

    def await_leader(self) -> tuple[Candidate, int]:
        """Patient: whether it took too long is for the checks to say."""
        end = time.monotonic() + _STUCK_S
        while (found := self.leader()) is None:
            assert time.monotonic() < end, f"nobody leads; there were {self.terms()[-3:]}, {self.faults[-3:]}"
            time.sleep(0.02)
        return found

    def await_successor(self, token: int) -> None:
        """Somebody has been elected under a higher token."""
        end = time.monotonic() + _STUCK_S
        while max((term.token for term in self.terms()), default=0) <= token:
            assert time.monotonic() < end, f"nobody was elected after {token}"
            time.sleep(0.02)

    def findings(self) -> list[Finding]:
        """What the rules say."""
        return check(self.beliefs, self.deaths, self.writes, self.faults, int(self.bound_s * _S))

    @property
    def writes(self) -> list[Write]:
        return self._register.writes

    # Faults

    def kinds(self) -> set[Kind]:
        """Those that can be played here."""
        absent = set() if self._engine.address else set(LINK)
        return set(Kind) - absent - (OF_ENGINE - set(self._engine.faults))

    def run(self, transitions: int, seconds: float = 0.0) -> None:
        """Plays faults until there were so many transitions, and for so long."""
        end = time.monotonic() + seconds
        for step in schedule(self._seed, self.kinds()):
            self.play(step)
            if len(self.terms()) > transitions and time.monotonic() >= end:
                break
        self.await_leader()
        for candidate in self.candidates:
            candidate.check_app()

    def play(self, step: Step) -> None:
        """One fault, on a leader or beside it, after which somebody leads again."""
        self.await_leader()
        time.sleep(step.pause_s)  # the leader works for a while
        leader, token = self.await_leader()
        on_leader = step.pick < _ON_LEADER or step.kind is Kind.RESIGN  # others have nothing to resign
        target = leader if on_leader else self._other(leader)
        kind, begin = self._kind(step.kind, target), boot_ns()
        self._play(kind, target, step.lasts * self._engine.lease_s)
        hits = target is leader or kind in OF_ENGINE or kind is Kind.STEP_DOWN
        self.faults.append(Fault(kind, begin, boot_ns(), token if hits else 0, kind in OF_ENGINE))
        self.await_leader()

    def withhold(self, *modes: tuple[Mode, float]) -> None:
        """Does this to the leader's connection to its server, each for so many seconds; then another term begins."""
        leader, token = self.await_leader()
        begin = boot_ns()
        for mode, lasts_s in modes:
            leader.app_link.set(mode)
            time.sleep(lasts_s)
        leader.app_link.set(Mode.PASS)
        self.faults.append(Fault("withheld", begin, boot_ns(), token))
        self.await_successor(token)

    def _other(self, leader: Candidate) -> Candidate:
        return self._chance.choice([candidate for candidate in self.candidates if candidate is not leader])

    def _kind(self, kind: Kind, target: Candidate) -> Kind:
        """Whether a killed app's death is proven was decided when it was started."""
        if kind in (Kind.KILL_APP, Kind.KILL_PROVEN):
            return Kind.KILL_PROVEN if target.proof else Kind.KILL_APP
        return kind

    def _play(self, kind: Kind, target: Candidate, lasts_s: float) -> None:
        if play := self._engine.faults.get(kind):
            play(lambda: time.sleep(lasts_s))
            return
        match kind:
            case Kind.KILL_APP | Kind.KILL_PROVEN:
                self._replace_app(target, Clock())
            case Kind.APP_CLOCK:
                self._replace_app(target, clocks.of_app(self._chance))
            case Kind.KILL_SERVER:
                self._replace_server(target, Clock(), lasts_s)
            case Kind.SERVER_CLOCK:
                clock = clocks.of_server(self._chance, one_kernel=self._engine.one_kernel)
                self._replace_server(target, clock, lasts_s)
            case Kind.STOP_APP:
                _stop(target.app.send_signal, lasts_s)
            case Kind.STOP_SERVER:
                _stop(target.server.process.send_signal, lasts_s)
            case Kind.RESIGN:
                target.app.send_signal(signal.SIGUSR1)
            case Kind.STEP_DOWN:
                self._ask_step_down(target)
            case _:
                self._disturb(kind, _link(kind, target), lasts_s)

    def _replace_app(self, target: Candidate, clock: Clock) -> None:
        target.kill_app()
        target.start_app(clock, proof=self._chance.random() < 0.5)

    def _replace_server(self, target: Candidate, clock: Clock, lasts_s: float) -> None:
        target.server.kill()
        time.sleep(lasts_s)  # how long there is none
        target.start_server(clock)

    def _ask_step_down(self, target: Candidate) -> None:
        """By an operator of any server."""
        with grpc.insecure_channel(target.server.control) as channel:
            ask = rpc.LeaderElectionServiceStub(channel).RequestStepDown
            try:
                ask(api.RequestStepDownRequest(election_id=ELECTION), timeout=10, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION):
                    raise

    def _disturb(self, kind: Kind, link: Proxy, lasts_s: float) -> None:
        if kind not in _MODES:
            link.cut()
            return
        link.set(_MODES[kind])
        time.sleep(lasts_s)
        link.set(Mode.PASS)


def _link(kind: Kind, target: Candidate) -> Proxy:
    link = target.engine_link if kind in LINK else target.app_link
    assert link is not None
    return link


def _stop(send: Callable[[int], None], lasts_s: float) -> None:
    send(signal.SIGSTOP)
    time.sleep(lasts_s)
    send(signal.SIGCONT)
