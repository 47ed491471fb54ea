"""Settings -> engines -> core -> servicers, by explicit constructors."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from retinue_server.runtime.discovery.dns import DnsDiscovery
from retinue_server.runtime.discovery.kubernetes import KubernetesDiscovery
from retinue_server.runtime.dispatch import Pattern, Service
from retinue_server.scattergather import journal, leaf_service, metrics, service
from retinue_server.scattergather.config import ScatterGatherSettings
from retinue_server.scattergather.core.clock import LoopClock
from retinue_server.scattergather.core.root import Root
from retinue_server.scattergather.core.scatter import ScatterError
from retinue_server.scattergather.engines.grpc import GrpcLeaves
from retinue_server.scattergather.engines.merging import MergeCalls
from retinue_server.scattergather.poolwatch import PoolFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retinue_server.runtime.config import Settings, Upstream
    from retinue_server.scattergather.core.topology import Pool

SETTINGS = ScatterGatherSettings
NAME = "scattergather"


async def wire(settings: Settings, section: ScatterGatherSettings) -> Pattern:
    """A root with its pools, or, with an upstream, a relay."""
    if settings.upstream is not None:
        return _relay(settings.upstream)
    clock = LoopClock()
    leaves, merges = GrpcLeaves(), MergeCalls(ScatterError)
    dns = DnsDiscovery(section.dns_poll_seconds)
    kubernetes = KubernetesDiscovery(section.kubernetes.kubeconfig, section.kubernetes.namespace, NAME)
    root = Root(
        os.urandom(6).hex(),
        leaves,
        {"dns": dns, "kubernetes": kubernetes},
        merges,
        clock,
        share=section.processes,
        ended=journal.slow,
    )
    path = section.pools or settings.data_dir.absolute() / NAME / "pools.yaml"
    pools = PoolFile(path, root.apply, must_exist=section.pools is not None, prepare=partial(_prepare, kubernetes))
    return Pattern(
        name=NAME,
        services=(
            Service(service.SCATTER, service.ScatterGatherService(root, clock)),
            Service(service.TOPOLOGY, service.TopologyService(root, clock)),
            Service(leaf_service.LEAF, leaf_service.LeafService(root, section.leaf_pool)),
        ),
        parts=(leaves, merges, dns, kubernetes, pools, root),
        quiesce=root.quiesce,
        metrics=lambda: metrics.families(root, lambda: pools.ok, clock.now()),
        notices=lambda: [f"{len(root.pools)} pools from {path}"],
    )


def _prepare(kubernetes: KubernetesDiscovery, pools: Sequence[Pool]) -> None:
    """Loads the client of Kubernetes as soon as a pool has use for it."""
    if any(source.startswith("kubernetes:") for pool in pools for shard in pool.shards for source in shard.sources):
        kubernetes.prepare()


def _relay(upstream: Upstream) -> Pattern:
    from retinue_server.runtime.relay import RelayServicer, UpstreamChannel  # noqa: PLC0415 - relays only

    channel = UpstreamChannel(upstream)
    descriptors = (service.SCATTER, service.TOPOLOGY, leaf_service.LEAF)
    return Pattern(
        name=NAME,
        services=[Service(one, RelayServicer(one, channel)) for one in descriptors],
        parts=(channel,),
        health=channel,
        notices=lambda: [f"relays to {upstream.address}"],
    )
