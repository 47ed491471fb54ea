"""The pools that the claims about scatter/gather ask, as a pool file.

The leaves are played by the suite, on ports that follow each other: four replicas, a MergeService, and one where nobody
listens. A root of the suite's own gets the file when it is started. For any other root, print it, give it to the root
in whatever form that takes, and name both to the suite:

    PYTHONPATH=tests python -m contract.pools --leaves 127.0.0.1:7400 --root HOST:PORT > pools.yaml
    pytest tests/contract -k scattergather --target HOST:PORT --leaves 127.0.0.1:7400
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

REPLICAS = ("r0", "r1", "r2", "r3")
MERGER = "merger"
NOBODY = "nobody"
LAYOUT = (*REPLICAS, MERGER, NOBODY)
"""Who listens where, from the first port on."""
FOREIGN = "/shop.v1.Catalog/Find"
HEDGE_SOON = {"min_samples": 0, "min_delay_seconds": 0.02}
QUICK_S = 1.0
NO_HEDGES = {"enabled": False}
JSON_MERGES = ("sum", "min", "max", "count", "group_sum", "union", "histogram")


def pools(at: Callable[[str], str], root: str) -> dict[str, Any]:
    """The file's content; `at` gives the address of one of LAYOUT, `root` is where the root serves LeafService."""

    def shard(shard_id: str, *names: str, **more: Any) -> dict[str, Any]:
        return {"shard_id": shard_id, "endpoints": [at(name) for name in names], **more}

    abc = [shard("a", "r0"), shard("b", "r1"), shard("c", "r2")]
    plain = {"shards": abc, "hedging": NO_HEDGES}
    found: dict[str, Any] = {
        "collect": plain | {"forward_metadata": ["x-user"]},
        "json": plain | {"replies": "json"},
        "concat": plain | {"merge": "concat"},
        "first": plain | {"merge": "first", "shards": [one | {"weight": 2} for one in abc]},
        "top_k": plain | {"merge": "top_k", "top_k": 3},
        **{name: plain | {"merge": name} for name in JSON_MERGES},
        "service": plain | {"merge": "service", "merge_address": at(MERGER)},
        "service_streamed": plain | {"merge": "service", "merge_address": at(MERGER), "commutative": True},
        "weighted": plain | {"shards": [shard("a", "r0", weight=3), shard("b", "r1")]},
        "replicas": plain | {"shards": [shard("a", "r0", "r1", "r2")]},
        "hedged": {"shards": [shard("a", "r0", "r1"), shard("b", "r2", "r3")], "hedging": HEDGE_SOON},
        "streamed": plain | {"transport": "stream"},
        "once": {"shards": [shard("a", "r0", "r1")], "hedging": HEDGE_SOON, "idempotent": False},
        "spent": {"shards": [shard("a", "r0", "r1")], "hedging": HEDGE_SOON, "budget": {"ratio": 0, "burst": 0}},
        "foreign": plain | {"method": FOREIGN, "forward_metadata": ["x-user"]},
        "batched": plain | {"batch": True, "shards": [shard("a", "r0"), shard("b", "r0"), shard("c", "r1")]},
        "batched_twice": plain | {"batch": True, "shards": [shard("a", "r0", "r1"), shard("b", "r0", "r1")]},
        "tight": plain | {"limits": {"max_gathered_bytes": 1000, "max_reply_bytes": 600}},
        "narrow": plain | {"limits": {"max_calls": 3}},
        "empty": {"shards": []},
        "away": plain | {"shards": [shard("a", "r0"), shard("b", NOBODY)]},
        "quick": plain | {"timeout_seconds": QUICK_S},
        "left": plain | {"merge": "sum", "shards": [shard("a", "r0"), shard("b", "r1")]},
        "right": plain | {"merge": "sum", "shards": [shard("c", "r2"), shard("d", "r3")]},
        "loop": {"shards": [{"shard_id": "self", "endpoints": [root], "pool": "loop"}]},
    }
    parents = [{"shard_id": name, "endpoints": [root], "pool": name, "weight": 2} for name in ("left", "right")]
    found["tree"] = {"merge": "sum", "shards": parents, "hedging": NO_HEDGES}
    return {"pools": found}


def following(first: str) -> Callable[[str], str]:
    """The layout on the ports from HOST:PORT on."""
    host, _, port = first.rpartition(":")
    return lambda name: f"{host}:{int(port) + LAYOUT.index(name)}"


def main() -> None:
    """Prints the file; JSON is YAML."""
    parser = argparse.ArgumentParser(description="Prints the pool file for a root that the suite is to judge.")
    parser.add_argument("--leaves", metavar="HOST:PORT", required=True, help="the first of six ports for the leaves")
    parser.add_argument("--root", metavar="HOST:PORT", required=True, help="where the root serves LeafService")
    asked = parser.parse_args()
    print(json.dumps(pools(following(asked.leaves), asked.root), indent=2))  # noqa: T201 - a command


if __name__ == "__main__":
    main()
