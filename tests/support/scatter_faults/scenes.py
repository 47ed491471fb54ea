"""The faults of the table and the modes in which they are met.

Each has pools of its own, on four shards of which one is hit: `s1`, whose leaf is the fault's victim. In the mode
`hedged` a twin has that shard, too; it is slower, so that the victim is asked first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from google.rpc import code_pb2

from retinue.scattergather.v1 import coverage_pb2
from support.faults.proxy import Mode as Link
from support.scatter_faults.behaviour import Behaviour, Kind
from support.scatter_faults.callers import Caller, Pending
from support.scatter_faults.hosts import Hosts
from support.scatter_faults.leaves import House
from support.scatter_faults.pools import STRICT, Policy, Pool
from support.scatter_faults.stage import Stage

DEADLINE_S = 3.0
SOFT_S = DEADLINE_S / 3
SLOW_S = DEADLINE_S * 0.6
TWIN_S = 0.05
HEDGE_S, LATE_S = 0.2, 0.4
_SHARDS = ("s0", "s1", "s2", "s3")
HIT = "s1"
_STUCK_S = 60.0


class Mode(NamedTuple):
    """How a caller asks, and of which kind of pool."""

    name: str
    pool: str
    policy: Policy = STRICT


STRICTLY = Mode("strict", "single")
PARTIAL = Mode("partial", "single", Policy(0.5))
FIRST = Mode("first 3", "single", Policy(0.5, first_k=3))
SOFT = Mode("soft deadline", "single", Policy(0.5, soft_s=SOFT_S))
HEDGED = Mode("hedged", "double")
ONCE = Mode("not idempotent", "once")
MODES = (STRICTLY, PARTIAL, FIRST, SOFT, HEDGED, ONCE)
IN_TURN = (STRICTLY, PARTIAL, SOFT, ONCE, HEDGED, FIRST)
"""How what is flapping is asked: the last leave it open whether the victim has got the call."""


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
        return found + (f", {HIT} {self.hit}" if self.hit else "")

    @property
    def brief(self) -> str:
        """For a table: an answer by how much of it came, and what the shard lacked; an error by its code."""
        reason = f" ({self.reason})" if self.reason not in ("", "COVERAGE_NOT_MET") else ""
        if self.code == "OK":
            found = f"OK, {self.answered} of {self.expected}" + (f": {self.hit}" if self.hit else "")
        else:
            found = self.code + (f": {self.hit}" if self.hit not in ("", "CANCELLED", self.code) else reason)
        return f"{found}; {self.share:.0%}"


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
            "double": self._pool("double", (source, "twin"), hedge_s=HEDGE_S, limits=settings),
            "once": self._pool("once", (source,), idempotent=False, limits=settings),
        }
        return list(self.pools.values())

    def _pool(self, kind: str, hit: tuple[str, ...], others: str = "", **settings: Any) -> Pool:
        replicas = {shard: (others or ("h0", "h1")[i % 2],) for i, shard in enumerate(_SHARDS)} | {HIT: hit}
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
            found = [address for one in pool.replicas[HIT] if (address := self.hosts.resolved(one))]
            self.stage.await_endpoints(pool.name, HIT, *(links[one].address if one in links else one for one in found))

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
        self._await(lambda: all(self._victims(one) for one in pending), "the victim has its calls")

    def await_rest(self, pending: Pending) -> None:
        """It is answered, or waits for the victim alone: others have the processor then."""
        others = len(_SHARDS) - 1
        self._await(lambda: pending.done or self._ended(pending) >= others, "all but the victim have answered")

    def _victims(self, pending: Pending) -> bool:
        return any(
            call.got.leaf == self.victim for call in self.stage.story().by_request.get(pending.asked.request, ())
        )

    def _ended(self, pending: Pending) -> int:
        reader = self.stage.reader
        reader.look()
        return sum(serial in reader.ended for serial in reader.got[pending.asked.request])

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _STUCK_S
        while not condition():
            assert time.monotonic() < end, f"{self.name}: never: {what}"
            time.sleep(0.002)


class Row(NamedTuple):
    """A fault: what is done before the calls, and, for what happens under them, after they have come."""

    name: str
    begin: Callable[[Scene, Caller], object] = lambda *_: None
    under_way: Callable[[Scene], object] | None = None
    early: bool = False
    """It changes whom the root knows, and takes a while."""
    flaps: bool = False
    reached: bool = True
    """The victim can be called."""
    holds: bool = False
    kills: bool = False
    named: bool = False
    """The victim is found by its name."""
    max_calls: int = 8192
    own_process: bool = False


ROWS = (
    Row("none"),
    Row("refused", lambda s, _: s.stage.village.links[s.victim].refuse(), reached=False),
    Row("stopped process", lambda s, _: s.house.pause(), holds=True, own_process=True),
    Row("nothing passes", lambda s, _: s.link(Link.HALF_OPEN), holds=True),
    Row("slow", lambda s, _: s.tell(Kind.ANSWER, delay_s=SLOW_S)),
    Row("first byte, then nothing", lambda s, _: s.link(Link.STALL), holds=True),
    Row("headers, then nothing", lambda s, _: s.tell(Kind.STALL)),
    Row("error at once", lambda s, _: s.tell(Kind.FAIL, code=code_pb2.UNAVAILABLE)),
    Row("internal error", lambda s, _: s.tell(Kind.FAIL, code=code_pb2.INTERNAL)),
    Row("flapping", lambda s, _: s.tell(Kind.FLAP), flaps=True),
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
