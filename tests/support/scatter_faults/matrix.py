"""Every fault in every mode: what the caller saw, and what coverage was reported.

All are played at once, each against pools of its own, on four shards of which one is hit: `s1`, whose leaf is the
fault's victim. In the mode `hedged` a twin has that shard, too; it is slower, so that the victim is asked first.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

from google.rpc import code_pb2

from retinue.scattergather.v1 import coverage_pb2
from support.faults.proxy import Mode as Link
from support.history.recorder import boot_ns
from support.scatter_faults.behaviour import Behaviour, Kind
from support.scatter_faults.callers import Caller, Pending
from support.scatter_faults.hosts import Hosts
from support.scatter_faults.leaves import House
from support.scatter_faults.pools import STRICT, Policy, Pool
from support.scatter_faults.stage import Stage

DEADLINE_S = 3.0
_SOFT_S = DEADLINE_S / 3
_SLOW_S = DEADLINE_S * 0.6
_TWIN_S = 0.05
_HEDGE_S, _LATE_S = 0.2, 0.4
_SHARDS = ("s0", "s1", "s2", "s3")
_HIT = "s1"
_TRIES = 30


class Mode(NamedTuple):
    """How a caller asks, and of which kind of pool."""

    name: str
    pool: str
    policy: Policy = STRICT


HEDGED = Mode("hedged", "double")
MODES = (
    Mode("strict", "single"),
    Mode("partial", "single", Policy(0.5)),
    Mode("first 3", "single", Policy(0.5, first_k=3)),
    Mode("soft deadline", "single", Policy(0.5, soft_s=_SOFT_S)),
    HEDGED,
    Mode("not idempotent", "once"),
)


class Cell(NamedTuple):
    """What a caller saw."""

    code: str
    reason: str
    answered: int
    expected: int
    complete: bool
    hit: str
    """The code of the shard that was hit, if it is named as missing."""
    share: float
    """How much of its deadline it took."""

    def __str__(self) -> str:
        """Without the time, and without what had answered before a failure, which is chance."""
        found = self.code
        if self.reason not in ("", "COVERAGE_NOT_MET"):
            found += f" ({self.reason})"
        if self.code == "OK":
            found += f", {self.answered} of {self.expected}"
        return found + (f", {_HIT} {self.hit}" if self.hit else "")


Cells = Mapping[tuple[str, str], list[Cell]]
"""By fault and mode."""


class Scene:
    """One fault with its pools."""

    def __init__(self, stage: Stage, name: str, house: House, victim: str, *, dead: str, hosts: Hosts) -> None:
        self.stage, self.name, self.victim, self.house, self.dead, self.hosts = stage, name, victim, house, dead, hosts
        self.pools: dict[str, Pool] = {}
        self.occupants: list[Pending] = []

    def make(self, source: str, **settings: int) -> list[Pool]:
        """The pools; `source` is where the shard that is hit is found first."""
        self.pools = {
            "single": self._pool("single", (source,), limits=settings),
            "double": self._pool("double", (source, "twin"), hedge_s=_HEDGE_S, limits=settings),
            "once": self._pool("once", (source,), idempotent=False, limits=settings),
        }
        return list(self.pools.values())

    def _pool(self, kind: str, hit: tuple[str, ...], others: str = "", **settings: Any) -> Pool:
        replicas = {shard: (others or ("h0", "h1")[i % 2],) for i, shard in enumerate(_SHARDS)} | {_HIT: hit}
        return Pool(
            f"{self.name.replace(',', '').replace(' ', '-')}.{kind}", replicas, timeout_s=DEADLINE_S, **settings
        )

    # Faults

    def tell(self, kind: Kind, **settings: float) -> None:
        self.house.tell(Behaviour(kind, **settings), self.victim)  # type: ignore[arg-type] # as Behaviour has them

    def link(self, mode: Link) -> None:
        self.stage.village.links[self.victim].set(mode)

    def point(self, *sources: str) -> None:
        """The pool file gives the shard these endpoints; who has a twin keeps that alone."""
        self._rewrite(lambda kind: ("twin",) if kind == "double" else sources)

    def bury(self) -> None:
        """Every endpoint of every shard is dead."""
        self._rewrite(lambda _: (self.dead,), self.dead)

    def _rewrite(self, hit: Callable[[str], tuple[str, ...]], others: str = "") -> None:
        for kind, pool in self.pools.items():
            again = self._pool(kind, hit(kind), others, hedge_s=pool.hedge_s, idempotent=pool.idempotent)
            self.pools[kind] = again
        self.stage.write(self.pools.values())

    def await_applied(self) -> None:
        """The root has the pools as the file and the names have them now."""
        links = self.stage.village.links
        for pool in self.pools.values():
            found = (self.hosts.resolved(one) for one in pool.replicas[_HIT])
            self.stage.await_endpoints(pool.name, _HIT, *(links[one].address if one in links else one for one in found))

    def occupy(self, caller: Caller) -> None:
        """As many calls as each pool may have are under way."""
        self.tell(Kind.STALL)
        alone = Policy(no_hedge=True)
        self.occupants = [caller.begin(pool, alone, mode="occupant") for pool in self.pools.values()]
        self.await_got(self.occupants)

    def was_first(self, attempts: Iterable[Any]) -> bool:
        """Whether the victim was asked, and not only beside the twin."""
        address = self.stage.village.address(self.victim)
        return any(one.address == address and one.kind == coverage_pb2.ATTEMPT_KIND_PRIMARY for one in attempts)

    def await_got(self, pending: Sequence[Pending]) -> None:
        """The victim has the calls."""
        wanted = {one.asked.request for one in pending}
        end = time.monotonic() + 30
        while not wanted <= {call.got.request for call in self.stage.story().calls if call.got.leaf == self.victim}:
            assert time.monotonic() < end, f"{self.victim} does not get its calls"
            time.sleep(0.02)


class Row(NamedTuple):
    """A fault: what is done before the calls, and, for what happens under them, after they have come."""

    name: str
    begin: Callable[[Scene, Caller], object] = lambda *_: None
    under_way: Callable[[Scene], object] | None = None
    early: bool = False
    """It changes whom the root knows, and takes a while."""
    reached: bool = True
    """The victim can be called."""
    holds: bool = False
    kills: bool = False
    named: bool = False
    """The victim is found by its name."""
    max_calls: int = 8192
    own_process: bool = False

    @property
    def in_turn(self) -> bool:
        """Whether hedged calls go one after the other, so that the hedges are not for want of a processor."""
        return self.reached and self.under_way is None


ROWS = (
    Row("none"),
    Row("refused", lambda s, _: s.stage.village.links[s.victim].refuse(), reached=False),
    Row("stopped process", lambda s, _: s.house.pause(), holds=True, own_process=True),
    Row("nothing passes", lambda s, _: s.link(Link.HALF_OPEN), holds=True),
    Row("slow", lambda s, _: s.tell(Kind.ANSWER, delay_s=_SLOW_S)),
    Row("first byte, then nothing", lambda s, _: s.link(Link.STALL), holds=True),
    Row("headers, then nothing", lambda s, _: s.tell(Kind.STALL)),
    Row("error at once", lambda s, _: s.tell(Kind.FAIL, code=code_pb2.UNAVAILABLE)),
    Row("internal error", lambda s, _: s.tell(Kind.FAIL, code=code_pb2.INTERNAL)),
    Row("flapping", lambda s, _: s.tell(Kind.FLAP)),
    Row("reply too large", lambda s, _: s.tell(Kind.OVERSIZE, size=4 * 1024 * 1024)),
    Row("corrupt reply", lambda s, _: s.tell(Kind.CORRUPT)),
    Row("half an answer", lambda s, _: s.tell(Kind.PART)),
    Row("overloaded leaf", lambda s, _: s.tell(Kind.FAIL, code=code_pb2.RESOURCE_EXHAUSTED)),
    Row("leaf refuses", lambda s, _: s.tell(Kind.FAIL, code=code_pb2.INVALID_ARGUMENT)),
    Row("late reply", lambda s, _: s.link(Link.LATE_REPLIES)),
    Row("killed under way", lambda s, _: s.tell(Kind.STALL), lambda s: s.house.kill(), kills=True, own_process=True),
    Row("pool file points elsewhere", lambda s, _: s.point(s.dead), early=True, reached=False),
    Row(
        "name resolves elsewhere",
        lambda s, _: s.hosts.move(s.victim, "127.0.0.9"),
        early=True,
        reached=False,
        named=True,
    ),
    Row("name resolves no more", lambda s, _: s.hosts.move(s.victim, ""), early=True, reached=False, named=True),
    Row("root overloaded", lambda s, caller: s.occupy(caller), reached=False, max_calls=4),
    Row("all down", lambda s, _: s.bury(), early=True, reached=False),
)
IN_TURN = ("strict", "partial", "soft deadline", "not idempotent", "hedged", "first 3")
"""How what is flapping is asked: the last leave it open whether the victim has got the call."""


class Matrix:
    """Plays it; a context that ends it."""

    def __init__(self, where: Path, rows: Sequence[Row] = ROWS) -> None:
        self._rows, self._where = rows, where
        self._open = ExitStack()
        self._hosts = Hosts(where / "hosts")
        self.stage: Stage
        self.scenes: dict[str, Scene] = {}
        self.asked: dict[tuple[str, str], list[Pending]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.stage = stack.enter_context(Stage(self._where, before=self._hosts.before))
            dead = stack.enter_context(socket.socket())
            dead.bind(("127.0.0.1", 0))  # and never listens: its port is nobody's
            self._build(f"127.0.0.1:{dead.getsockname()[1]}")
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _build(self, dead: str) -> None:
        village = self.stage.village
        village.build("h0", "h1", "twin").tell(Behaviour(delay_s=_TWIN_S), "twin")
        plain = {f"v{i}": row for i, row in enumerate(self._rows) if not (row.own_process or row.named)}
        shared = village.build(*plain, late_s=_LATE_S) if plain else None
        pools: list[Pool] = []
        for i, row in enumerate(self._rows):
            name = f"v{i}"
            house = shared if name in plain else village.build(name, host="127.0.0.2" if row.named else "127.0.0.1")
            assert house is not None
            scene = self.scenes[row.name] = Scene(self.stage, row.name, house, name, dead=dead, hosts=self._hosts)
            source = name
            if row.named:
                self._hosts.move(name, "127.0.0.2")
                source = f"dns:{self._hosts.name(name)}:{house.addresses[name].rpartition(':')[2]}"
            pools += scene.make(source, max_calls=row.max_calls)
        self.stage.open(*pools)

    def play(self) -> Cells:
        """The cells by fault and mode; most have one, a fault that is not always there has two."""
        caller = self.stage.caller()
        began = self._begin(caller)
        for row in self._rows:
            for mode in MODES if row.name != "flapping" else ():
                if mode is not HEDGED or not row.in_turn:
                    self.asked[row.name, mode.name] = [self._ask(caller, row, mode)]
        for row in self._rows:
            if row.under_way:
                scene = self.scenes[row.name]
                scene.await_got([self.asked[row.name, mode.name][0] for mode in MODES])
                row.under_way(scene)
        self._flap(caller)
        for row in self._rows:
            if row.in_turn and row.name != "flapping":
                self._hit(caller, row)
        cells = {key: [_cell(one) for one in pending] for key, pending in self.asked.items()}
        self._end(began)
        return cells

    def _begin(self, caller: Caller) -> Mapping[str, int]:
        """Begins all faults; when they began."""
        began = {}
        for early in (True, False):
            rows = [row for row in self._rows if row.early == early]
            self._warm(caller, rows)
            for row in rows:
                began[row.name] = boot_ns()
                row.begin(self.scenes[row.name], caller)
            for row in rows:
                if early:
                    self.scenes[row.name].await_applied()
        return began

    def _warm(self, caller: Caller, rows: Iterable[Row]) -> None:
        """Until of each victim and its twin the root knows which is the faster."""
        doubles = {row.name: self.scenes[row.name].pools["double"] for row in rows}
        for _ in range(_TRIES):
            for pending in [caller.begin(pool, mode="warm") for pool in doubles.values()]:
                assert pending.result().code == 0, pending.told
            doubles = {name: pool for name, pool in doubles.items() if not self._prefers_victim(pool)}
            if not doubles:
                return
        raise AssertionError(f"the victims of {list(doubles)} are not preferred")

    def _prefers_victim(self, pool: Pool) -> bool:
        """Whether the latencies that the root has seen say so; the twin's delay is in them."""
        [shard] = [shard for shard in self.stage.topology(pool.name).shards if shard.shard_id == _HIT]
        latency = {one.address: one.latency_duration.ToMicroseconds() for one in shard.endpoints}
        twin = latency.pop(self.stage.village.address("twin"))
        [victim] = latency.values()
        return bool(0 < victim < twin)

    def _ask(self, caller: Caller, row: Row, mode: Mode) -> Pending:
        return caller.begin(self.scenes[row.name].pools[mode.pool], mode.policy, mode=mode.name)

    def _flap(self, caller: Caller) -> None:
        """One after the other, twice in each mode."""
        modes = {mode.name: mode for mode in MODES}
        for row in self._rows:
            for name in IN_TURN if row.name == "flapping" else ():
                first = self._ask(caller, row, modes[name])
                first.result()
                second = self._ask(caller, row, modes[name])
                second.result()
                self.asked[row.name, name] = [first, second]

    def _hit(self, caller: Caller, row: Row) -> None:
        """Asks in the mode `hedged` until the victim was the first who was asked."""
        scene = self.scenes[row.name]
        pool = scene.pools[HEDGED.pool]
        for _ in range(_TRIES):
            pending = self._ask(caller, row, HEDGED)
            pending.result()
            self.asked[row.name, HEDGED.name] = [pending]
            [latest] = caller.recent(pool_id=pool.name, page_size=1)
            if scene.was_first(latest.attempts):
                return
        raise AssertionError(f"{row.name}: the victim is not asked")

    def _end(self, began: Mapping[str, int]) -> None:
        """Undoes what would keep the victims from telling how their calls ended, and waits until they have."""
        for row in self._rows:
            scene = self.scenes[row.name]
            for pending in scene.occupants:
                pending.result()
            if row.own_process and row.holds:
                scene.house.resume()
            if scene.victim in self.stage.village.links:
                scene.link(Link.PASS)
            hit = {leaf for pool in scene.pools.values() for leaf in pool.replicas[_HIT]} - {"twin"}
            self.stage.fault(row.name, began[row.name], *hit, scene.victim, holds=row.holds, kills=row.kills)
        self.stage.await_idle()
        self.stage.await_ended()


def _cell(pending: Pending) -> Cell:
    told, asked = pending.result(), pending.asked
    known = told.coverage
    hit = told.failures.get(_HIT)
    return Cell(
        code_pb2.Code.Name(told.code),
        told.reason,
        known.answered if known else 0,
        known.expected if known else 0,
        bool(known and known.complete),
        "" if hit is None else code_pb2.Code.Name(hit),
        (told.at - asked.at) / asked.timeout_ns,
    )


def table(cells: Cells) -> Iterator[str]:
    """For people, as Markdown: each cell with the share of the deadline that it took."""
    rows = list(dict.fromkeys(row for row, _ in cells))
    yield "| fault | " + " | ".join(mode.name for mode in MODES) + " |"
    yield "| --- " * (len(MODES) + 1) + "|"
    for row in rows:
        shown = (", then ".join(f"{cell}: {cell.share:.0%}" for cell in cells[row, mode.name]) for mode in MODES)
        yield f"| {row} | " + " | ".join(shown) + " |"
