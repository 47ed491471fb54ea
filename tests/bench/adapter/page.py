"""The goals of the adapter and its results as Markdown. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import tables
from bench.adapter.collecting import OFTEN, OURS, PARSER, RANDOM, WITH
from bench.adapter.statsd import FULL, PACED
from bench.goals import Goal

if TYPE_CHECKING:
    from bench.results import Results


def _most(what: str, cell: str, system: str, figure: str, bound: float, *, unit: str = "") -> Goal:
    return Goal(what, cell, bound, figure=figure, system=system, at_most=True, unit=unit)


def _least(what: str, cell: str, system: str, figure: str, bound: float, *, unit: str = "") -> Goal:
    return Goal(what, cell, bound, figure=figure, system=system, unit=unit)


GOALS = (
    _most("scrape of 10,000 lines at random times, p99", "scrapes", RANDOM, "p99_ms", 20, unit="ms"),
    _most("ten a second, p99", "scrapes", OFTEN, "p99_ms", 20, unit="ms"),
    Goal("CPU per collected series", "cost", 1.3, PARSER, "cpu_us", OURS, at_most=True),
    _least("StatsD, lines in a second of one core", "statsd", FULL, "per_core", 300_000),
    _least("StatsD at 300,000 lines/s, taken in (1 % for the sender's pace)", "statsd", PACED, "rate", 297_000),
    _most("StatsD, sent but neither received nor reported", "statsd", FULL, "unaccounted", 0, unit="datagrams"),
    _most("the same at 300,000 lines/s", "statsd", PACED, "unaccounted", 0, unit="datagrams"),
    _least("ten hung apps: collections of the others, of without", "hung", WITH, "collections_share", 0.95),
    _most("ten hung apps: p99 of scrapes, of without", "hung", WITH, "p99_share", 1.3),
    _most("100 watchers of 100 series, once a second", "watchers", OURS, "cores", 0.1, unit="cores"),
)

FIGURES = {
    "count": "scrapes",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "p99_share": "p99, of without",
    "collections": "collections/s",
    "collections_share": "of without",
    "cpu_us": "µs of CPU per series",
    "rate": "lines/s taken in",
    "sent_rate": "lines/s sent",
    "dropped_share": "dropped, share",
    "unaccounted": "neither received nor reported",
    "per_core": "lines in a second of CPU",
    "without": "cores without them",
    "with": "cores with them",
    "cores": "difference",
    "series_rate": "series/s told to each",
    "coalesced": "collections missed",
    "start_ms": "start, ms",
    "alone_mib": "RSS then, MiB",
    "first_ms": "to the first collection with a new worker, ms",
    "server_mib": "with 10,000 series: RSS of the server, MiB",
    "worker_mib": "of the worker, MiB",
}

_PAGE = """\
# The adapter, measured

Written by `make bench-adapter REFERENCE=1`; edit [`adapter/page.py`](adapter/page.py), not this file. How it is
measured stands in [`adapter/__init__.py`](adapter/__init__.py), every round in [`results/`](results), what was tried in
[decision 14](../../services/decisions/0014-what-a-collection-costs.md).

```sh
make bench-adapter                                        # everything, three rounds at most
make bench-adapter CELLS="scrapes cost" ROUNDS=1
```

"""


def page(results: Results) -> str:
    """The committed page: the machine, then all tables."""
    facts = tables.grid(["machine", ""], [[key, text] for key, text in results.machine.items()])
    return f"{_PAGE}{facts}\n\n## Goals\n\n{render(results)}"


def render(results: Results) -> str:
    """Goals first, then a table per cell."""
    cells = [
        f"### {cell.title}\n\n`{name}`; {cell.pins}; {cell.played}\n\n{tables.plain(cell, FIGURES)}"
        for name, cell in results.cells.items()
    ]
    return "\n\n".join([tables.goals(results, GOALS), "## Cells", *cells]) + "\n"
