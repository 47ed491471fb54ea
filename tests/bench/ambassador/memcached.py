"""memcached over three shards, beside nutcracker; and one shard without anybody between."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from bench.ambassador.players import (
    DIRECT,
    NUTCRACKER,
    OURS,
    Figures,
    Load,
    Proxy,
    in_turns,
    memcacheds,
    nutcracker,
    ours,
    upstream,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.turns import Play

_SHARDS = 3
_KEYS, _BYTES = 100_000, 100
"""More keys than anybody keeps at hand."""
_SECONDS = 1.5


def memcached(kind: str, clients: int) -> Play:
    """`get` of what is there, or `set`."""

    def play(_: str, turns: int) -> Mapping[str, Figures]:
        with ExitStack() as stack:
            load = stack.enter_context(Load())
            shards = memcacheds(stack, _SHARDS)
            proxies = {
                OURS: stack.enter_context(ours("native")).declare(upstream("cache", "MEMCACHED", *shards)),
                NUTCRACKER: stack.enter_context(nutcracker(shards)),
                DIRECT: Proxy(int(memcacheds(stack, 1)[0].rpartition(":")[2])),
            }
            asked = {"clients": clients, "keys": _KEYS, "bytes": _BYTES, "seconds": _SECONDS, "kind": kind}
            for proxy in proxies.values() if kind == "get" else ():
                load.play(proxy, **asked | {"kind": "set", "clients": 64, "all": True})
            return in_turns(list(proxies), lambda name: load.measure(proxies[name], **asked), turns)

    return play
