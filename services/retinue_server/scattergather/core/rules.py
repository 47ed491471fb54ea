"""Arithmetic of scatter/gather: deadlines, routes, codes, and the delay of hedges."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from math import log2
from typing import TYPE_CHECKING

from retinue_server.runtime.errors import Code

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RESERVE_SHARE = 0.05
RESERVE_S = 0.005
MAX_DEPTH = 8
"""Roots above a leaf."""

REFUSALS = frozenset({Code.INVALID_ARGUMENT, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED})
"""No replica would say otherwise: the request ends with them."""
RETRYABLE = frozenset({Code.UNAVAILABLE, Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS, Code.ABORTED})
"""Another replica might do better. Not after a time-out, nor where a leaf has too much to do already."""
CODES = frozenset(Code) - {Code.OK, Code.CANCELLED}
"""What a leaf may fail with. Others are unknown: CANCELLED, too, since nobody here cancelled the call."""
_ROUNDING = 1e-12
"""0.55 of 20 leaves are 11, although the product of the doubles is a little more."""
_WORST_FIRST = (Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE)


_FINE = 32
"""Buckets of latencies for each doubling."""
_SHORTEST_S, _LONGEST_S = 2.0**-16, 2.0**12
"""15 µs and an hour, the longest that a call may take."""
_LOWEST = int(log2(_SHORTEST_S)) * _FINE
_BUCKETS = int(log2(_LONGEST_S)) * _FINE - _LOWEST


def leaf_timeout_s(remaining_s: float) -> float:
    """What leaves have of what is left: a twentieth, 5 ms at least, is kept for merging."""
    return remaining_s - max(RESERVE_S, remaining_s * RESERVE_SHARE)


def needed(min_coverage: float, expected: int) -> int:
    """How many of the expected leaves must have answered: none only where nothing is asked for."""
    return max(1, math.ceil(min_coverage * expected * (1 - _ROUNDING))) if min_coverage > 0 else 0


def combined(codes: Iterable[int]) -> Code:
    """The code of a request whose shards failed with these."""
    seen = set(codes)
    return next((code for code in _WORST_FIRST if code in seen), Code.INTERNAL)


def route(key: str, shard_ids: Sequence[str]) -> str:
    """The shard to which a key belongs: rendezvous hashing (Thaler and Ravishankar, 1998) by SHA-256."""
    prefix = key.encode() + b"\0"
    return max(shard_ids, key=lambda shard_id: hashlib.sha256(prefix + shard_id.encode()).digest()[:8])


class LatencyWindow:
    """The latest latencies of a pool, counted in buckets 2 % wide: taking one in must cost little."""

    def __init__(self, size: int = 2048) -> None:
        self._size = size
        self._order: deque[int] = deque()
        self._counts = [0] * _BUCKETS
        self._highest = 0
        """No bucket above it has any."""

    def __len__(self) -> int:
        return len(self._order)

    def add(self, seconds: float) -> None:
        """Takes one in, and the oldest out when it is full."""
        bucket = int(log2(seconds) * _FINE - _LOWEST) if _SHORTEST_S < seconds < _LONGEST_S else 0
        if len(self._order) == self._size:
            self._counts[self._order.popleft()] -= 1
        self._order.append(bucket)
        self._counts[bucket] += 1
        self._highest = max(self._highest, bucket)

    def quantile(self, q: float) -> float:
        """The middle of its bucket; 0 of an empty window."""
        if not self._order:
            return 0.0
        counts = self._counts
        while not counts[self._highest]:
            self._highest -= 1
        bucket, beyond = self._highest, len(self._order) - int(q * len(self._order))
        while (beyond := beyond - counts[bucket]) > 0:
            bucket -= 1
        return float(2 ** ((bucket + _LOWEST + 0.5) / _FINE))


class TokenBucket:
    """Extra calls: each first call earns a part of one, up to `burst` (gRPC A6 and Finagle bound retries so)."""

    def __init__(self, ratio: float, burst: float) -> None:
        self._ratio, self._burst = ratio, burst
        self.level = burst

    def earn(self, calls: int) -> None:
        """First calls were made."""
        self.level = min(self._burst, self.level + calls * self._ratio)

    def spend(self) -> bool:
        """Whether one more may be made, and then it counts."""
        if self.level < 1:
            return False
        self.level -= 1
        return True
