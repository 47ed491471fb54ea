"""Notices when the machine has no time for the harness: what takes long then takes long for want of a processor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from support.history.recorder import boot_ns

_BEAT_S = 0.05
_LATE_NS = 300_000_000


class Pulse:
    """A thread that wants to run every 50 ms, and tells of the times when it could not for much longer."""

    def __init__(self, stalled: Callable[[int], None]) -> None:
        """`stalled` is given when it began; it has just ended."""
        self._stalled = stalled
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        last = boot_ns()
        while not self._over.is_set():
            time.sleep(_BEAT_S)
            now = boot_ns()
            if now - last > _LATE_NS:
                self._stalled(last)
            last = now
