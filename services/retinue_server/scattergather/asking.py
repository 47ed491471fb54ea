"""Makes the core's request of what came, from apps and from roots above alike."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from retinue_server.runtime import telemetry
from retinue_server.scattergather import framing, journal, translate
from retinue_server.scattergather.core import limits
from retinue_server.scattergather.core.requests import Ask, Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retinue.scattergather.v1 import scattergather_service_pb2 as api
    from retinue_server.runtime.dispatch import Call
    from retinue_server.scattergather.core.pool import Topology
    from retinue_server.scattergather.core.root import Root
    from retinue_server.scattergather.core.scatter import Observer
    from retinue_server.scattergather.engine import Metadata

_VALUE = re.compile(r"[\x20-\x7e]*")


class From(NamedTuple):
    """Where a request comes from."""

    path: tuple[str, ...] = ()
    parent_scatter_id: str = ""


class Requests:
    """Makes the core's request of what came."""

    def __init__(self, root: Root) -> None:
        self.root = root

    def ask(self, request: api.ScatterRequest, call: Call, read: translate.Reader) -> Ask:
        """What is wrong with the fields is in `read.violations`; it is raised where there is no pool to go on with."""
        limits.check_pool_id(request.pool_id, read.violations)
        inputs, ids = read.inputs(request)
        policy = read.policy(request.policy)
        limits.check_policy(policy, read.violations)
        if request.pool_id not in self.root.pools:
            limits.refuse(read.violations)
        return self.made(request.pool_id, inputs, ids, policy, call, request.route_keys, request.shard_ids)

    def made(  # noqa: PLR0917 - what a request is made of
        self,
        pool_id: str,
        inputs: framing.Inputs,
        ids: tuple[str, ...] | None,
        policy: Policy,
        call: Call,
        route_keys: Sequence[str] = (),
        shard_ids: Sequence[str] = (),
        above: From = From(),  # noqa: B008 - immutable
    ) -> Ask:
        """The request with its question."""
        topology = self.root.topology(pool_id)
        pool = topology.pool
        scatter_id = self.root.new_id()
        forwarded = _forwarded(call, pool.forward_metadata)
        question: framing.LeafQuestion | framing.PlainQuestion
        if pool.is_retinue_leaf:
            path = (*above.path, f"{self.root.server_id}/{pool_id}")
            parent = framing.Parent(path, not policy.strict, scatter_id)
            question = framing.LeafQuestion(inputs, parent, forwarded, batch=pool.batch)
        else:
            question = framing.PlainQuestion(inputs, forwarded)
        context = telemetry.parse(telemetry.current())
        return Ask(
            pool_id=pool_id,
            scatter_id=scatter_id,
            topology=topology,
            question=question,
            route_keys=tuple(route_keys),
            shard_ids=tuple(shard_ids),
            input_ids=ids,
            policy=policy,
            timeout_s=call.time_remaining(),
            payload=inputs.payload,
            path=above.path,
            parent_scatter_id=above.parent_scatter_id,
            trace_id=context.trace_id if context else "",
        )


def _forwarded(call: Call, keys: Sequence[str]) -> Metadata:
    """What of the caller's metadata the pool lets through."""
    found = ((key, call.metadata.get(key)) for key in keys)
    return tuple((key, value) for key, value in found if value is not None and _VALUE.fullmatch(value))


def trace(topology: Topology, shards: int) -> Observer | None:
    """What follows a request that is traced, here or by its caller; None, which costs nothing, for others."""
    if not telemetry.tracer().on and not telemetry.current():
        return None
    return journal.Trace(topology, shards)
