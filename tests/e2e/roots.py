"""What tests of scatter/gather share that see it as a person does: a root over a pool file, and grpcurl."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
from servers import RunningServer, start_server

from retinue.scattergather.v1.topology_service_pb2 import WatchTopologyRequest
from retinue.scattergather.v1.topology_service_pb2_grpc import TopologyServiceStub

TOOL = Path(sys.executable).parent
"""Where wheels put their programs."""
SERVICE = "retinue.scattergather.v1.ScatterGatherService"


def pool(where: Path, shards: Iterable[str], **settings: str) -> dict[str, Any]:
    """A pool of shards that each listen at a socket of their name."""
    entries = [{"shard_id": name, "endpoints": [f"unix:{where}/{name}"]} for name in shards]
    return {"shards": entries, "hedging": {"enabled": False}, **settings}


def started_root(where: Path, pools: dict[str, Any], **env: str) -> RunningServer:
    """A root with these pools; the caller stops it."""
    file = where / "pools.yaml"
    file.write_text(json.dumps({"pools": pools}))
    return start_server(where, "scattergather", env={"RETINUE_SCATTERGATHER__POOLS": str(file), **env})


def await_connected(server: RunningServer, pool_id: str, wanted: int) -> None:
    """Returns when the root is connected to so many shards of the pool."""
    with grpc.insecure_channel(server.address) as channel:
        for seen in TopologyServiceStub(channel).WatchTopology(WatchTopologyRequest(pool_id=pool_id), timeout=60):
            if sum(shard.endpoints[0].connected for shard in seen.pool.shards) == wanted:
                return
    raise AssertionError("the pool is gone")


def grpcurl(server: RunningServer, rpc: str, request: dict[str, Any], *, ok: bool = True) -> Any:
    """The messages that come, or what is said of an error."""
    command = [str(TOOL / "grpcurl"), "-plaintext", "-max-time", "60", "-d", json.dumps(request), server.address]
    done = subprocess.run([*command, f"{SERVICE}/{rpc}"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode == 0) == ok, done.stderr
    return _messages(done.stdout) if ok else done.stderr


def _messages(text: str) -> list[dict[str, Any]]:
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        message, end = decoder.raw_decode(text)
        found.append(message)
        text = text[end:]
    return found
