"""Crashes: SIGKILL of an app, or of its server, and the time runs until a candidate on another server is elected."""

from __future__ import annotations

import asyncio
import random
import time

import grpc.aio

from bench.elections.candidates import App, Candidate
from bench.elections.engines import Store, store
from bench.elections.players import Figures, channels, run, times

_LEASE = 2.0
"""The engine's, when a server crashes, in seconds."""
_APP_LEASE, _SHORT_APP_LEASE = 2.0, 0.5
_SETTLE = 0.1


def app_crash(engine: str, count: int) -> dict[str, Figures]:
    """So many times with proof of death, a quarter as often without."""
    with store(engine, "app") as place:
        one, two = place.serve("one"), place.serve("two")
        proofs = str(one.data_dir / "leaderelection" / "proofs")
        proven = run(_kill_apps(one.address, two.address, proofs, _APP_LEASE, count))
        silent = run(_kill_apps(one.address, two.address, "", _SHORT_APP_LEASE, count // 4))
    lapsed = {"silent_p50_ms": times(silent)["p50_ms"], "silent_ms": times(silent)["longest_ms"]}
    return {engine: times(proven, "proof_") | lapsed}


async def _kill_apps(one: str, two: str, proofs: str, app_lease: float, count: int) -> list[float]:
    async with channels(two) as [channel]:
        return [await _kill_app(one, channel, proofs, app_lease, f"next-{number}") for number in range(count)]


async def _kill_app(one: str, channel: grpc.aio.Channel, proofs: str, app_lease: float, name: str) -> float:
    with App(one, proofs, app_lease) as app:
        await asyncio.to_thread(app.lead)
        async with Candidate(channel, name) as candidate:
            await asyncio.sleep(_SETTLE + random.uniform(0, app_lease / 4))  # at any time between two heartbeats
            began = app.kill()
            took = await candidate.elected() - began
            await candidate.resign()
            return took


def server_crash(engine: str, count: int) -> dict[str, Figures]:
    """At any time between two renewals; the server that was killed starts again."""
    with store(engine, "server") as place:
        two = place.serve("two")
        found = [run(_kill_server(place, two.address, number)) for number in range(count)]
    return {engine: times(found) | {"of_lease": max(found) / _LEASE}}


async def _kill_server(place: Store, two: str, number: int) -> float:
    one = await asyncio.to_thread(place.serve, "one")
    async with (
        channels(one.address, two) as [first, second],
        Candidate(first, f"leader-{number}", _LEASE / 4, _LEASE) as leader,
        Candidate(second, f"next-{number}", _LEASE / 4, _LEASE) as candidate,
    ):
        await leader.elected()
        await asyncio.sleep(_SETTLE + random.uniform(0, _LEASE / 3))
        began = time.perf_counter()
        one.process.kill()
        took = await candidate.elected() - began
        one.kill()
        await candidate.resign()
        return took
