"""Three times as many requests as the root can answer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from bench.scatter.players import POOL, Figures, Leaves, Load, Probe, Root, ours, pool

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.turns import Play

_TIMES = 3
_REJECTED = "ResourceExhausted"


def overload(fan_out: int) -> Play:
    """Its peak in a closed loop, then the open one."""

    def play(name: str, seconds: int) -> Mapping[str, Figures]:
        with ExitStack() as stack:
            leaves, load = stack.enter_context(Leaves(fan_out)), stack.enter_context(Load())
            root = stack.enter_context(ours({POOL: pool([[address] for address in leaves.addresses])}))
            peak = _peak(root, load)
            with Probe(root) as probe:
                answers = load.play(root, seconds=float(seconds), rate=_TIMES * peak)
            return {name: {"peak": peak, **_figures(answers, peak), "probe_p99_ms": probe.p99_ms()}}

    return play


def _peak(root: Root, load: Load) -> float:
    load.play(root, seconds=1.0, callers=4)
    found = [load.play(root, seconds=2.0, callers=callers)["OK"] for callers in (2, 4)]
    return max(ok["calls"] / ok["seconds"] for ok in found)


def _figures(answers: Mapping[str, Figures], peak: float) -> Figures:
    ok, rejected = answers["OK"], answers.get(_REJECTED, {"calls": 0.0, "p50_ms": 0.0, "p99_ms": 0.0})
    calls = sum(one["calls"] for one in answers.values())
    goodput = ok["calls"] / ok["seconds"]
    return {
        "goodput": goodput,
        "goodput_share": goodput / peak,
        "rejected_share": rejected["calls"] / calls,
        "rejected_p50_ms": rejected["p50_ms"],
        "rejected_p99_ms": rejected["p99_ms"],
        "failed": calls - ok["calls"] - rejected["calls"],
        "p50_ms": ok["p50_ms"],
        "p99_ms": ok["p99_ms"],
    }
