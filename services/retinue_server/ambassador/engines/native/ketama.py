"""Consistent hashing as libmemcached has it with MEMCACHED_BEHAVIOR_KETAMA_WEIGHTED.

160 points for a server of middle weight, four from each MD5 digest of its name and a number, and keys by the first four
bytes of theirs. A client that hashes so itself and one that comes through here find a key on the same server.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

try:
    from _md5 import md5 as _md5  # type: ignore[import-not-found]
except ImportError:  # an interpreter without its own; OpenSSL's takes twice as long for a short key
    _md5 = partial(hashlib.md5, usedforsecurity=False)

if TYPE_CHECKING:
    from collections.abc import Sequence

Shard = TypeVar("Shard")

_POINTS = 160
_PER_DIGEST = 4
_USUAL_PORT = "11211"
_FIRST = struct.Struct("<I").unpack_from


class Ring(Generic[Shard]):
    """Keys to shards; made anew when they change."""

    def __init__(self, shards: Sequence[tuple[str, int, Shard]]) -> None:
        """Names, `HOST:PORT` or whatever else, weights, and what they stand for; one or more."""
        total = sum(weight for _, weight, _ in shards)
        points = [
            (value, index)
            for index, (name, weight, _) in enumerate(shards)
            for value in _values(name, weight / total * len(shards))
        ]
        points.sort(key=lambda point: point[0])
        self._values = [value for value, _ in points]
        self._shards = [shards[index][2] for _, index in points]
        self._only = shards[0][2] if len(shards) == 1 else None

    def of(self, key: bytes) -> Shard:
        """Where a key is."""
        if self._only is not None:
            return self._only
        (value,) = _FIRST(_md5(key).digest())
        at = bisect_left(self._values, value)
        return self._shards[at if at < len(self._values) else 0]


def _values(name: str, share: float) -> list[int]:
    """The points of one server."""
    host, _, port = name.rpartition(":")
    base = host if host and port == _USUAL_PORT else name
    found = []
    for number in range(int(share * _POINTS / _PER_DIGEST + 1e-10)):
        digest = hashlib.md5(f"{base}-{number}".encode(), usedforsecurity=False).digest()
        found += [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 16, 4)]
    return found
