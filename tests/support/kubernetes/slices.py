"""A Service's EndpointSlices, as the controller that no test cluster has would write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.kubernetes.api import Api

LABEL = "kubernetes.io/service-name"
Body = dict[str, Any]


def endpoint(address: str, **conditions: bool) -> Body:
    """One endpoint; ready, unless its conditions say otherwise."""
    return {"addresses": [address], "conditions": {"ready": True} | conditions}


def body(name: str, service: str, endpoints: Sequence[Body], ports: Sequence[Body], family: str = "IPv4") -> Body:
    """A slice."""
    meta = {"name": name, "labels": {LABEL: service}}
    kind = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice"}
    return {**kind, "metadata": meta, "addressType": family, "endpoints": list(endpoints), "ports": list(ports)}


def put(api: Api, namespace: str, wanted: Body) -> None:
    """Stores a slice, whether there was one of that name or not."""
    path = f"{namespace}/endpointslices"
    code, said = api.request("PUT", f"{path}/{wanted['metadata']['name']}", wanted)
    if code == 404:
        code, said = api.request("POST", path, wanted)
    assert code in (200, 201), said


def remove(api: Api, namespace: str, name: str) -> None:
    """Removes a slice, if there is one."""
    assert api.request("DELETE", f"{namespace}/endpointslices/{name}").code in (200, 404)
