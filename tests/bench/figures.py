"""Medians, ranges, ratios, percentiles, and whether every task was delivered exactly once. No I/O."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class Spread:
    """The median of some rounds and their range."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError for no values."""
    if not values:
        raise ValueError("cannot tell the median of nothing")
    return Spread(median(values), min(values), max(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times theirs ours is, taken round by round: both were played in the same round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the smallest value that at least `share` (0-1) of all do not exceed."""
    if not values:
        raise ValueError("cannot tell a percentile of nothing")
    ordered = sorted(values)
    rank = -(-len(ordered) * share // 1)  # rounded up
    return ordered[min(max(int(rank), 1), len(ordered)) - 1]


def undelivered(expected: range, handled: Iterable[int]) -> str:
    """What is wrong with a delivery; empty when every expected task was handled exactly once and no other."""
    times = Counter(handled)
    missing = sum(number not in times for number in expected)
    foreign = sum(number not in expected for number in times)
    again = sum(count > 1 for count in times.values())
    wrong = {"missing": missing, "foreign": foreign, "handled more than once": again}
    return ", ".join(f"{count} {what}" for what, count in wrong.items() if count)
