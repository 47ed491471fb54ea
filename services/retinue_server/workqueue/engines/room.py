"""How much of a file system may be filled: what is free less a reserve, in which work that is there can still end.

New data is refused before the disk is full, so that leases, extensions, completions, failures, releases and sweeps go
on (beanstalkd and tuber keep disk back for the same). Looking costs two cheap calls, ten times a second at most;
between two looks what was let in is counted. A change of the condition is one line in the log.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from retinue_server.runtime.errors import Reason, ResourceExhausted
from retinue_server.workqueue.engine import Room

log = logging.getLogger(__name__)

RESERVE_BYTES = 64 * 1024**2
_SMALL_DISK = 8
"""Of a small disk no more than this part is held back."""
_LOG_SHARE = 4
"""Free pages in a file help only while this part of the reserve is free outside: what is written passes the log."""
_LOOK_S = 0.1
_HOLD_S = 1.0
"""How long nothing is let in after the disk ran out, whatever is said to be free (a quota is not seen from here)."""
_RETRY_MS = 5_000


class DiskRoom:
    """Lets new data of one kind in, or refuses it. `spare` gives what is free inside the files; any thread may ask."""

    def __init__(self, directory: Path, reserve_bytes: int, what: str, spare: Callable[[], int] = lambda: 0) -> None:
        self._directory, self._reserve_bytes, self._what, self._spare = directory, reserve_bytes, what, spare
        self._lock = threading.Lock()
        self._report = Room(0, admitting=True)
        self._left = 0
        """What may still be let in until the next look."""
        self._reopen_at = 0
        self._look_again = self._closed_until = 0.0
        self._ran_out = False
        self.tight = False
        """Whether so little is free outside the files that what is free inside them is of no use."""

    @property
    def report(self) -> Room:
        """As it was looked at last."""
        return self._report

    def claim(self, size: int) -> None:
        """Lets `size` bytes in; raises ResourceExhausted (DISK_FULL) when they would eat into the reserve."""
        with self._lock:
            self._look_if_due()
            if self._report.admitting and self._left < size:
                self._look()
                if self._left < size:
                    self._reopen_at = size
                    self._close("the rest is kept for work that is there")
            if not self._report.admitting:
                raise _full(f"cannot take in {self._what}: the disk is nearly full; what is there can be worked off")
            self._left -= size

    def look(self) -> None:
        """Looks, if the last time was not just now."""
        with self._lock:
            self._look_if_due()

    def ran_out(self) -> ResourceExhausted:
        """The disk is full in earnest: nothing is let in for a while. What to tell the caller."""
        with self._lock:
            if not self._ran_out:
                self._close("the disk is full and nothing can be written")
            self._ran_out = True
            self._closed_until = time.monotonic() + _HOLD_S
        return _full("cannot write: the disk is full; nothing was changed")

    def _look_if_due(self) -> None:
        if time.monotonic() >= self._look_again:
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        self._look_again = now + _LOOK_S
        disk = os.statvfs(self._directory)
        reserve = min(self._reserve_bytes, disk.f_blocks * disk.f_frsize // _SMALL_DISK)
        outside = disk.f_bavail * disk.f_frsize
        self.tight = outside < reserve // _LOG_SHARE
        free = outside + (0 if self.tight else self._spare())
        self._left = free - reserve
        self._report = Room(free, self._report.admitting)
        margin = self._reopen_at + max(reserve // 8, 1024**2)  # else it would open and close all the time
        if not self._report.admitting and now >= self._closed_until and self._left >= margin:
            self._open()

    def _close(self, why: str) -> None:
        self._report = Room(self._report.free_bytes, admitting=False)
        free_mib = self._report.free_bytes / 1024**2
        log.warning("no more %s are taken in: %.1f MiB are free in %s; %s", self._what, free_mib, self._directory, why)

    def _open(self) -> None:
        self._report = Room(self._report.free_bytes, admitting=True)
        self._ran_out = False
        log.warning("%s are taken in again: there is room in %s", self._what, self._directory)


def _full(message: str) -> ResourceExhausted:
    return ResourceExhausted(message, reason=Reason.DISK_FULL, retry_ms=_RETRY_MS)


def is_full(error: BaseException) -> bool:
    """Whether an OSError says that the disk, or a quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
