"""What `envoy --mode validate` says of an assignment, for those who only want to know."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from retinue_server.ambassador.engine import Refused
from retinue_server.ambassador.engines.envoy import render

if TYPE_CHECKING:
    from collections.abc import Mapping

    from retinue_server.ambassador.engines.envoy.bindings import Json
    from retinue_server.ambassador.engines.envoy.xds import Key

_PATIENCE_S = 10.0


async def validate(program: Path, directory: Path, resources: Mapping[Key, Json]) -> None:
    """Raises Refused with Envoy's words."""
    with tempfile.TemporaryDirectory(dir=directory) as where:
        file = Path(where) / "static.json"
        await asyncio.to_thread(file.write_bytes, msgspec.json.encode(_static(resources)))
        process = await asyncio.create_subprocess_exec(
            str(program), "--mode", "validate", "-c", str(file), "--log-level", "critical",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.environ.get("PATH", "")},
        )  # fmt: skip
        try:
            async with asyncio.timeout(_PATIENCE_S):
                _, said = await process.communicate()
        except TimeoutError:
            process.kill()
            raise Refused("Envoy did not say in time whether it takes it") from None
    if process.returncode:
        raise Refused(said.decode(errors="replace").strip()[-500:] or "Envoy does not say why")


def _static(resources: Mapping[Key, Json]) -> Json:
    """The same as a configuration that needs no discovery."""
    by_kind: dict[str, Any] = {key.kind: said for key, said in resources.items()}
    cluster = {**by_kind[render.CLUSTER], "type": "STATIC", "load_assignment": by_kind[render.ENDPOINTS]}
    del cluster["eds_cluster_config"]
    cluster.pop("transport_socket", None)  # its secrets come by discovery
    listener = msgspec.json.decode(msgspec.json.encode(by_kind[render.LISTENER]))
    for one in listener["filter_chains"][0]["filters"]:
        if one["typed_config"].pop("rds", None):
            one["typed_config"]["route_config"] = {**by_kind[render.ROUTES], "validate_clusters": False}
    return {"static_resources": {"clusters": [cluster], "listeners": [listener]}}
