"""The leases that this coordinator granted, known by heart, so that settling them in time reads nothing.

What is known here may be wrong: another coordinator may have changed the task since. So each row comes with the
transaction that wrote it (PostgreSQL's `xmin`), and whoever uses it writes on condition that the row is still that one
(`end` and `prove` in statements.sql); if not, the database undoes the transaction, and the steps run again without
this.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from retinue_server.workqueue.engine import TaskRow

_MOST = 16_384


class Known(NamedTuple):
    """A row as it was committed, and by which transaction."""

    row: TaskRow
    version: int


class Leases:
    """Those of one coordinator, by seq; for all its writers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, Known] = {}

    def take(self, seqs: Iterable[int]) -> dict[int, Known]:
        """What is known of them, and no longer is: whoever takes it changes it."""
        with self._lock:
            found = [(seq, self._known.pop(seq, None)) for seq in seqs]
        return {seq: known for seq, known in found if known}

    def put(self, rows: Iterable[TaskRow], version: int) -> None:
        """Rows that a transaction wrote; the oldest of too many are forgotten."""
        with self._lock:
            self._known.update((row.seq, Known(row, version)) for row in rows)
            while len(self._known) > _MOST:
                del self._known[next(iter(self._known))]
