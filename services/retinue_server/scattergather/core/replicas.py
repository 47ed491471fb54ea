"""The endpoints of a shard: what they cost lately, and who is asked next."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from retinue_server.scattergather.engine import Line

_NEW = 0.3
"""The weight of the latest latency in the moving average."""
_HALF_LIFE_S = 5.0
"""An endpoint that nobody asks is forgiven half of its latency in this time, so that it is tried again."""


class Replica:
    """One endpoint of a pool, shared by the shards that it serves."""

    __slots__ = ("_at", "_latency_s", "address", "in_flight", "line", "seen")

    def __init__(self, address: str, line: Line) -> None:
        self.address, self.line = address, line
        self.in_flight = 0
        self.seen = False
        """Whether any call has ended."""
        self._latency_s = self._at = 0.0

    def observe(self, seconds: float, now: float) -> None:
        """A call ended after so long."""
        before = self._latency_s if now - self._at < 1 else self.latency_s(now)
        self._latency_s = before + _NEW * (seconds - before) if self.seen else seconds
        self._at, self.seen = now, True

    def latency_s(self, now: float) -> float:
        """The moving average, as far as it is still believed."""
        idle = now - self._at
        return self._latency_s if idle < 1 else self._latency_s * 0.5 ** (idle / _HALF_LIFE_S)

    def cost(self, now: float) -> float:
        """What is expected of one more call: its latency behind those under way (peak EWMA, as in Finagle and brpc)."""
        return self.latency_s(now) * (self.in_flight + 1)


def choose(
    replicas: Sequence[Replica], tried: Sequence[Replica], now: float, draw: Callable[[], float], max_in_flight: int
) -> Replica | None:
    """The better of two drawn at random (p2c) of those not tried yet; connected ones first. None if nobody is left."""
    if len(replicas) == 1:
        [only] = replicas
        return only if not tried and only.in_flight < max_in_flight else None
    free = [one for one in replicas if one not in tried and one.in_flight < max_in_flight]
    free = [one for one in free if one.line.connected] or free
    if len(free) < 2:  # noqa: PLR2004 - two to choose from
        return free[0] if free else None
    first = int(draw() * len(free))
    second = int(draw() * (len(free) - 1))
    if second >= first:
        second += 1
    one, other = free[first], free[second]
    one_cost, other_cost = one.cost(now), other.cost(now)
    if one_cost == other_cost:
        return one if one.in_flight <= other.in_flight else other
    return one if one_cost < other_cost else other
