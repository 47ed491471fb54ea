"""One run: twelve shards with two replicas each, callers of every mode, several faults at a time, and the history."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from google.rpc import code_pb2

from support.faults.proxy import Mode as Link
from support.faults.proxy import Proxy
from support.history.recorder import boot_ns
from support.scatter_faults.behaviour import Behaviour
from support.scatter_faults.behaviour import Kind as Does
from support.scatter_faults.callers import Caller, Pending
from support.scatter_faults.checks import ROOT, Finding, check
from support.scatter_faults.history import Story
from support.scatter_faults.leaves import House
from support.scatter_faults.pools import STRICT, Policy, Pool
from support.scatter_faults.schedule import OF_HOUSE, OF_POOLS, Kind, Step, schedule
from support.scatter_faults.stage import Stage

SHARDS, HOUSES, CALLERS = 12, 6, 8
SLACK_NS = 3_000_000_000
"""Calls of the pools that hedge may take four times as long: one that is leaked shows."""
_HEDGE_S, _LONG_S, _SHORT_S = 0.03, 12.0, 2.0
_USUAL = Behaviour(delay_s=0.003)
_STUCK_S = 60.0
_REPLICAS = {f"s{i}": (f"a{i}", f"b{i}") for i in range(SHARDS)}
_WEIGHTS = {f"s{i}": 1 + i % 3 for i in range(SHARDS)}
_HEDGED: dict[str, Any] = {"timeout_s": _LONG_S, "hedge_s": _HEDGE_S, "ratio": 0.1}
_PLENTY = 100_000.0
"""A budget that no run exhausts: there a healthy replica must have been found."""
POOLS = (
    Pool("search", _REPLICAS, _WEIGHTS, **_HEDGED),
    Pool("sums", _REPLICAS, _WEIGHTS, merge="group_sum", **_HEDGED | {"burst": _PLENTY}),
    Pool("lines", _REPLICAS, _WEIGHTS, merge="concat", timeout_s=_SHORT_S),
    Pool("once", _REPLICAS, _WEIGHTS, idempotent=False, timeout_s=_SHORT_S),
    Pool("crowded", _REPLICAS, _WEIGHTS, limits={"max_calls": SHARDS + 3}, **_HEDGED),
)
_POLICIES = {
    "strict": STRICT,
    "half": Policy(0.5),
    "most": Policy(0.9),
    "first 8": Policy(0.3, first_k=8),
    "soft deadline": Policy(0.4, soft_s=0.2),
    "anything": Policy(0.0, soft_s=0.5),
    "no hedge": Policy(no_hedge=True),
}
_BEHAVIOURS = {
    Kind.SLOW: Behaviour(delay_s=0.5),
    Kind.RACE: Behaviour(delay_s=_HEDGE_S + 0.004),
    Kind.FAIL: Behaviour(Does.FAIL, code=code_pb2.INTERNAL),
    Kind.FLAP: Behaviour(Does.FLAP),
    Kind.STALL: Behaviour(Does.STALL),
    Kind.OVERSIZE: Behaviour(Does.OVERSIZE, size=4 * 1024 * 1024),
    Kind.CORRUPT: Behaviour(Does.CORRUPT),
    Kind.PART: Behaviour(Does.PART),
    Kind.OVERLOADED: Behaviour(Does.FAIL, code=code_pb2.RESOURCE_EXHAUSTED),
    Kind.REFUSES: Behaviour(Does.FAIL, code=code_pb2.INVALID_ARGUMENT),
}
_LINKS = {
    Kind.HALF_OPEN: Link.HALF_OPEN,
    Kind.FIRST_BYTE: Link.STALL,
    Kind.LATE: Link.LATE_REPLIES,
    Kind.HELD: Link.REQUESTS_ONLY,
    Kind.TRICKLE: Link.TRICKLE,
}


class Played(NamedTuple):
    """A fault that is going on."""

    kind: Kind
    begin: int
    leaves: tuple[str, ...]
    undo: Callable[[], object]


class Campaign:
    """See the module; a context that ends it."""

    def __init__(self, where: Path, seed: int, program: Path | None = None, module: str = "") -> None:
        """`program` is the Go leaf, in which every other process runs; None = all are in Python."""
        self._seed, self._program = seed, program
        self.stage = Stage(where, module=module)
        self.faults: Counter[Kind] = Counter()
        self._busy: set[str] = set()
        """Leaves that a fault has, and `pools` and `root`."""
        self._playing = threading.Lock()
        self._undoing: list[threading.Timer] = []
        self._over = threading.Event()
        self._failed: list[BaseException] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.stage)
            dead = stack.enter_context(socket.socket())
            dead.bind(("127.0.0.1", 0))  # and never listens: its port is nobody's
            self._dead = f"127.0.0.1:{dead.getsockname()[1]}"
            for number in range(HOUSES):
                program = self._program if number % 2 else None
                self.stage.village.build(*_house(number), program=program).tell(_USUAL)
            self.stage.open(*POOLS)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for timer in self._undoing:
            timer.cancel()
        self._open.close()

    def run(self, seconds: float) -> None:
        """Plays the faults of the seed so long, with all callers."""
        callers = [threading.Thread(target=self._call, args=(n,), name=f"caller {n}") for n in range(CALLERS)]
        for thread in callers:
            thread.start()
        end = time.monotonic() + seconds
        for step in schedule(self._seed):
            time.sleep(step.pause_s)  # several go on at a time; nothing waits for one
            if time.monotonic() >= end:
                break
            self._begin(step)
        self._over.set()
        for thread in (*callers, *self._undoing):
            thread.join()
        if self._failed:
            raise self._failed[0]
        self._settle()

    # Callers

    def _call(self, number: int) -> None:
        chance = random.Random(self._seed * 1000 + number)
        try:
            while not self._over.is_set():
                with Caller(self.stage.root.address, self.stage.notes) as caller:
                    for _ in range(chance.choice((3, 30, 100))):
                        if not self._over.is_set():
                            _ask(caller, chance)
        except BaseException as error:  # noqa: BLE001 - told by who runs it
            self._failed.append(error)

    # Faults

    def _begin(self, step: Step) -> None:
        with self._playing:
            hit = self._target(step)
            if not hit:
                return
            self._busy |= set(hit)
        self.faults[step.kind] += 1
        begin, undo = boot_ns(), self._play(step, hit)
        played = Played(step.kind, begin, hit, undo)
        timer = threading.Timer(step.lasts_s, self._undo, (played,))
        self._undoing.append(timer)
        timer.start()

    def _target(self, step: Step) -> tuple[str, ...]:
        """The leaves that it hits, none of which has another fault; empty = nobody is free."""
        if step.kind is Kind.KILL_ROOT:
            return () if ROOT in self._busy or "pools" in self._busy else (ROOT, "pools")
        if step.kind in OF_HOUSE:
            some: Iterable[tuple[str, ...]] = map(_house, range(HOUSES))
        elif step.kind in OF_POOLS:
            some = ((*leaves, "pools") for leaves in _REPLICAS.values())
        else:
            some = ((leaf,) for leaves in _REPLICAS.values() for leaf in leaves)
        free = [leaves for leaves in some if not self._busy & set(leaves)]
        return free[int(step.pick * len(free))] if free else ()

    def _undo(self, played: Played) -> None:
        try:
            played.undo()
            holds = played.kind in {Kind.STOP, *_LINKS}
            leaves = [name for name in played.leaves if name != "pools"]
            self.stage.fault(played.kind, played.begin, *leaves, holds=holds, kills=played.kind is Kind.KILL)
        except BaseException as error:  # noqa: BLE001 - told by who runs it
            self._failed.append(error)
        with self._playing:
            self._busy -= set(played.leaves)

    def _play(self, step: Step, hit: tuple[str, ...]) -> Callable[[], object]:
        """Begins it, and gives what ends it."""
        if step.kind is Kind.KILL_ROOT:
            self.stage.restart()
            return _nothing
        if step.kind in OF_POOLS:
            return self._point(hit[0], (hit[1],) if step.kind is Kind.SHRINK else (self._dead,))
        house = self.stage.village.house(hit[0])
        if step.kind in OF_HOUSE:
            return _stop(house) if step.kind is Kind.STOP else _kill(house)
        if step.kind in _BEHAVIOURS:
            house.tell(_BEHAVIOURS[step.kind], hit[0])
            return lambda: house.tell(_USUAL, hit[0])
        return _disturb(step.kind, self.stage.village.links[hit[0]])

    def _point(self, leaf: str, leaves: tuple[str, ...]) -> Callable[[], object]:
        """The pool file gives the leaf's shard these endpoints."""
        shard = f"s{leaf[1:]}"
        self.stage.write(replace(pool, replicas={**pool.replicas, shard: leaves}) for pool in POOLS)
        return lambda: self.stage.write(POOLS)

    # The end

    def _settle(self) -> None:
        """Without faults all is well again, and nothing is under way."""
        with Caller(self.stage.root.address, self.stage.notes) as caller:
            for pool in POOLS:
                end = time.monotonic() + _STUCK_S
                while (told := caller.ask(pool, mode="afterwards").told).code:
                    assert time.monotonic() < end, f"{pool.name} does not recover: {told}"
                    time.sleep(0.1)
        self.stage.await_idle()
        self.stage.await_ended(SLACK_NS / 1e9)

    def story(self) -> Story:
        return self.stage.story()

    def findings(self) -> list[Finding]:
        """What the rules say, and what the root may not write into its log."""
        log = [Finding("log", "", line) for line in self.stage.log_errors()]
        return [*check(self.story(), SLACK_NS), *log]


def _nothing() -> None:
    """It is over as soon as it began."""


def _stop(house: House) -> Callable[[], object]:
    house.pause()
    return house.resume


def _kill(house: House) -> Callable[[], object]:
    house.kill()

    def revive() -> None:
        house.start()
        house.tell(_USUAL)

    return revive


def _disturb(kind: Kind, link: Proxy) -> Callable[[], object]:
    if kind is Kind.CUT:
        link.cut()
        return _nothing
    if kind is Kind.REFUSED:
        link.refuse()
        return link.accept
    link.set(_LINKS[kind])
    return lambda: link.set(Link.PASS)


def _house(number: int) -> tuple[str, ...]:
    """The leaves of a process: no two of them have the same shard."""
    first = (f"a{i}" for i in range(number, SHARDS, HOUSES))
    return (*first, *(f"b{i}" for i in range((number + HOUSES // 2) % HOUSES, SHARDS, HOUSES)))


def _ask(caller: Caller, chance: random.Random) -> None:
    """One request of whatever kind."""
    pool = chance.choice(POOLS)
    mode, policy = chance.choice(list(_POLICIES.items())) if pool.idempotent else ("strict", STRICT)
    shards = list(pool.shards) if chance.random() < 0.7 else chance.sample(list(pool.shards), chance.randint(2, SHARDS))
    policy = policy._replace(first_k=min(policy.first_k, len(shards)))
    deadline = chance.choice((None, None, 0.05, 0.5, 2.0))
    pending = caller.begin(pool, policy, mode=f"{pool.name}, {mode}", shards=shards, deadline_s=deadline)
    if chance.random() < 0.1:
        _leave(pending, chance)
    pending.result()


def _leave(pending: Pending, chance: random.Random) -> None:
    time.sleep(chance.uniform(0, 2 * _HEDGE_S))  # so long it stays
    pending.leave()


def rows(story: Story) -> Iterator[tuple[str, Counter[str]]]:
    """By pool and mode: how many requests ended how."""
    found: dict[str, Counter[str]] = {}
    for asked in story.asked.values():
        ends = found.setdefault(asked.mode, Counter())
        told = story.told.get(asked.request)
        ends["asked"] += 1
        if told is None or told.code < 0:
            ends["left"] += 1
        elif told.code:
            ends[f"{code_pb2.Code.Name(told.code)} {told.reason}".strip()] += 1
        else:
            ends["complete" if told.coverage and told.coverage.complete else "partial"] += 1
            ends["hedges"] += told.hedges
            ends["retries"] += told.retries
    yield from sorted(found.items())
