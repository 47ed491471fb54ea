"""Until when a leadership is valid, by the app's own boot clock. No I/O.

The clock counts suspended time and is never stepped. Each message is stamped *before* it is written, and what the
server grants counts from the stamp of the message it answers: an answer that comes late grants less, never more.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Where there is no such clock (macOS), the monotonic one of the system counts suspended time.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_seconds() -> float:
    """Seconds since the machine started, suspended ones included."""
    return time.clock_gettime(_CLOCK)


class Deadline:
    """When what one session was granted is over. It only moves forward; a new term begins with reset().

    Sequences count the messages of one stream: 0 is `start`, then come the heartbeats.
    """

    def __init__(self, now: Callable[[], float] = boot_seconds) -> None:
        self.now = now
        self.at = float("-inf")
        """The deadline, in boot seconds."""
        self._stamps: dict[int, float] = {}
        self._sequence = 0

    @property
    def remaining(self) -> float:
        """Seconds left; below 0 when it is over."""
        return self.at - self.now()

    def start(self) -> None:
        """The first message of a stream is about to be written. Answers of earlier streams can't be told any more."""
        self._sequence = 0
        self._stamps = {0: self.now()}

    def beat(self) -> int:
        """The sequence of the heartbeat that is about to be written."""
        self._sequence += 1
        self._stamps[self._sequence] = self.now()
        return self._sequence

    def grant(self, sequence: int, seconds: float) -> None:
        """The server's answer to that message. One to a message that was never sent grants nothing."""
        stamp = self._stamps.get(sequence)
        if stamp is not None:
            self.at = max(self.at, stamp + seconds)
            self._stamps = {known: at for known, at in self._stamps.items() if known >= sequence}

    def reset(self) -> None:
        """Another term: what was granted for the last one does not count for it."""
        self.at = float("-inf")
