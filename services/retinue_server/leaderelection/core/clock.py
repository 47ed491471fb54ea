"""Time: wall time for people, boot time for deadlines, and waiting."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple, Protocol


class Instant(NamedTuple):
    """Now, on both clocks, in milliseconds."""

    wall_ms: int
    boot_ms: int


class Clock(Protocol):
    """Where time comes from; tests give their own."""

    def now(self) -> Instant:
        """Now."""

    async def wait(self, woken: asyncio.Event, until_ms: int | None) -> None:
        """Returns when the event is set or the boot clock shows that time."""


class SystemClock:
    """The machine's: the boot clock counts suspended time and never steps."""

    def now(self) -> Instant:
        return Instant(time.time_ns() // 1_000_000, time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000)

    async def wait(self, woken: asyncio.Event, until_ms: int | None) -> None:
        if until_ms is None:
            await woken.wait()
            return
        left = (until_ms - self.now().boot_ms) / 1000
        if left > 0:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(left, woken.set)
            try:
                await woken.wait()
            finally:
                timer.cancel()
        else:
            await asyncio.sleep(0)
