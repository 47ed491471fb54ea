"""Notices when the machine has no time for the harness: what takes long then takes long for want of a processor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from support.history.recorder import boot_ns

NO_PROCESSOR = "no processor"
"""The kind of such a fault."""
_BEAT_S = 0.05
_LATE_NS, _CALM_NS = 300_000_000, 1_000_000_000


class Pulse:
    """A thread that wants to run every 50 ms, and tells of the times when it could not for much longer.

    Such a time is over when it has run as it wants to for a second.
    """

    def __init__(self, stalled: Callable[[int], None]) -> None:
        """`stalled` is given when it began; it has just ended."""
        self._stalled = stalled
        self.began: int | None = None
        """When a time began that is not over."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        last = late = boot_ns()
        while not self._over.is_set():
            time.sleep(_BEAT_S)
            now = boot_ns()
            if now - last > _LATE_NS:
                self.began, late = self.began or last, now
            elif self.began is not None and now - late > _CALM_NS:
                self._stalled(self.began)
                self.began = None
            last = now
