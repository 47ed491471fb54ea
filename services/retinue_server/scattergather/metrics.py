"""What scatter/gather counts, in Prometheus' terms; names and labels are part of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.runtime.metrics import Family, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from retinue_server.scattergather.core.pool import LivePool
    from retinue_server.scattergather.core.root import Root


_QUANTILES = 0.5, 0.9, 0.99


def families(root: Root, file_ok: Callable[[], bool], now: float) -> Iterable[Family]:
    """Requests, calls, what is under way, and who can be reached."""
    pools = {pool_id: kept.live for pool_id, kept in root.pools.items()}
    ended = [Sample({"pool": p, "end": end}, n) for p, live in pools.items() for end, n in live.ended.items()]
    attempts = [
        Sample({"pool": p, "attempt": kind, "outcome": end}, n)
        for p, live in pools.items()
        for (kind, end), n in live.attempts.items()
    ]

    def each(read: Callable[[LivePool], float]) -> list[Sample]:
        return [Sample({"pool": pool_id}, read(live)) for pool_id, live in pools.items()]

    name = "retinue_scattergather_"
    return (
        Family(f"{name}requests_total", "Requests, by end; partial ones are OK.", "counter", ended),
        Family(f"{name}attempts_total", "Calls to leaves, by kind and outcome.", "counter", attempts),
        Family(
            f"{name}denied_total", "Hedges and retries that the budget forbade.", "counter", each(lambda p: p.denied)
        ),
        Family(f"{name}expected_leaves_total", "Leaves that requests selected.", "counter", each(lambda p: p.expected)),
        Family(f"{name}answered_leaves_total", "Those of them that answered.", "counter", each(lambda p: p.answered)),
        Family(f"{name}reply_seconds", "What replies took lately, by quantile.", "gauge", _quantiles(pools)),
        Family(f"{name}endpoint_seconds", "What calls to an endpoint took lately.", "gauge", _endpoints(pools, now)),
        Family(f"{name}running", "Requests under way.", "gauge", each(lambda p: p.running)),
        Family(f"{name}open_calls", "Shards that are asked, or are to be.", "gauge", each(lambda p: p.open_calls)),
        Family(f"{name}unsent_calls", "Those of them still to be asked.", "gauge", each(lambda p: p.unsent)),
        Family(f"{name}budget", "Extra calls that may be made now.", "gauge", each(lambda p: p.budget.level)),
        Family(f"{name}shards", "Shards that are expected.", "gauge", each(lambda p: len(p.topology.members))),
        Family(f"{name}reachable_shards", "Shards with a connected endpoint.", "gauge", each(_reachable)),
        Family(f"{name}topology_version", "Grows with each change.", "gauge", each(lambda p: p.topology.version)),
        Family(f"{name}measured_total", "Requests that succeeded.", "counter", each(lambda p: p.measured)),
        Family(
            f"{name}overhead_seconds_total",
            "The root's own part: from the request to the first call, and from the last reply to the answer.",
            "counter",
            each(lambda p: p.overhead_s),
        ),
        Family(
            f"{name}straggler_seconds_total",
            "By how much the last reply came after the middle one.",
            "counter",
            each(lambda p: p.straggler_s),
        ),
        Family(f"{name}pool_file_ok", "0 while the pool file is wrong.", "gauge", [Sample({}, int(file_ok()))]),
    )


def _quantiles(pools: Mapping[str, LivePool]) -> list[Sample]:
    return [
        Sample({"pool": pool_id, "quantile": str(q)}, live.latencies.quantile(q))
        for pool_id, live in pools.items()
        if len(live.latencies)
        for q in _QUANTILES
    ]


def _endpoints(pools: Mapping[str, LivePool], now: float) -> list[Sample]:
    replicas = {
        (pool_id, replica.address): replica
        for pool_id, live in pools.items()
        for member in live.topology.members
        for replica in member.replicas
        if replica.seen
    }
    return [
        Sample({"pool": pool_id, "endpoint": address}, replica.latency_s(now))
        for (pool_id, address), replica in replicas.items()
    ]


def _reachable(live: LivePool) -> int:
    return sum(any(replica.line.connected for replica in member.replicas) for member in live.topology.members)
