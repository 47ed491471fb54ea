"""What is expected: pools and their shards, as the pool file says; and a request's snapshot of it."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from retinue_server.scattergather.engine import Tls  # noqa: TC001 - msgspec reads it

LEAF_METHOD = "/retinue.scattergather.v1.LeafService/Query"


class MergeKind(IntEnum):
    """As in the contract."""

    COLLECT = 1
    CONCAT = 2
    FIRST = 3
    SUM = 4
    MIN = 5
    MAX = 6
    COUNT = 7
    GROUP_SUM = 8
    UNION = 9
    TOP_K = 10
    HISTOGRAM = 11
    SERVICE = 12


GIVES_JSON = frozenset(range(MergeKind.SUM, MergeKind.SERVICE))
"""The merges that read and give JSON."""


class Merging(msgspec.Struct, frozen=True):
    """How replies become an answer."""

    kind: MergeKind = MergeKind.COLLECT
    top_k: int = 0
    address: str = ""
    """Of SERVICE: HOST:PORT or unix:PATH."""
    commutative: bool = False
    """Of SERVICE: replies may be given in the order of their coming, as they come."""
    json_replies: bool = False
    """Of COLLECT: replies are JSON."""


class Hedging(msgspec.Struct, frozen=True):
    """When a second call is made beside a slow one."""

    enabled: bool = True
    quantile: float = 0.975
    """Of the pool's latencies, over a sliding window: the delay."""
    min_delay_s: float = 0.002
    min_samples: int = 100
    """No hedges before so many replies have been seen."""
    max_hedges: int = 2
    """For a shard in one request; each beside one that is slow, too."""


class Budget(msgspec.Struct, frozen=True):
    """What hedges and retries may add to the load."""

    ratio: float = 0.05
    """Extra calls for each first call."""
    burst: float = 50.0
    """Extra calls that may be made at once."""


class PoolLimits(msgspec.Struct, frozen=True):
    """What one root takes for a pool at once."""

    max_calls: int = 8192
    """Calls to leaves under way or still to send: requests beyond it are refused as a whole."""
    max_unsent: int = 512
    """Calls still to send: when the processor is what lacks, they pile up, whatever the leaves do."""
    max_calls_per_endpoint: int = 1024
    max_reply_bytes: int = 3 * 1024 * 1024
    """Of one reply."""
    max_gathered_bytes: int = 64 * 1024 * 1024
    """Of all replies of a request."""


class Shard(msgspec.Struct, frozen=True):
    """A part of the data."""

    shard_id: str
    sources: tuple[str, ...]
    """Where its replicas are: HOST:PORT, unix:PATH, dns:NAME:PORT, kubernetes:SERVICE:PORT."""
    weight: int = 1
    pool: str = ""
    """Of a shard that is a root itself: the pool that it asks; empty = the one of its settings."""


class Pool(msgspec.Struct, frozen=True):
    """A pool as the file has it."""

    pool_id: str
    shards: tuple[Shard, ...]
    method: str = LEAF_METHOD
    stream: bool = False
    """Whether queries go over one stream for each endpoint."""
    merging: Merging = Merging()
    timeout_s: float = 10.0
    idempotent: bool = True
    max_retries: int = 2
    """Of one shard in one request."""
    hedging: Hedging = Hedging()
    budget: Budget = Budget()
    limits: PoolLimits = PoolLimits()
    forward_metadata: tuple[str, ...] = ()
    """Keys of the caller's metadata that leaves get."""
    batch: bool = False
    """Whether shards of one endpoint are asked by one call, which the leaf reduces to one reply."""
    tls: Tls | None = None
    slow_s: float | None = None
    """Requests that take longer are logged with their shards; None = none is."""
    max_traced_attempts: int = 64
    """Up to so many shards, each attempt has a span; beyond, those that failed, hedges and the slowest five."""

    @property
    def is_retinue_leaf(self) -> bool:
        """Whether leaves speak LeafService, and not a method of their own."""
        return self.method == LEAF_METHOD
