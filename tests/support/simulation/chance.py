"""Everything that is left to chance in a simulated world, drawn from one seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Chance:
    """The same seed draws the same numbers, whatever the process and its hash seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.fraction = self._random.random
        """A number in [0, 1)."""
        self.bits = self._random.getrandbits
        """So many random bits."""

    def happens(self, probability: float) -> bool:
        """True with that probability; draws nothing for what never happens."""
        return probability > 0 and self.fraction() < probability

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + self.fraction() * (high - low)

    def whole(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return low + int(self.fraction() * (high - low + 1))

    def among(self, items: Sequence[T]) -> T:
        """One of them."""
        return items[int(self.fraction() * len(items))]
