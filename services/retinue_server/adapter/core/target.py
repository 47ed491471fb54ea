"""One target: when it is collected, how it does, what is shown of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from retinue_server.adapter.core.points import SIGNALS, Signal
from retinue_server.adapter.core.spec import State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from retinue_server.adapter.core.points import AnyFamily
    from retinue_server.adapter.core.spec import Spec

_UNASKED = [Signal(None, "nothing was collected yet", "") for _ in SIGNALS]


class Shown(msgspec.Struct, frozen=True):
    """What a collection left: the latest that is good."""

    families: Sequence[AnyFamily] = ()
    signals: Sequence[Signal] = ()
    time_ms: int = 0
    rates: Sequence[float | None] = (None, None)
    """Of requests and errors, per second."""
    stale: bool = True
    """Too old for `/metrics`, or there never was any."""

    @property
    def series(self) -> int:
        """How many are shown."""
        return 0 if self.stale else sum(family.count for family in self.families)


class Status(msgspec.Struct, frozen=True):
    """How a target does."""

    state: State = State.PENDING
    message: str = ""
    last_ms: int = 0
    success_ms: int = 0
    took_ms: int = 0
    rejected: Mapping[str, int] = {}
    examples: Mapping[str, str] = {}
    received: int = 0
    dropped: int = 0
    address: str = ""


class Target:
    """See the module. What it shows changes in `succeeded`, `failed` and `expire` alone."""

    def __init__(self, spec: Spec, *, from_file: bool = False, generation: int = 0) -> None:
        self.spec, self.from_file, self.generation = spec, from_file, generation
        self.status, self.shown = Status(), Shown(signals=_UNASKED)
        self.collected = asyncio.Event()
        """After the first collection, however it went."""
        self.news = asyncio.Event()
        """What tells has told something."""
        self.collections = 0

    @property
    def is_stale(self) -> bool:
        """Whether nothing of it is shown on `/metrics`."""
        return self.shown.stale

    def succeeded(
        self,
        families: Sequence[AnyFamily],
        signals: Sequence[Signal],
        *,
        now_ms: int,
        took_ms: int,
        rejected: Mapping[str, int],
        examples: Mapping[str, str],
        limited: bool,
    ) -> None:
        """A collection brought these."""
        total, before = sum(rejected.values()), sum(self.status.rejected.values())
        new = total - before if total >= before else total  # a new worker counts anew
        state = State.LIMITED if limited else State.DEGRADED if new > 0 else State.UP
        why = ""
        if state is not State.UP:
            why = "; ".join(
                f"{reason}: {count}, such as {examples.get(reason, '')}" for reason, count in rejected.items()
            )
        self.shown = Shown(families, signals, now_ms, self._rates(signals, now_ms), stale=False)
        self.status = Status(
            state, why[:1000], now_ms, now_ms, took_ms, rejected, examples, address=self.status.address
        )
        self._end()

    def failed(self, why: str, *, now_ms: int, took_ms: int, misconfigured: bool, stale_after_ms: int) -> None:
        """It failed; what was good stands until it is too old."""
        before = self.status
        gone = not before.success_ms or now_ms - before.success_ms >= stale_after_ms
        state = State.MISCONFIGURED if misconfigured else State.DOWN if gone else State.STALE
        if gone:
            absent = [Signal(None, f"it is not collected: {why}"[:300], "") for _ in SIGNALS]
            self.shown = Shown(self.shown.families, absent, self.shown.time_ms)
        self.status = msgspec.structs.replace(before, state=state, message=why, last_ms=now_ms, took_ms=took_ms)
        self._end()

    def _end(self) -> None:
        self.collections += 1
        self.collected.set()

    def _rates(self, signals: Sequence[Signal], now_ms: int) -> list[float | None]:
        """How fast requests and errors grew since the last good collection; after a reset, nothing is known."""
        before, rates = self.shown, list[float | None]()
        for index in range(2):
            now, then = signals[index].value, before.signals[index].value
            known = isinstance(now, float | int) and isinstance(then, float | int) and now_ms > before.time_ms
            grown = now - then if known else -1  # type: ignore[operator] # both are numbers
            rates.append(grown * 1000 / (now_ms - before.time_ms) if grown >= 0 else None)
        return rates
