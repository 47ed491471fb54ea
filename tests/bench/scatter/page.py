"""The goals of scatter/gather and its results as Markdown. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import tables
from bench.goals import Goal
from bench.scatter.many import TREE, TWO
from bench.scatter.overhead import BARE, NODE, OURS
from bench.scatter.slowness import HEDGED

if TYPE_CHECKING:
    from bench.results import Results


def _most(what: str, cell: str, system: str, figure: str, bound: float) -> Goal:
    unit = "ms" if figure.endswith("_ms") else ""
    return Goal(what, cell, bound, figure=figure, system=system, at_most=True, unit=unit)


def _least(what: str, cell: str, system: str, figure: str, bound: float) -> Goal:
    return Goal(what, cell, bound, figure=figure, system=system)


GOALS = (
    Goal("CPU per leaf, fan-out 32", "overhead_32", 1.5, BARE, "cpu_us", OURS, at_most=True),
    Goal("CPU per leaf, fan-out 128", "overhead_128", 1.35, BARE, "cpu_us", OURS, at_most=True),
    Goal("requests/s, fan-out 32", "overhead_32", 1.5, NODE, "rate", OURS),
    Goal("requests/s, fan-out 128", "overhead_128", 1.5, NODE, "rate", OURS),
    _most("stragglers: slow requests", "stragglers", HEDGED, "slow_share", 0.02),
    _most("stragglers: extra calls", "stragglers", HEDGED, "extra_share", 0.05),
    _most("stragglers: p99, of 1.3 × without them + the hedge's delay", "stragglers", HEDGED, "p99_of_bound", 1),
    _most("brown-out: extra calls, of the budget", "brown_out", HEDGED, "extra_of_budget", 1),
    _least("brown-out: goodput, of not hedging", "brown_out", HEDGED, "goodput_share", 0.95),
    _least("overload: goodput, of the peak, fan-out 32", "overload_32", OURS, "goodput_share", 0.75),
    _least("overload: goodput, of the peak, fan-out 128", "overload_128", OURS, "goodput_share", 0.9),
    _most("overload: rejections, p99, fan-out 32", "overload_32", OURS, "rejected_p99_ms", 25),
    _most("overload: rejections, p99, fan-out 128", "overload_128", OURS, "rejected_p99_ms", 25),
    _most("tree: the root's own CPU, of the flat root's", "tree", TREE, "own_cpu_ms_share", 0.1),
    _most("tree: all CPU, of the flat root's", "tree", TREE, "total_cpu_ms_share", 1.6),
    _most("two processes: extra calls, of one's budget", "processes", TWO, "extra_of_budget", 1),
)

FIGURES = {
    "rate": "requests/s",
    "cpu_us": "root, µs of CPU per leaf",
    "leaf_cpu_us": "leaf, µs of CPU per call",
    "calls": "requests",
    "slow_share": "slow requests, share",
    "extra_share": "extra calls, share",
    "extra_of_budget": "extra calls, of the budget",
    "peak": "peak, answers/s",
    "goodput": "answers/s",
    "goodput_share": "goodput, share",
    "rejected_share": "rejected, share",
    "rejected_p50_ms": "rejection: p50, ms",
    "rejected_p99_ms": "p99, ms",
    "failed": "failed otherwise",
    "own_cpu_ms": "root's CPU, ms per request",
    "own_cpu_ms_share": "of flat",
    "total_cpu_ms": "CPU of all, ms per request",
    "total_cpu_ms_share": "of flat",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "delay_ms": "hedge after, ms",
    "p99_of_bound": "p99, of the bound",
    "model_ms": "with a core each, ms",
    "probe_p99_ms": "health meanwhile: p99, ms",
}

_PAGE = """\
# Scatter/gather, measured

Written by `make bench-scatter REFERENCE=1`; edit [`scatter/page.py`](scatter/page.py), not this file. How it is
measured stands in [`scatter/__init__.py`](scatter/__init__.py), leaves and load are in [`go/scatter`](go/scatter),
every round in [`results/`](results), what was tried in
[decision 11](../../services/decisions/0011-what-a-root-costs.md).

```sh
make bench-scatter                                        # everything, three rounds at most
make bench-scatter CELLS="overhead_32 overload_32" ROUNDS=1
```

"""

_MORE_CORES = """\
## More cores

A root is one process, which uses one core. Two ways lead to more:

- *Parents* divide a wide fan-out. The root's own part shrinks to its parents' number; the tree's `with a core each` is
  the CPU of the root and of one parent, one after the other: what p50 comes to when every process has a core. With `c`
  µs of CPU per leaf and `b` per request, N leaves take `b + N·c` flat, and `2b + (P + N/P)·c` through P parents.
- *Processes* divide a load. Each gets `scattergather.processes: N` (so that limits and budgets are divided), an address
  and a data directory of its own: as sidecars or as replicas of a Deployment this comes by itself, on one host it is
  `retinue-server scattergather --listen 127.0.0.1:7077 --data-dir a`, then `… :17077 --data-dir b`. Callers are given
  all addresses (gRPC's `round_robin` over `ipv4:127.0.0.1:7077,127.0.0.1:17077`). They do not share a port: a kernel
  that divides connections gives one process all the calls of a client that has one.

"""


def page(results: Results) -> str:
    """The committed page: the machine, then all tables."""
    facts = tables.grid(["machine", ""], [[key, text] for key, text in results.machine.items()])
    return f"{_PAGE}{facts}\n\n## Goals\n\n{render(results)}\n{_MORE_CORES}".rstrip() + "\n"


def render(results: Results) -> str:
    """Goals first, then a table per cell."""
    cells = [
        f"### {cell.title}\n\n`{name}`; {cell.pins}; {cell.played}\n\n{tables.plain(cell, FIGURES)}"
        for name, cell in results.cells.items()
    ]
    return "\n\n".join([tables.goals(results, GOALS), "## Cells", *cells]) + "\n"
