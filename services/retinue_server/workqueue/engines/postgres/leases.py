"""The leases that this coordinator granted, known by heart, so that settling them in time reads nothing.

What is known here may be wrong: another coordinator may have changed the task since. So each row comes with the
transaction that wrote it (PostgreSQL's `xmin`), and whoever uses it writes on condition that the row is still that one
(`end` and `prove` in statements.sql); if not, the database undoes the transaction, and the steps run again without
this.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retinue_server.workqueue.engine import TaskRow

_MOST = 16_384
_PATIENCE_S = 1.0


Known = tuple["TaskRow", int]
"""A row as it was committed, and by which transaction."""


class Leases:
    """Those of one coordinator, by seq; for all its writers."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._known: dict[int, Known] = {}
        self._taken: set[int] = set()
        """What a writer has taken whose transaction has not ended."""

    def take(self, seqs: Collection[int]) -> dict[int, Known]:
        """What is known of them, and no longer is: whoever takes it changes it, and gives back the seqs at the end.

        Waits for writers that have taken some before: nothing is locked by then, and outcomes take effect in order. Not
        for ever: that one may wait in the database for what this one has locked.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._taken.isdisjoint(seqs), _PATIENCE_S)
            taken = {seq: self._known.pop(seq) for seq in seqs if seq in self._known}
            self._taken.update(taken)
        return taken

    def give_back(self, seqs: Collection[int]) -> None:
        """The transaction that took them has ended, one way or the other."""
        if seqs:
            with self._lock:
                self._taken.difference_update(seqs)
                self._lock.notify_all()

    def put(self, rows: Iterable[TaskRow], version: int) -> None:
        """Rows that a transaction wrote; the oldest of too many are forgotten."""
        with self._lock:
            self._known.update({row.seq: (row, version) for row in rows})
            while len(self._known) > _MOST:
                del self._known[next(iter(self._known))]
