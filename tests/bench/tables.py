"""Results as Markdown. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.figures import Spread, ratio, spread
from bench.goals import GOALS, outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.goals import Goal
    from bench.results import Played, PlayedCell, Results

COSTS = {
    "server_cpu_us": "server CPU, ms per 1,000",
    "worker_cpu_us": "worker CPU, ms per 1,000",
    "bytes": "bytes written per task",
    "fsyncs": "fsyncs per task",
    "server_rss_mib": "server RSS, MiB",
    "worker_rss_mib": "worker RSS, MiB",
}
"""What a task costs, besides its time."""

FIGURES = {
    "capacity": "capacity, tasks/s",
    **{
        f"{name}_{load}": f"{text} at {load} %, ms"
        for load in (25, 50, 75)
        for name, text in (("p50", "p50"), ("p99", "p99"), ("p999", "p99.9"))
    },
    "empty_rate": "leases/s, no more waiting",
    "deep_rate": "leases/s, 1,000,000 waiting",
    "deep_share": "share",
    "restart_ms": "from start to first lease, ms",
    "restart_cpu_ms": "CPU until then, ms",
    "idle_share": "idle, cores",
    "workers_share": "1,000 workers wait, cores",
    "workers_rss_mib": "with them, RSS in MiB",
    "start_ms": "start, ms",
    "start_cpu_ms": "CPU until then, ms",
    "import_cpu_ms": "CPU of `import grpc.aio` alone, ms",
    "rss_mib": "RSS, MiB",
    "modules": "modules",
}
"""What cells without a rate tell."""


_PAGE = """\
# The scoreboard

Written by `make bench REFERENCE=1`; edit [`tables.py`](tables.py), not this file. How it is measured stands in
[`__init__.py`](__init__.py), how a peer is tuned in its [adapter](adapters), the versions in [`peers.txt`](peers.txt),
[`node/package.json`](node/package.json) and [`go/go.mod`](go/go.mod), every round in [`results/`](results).

```sh
make bench                                                          # everything beside everybody, five rounds
make bench CELLS="process enqueue_bulk" SYSTEMS="retinue bullmq" ROUNDS=5
make bench-profile CELL=process                                     # where the time goes
```

"""


def page(results: Results) -> str:
    """The committed page: the machine, then all tables."""
    facts = grid(["machine", ""], [[key, text] for key, text in results.machine.items()])
    return f"{_PAGE}{facts}\n\n## Goals\n\n{render(results)}"


def render(results: Results) -> str:
    """Goals first, then a table per cell."""
    cells = [f"### {cell.title}\n\n{table(name, cell)}" for name, cell in results.cells.items()]
    return "\n\n".join([goals(results), "## Cells", *cells]) + "\n"


def goals(results: Results, wanted: Sequence[Goal] = GOALS) -> str:
    rows = []
    for goal in wanted:
        measured, verdict = outcome(goal, results)
        if goal.cell not in results.cells:
            continue
        unit = "×" if goal.against else f" {goal.unit}"
        rows.append([goal.what, goal.text, ranged(measured, unit) if measured else "", verdict])
    return grid(["what", "goal", "measured: median (range)", ""], rows)


def table(name: str, cell: PlayedCell) -> str:
    """One row per system; rates with how many times a peer's ours is, other figures as they are."""
    rows = rated(cell) if any(played.values("rate") for played in cell.systems.values()) else plain(cell)
    return f"`{name}`; {'; '.join(filter(None, [cell.pins, cell.played]))}\n\n{rows}"


def rated(cell: PlayedCell) -> str:
    costs = [key for key in COSTS if any(played.values(key) for played in cell.systems.values())]
    header = ["system", "tasks a round", "tasks/s: median (range)", "Retinue is", *(COSTS[key] for key in costs)]
    ours = cell.systems.get("retinue")
    return grid(header, [_rated(system, played, ours, costs) for system, played in cell.systems.items()])


def _rated(system: str, played: Played, ours: Played | None, costs: Sequence[str]) -> list[str]:
    if void := _void(played):
        return [system, f"{played.tasks:,}", void, "", *("" for _ in costs)]
    rates = played.values("rate")
    against = ranged(ratio(ours.values("rate"), rates), "×") if ours and len(ours.values("rate")) == len(rates) else ""
    medians = [number(spread(values).median) if (values := played.values(key)) else "" for key in costs]
    return [system, f"{played.tasks:,}", ranged(spread(rates)), against, *medians]


def plain(cell: PlayedCell, figures: Mapping[str, str] = FIGURES) -> str:
    """Median and range of every figure."""
    found = [key for key in figures if any(played.values(key) for played in cell.systems.values())]
    rows = []
    for system, played in cell.systems.items():
        texts = [ranged(spread(values)) if (values := played.values(key)) else "" for key in found]
        rows.append([system, *([_void(played), *texts[1:]] if _void(played) else texts)])
    return grid(["system", *(figures[key] for key in found)], rows)


def _void(played: Played) -> str:
    return "" if played.rounds and not played.void else f"void: {played.void or 'not played'}"


def ranged(found: Spread, unit: str = "") -> str:
    return f"{number(found.median)}{unit} ({number(found.low)}-{number(found.high)})"


def number(value: float) -> str:
    """Three significant digits."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
