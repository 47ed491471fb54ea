"""Settings -> engines -> core -> servicers, by explicit constructors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from retinue_server.runtime.dispatch import Pattern, Service
from retinue_server.scattergather import journal, leaf_service, metrics, service
from retinue_server.scattergather.config import ScatterGatherSettings
from retinue_server.scattergather.core.clock import LoopClock
from retinue_server.scattergather.core.root import Root
from retinue_server.scattergather.core.scatter import ScatterError
from retinue_server.scattergather.engines.dns import DnsDiscovery
from retinue_server.scattergather.engines.grpc import GrpcLeaves
from retinue_server.scattergather.engines.merging import MergeCalls
from retinue_server.scattergather.poolfile import PoolFile

if TYPE_CHECKING:
    from retinue_server.runtime.config import Settings, Upstream

SETTINGS = ScatterGatherSettings
NAME = "scattergather"


async def wire(settings: Settings, section: ScatterGatherSettings) -> Pattern:
    """A root with its pools, or, with an upstream, a relay."""
    if settings.upstream is not None:
        return _relay(settings.upstream)
    clock = LoopClock()
    leaves, merges = GrpcLeaves(), MergeCalls(ScatterError)
    dns = DnsDiscovery(section.dns_poll_seconds)
    root = Root(
        os.urandom(6).hex(),
        leaves,
        {"dns": dns},
        merges,
        clock,
        share=section.processes,
        ended=journal.slow,
    )
    path = section.pools or settings.data_dir.absolute() / NAME / "pools.yaml"
    pools = PoolFile(path, must_exist=section.pools is not None, apply=root.apply)
    return Pattern(
        name=NAME,
        services=(
            Service(service.SCATTER, service.ScatterGatherService(root, clock)),
            Service(service.TOPOLOGY, service.TopologyService(root, clock)),
            Service(leaf_service.LEAF, leaf_service.LeafService(root, section.leaf_pool)),
        ),
        parts=(leaves, merges, dns, pools, root),
        quiesce=root.quiesce,
        metrics=lambda: metrics.families(root, lambda: pools.ok, clock.now()),
        notices=lambda: [f"{len(root.pools)} pools from {path}"],
    )


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
