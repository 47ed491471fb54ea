"""An ambassador that breaks a rule with each upstream that is named after it: what the checker must catch.

The rules are broken from here, so that the product has no switch for it; other upstreams are served as they should be.
"""

from __future__ import annotations

import asyncio
import os
import sys
from unittest.mock import patch

from msgspec.structs import replace

from retinue_server.__main__ import main
from retinue_server.ambassador.core.spec import Spec
from retinue_server.ambassador.engine import Assignment
from retinue_server.ambassador.engines.envoy import render
from retinue_server.ambassador.engines.envoy.bindings import Json
from retinue_server.ambassador.engines.envoy.plane import EnvoyPlane
from retinue_server.ambassador.engines.native.plane import NativePlane

_DEAF_S = 0.2
_put, _cluster = NativePlane.put, render.cluster


async def put(plane: NativePlane, wanted: Assignment) -> None:
    """A change cuts what is open, is served by those before it, or closes the listener for a while."""
    name = wanted.spec.upstream_id
    known = plane._upstreams.get(name)
    if known is not None and known.served.assignment.endpoints:
        if name == "cuts-what-is-open":
            known.served.cut()
        elif name == "serves-the-former":
            wanted = replace(wanted, endpoints=known.served.assignment.endpoints)
        elif name == "listens-anew":
            known.served.close()
            await asyncio.sleep(_DEAF_S)
    await _put(plane, wanted)


async def do_not_wait(plane: EnvoyPlane) -> None:
    """Requests that are under way are no reason to go on (upstream `leaves-at-once`)."""


def cluster(spec: Spec, redis_password: str = "") -> Json:
    """Each process renders it otherwise, so that the next one changes what Envoy has (`changes-what-stays`)."""
    return _cluster(spec, redis_password) | {"per_connection_buffer_limit_bytes": 1_000_000 + os.getpid()}


def break_all() -> None:
    """From now on."""
    patch.object(NativePlane, "put", put).start()
    patch.object(EnvoyPlane, "_at_rest", do_not_wait).start()
    patch.object(render, "cluster", cluster).start()


if __name__ == "__main__":
    break_all()
    sys.exit(main())
