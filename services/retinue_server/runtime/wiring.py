"""Settings and wired patterns -> a process, by explicit constructors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from retinue_server.runtime import addresses
from retinue_server.runtime.addresses import StartError, Tcp
from retinue_server.runtime.authority import Authority
from retinue_server.runtime.codec import Codec, proto_codec
from retinue_server.runtime.dispatch import Method, Page, Pattern, Role, Service
from retinue_server.runtime.health import HEALTH, HealthService, ReflectionService
from retinue_server.runtime.interceptors import Interceptors, Limits, unguarded
from retinue_server.runtime.lifecycle import Listener, Process
from retinue_server.runtime.metrics import Exposition, Metrics, of_limits
from retinue_server.runtime.server import GrpcListener, Route
from retinue_server.runtime.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import grpc

    from retinue_server.runtime.addresses import Address
    from retinue_server.runtime.config import Settings
    from retinue_server.runtime.interceptors import Endpoint
    from retinue_server.runtime.metrics import MetricPages
    from retinue_server.runtime.tokens import TokenFile


class _Shared(msgspec.Struct, frozen=True):
    """What the listeners of one process have in common."""

    settings: Settings
    health: HealthService
    reflection: ReflectionService
    methods: Sequence[Method]
    pages: Mapping[str, Page]
    metric_pages: MetricPages | None
    limits: Limits
    metrics: Metrics
    tokens: TokenFile | None
    token_required: bool


async def build(settings: Settings, patterns: Sequence[Pattern]) -> Process:
    """The process that serves the patterns; raises StartError for settings that would expose it."""
    shared = await _share(settings, patterns)
    return Process(
        patterns,
        _listeners(shared),
        shared.health,
        drain_seconds=settings.drain_seconds,
        parts=[Telemetry(os.environ, shared.metrics)],
        on_drain=shared.reflection.close,
    )


async def _share(settings: Settings, patterns: Sequence[Pattern]) -> _Shared:
    services = [service for pattern in patterns for service in pattern.services]
    limits = Limits(settings.limits.max_concurrent_calls, settings.limits.max_concurrent_streams)
    collectors = [of_limits(limits), *(pattern.metrics for pattern in patterns if pattern.metrics)]
    return _Shared(
        settings=settings,
        health=HealthService(patterns),
        reflection=ReflectionService([HEALTH.full_name, *(s.descriptor.full_name for s in services)]),
        methods=[method for service in services for method in service.methods()],
        pages={key: page for pattern in patterns for key, page in pattern.pages.items()},
        metric_pages=next((pattern.metric_pages for pattern in patterns if pattern.metric_pages), None),
        limits=limits,
        metrics=Metrics(collectors, [pattern.resources for pattern in patterns if pattern.resources]),
        tokens=_tokens(settings),
        token_required=await _check_exposure(settings) or settings.require_token,
    )


def _tokens(settings: Settings) -> TokenFile | None:
    if settings.token_file is None:
        return None
    from retinue_server.runtime.tokens import TokenFile, TokenFileError  # noqa: PLC0415 - most servers have none

    try:
        return TokenFile(settings.token_file)
    except TokenFileError as error:
        raise StartError(str(error)) from None


async def _check_exposure(settings: Settings) -> bool:
    """Refuses plaintext beyond this host; True when tokens are what keeps strangers out."""
    exposed = [a for text in (*settings.listen, settings.http) for a in await _reachable(text)]
    has_mtls = settings.tls is not None and settings.tls.client_ca_file is not None
    has_tokens = settings.tls is not None and settings.token_file is not None
    if exposed and not (has_mtls or has_tokens or settings.insecure):
        raise StartError(
            f"cannot listen on {exposed[0]}: other hosts can dial it, so it needs TLS and tokens "
            "(tls.cert_file, tls.key_file and token_file) or mTLS (tls.client_ca_file); "
            "--insecure serves it all the same"
        )
    return bool(exposed) and not has_mtls and settings.token_file is not None


async def _reachable(text: str | None) -> list[Tcp]:
    """The addresses that other hosts can dial."""
    address = addresses.parse(text) if text else None
    if not isinstance(address, Tcp):
        return []
    return [numeric for numeric in await addresses.resolve(address) if not addresses.is_loopback(numeric)]


def _listeners(shared: _Shared) -> list[Listener]:
    settings = shared.settings
    found: list[Listener] = []
    if settings.listen:
        found.append(_apps(shared))
    if settings.control:
        routes = _routes(shared, Role.OPERATOR)
        found.append(_grpc("control", [addresses.parse(settings.control)], routes, socket_mode=0o600))
    if settings.http:
        found.append(_http(shared, _tcp(settings.http)))
    if settings.probe:
        health = list(_wrapped(Service(HEALTH, shared.health).methods(), unguarded))
        found.append(_grpc("probe", [_tcp(settings.probe)], health))
    if settings.metrics:
        found.append(_monitor(shared, _tcp(settings.metrics)))
    return found


def _apps(shared: _Shared) -> Listener:
    where = [addresses.parse(text) for text in shared.settings.listen]
    routes, credentials = _routes(shared, Role.APP), _credentials(shared.settings)
    return GrpcListener(where, routes, name="listen", socket_mode=0o660, credentials=credentials)


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    if settings.tls is None:
        return None
    from retinue_server.runtime import tls  # noqa: PLC0415 - optional

    return tls.server_credentials(settings.tls)


def _grpc(name: str, where: Sequence[Address], routes: Sequence[Route], socket_mode: int = 0o600) -> Listener:
    return GrpcListener(where, routes, name=name, socket_mode=socket_mode)


def _tcp(text: str) -> Tcp:
    address = addresses.parse(text)
    if not isinstance(address, Tcp):
        raise StartError(f"cannot listen on {address}: this listener takes HOST:PORT only")
    return address


def _routes(shared: _Shared, role: Role) -> list[Route]:
    common = Service(HEALTH, shared.health).methods() + shared.reflection.methods()
    wrap = _interceptors(shared, role).wrap
    return [*_wrapped(shared.methods, wrap), *_wrapped(common, unguarded)]


def _interceptors(shared: _Shared, role: Role) -> Interceptors:
    return Interceptors(_authority(shared, role), shared.limits, shared.metrics)


def _authority(shared: _Shared, role: Role) -> Authority:
    return Authority(role, shared.tokens, required=shared.token_required and role is Role.APP)


def _wrapped(methods: Iterable[Method], wrap: Callable[[Method, Codec], Endpoint]) -> Iterable[Route]:
    for method in methods:
        codec = proto_codec(method)
        yield Route(method, wrap(method, codec), codec)


def _http(shared: _Shared, address: Tcp) -> Listener:
    from retinue_server.runtime.http import ConnectApp, Hosts, HttpListener, Pages  # noqa: PLC0415 - optional
    from retinue_server.runtime.json_codec import json_codec, to_json  # noqa: PLC0415 - for HTTP only

    wrap = _interceptors(shared, Role.APP).wrap
    codecs = [(method, json_codec(method)) for method in shared.methods]
    routes = [Route(method, wrap(method, codec), codec) for method, codec in codecs]
    wildcard = address.host in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
    hosts = Hosts([*shared.settings.allowed_hosts, *([] if wildcard else [address.host])])
    pages = Pages(shared.pages, _authority(shared, Role.APP), to_json)
    app = ConnectApp(routes, pages, hosts, shared.settings.limits.max_message_bytes)
    return HttpListener(address, app, shared.settings.tls)


def _monitor(shared: _Shared, address: Tcp) -> Listener:
    from retinue_server.runtime.monitor import MonitorListener  # noqa: PLC0415 - optional

    return MonitorListener(address, Exposition(shared.metrics, shared.metric_pages), shared.health.serving)
