"""The clocks of a simulated world: every machine has the same wall clock, which jumps; each boot has its own."""

from __future__ import annotations

from collections.abc import Callable

WALL_ZERO_MS = 1_700_000_000_000


class WallClock:
    """Time of day: the loop's time and what people and NTP did to it."""

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self.offset_ms = self._latest_ms = 0

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return WALL_ZERO_MS + int(self._time() * 1000) + self.offset_ms

    def jump(self, ms: int) -> None:
        """Steps forward, or back."""
        self.offset_ms += ms
        self._latest_ms = max(self._latest_ms, self.offset_ms)

    def settle(self) -> None:
        """Goes to the latest it ever was ahead, so that nothing that was due is in the future again."""
        self.offset_ms = self._latest_ms


class BootClock:
    """Milliseconds of one boot; those of two boots can't be compared."""

    def __init__(self, time: Callable[[], float], zero_ms: int) -> None:
        self._time, self.zero_ms = time, zero_ms

    def now_ms(self) -> int:
        """Milliseconds."""
        return int(self._time() * 1000) + self.zero_ms
