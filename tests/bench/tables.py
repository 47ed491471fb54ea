"""Results as Markdown. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.figures import Spread, ratio, spread
from bench.goals import GOALS, outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.results import Played, PlayedCell, Results

_COSTS = {
    "server_cpu_us": "server CPU, ms per 1,000",
    "worker_cpu_us": "worker CPU, ms per 1,000",
    "bytes": "bytes written per task",
    "fsyncs": "fsyncs per task",
    "server_rss_mib": "server RSS, MiB",
    "worker_rss_mib": "worker RSS, MiB",
}


def render(results: Results) -> str:
    """Goals first, then a table per cell."""
    parts = [goals(results), *(f"### {cell.title}\n\n{table(name, cell)}" for name, cell in results.cells.items())]
    return "\n\n".join(parts) + "\n"


def goals(results: Results) -> str:
    rows = []
    for goal in GOALS:
        measured, verdict = outcome(goal, results)
        unit = "×" if goal.against else f" {goal.unit}"
        rows.append([goal.what, goal.text, ranged(measured, unit) if measured else "", verdict])
    return grid(["what", "goal", "measured: median (range)", ""], rows)


def table(name: str, cell: PlayedCell) -> str:
    """One row per system; the ratio is Retinue's rate over the peer's."""
    costs = [key for key in _COSTS if any(played.values(key) for played in cell.systems.values())]
    header = ["system", "tasks a round", "tasks/s: median (range)", "Retinue is", *(_COSTS[key] for key in costs)]
    ours = cell.systems.get("retinue")
    rows = [_row(system, played, ours, costs) for system, played in cell.systems.items()]
    return f"`{name}`; {cell.pins}\n\n{grid(header, rows)}"


def _row(system: str, played: Played, ours: Played | None, costs: Sequence[str]) -> list[str]:
    if played.void or not played.rounds:
        return [system, f"{played.tasks:,}", f"void: {played.void or 'not played'}", "", *("" for _ in costs)]
    against = ranged(ratio(ours.values("rate"), played.values("rate")), "×") if ours and ours.values("rate") else ""
    medians = [number(spread(values).median) if (values := played.values(key)) else "" for key in costs]
    return [system, f"{played.tasks:,}", ranged(spread(played.values("rate"))), against, *medians]


def ranged(found: Spread, unit: str = "") -> str:
    return f"{number(found.median)}{unit} ({number(found.low)}-{number(found.high)})"


def number(value: float) -> str:
    """Three significant digits."""
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{float(f'{value:.3g}'):g}"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
