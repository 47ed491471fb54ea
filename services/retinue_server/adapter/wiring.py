"""Settings -> rule packs, sources, worker -> core -> servicer, by explicit constructors."""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING

from retinue_server.adapter import metrics, otlp, service
from retinue_server.adapter.config import AdapterSettings
from retinue_server.adapter.core.targets import Targets
from retinue_server.adapter.engines import sources
from retinue_server.adapter.engines.work import ProcessWork
from retinue_server.adapter.packfile import PackFiles
from retinue_server.adapter.pages import MetricPages
from retinue_server.adapter.targetfile import TargetFile
from retinue_server.runtime import endpoints
from retinue_server.runtime.config import ConfigError
from retinue_server.runtime.dispatch import Pattern, Service
from retinue_server.runtime.lifecycle import DataDirLock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from retinue_server.adapter.config import EndpointSettings
    from retinue_server.runtime.config import Settings, Upstream

SETTINGS = AdapterSettings
NAME = "adapter"
_LOOPBACK = ("127.0.0.0/8", "::1/128")


async def wire(settings: Settings, section: AdapterSettings) -> Pattern:
    """An adapter, or, with an upstream, a relay."""
    if settings.upstream is not None:
        return _relay(settings.upstream)
    directory = settings.data_dir.absolute() / NAME
    packs, work = PackFiles(section.rule_packs), ProcessWork()
    objection = _endpoint_policy(section.endpoints).objection
    targets = Targets(
        work,
        partial(sources.make, objection),
        packs.load(),
        objection=objection,
        most=section.max_targets,
        stale_intervals=section.stale_intervals,
        max_watchers=section.max_watchers,
        allow_override=section.allow_override,
    )
    packs.changed = targets.packs_changed
    path = section.targets or directory / "targets.yaml"
    file = TargetFile(path, targets, must_exist=section.targets is not None)
    return Pattern(
        name=NAME,
        services=(Service(service.DESCRIPTOR, service.AdapterService(targets), service.ROLES), *otlp.services(targets)),
        parts=(DataDirLock(directory), packs, work, targets, file),
        health=targets,
        health_of=targets.health_of,
        quiesce=targets.quiesce,
        metrics=partial(
            metrics.families, targets, lambda: packs.ok, lambda: file.ok, lambda: max(work.working.restarts, 0)
        ),
        resources=partial(metrics.resources, targets),
        metric_pages=MetricPages(targets),
        notices=lambda: [f"{len(targets.names())} targets; rule packs {', '.join(sorted(packs.packs))}", _of_otlp()],
    )


def _of_otlp() -> str:
    if otlp.descriptor() is not None:
        return "OTLP metrics are taken in"
    return "no OTLP: opentelemetry-proto is missing; run `pip install 'retinue-server[telemetry]'`"


def _endpoint_policy(said: EndpointSettings) -> endpoints.EndpointPolicy:
    """This host's own addresses, and those that are allowed."""
    try:
        rules = [endpoints.parse_rule(text) for text in (*_LOOPBACK, *_own(), *said.allow)]
    except endpoints.RuleError as error:
        raise ConfigError(f"cannot use adapter.endpoints: {error}") from None
    return endpoints.EndpointPolicy(allow=rules, only=rules)


def _own() -> Iterator[str]:
    """The addresses that this host's name has; in a pod, the pod's."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return
    for *_, address in found:
        yield f"{str(address[0]).partition('%')[0]}/{128 if ':' in str(address[0]) else 32}"


def _relay(upstream: Upstream) -> Pattern:
    from retinue_server.runtime.relay import RelayServicer, UpstreamChannel  # noqa: PLC0415 - relays only

    channel = UpstreamChannel(upstream)
    descriptors = [one for one in (service.DESCRIPTOR, otlp.descriptor()) if one is not None]
    return Pattern(
        name=NAME,
        services=[Service(one, RelayServicer(one, channel)) for one in descriptors],
        parts=(channel,),
        health=channel,
        notices=lambda: [f"relays to {upstream.address}"],
    )
