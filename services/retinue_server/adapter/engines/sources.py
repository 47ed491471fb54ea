"""A target's kind -> how it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.adapter.core.spec import Kind

if TYPE_CHECKING:
    from retinue_server.adapter.core.packs import Pack
    from retinue_server.adapter.core.spec import Spec
    from retinue_server.adapter.engine import Listener, Source
    from retinue_server.adapter.engines.dialling import Objection


def make(objection: Objection, spec: Spec, pack: Pack | None) -> Source | Listener:
    """Raises CAPABILITY_MISSING where a library is missing. Modules load on the first target of their kind."""
    match spec.kind:
        case Kind.PROMETHEUS | Kind.JSON | Kind.NGINX:
            from retinue_server.adapter.engines.http import HttpSource  # noqa: PLC0415

            return HttpSource(spec, pack, objection)
        case Kind.REDIS | Kind.MEMCACHED:
            from retinue_server.adapter.engines.lines import LineSource  # noqa: PLC0415

            return LineSource(spec, objection)
        case Kind.POSTGRESQL:
            from retinue_server.adapter.engines.postgres import PostgresSource  # noqa: PLC0415

            return PostgresSource(spec, pack, objection)
        case Kind.STATSD:
            from retinue_server.adapter.engines.statsd import StatsdListener  # noqa: PLC0415

            return StatsdListener(spec, pack)
        case Kind.REPORT:
            from retinue_server.adapter.engines.reports import Reports  # noqa: PLC0415

            return Reports(spec)
        case Kind.OTLP:
            from retinue_server.adapter.engines.reports import Pushes  # noqa: PLC0415

            return Pushes(spec)
