"""Pools of a run, as the pool file has them and as the checker knows them; and what callers may be content with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from support.scatter_faults.history import Ran


@dataclass(frozen=True)
class Pool:
    """One pool."""

    name: str
    replicas: Mapping[str, tuple[str, ...]]
    """By shard: names of leaves, or sources as the file has them."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """Of shards that stand for more than one leaf."""
    timeout_s: float = 3.0
    merge: str = "collect"
    idempotent: bool = True
    hedge_s: float | None = None
    """From when on a slow call gets company at the earliest; None = never."""
    ratio: float = 0.05
    burst: float = 50.0
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def shards(self) -> dict[str, int]:
        """Their weights."""
        return {shard: self.weights.get(shard, 1) for shard in self.replicas}

    def entry(self, address: Callable[[str], str]) -> dict[str, Any]:
        """For the file; `address` gives where a leaf is dialled."""
        shards = [
            {"shard_id": shard, "weight": self.shards[shard], "endpoints": [address(leaf) for leaf in leaves]}
            for shard, leaves in self.replicas.items()
        ]
        hedging = {"enabled": self.hedge_s is not None, "min_samples": 0, "min_delay_seconds": self.hedge_s or 0}
        return {
            "shards": shards,
            "merge": self.merge,
            "timeout_seconds": self.timeout_s,
            "idempotent": self.idempotent,
            "hedging": hedging,
            "budget": {"ratio": self.ratio, "burst": self.burst},
            "limits": dict(self.limits),
        }

    def ran(self, roots: int = 1) -> Ran:
        """For the history."""
        replicas = dict(self.replicas)
        hedged = self.hedge_s is not None and self.idempotent
        return Ran(self.name, replicas, self.idempotent, self.ratio, self.burst, 2, hedged, roots)


def write(path: Path, pools: Iterable[Pool], address: Callable[[str], str]) -> None:
    """The pool file, put in its place at once."""
    text = json.dumps({"pools": {pool.name: pool.entry(address) for pool in pools}})  # YAML has JSON in it
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


class Policy(NamedTuple):
    """What a caller is content with."""

    min_coverage: float = 1.0
    first_k: int = 0
    soft_s: float = 0.0
    no_hedge: bool = False

    def said(self) -> dict[str, Any]:
        """ScatterPolicy, as keywords."""
        found: dict[str, Any] = {"first_k": self.first_k, "no_hedge": self.no_hedge}
        if self.min_coverage < 1:
            found["min_coverage"] = self.min_coverage
        if self.soft_s:
            found["soft_deadline_duration"] = {"seconds": int(self.soft_s), "nanos": int(self.soft_s % 1 * 1e9)}
        return found


STRICT = Policy()
