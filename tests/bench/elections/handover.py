"""Graceful hand-over: the leader resigns, and the time runs until the next has read that it is elected."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import AsyncExitStack

from bench.elections.candidates import Candidate
from bench.elections.engines import store
from bench.elections.players import Figures, channels, run, times
from bench.install import ensure
from bench.processes import HOME, Failure, clean_environment

_SETTLE = 0.12
"""How long the candidate that stands by has to begin waiting, in seconds: etcd takes up to 100 ms until a new watch of
the past hears news at once. The peer on etcd has as much."""
_WARM_UP = 5


def handover(engine: str, count: int) -> dict[str, Figures]:
    """Back and forth between two servers."""
    with store(engine, "handover") as place:
        addresses = [place.serve(name).address for name in ("one", "two")]
        found = run(_back_and_forth(addresses, count + _WARM_UP))
    return {engine: times(found[_WARM_UP:])}


async def _back_and_forth(addresses: list[str], count: int) -> list[float]:
    async with AsyncExitStack() as stack:
        places = await stack.enter_async_context(channels(*addresses))
        leading = await stack.enter_async_context(AsyncExitStack())
        leader = await leading.enter_async_context(Candidate(places[0], "candidate-0"))
        await leader.elected()
        found = []
        for number in range(1, count + 1):
            following = await stack.enter_async_context(AsyncExitStack())
            candidate = Candidate(places[number % 2], f"candidate-{number}")
            follower = await following.enter_async_context(candidate)
            found.append(await _once(leader, follower))
            await leading.aclose()
            leader, leading = follower, following
        return found


async def _once(leader: Candidate, follower: Candidate) -> float:
    await asyncio.sleep(_SETTLE)
    began = await leader.resign()
    return await follower.elected() - began


def etcd_election(name: str, count: int) -> dict[str, Figures]:
    """The same between two sessions of etcd's client in Go."""
    with store("etcd", "peer") as place:
        return {name: times(_program("etcd", place.address, str(count + _WARM_UP))[_WARM_UP:])}


def client_go(name: str, count: int) -> dict[str, Figures]:
    """The same between two electors of client-go."""
    with store("kubernetes", "peer") as place:
        return {name: times(_program("clientgo", *place.address.split(), str(count)))}


def _program(name: str, *args: str) -> list[float]:
    """Runs a peer that prints milliseconds, one a line."""
    ensure("go-elections")
    command = [str(HOME / "go-elections" / name), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment(), timeout=600)
    if done.returncode:
        raise Failure(f"{name} failed: {done.stderr[-200:]}")
    return [float(line) / 1000 for line in done.stdout.split()]
