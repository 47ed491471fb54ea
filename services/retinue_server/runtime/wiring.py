"""Settings and wired patterns -> a process, by explicit constructors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.runtime import addresses
from retinue_server.runtime.authority import Authority, TokenFile
from retinue_server.runtime.codec import proto_codec
from retinue_server.runtime.dispatch import Method, Pattern, Role, Service
from retinue_server.runtime.health import HEALTH, HealthService, ReflectionService
from retinue_server.runtime.interceptors import Interceptors, Limits, unguarded
from retinue_server.runtime.lifecycle import Listener, Process
from retinue_server.runtime.server import GrpcListener, Route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retinue_server.runtime.config import Settings


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
        return _routes(methods, common, Interceptors(authority, limits))

    listeners: list[Listener] = []
    if settings.listen:
        app = routes(Role.APP, token_required=settings.require_token)
        where = [addresses.parse(text) for text in settings.listen]
        listeners.append(GrpcListener(where, app, name="listen", socket_mode=0o660))
    if settings.control:
        operator = routes(Role.OPERATOR, token_required=False)
        control = [addresses.parse(settings.control)]
        listeners.append(GrpcListener(control, operator, name="control", socket_mode=0o600))
    return Process(patterns, listeners, health, drain_seconds=settings.drain_seconds, on_drain=reflection.close)


def _routes(methods: Sequence[Method], common: Sequence[Method], interceptors: Interceptors) -> list[Route]:
    routes = []
    for method in methods:
        codec = proto_codec(method)
        routes.append(Route(method, interceptors.wrap(method, codec), codec))
    for method in common:
        codec = proto_codec(method)
        routes.append(Route(method, unguarded(method, codec), codec))
    return routes
