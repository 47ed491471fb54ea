"""Where to begin looking, so that scans need not wade through dead entries of an index.

While anybody's transaction stays open, vacuum can't remove what was leased or settled since; each scan from an index's
beginning would pass over all of it. These marks are hints, shared by the writers of a coordinator: what lies before one
is looked for again after a while, and whenever nothing is found behind it.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

_SHARE = 20
"""Scans from the beginning take one part in so many of the time, once they are slow."""
_SLOW_S = 0.005
_SLACK_MS = 60_000
"""How long after its time a row may still come into the tables."""
_ALL_AGAIN_S = 60.0
BEGINNING = -(1 << 62)


class Place(NamedTuple):
    """Behind this task of its queue, in the order of leasing."""

    priority: int
    seq: int


class Marks:
    """All marks of one coordinator."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[str, Place] = {}
        self._again: dict[str, float] = {}
        self._swept: dict[str, tuple[int, float]] = {}

    def place(self, queue_id: str) -> Place | None:
        """Where to go on leasing; None = from the beginning."""
        with self._lock:
            late = time.monotonic() >= self._again.get(queue_id, 0)
            return None if late else self._places.get(queue_id)

    def leased_upto(self, queue_id: str, last: Place | None, full_scan_s: float | None) -> None:
        """Up to where tasks were just leased (None = to the end), and how long a scan from the beginning took."""
        with self._lock:
            if full_scan_s is not None:
                slow = full_scan_s >= _SLOW_S
                self._again[queue_id] = time.monotonic() + _SHARE * full_scan_s if slow else 0
            if last is None:
                self._places.pop(queue_id, None)
            else:
                self._places[queue_id] = last

    def ready(self, queue_id: str, priority: int, seq: int) -> None:
        """A task became ready: behind the mark it is found anyway."""
        with self._lock:
            place = self._places.get(queue_id)
            if place is not None and (-priority, seq) <= (-place.priority, place.seq):
                del self._places[queue_id]

    def floor(self, kind: str, now_ms: int) -> int:
        """The time before which all of a kind was swept."""
        with self._lock:
            swept_ms, again = self._swept.get(kind, (now_ms + 1, 0.0))
            return BEGINNING if now_ms < swept_ms or time.monotonic() >= again else swept_ms - _SLACK_MS

    def swept(self, kind: str, now_ms: int, floor: int) -> None:
        """All of a kind between the floor and now was found."""
        with self._lock:
            _, again = self._swept.get(kind, (0, 0.0))
            if floor == BEGINNING:
                again = time.monotonic() + _ALL_AGAIN_S
            self._swept[kind] = (now_ms, again)
