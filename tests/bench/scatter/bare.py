"""The bare loop: `python -m bench.scatter.bare ADDRESS...` asks every address for what came, joins what came back.

No deadlines of its own, no replicas, no merge, no limits: what a root in grpc.aio costs at least when each leaf is
asked by a call. It has whatever tuning the server has: uvloop, gRPC's older poller, a calm garbage collector.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from typing import Any

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener,-event_engine_client")

import grpc
import uvloop
from grpc import aio

SERVICE, METHOD = "retinue.scattergather.v1.ScatterGatherService", "Scatter"
LEAF = "/retinue.scattergather.v1.LeafService/Query"
_OPTIONS = (("grpc.http2.bdp_probe", 0), ("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1))
_TIMEOUT_S = 9.5


async def main(addresses: list[str]) -> None:
    channels = [aio.insecure_channel(address, options=_OPTIONS) for address in addresses]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    methods: list[Any] = [channel.unary_unary(LEAF) for channel in channels]

    async def scatter(data: bytes, _: Any) -> bytes:
        calls = [method(data, timeout=_TIMEOUT_S) for method in methods]
        return b"".join([await call for call in calls])

    server = aio.server(options=[("grpc.http2.bdp_probe", 0)])
    handlers: Any = {METHOD: grpc.unary_unary_rpc_method_handler(scatter)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    print(json.dumps({"listen": [f"127.0.0.1:{port}"]}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
