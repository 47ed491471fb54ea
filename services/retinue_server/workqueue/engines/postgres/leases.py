"""The leases that this coordinator granted, known by heart, so that settling them in time reads nothing.

What is known here may be wrong: another coordinator may have changed the task since. So each row comes with the
transaction that wrote it (PostgreSQL's `xmin`), and whoever uses it writes on condition that the row is still that one
(`end` and `prove` in statements.sql); if not, the database undoes the transaction, and the steps run again without it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from retinue_server.workqueue.engine import TaskRow

_MOST = 16_384
_PATIENCE_S = 1.0
"""How long to wait for another writer's commit at most: it might itself wait for a row that this one has locked."""


class Known(NamedTuple):
    """A row as it was committed, and by which transaction."""

    row: TaskRow
    version: int


class Leases:
    """Those of one coordinator, by seq; for all its writers."""

    def __init__(self) -> None:
        self._settled = threading.Condition()
        self._known: dict[int, Known] = {}
        self._takers: dict[int, object] = {}
        """Whose transaction, not yet committed, goes by what was known of a task."""

    def take(self, seqs: Iterable[int], taker: object) -> dict[int, Known]:
        """What is known of them, and no longer is: whoever takes it changes it.

        Waits for the commits of other takers: nothing is locked that is known by heart, and the later one's must not
        come first.
        """
        wanted = list(seqs)
        with self._settled:
            self._settled.wait_for(lambda: not self._taken_by_others(wanted, taker), _PATIENCE_S)
            found = {seq: known for seq in wanted if (known := self._known.pop(seq, None))}
            self._takers.update(dict.fromkeys(found, taker))
        return found

    def _taken_by_others(self, seqs: Iterable[int], taker: object) -> bool:
        return bool(self._takers) and any(self._takers.get(seq, taker) is not taker for seq in seqs)

    def done(self, taker: object) -> None:
        """Its transaction has ended, either way."""
        with self._settled:
            self._takers = {seq: other for seq, other in self._takers.items() if other is not taker}
            self._settled.notify_all()

    def put(self, rows: Iterable[TaskRow], version: int) -> None:
        """Rows that a transaction wrote; the oldest of too many are forgotten."""
        with self._settled:
            self._known.update((row.seq, Known(row, version)) for row in rows)
            while len(self._known) > _MOST:
                del self._known[next(iter(self._known))]
