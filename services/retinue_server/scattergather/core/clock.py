"""Time: a monotonic clock for everything that counts, the wall clock for people, and timers."""

from __future__ import annotations

import asyncio
import math
import os
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Timer(Protocol):
    """Something that will happen."""

    def cancel(self) -> None:
        """It will not; also after it has."""


class Clock(Protocol):
    """Where time comes from; tests give their own."""

    def now(self) -> float:
        """Monotonic seconds."""

    def wall_ms(self) -> int:
        """Milliseconds since the epoch, for people."""

    def at(self, when: float, do: Callable[[], None]) -> Timer:
        """Does it once the clock shows `when`."""

    def soon(self, do: Callable[[], None]) -> object:
        """Does it after whatever is due now; other threads that want the processor get it first."""


class LoopClock:
    """The event loop's, but finer than uvloop's `time`, which has milliseconds; to be made while it runs."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.now = time.monotonic

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def at(self, when: float, do: Callable[[], None]) -> Timer:
        """Never too early: uvloop counts whole milliseconds from the one that has begun."""
        milliseconds = math.ceil(when * 1000) - math.floor(self.now() * 1000)
        return self._loop.call_later(max(milliseconds, 0) / 1000, do)

    def soon(self, do: Callable[[], None]) -> object:
        os.sched_yield()  # gRPC's thread may have to share a processor with the loop
        return self._loop.call_soon(do)
