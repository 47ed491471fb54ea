"""What the ambassador counts, in Prometheus' terms; names and labels are part of the product.

What the traffic was stands in WatchUpstreamStats, and in Envoy's own metrics; here is what became of declarations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.ambassador.core.upstream import State
from retinue_server.runtime.metrics import Family, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from retinue_server.ambassador.core.upstream import View
    from retinue_server.ambassador.core.upstreams import Upstreams


def families(upstreams: Upstreams, file_ok: Callable[[], bool]) -> Iterable[Family]:
    """Upstreams by state, their endpoints and connections, and whether the data planes work."""
    views = list(upstreams.views())
    states = [
        Sample({"upstream": view.spec.upstream_id, "state": state.name.lower()}, int(view.state is state))
        for view in views
        for state in State
    ]

    def each(read: Callable[[View], float]) -> list[Sample]:
        return [Sample({"upstream": view.spec.upstream_id}, read(view)) for view in views]

    name = "retinue_ambassador_"
    return (
        Family(f"{name}upstream_state", "1 for the state that an upstream is in.", "gauge", states),
        Family(f"{name}endpoints", "Endpoints that may be dialled.", "gauge", each(lambda v: len(v.endpoints))),
        Family(f"{name}unhealthy_endpoints", "Of them, those that are kept off.", "gauge", each(_unhealthy)),
        Family(f"{name}connections", "Connections from apps.", "gauge", each(lambda v: v.connections)),
        Family(
            f"{name}rejected", "1 while the latest change is refused by the data plane.", "gauge", each(_is_rejected)
        ),
        Family(
            f"{name}declarations_total",
            "Declarations, by whether they were taken.",
            "counter",
            [Sample({"taken": "yes"}, upstreams.declared), Sample({"taken": "no"}, upstreams.refused)],
        ),
        Family(
            f"{name}data_plane_live",
            "1 while a data plane takes connections and declarations.",
            "gauge",
            [Sample({"data_plane": one.kind.name.lower()}, int(one.state.live)) for one in upstreams.planes],
        ),
        Family(
            f"{name}upstream_file_ok", "0 while the file of upstreams is wrong.", "gauge", [Sample({}, int(file_ok()))]
        ),
    )


def _unhealthy(view: View) -> int:
    return sum(not one.healthy for one in view.health)


def _is_rejected(view: View) -> int:
    return int(view.rejection is not None)
