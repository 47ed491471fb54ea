"""The goals of leader election and its results as Markdown. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import tables
from bench.goals import Goal

if TYPE_CHECKING:
    from bench.results import Results


def _most(what: str, cell: str, figure: str, bound: float, unit: str = "") -> list[Goal]:
    """One for each engine that has such a goal."""
    return [
        Goal(f"{what}, {engine}", cell, bound, figure=figure, system=engine, at_most=True, unit=unit)
        for engine in ("sqlite", "etcd", "postgres")
    ]


def _of_etcd(what: str, cell: str, figure: str, bound: float) -> Goal:
    return Goal(what, cell, bound, "etcd, called directly", figure, "sqlite", at_most=True)


GOALS = (
    *_most("hand-over, p99", "handover", "p99_ms", 50, "ms"),
    *_most("app killed, with proof, p99", "app_crash", "proof_p99_ms", 100, "ms"),
    *_most("app killed, without proof, longest", "app_crash", "silent_ms", 600, "ms"),
    *_most("server killed, longest, in engine leases", "server_crash", "of_lease", 1.1),
    _of_etcd("acquire, p50", "acquire", "acquire_p50_ms", 1.1),
    _of_etcd("acquire and resign, p50", "acquire", "both_p50_ms", 1.1),
    _of_etcd("heartbeat, p50", "keep_alive", "p50_ms", 1),
    *_most("rows written, of client-go's", "many", "rows_share", 0.45),
    *_most("commits, of client-go's", "many", "commits_share", 0.05),
)

FIGURES = {
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "longest_ms": "longest, ms",
    "proof_p50_ms": "with proof: p50, ms",
    "proof_p99_ms": "p99, ms",
    "silent_p50_ms": "without: p50, ms",
    "silent_ms": "longest, ms",
    "of_lease": "longest, of the lease",
    "acquire_p50_ms": "acquire: p50, ms",
    "acquire_p99_ms": "p99, ms",
    "both_p50_ms": "and resign: p50, ms",
    "rows": "rows/s",
    "rows_share": "of client-go's",
    "commits": "commits/s",
    "commits_share": "of client-go's",
    "writing": "commits/s that wrote",
    "cpu": "server, cores",
    "rss_mib": "server RSS, MiB",
}

_PAGE = """\
# Leader election, measured

Written by `make bench-elections REFERENCE=1`; edit [`elections/page.py`](elections/page.py), not this file. How it is
measured stands in [`elections/__init__.py`](elections/__init__.py), what the peers are in
[`go/elections`](go/elections), every round in [`results/`](results).

```sh
make bench-elections                                        # everything, three rounds
make bench-elections CELLS="handover app_crash" ROUNDS=1
```

"""


def page(results: Results) -> str:
    """The committed page: the machine, then all tables."""
    facts = tables.grid(["machine", ""], [[key, text] for key, text in results.machine.items()])
    return f"{_PAGE}{facts}\n\n## Goals\n\n{render(results)}"


def render(results: Results) -> str:
    """Goals first, then a table per cell."""
    cells = [
        f"### {cell.title}\n\n`{name}`; {cell.pins}\n\n{tables.plain(cell, FIGURES)}"
        for name, cell in results.cells.items()
    ]
    return "\n\n".join([tables.goals(results, GOALS), "## Cells", *cells]) + "\n"
