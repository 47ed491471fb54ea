"""More than one root: a tree over 1,000 leaves, and root processes that share a load."""

from __future__ import annotations

import json
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.processes import LOAD_CORE, SERVER_CORE
from bench.scatter.players import PAYLOAD, POOL, Figures, Leaves, Load, Probe, Root, ours, pool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LEAVES, _PARENTS = 1000, 25
FLAT, TREE = "flat", "tree"
ONE, TWO = "one process", "two processes"

_FAN_OUT, _CALLERS, _SECONDS = 32, 4, 2.0
_SHARDS, _REQUESTS = 10, 400
_TARDY: dict[str, Any] = {"work_ms": 1, "slow": 0.5, "slow_ms": 100}
"""Half of all calls want company."""


def tree(_: str, requests: int) -> Mapping[str, Figures]:
    """One root for all leaves beside one with parents beneath it; all roots share a core."""
    with ExitStack() as stack:
        leaves, load = stack.enter_context(Leaves(_LEAVES)), stack.enter_context(Load())
        flat = stack.enter_context(ours({POOL: pool([[address] for address in leaves.addresses])}, name="flat"))
        parents = _parents(stack, leaves)
        width = _LEAVES // _PARENTS
        beneath = pool([[parent.address] for parent in parents])
        for shard in beneath["shards"]:
            shard |= {"weight": width, "pool": POOL}
        top = stack.enter_context(ours({POOL: beneath}, name="top"))
        rounds = [(_costs(flat, [], load), _costs(top, parents, load)) for _ in range(requests)]
        with Probe(flat) as probe:
            load.play(flat, seconds=5.0, callers=1)
        found = {FLAT: _medians([one for one, _ in rounds]), TREE: _medians([two for _, two in rounds])}
        found[FLAT]["probe_p99_ms"] = probe.p99_ms()
        for key in ("own_cpu_ms", "total_cpu_ms"):
            found[TREE][f"{key}_share"] = found[TREE][key] / found[FLAT][key]
        return found


def _parents(stack: ExitStack, leaves: Leaves) -> list[Root]:
    width = _LEAVES // _PARENTS
    groups = [leaves.addresses[at : at + width] for at in range(0, _LEAVES, width)]
    return [
        stack.enter_context(ours({POOL: pool([[address] for address in group])}, name=f"parent-{number}"))
        for number, group in enumerate(groups)
    ]


def _costs(root: Root, parents: Sequence[Root], load: Load) -> Figures:
    """Of some requests, one after the other; the model: what p50 would be if each process had a core."""
    calls = 5
    before = root.cpu(), [parent.cpu() for parent in parents]
    ok = load.play(root, calls=calls, callers=1)["OK"]
    own = (root.cpu() - before[0]) / calls * 1000
    theirs = [(parent.cpu() - was) / calls * 1000 for parent, was in zip(parents, before[1], strict=True)]
    model = own + max(theirs, default=0.0)
    return {"own_cpu_ms": own, "total_cpu_ms": own + sum(theirs), "p50_ms": ok["p50_ms"], "model_ms": model}


def _medians(each: Sequence[Figures]) -> Figures:
    return {key: median(one[key] for one in each) for key in each[0]}


def processes(_: str, turns: int) -> Mapping[str, Figures]:
    """One root, and two that are told so, each with a port and a core of its own; callers take turns among them."""
    with ExitStack() as stack:
        leaves, load = stack.enter_context(Leaves(_FAN_OUT)), stack.enter_context(Load())
        pools = {POOL: pool([[address] for address in leaves.addresses])}
        pairs = list(zip(leaves.addresses[:_SHARDS], leaves.addresses[_SHARDS : 2 * _SHARDS], strict=True))
        tardy = {POOL: pool(pairs)}
        one = [stack.enter_context(ours(pools, name="one"))]
        shared = {"RETINUE_SCATTERGATHER__PROCESSES": "2"}
        cores = (SERVER_CORE, LOAD_CORE)
        two = [stack.enter_context(ours(pools, core, f"two-{core}", **shared)) for core in cores]
        rounds = [(_shared(one, load), _shared(two, load)) for _ in range(turns)]
        found = {ONE: _medians([a for a, _ in rounds]), TWO: _medians([b for _, b in rounds])}
        late = [stack.enter_context(ours(tardy, core, f"tardy-{core}", **shared)) for core in cores]
        found[TWO]["extra_of_budget"] = _extra(late, leaves, load)
        return found


def _shared(roots: Sequence[Root], load: Load) -> Figures:
    cpu = sum(root.cpu() for root in roots)
    ok = load.play(roots, seconds=_SECONDS, callers=_CALLERS * len(roots))["OK"]
    cpu = sum(root.cpu() for root in roots) - cpu
    return {"rate": ok["calls"] / ok["seconds"], "cpu_us": cpu / ok["calls"] / _FAN_OUT * 1e6, "p50_ms": ok["p50_ms"]}


def _extra(roots: Sequence[Root], leaves: Leaves, load: Load) -> float:
    """Extra calls, of those that one process might have made."""
    for root in roots:
        load.play(root, request=root.request(PAYLOAD), calls=20, callers=1)
    before = leaves.queries()
    load.play(roots, request=roots[0].request(json.dumps(_TARDY).encode()), calls=_REQUESTS, callers=8)
    first = _REQUESTS * _SHARDS
    return (leaves.queries() - before - first) / (first * 0.05 + 50)
