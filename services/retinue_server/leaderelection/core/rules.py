"""The arithmetic of deadlines, all in whole milliseconds on one boot clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retinue_server.leaderelection.engine import Record

GUARD = 10
"""A tenth of every lease is not used: it covers clocks whose rates differ by up to 5 %, since for a guard g, a lease D
and a difference of rates r on both sides g >= 2rD / (1 + r) must hold."""
RENEWALS = 3
"""How many renewals fit into a lease."""
RETRY_MS = 1_000
"""How soon a renewal that failed is tried again, at most."""


def guarded(ms: int) -> int:
    """What may be used of a duration."""
    return ms - -(-ms // GUARD)


def renew_after(lease_ms: int) -> int:
    """How long after the last stamp to renew."""
    return lease_ms // RENEWALS


def retry_after(lease_ms: int) -> int:
    """How long after a failed renewal to try again."""
    return min(RETRY_MS, lease_ms // (2 * RENEWALS))


def is_over(record: Record, unchanged_ms: int) -> bool:
    """Whether a record's lease is over, for one who has seen it unchanged for so long.

    By a store that can't tell itself, its whole length must have been watched; the guard was taken off by its holder.
    """
    return not record.candidate_id or unchanged_ms >= over_in(record)


def over_in(record: Record) -> int:
    """How long after it was read a record that does not change is over."""
    return record.lease_ms if record.left_ms is None else record.left_ms
