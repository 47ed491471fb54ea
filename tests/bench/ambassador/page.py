"""The goals of the ambassador and its results as Markdown. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import tables
from bench.ambassador.declaring import ENVOY, NATIVE
from bench.ambassador.players import HAPROXY, NUTCRACKER, OURS, PLAIN
from bench.goals import Goal

if TYPE_CHECKING:
    from bench.results import Results


def _rate(what: str, cell: str, bound: float, against: str) -> Goal:
    return Goal(f"{what}: requests/s", cell, bound, against, "rate", OURS)


def _p99(what: str, cell: str, bound: float, against: str) -> Goal:
    return Goal(f"{what}: p99", cell, bound, against, "p99_us", OURS, at_most=True)


def _most(what: str, cell: str, system: str, figure: str, bound: float) -> Goal:
    unit = "ms" if figure.endswith("_ms") else ""
    return Goal(what, cell, bound, figure=figure, system=system, at_most=True, unit=unit)


_MEMCACHED = {
    f"memcached_{kind}_{clients}": f"memcached {kind}, {clients} clients"
    for kind in ("get", "set")
    for clients in (8, 64)
}

GOALS = (
    *(_rate(what, cell, 1, NUTCRACKER) for cell, what in _MEMCACHED.items()),
    *(_p99(what, cell, 1.5, NUTCRACKER) for cell, what in _MEMCACHED.items()),
    _rate("HTTP", "http", 0.95, PLAIN),
    _p99("HTTP", "http", 1.25, PLAIN),
    _rate("Redis get", "redis_get", 0.95, PLAIN),
    _rate("Redis set", "redis_set", 0.95, PLAIN),
    _rate("TCP", "tcp", 0.5, HAPROXY),
    _most("declare to first byte, p99, native", "first_byte", NATIVE, "p99_ms", 100),
    _most("declare to first byte, p99, Envoy", "first_byte", ENVOY, "p99_ms", 100),
    _most("500 upstreams: CPU to declare one, of that at 100, native", "many", NATIVE, "declare_of_100", 1.5),
    _most("500 upstreams: CPU to declare one, of that at 100, Envoy", "many", ENVOY, "declare_of_100", 1.5),
    _most("500 upstreams: memory of one, of that at 100, native", "many", NATIVE, "memory_of_100", 1.5),
    _most("500 upstreams: memory of one, of that at 100, Envoy", "many", ENVOY, "memory_of_100", 1.5),
)

FIGURES = {
    "rate": "requests/s",
    "cpu_us": "proxy, µs of CPU per request",
    "p50_us": "p50, µs",
    "p99_us": "p99, µs",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "declare_ms": "to declare one, ms",
    "declare_cpu_ms": "CPU of that, ms",
    "declare_of_100": "of that at 100",
    "upstream_kib": "memory of one, KiB",
    "memory_of_100": "of that at 100",
    "server_mib": "server, RSS in MiB",
    "envoy_mib": "Envoy, RSS in MiB",
}

_PAGE = """\
# The ambassador, measured

Written by `make bench-ambassador REFERENCE=1`; edit [`ambassador/page.py`](ambassador/page.py), not this file. How it
is measured stands in [`ambassador/__init__.py`](ambassador/__init__.py), the load and what stands behind are in
[`go/ambassador`](go/ambassador), every round in [`results/`](results), what was tried in
[decision 13](../../services/decisions/0013-what-a-memcached-hop-costs.md).

```sh
make bench-ambassador                                     # everything, three rounds at most
make bench-ambassador CELLS="memcached_get_64 http" ROUNDS=1
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
