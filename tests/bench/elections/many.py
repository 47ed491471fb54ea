"""Many elections that one server leads: what it writes for them, and what it uses."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from bench.elections.engines import Store, Written, store
from bench.elections.players import Figures, channels, run
from bench.processes import rss_mib, threads_cpu_seconds
from retinue.leaderelection.v1 import election_pb2 as pb
from retinue.leaderelection.v1 import leaderelection_service_pb2 as api
from retinue.leaderelection.v1.leaderelection_service_pb2_grpc import LeaderElectionServiceStub

if TYPE_CHECKING:
    import grpc.aio

_SECONDS = 60.0
_LOOK = 1.0
"""How often the engine is asked, in seconds: more often than a row is renewed."""
_CLIENT_GO = 0.5
"""What client-go writes per election and second: RetryPeriod is 2 s."""


def many(engine: str, count: int) -> dict[str, Figures]:
    """Leads so many elections for a minute."""
    with store(engine, "many") as place:
        server = place.serve("one")
        return {engine: run(_lead(place, server.address, server.process.pid, count))}


async def _lead(place: Store, address: str, pid: int, count: int) -> Figures:
    async with AsyncExitStack() as stack:
        [channel] = await stack.enter_async_context(channels(address))
        calls = [await _elected(channel, number) for number in range(count)]
        for call in calls:
            stack.callback(call.cancel)
        figures = await _watched(place, pid, count)
        for call in calls:
            assert not call.done(), "a stream has ended"
        return figures


async def _elected(channel: grpc.aio.Channel, number: int) -> Any:
    """A stream that leads as long as it is open."""
    call: Any = LeaderElectionServiceStub(channel).Campaign()
    start = api.CampaignStart(election_id=f"election-{number}", candidate_id="candidate", liveness=pb.LIVENESS_STREAM)
    await call.write(api.CampaignRequest(start=start))
    while not (await call.read()).HasField("elected"):
        pass
    return call


async def _watched(place: Store, pid: int, count: int) -> Figures:
    await asyncio.sleep(_LOOK)
    began, cpu, before = time.monotonic(), threads_cpu_seconds(pid), place.written()
    while (passed := time.monotonic() - began) < _SECONDS:
        await asyncio.sleep(_LOOK)
        after = await asyncio.to_thread(place.written)
    used = threads_cpu_seconds(pid) - cpu
    return _figures(after - before, passed, count) | {"cpu": used / passed, "rss_mib": rss_mib(pid)}


def _figures(written: Written, passed: float, count: int) -> Figures:
    rows, commits, theirs = written.rows / passed, written.commits / passed, count * _CLIENT_GO
    found = {"rows": rows, "rows_share": rows / theirs, "commits": commits, "commits_share": commits / theirs}
    return found | ({"writing": written.writing / passed} if written.writing else {})
