"""What EndpointSlices (discovery.k8s.io/v1) say of a Service, read as kube-proxy reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from retinue_server.runtime.addresses import Tcp

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

SERVICE = "kubernetes.io/service-name"
"""The label that says whose slice it is."""
_FAMILIES = ("IPv4", "IPv6")
"""Slices of names (FQDN) are no endpoints; kube-proxy leaves them out, too."""


class Conditions(msgspec.Struct, frozen=True):
    """Of an endpoint. What is not told is ready, and is serving if it is ready."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None

    @property
    def is_ready(self) -> bool:
        return self.ready is not False

    @property
    def is_last_resort(self) -> bool:
        """Going away, and still answering."""
        serving = self.is_ready if self.serving is None else self.serving
        return serving and self.terminating is True


class Reference(msgspec.Struct, frozen=True):
    """To the pod that an endpoint is."""

    uid: str | None = None


class Endpoint(msgspec.Struct, frozen=True, rename="camel"):
    """A pod's place; its addresses mean the same, and the first is to be used."""

    addresses: tuple[str, ...] = ()
    conditions: Conditions | None = None
    target_ref: Reference | None = None

    @property
    def state(self) -> Conditions:
        return self.conditions or Conditions()


class Port(msgspec.Struct, frozen=True):
    """Which a slice's endpoints have, all the same."""

    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class Metadata(msgspec.Struct, frozen=True, rename="camel"):
    """What is needed of an object's."""

    name: str = ""
    labels: dict[str, str] | None = None
    resource_version: str = ""


class Slice(msgspec.Struct, frozen=True, rename="camel"):
    """Some endpoints of a Service: of one family, with the same ports."""

    metadata: Metadata = Metadata()
    address_type: str = ""
    endpoints: tuple[Endpoint, ...] | None = None
    ports: tuple[Port, ...] | None = None

    @property
    def service(self) -> str:
        """Empty if it is nobody's."""
        return (self.metadata.labels or {}).get(SERVICE, "")

    def port(self, name: str) -> int | None:
        """A number is the port itself, whatever the slice says; None if the slice has none of that name."""
        if name.isdecimal():
            return int(name)
        return next((p.port for p in self.ports or () if p.name == name and p.protocol in (None, "TCP")), None)


def addresses(slices: Collection[Slice], port: str) -> list[str]:
    """HOST:PORT of each pod that is ready, each once, sorted.

    If none is, those count that are going away and still serve. A pod with addresses of both families is one endpoint,
    at that of IPv4: two would be two replicas that fail together.
    """
    chosen = _chosen(slices, lambda state: state.is_ready) or _chosen(slices, lambda state: state.is_last_resort)
    pods: dict[str, dict[str, set[str]]] = {}
    for one, endpoint in chosen:
        number = one.port(port)
        if number is not None:
            pod = (endpoint.target_ref and endpoint.target_ref.uid) or endpoint.addresses[0]
            families = pods.setdefault(pod, {})
            families.setdefault(one.address_type, set()).add(str(Tcp(endpoint.addresses[0], number)))
    return sorted({place for families in pods.values() for place in families.get("IPv4") or families["IPv6"]})


def _chosen(slices: Collection[Slice], holds: Callable[[Conditions], bool]) -> list[tuple[Slice, Endpoint]]:
    return [
        (one, endpoint)
        for one in slices
        if one.address_type in _FAMILIES
        for endpoint in one.endpoints or ()
        if endpoint.addresses and holds(endpoint.state)
    ]
