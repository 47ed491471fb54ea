"""Settings and wired patterns -> a process, by explicit constructors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.runtime import addresses
from retinue_server.runtime.authority import Authority, TokenFile
from retinue_server.runtime.codec import Codec, json_codec, proto_codec
from retinue_server.runtime.dispatch import Method, Pattern, Role, Service
from retinue_server.runtime.health import HEALTH, HealthService, ReflectionService
from retinue_server.runtime.interceptors import Interceptors, Limits, unguarded
from retinue_server.runtime.lifecycle import Listener, Process
from retinue_server.runtime.server import GrpcListener, Route

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from retinue_server.runtime.config import Settings
    from retinue_server.runtime.interceptors import Endpoint


def build(settings: Settings, patterns: Sequence[Pattern]) -> Process:
    """The process that serves the patterns on the listeners of the settings."""
    health = HealthService(patterns)
    names = [service.descriptor.full_name for pattern in patterns for service in pattern.services]
    reflection = ReflectionService([*names, HEALTH.full_name])
    methods = [m for pattern in patterns for service in pattern.services for m in service.methods()]
    common = Service(HEALTH, health).methods() + reflection.methods()
    limits = Limits(settings.limits.max_concurrent_calls, settings.limits.max_concurrent_streams)
    tokens = TokenFile(settings.token_file) if settings.token_file else None

    def routes(role: Role, *, token_required: bool) -> list[Route]:
        authority = Authority(role, tokens, required=token_required)
        return _routes(methods, Interceptors(authority, limits).wrap) + _routes(common, unguarded)

    listeners: list[Listener] = []
    if settings.listen:
        app = routes(Role.APP, token_required=settings.require_token)
        where = [addresses.parse(text) for text in settings.listen]
        listeners.append(GrpcListener(where, app, name="listen", socket_mode=0o660))
    if settings.control:
        operator = routes(Role.OPERATOR, token_required=False)
        control = [addresses.parse(settings.control)]
        listeners.append(GrpcListener(control, operator, name="control", socket_mode=0o600))
    if settings.http:
        listeners.append(_http(settings, methods, Interceptors(Authority(Role.APP, tokens), limits)))
    return Process(
        patterns, listeners, health, drain_seconds=settings.drain_seconds, on_drain=reflection.close
    )


def _routes(methods: Sequence[Method], wrap: Callable[[Method, Codec], Endpoint]) -> list[Route]:
    codecs = [(method, proto_codec(method)) for method in methods]
    return [Route(method, wrap(method, codec), codec) for method, codec in codecs]


def _http(settings: Settings, methods: Sequence[Method], interceptors: Interceptors) -> Listener:
    from retinue_server.runtime.http import ConnectApp, Hosts, HttpListener  # noqa: PLC0415 - optional

    address = addresses.parse(settings.http or "")
    assert isinstance(address, addresses.Tcp)
    codecs = [(method, json_codec(method)) for method in methods]
    routes = [Route(method, interceptors.wrap(method, codec), codec) for method, codec in codecs]
    wildcard = address.host in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
    hosts = Hosts([*settings.allowed_hosts, *([] if wildcard else [address.host])])
    app = ConnectApp(routes, hosts, settings.limits.max_message_bytes)
    return HttpListener(address, app, settings.tls)
