"""Slow leaves: a few calls that take a second more, and a day on which every replica is slow."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from bench.scatter.players import POOL, Figures, Leaves, Load, Root, ours, pool
from retinue.scattergather.v1 import scattergather_service_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Mapping

FREE, UNHEDGED, HEDGED = "no stragglers", "not hedged", "hedged"
_BUDGET = 0.05
_BURST = 50.0

_STRAGGLER_SHARDS, _STRAGGLER_RATE, _STRAGGLER_SECONDS = 100, 25.0, 20.0
_SLOW_MS = 500.0
"""A request that takes longer has met a straggler."""
_USUAL: dict[str, Any] = {"work_ms": 2}
_STRAGGLING: dict[str, Any] = _USUAL | {"slow": 0.01, "slow_ms": 1000}

_BROWN_SHARDS, _BROWN_RATE, _BROWN_SECONDS = 20, 60.0, 10.0
_BROWN_TIMEOUT = 1.0
_QUICK: dict[str, Any] = {"work_ms": 2, "serial": True}
_BROWN: dict[str, Any] = {"work_ms": 27, "serial": True}
"""60 requests/s of 20 shards over 40 replicas: each works 81 % of the time."""


def _request(root: Root, behaviour: Mapping[str, Any], *, hedge: bool = True) -> bytes:
    payload = json.dumps(behaviour).encode()
    asked = api.ScatterRequest.FromString(root.request(payload))
    asked.policy.no_hedge = not hedge
    return asked.SerializeToString()


def stragglers(_: str, rounds: int) -> Mapping[str, Figures]:
    """Without any, with and without hedges against them."""
    del rounds
    with ExitStack() as stack:
        leaves, load = stack.enter_context(Leaves(2 * _STRAGGLER_SHARDS)), stack.enter_context(Load())
        root = stack.enter_context(ours({POOL: pool(_pairs(leaves))}))
        load.play(root, request=_request(root, _USUAL), calls=50, callers=4)
        free = _straggling(root, leaves, load, _request(root, _USUAL))
        plain = _straggling(root, leaves, load, _request(root, _STRAGGLING, hedge=False))
        hedged = _straggling(root, leaves, load, _request(root, _STRAGGLING))
        hedged["delay_ms"] = root.hedge_delay_ms()
        hedged["p99_of_bound"] = hedged["p99_ms"] / (1.3 * free["p99_ms"] + hedged["delay_ms"])
        return {FREE: free, UNHEDGED: plain, HEDGED: hedged}


def _pairs(leaves: Leaves) -> list[list[str]]:
    half = len(leaves.addresses) // 2
    return [list(pair) for pair in zip(leaves.addresses[:half], leaves.addresses[half:], strict=True)]


def _straggling(root: Root, leaves: Leaves, load: Load, request: bytes) -> Figures:
    before = leaves.queries()
    answers = load.play(root, request=request, seconds=_STRAGGLER_SECONDS, rate=_STRAGGLER_RATE, slow_ms=_SLOW_MS)
    ok, calls = answers["OK"], sum(one["calls"] for one in answers.values())
    return {
        "calls": calls,
        "slow_share": (ok["slow"] + calls - ok["calls"]) / calls,
        "extra_share": (leaves.queries() - before) / (calls * _STRAGGLER_SHARDS) - 1,
        "p50_ms": ok["p50_ms"],
        "p99_ms": ok["p99_ms"],
    }


def brown_out(_: str, rounds: int) -> Mapping[str, Figures]:
    """All replicas become slow under a steady load, in a pool that hedges and in one that does not."""
    del rounds
    found = {}
    for name in (UNHEDGED, HEDGED):
        with ExitStack() as stack:
            leaves, load = stack.enter_context(Leaves(2 * _BROWN_SHARDS)), stack.enter_context(Load())
            pools = {POOL: pool(_pairs(leaves), hedging={"enabled": name == HEDGED})}
            found[name] = _browning(stack.enter_context(ours(pools)), leaves, load)
    found[HEDGED]["goodput_share"] = found[HEDGED]["goodput"] / found[UNHEDGED]["goodput"]
    return found


def _browning(root: Root, leaves: Leaves, load: Load) -> Figures:
    steady = {"rate": _BROWN_RATE, "timeout": _BROWN_TIMEOUT}
    load.play(root, request=_request(root, _QUICK), seconds=3.0, **steady)
    before = leaves.queries()
    answers = load.play(root, request=_request(root, _BROWN), seconds=_BROWN_SECONDS, **steady)
    calls = sum(one["calls"] for one in answers.values())
    first = calls * _BROWN_SHARDS
    extra = leaves.queries() - before - first
    return {
        "calls": calls,
        "goodput": answers["OK"]["calls"] / _BROWN_SECONDS,
        "extra_share": extra / first,
        "extra_of_budget": extra / (first * _BUDGET + _BURST),
        "p50_ms": answers["OK"]["p50_ms"],
        "p99_ms": answers["OK"]["p99_ms"],
    }
