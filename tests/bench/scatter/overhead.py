"""What a root costs per leaf, beside the bare loop and a root on Node."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING

from bench.processes import Failure
from bench.scatter.players import POOL, Figures, Leaves, Load, Root, bare, on_node, ours, pool

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bench.turns import Play

OURS, STREAM, BARE, NODE = "retinue", "retinue, stream", "bare loop", "root on Node"
_CALLERS = 4
_SECONDS = 1.0


def overhead(fan_out: int) -> Play:
    """All roots over the same leaves, one after the other, so many times a second each."""

    def play(_: str, turns: int) -> Mapping[str, Figures]:
        with ExitStack() as stack:
            leaves, load = stack.enter_context(Leaves(fan_out)), stack.enter_context(Load())
            roots = _roots(stack, leaves)
            for root in roots.values():
                load.play(root, seconds=_SECONDS, callers=_CALLERS)
            return _in_turns(roots, lambda root: _measured(root, leaves, load, fan_out), turns)

    return play


def _roots(stack: ExitStack, leaves: Leaves) -> dict[str, Root]:
    shards = [[address] for address in leaves.addresses]
    return {
        OURS: stack.enter_context(ours({POOL: pool(shards)})),
        STREAM: stack.enter_context(ours({POOL: pool(shards, transport="stream")}, name="stream")),
        BARE: stack.enter_context(bare(leaves.addresses)),
        NODE: stack.enter_context(on_node(leaves.addresses)),
    }


def _in_turns(roots: Mapping[str, Root], measure: Callable[[Root], Figures], turns: int) -> dict[str, Figures]:
    """The median of each figure."""
    found: dict[str, list[Figures]] = defaultdict(list)
    for _ in range(turns):
        for name, root in roots.items():
            found[name].append(measure(root))
    return {name: {key: median(one[key] for one in each) for key in each[0]} for name, each in found.items()}


def _measured(root: Root, leaves: Leaves, load: Load, fan_out: int) -> Figures:
    cpu, theirs = root.cpu(), leaves.cpu()
    answers = load.play(root, seconds=_SECONDS, callers=_CALLERS)
    cpu, theirs = root.cpu() - cpu, leaves.cpu() - theirs
    if set(answers) != {"OK"}:
        raise Failure(f"calls ended with {', '.join(answers)}")
    ok = answers["OK"]
    calls = ok["calls"] * fan_out
    return {
        "rate": ok["calls"] / ok["seconds"],
        "cpu_us": cpu / calls * 1e6,
        "leaf_cpu_us": theirs / calls * 1e6,
        "p50_ms": ok["p50_ms"],
        "p99_ms": ok["p99_ms"],
    }
