"""Scrapes while collections run, what a series costs, hung apps, and the start."""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING

from bench.adapter.apps import LINES
from bench.adapter.players import GOOD, PATIENCE, Apps, Figures, Ours, ours, program, times
from bench.figures import percentile
from bench.processes import SERVER_CORE, Failure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BARE = "the same bytes from memory"
OURS, PARSER = "retinue", "prometheus_client"
RANDOM, OFTEN = "at random times", "ten a second"
WITHOUT, WITH = "without them", "with them"
_HUNG_S = 4.0


def scrapes(_: str, seconds: int) -> Mapping[str, Figures]:
    """Two kinds of scrapers, one after the other; and scrapes of who does nothing else, between those of ours."""
    with Apps() as apps, ours() as server:
        server.declare(apps.good)
        with program("bare", str(len(server.page())), core=SERVER_CORE) as (_process, said):
            at_random, bare = _scraped(server, seconds, 0.0, said["port"])
            often, bare_often = _scraped(server, seconds, 0.1, said["port"])
        return {RANDOM: at_random, OFTEN: often, BARE: times([*bare, *bare_often])}


def _scraped(server: Ours, seconds: float, every_s: float, beside: int) -> tuple[Figures, Sequence[float]]:
    began, before = time.perf_counter(), server.collections()
    took, theirs = server.scrapes(seconds, every_s, beside)
    rate = (server.collections() - before) / (time.perf_counter() - began)
    if rate < GOOD * 0.8:
        raise Failure(f"{rate:.1f} collections a second, not {GOOD}")
    return times(took) | {"collections": rate}, theirs


def cost(_: str, seconds: int) -> Mapping[str, Figures]:
    """Both in the same seconds: our five collections in each of them, and the parser once over the same five pages."""
    with ExitStack() as stack:
        apps, server = stack.enter_context(Apps()), stack.enter_context(ours())
        parser, _said = stack.enter_context(program("parse", str(GOOD), core=SERVER_CORE))
        server.declare(apps.good)
        before, cpu, parsed = server.collections(), server.cpu(), 0.0
        began = time.monotonic()
        for second in range(1, seconds + 1):
            parsed += parser.ask(PATIENCE, times=1)["cpu_s"]
            time.sleep(max(began + second - time.monotonic(), 0))
        cpu = server.cpu() - cpu
        pages = server.collections() - before
        if pages < seconds * GOOD * 0.8:
            raise Failure(f"{pages:.0f} collections in {seconds} s")
        return {
            OURS: {"cpu_us": cpu / pages / LINES * 1e6},
            PARSER: {"cpu_us": parsed / seconds / GOOD / LINES * 1e6},
        }


def hung(_: str, turns: int) -> Mapping[str, Figures]:
    """In turns, in one server: five good apps alone, and among ten that never answer."""
    found: dict[str, list[Figures]] = {WITHOUT: [], WITH: []}
    took: dict[str, list[float]] = {WITHOUT: [], WITH: []}
    with Apps(hung=10) as apps, ours() as server:
        server.declare(apps.good)
        for _turn in range(turns):
            for name in (WITHOUT, WITH):
                if name == WITH:
                    server.declare(apps.hung, wait=False)
                began, before = time.perf_counter(), server.collections()
                took[name] += server.scrapes(_HUNG_S, 0.05)[0]
                rate = (server.collections() - before) / (time.perf_counter() - began)
                found[name].append({"collections": rate})
            failed = server.metric("retinue_adapter_collections_total", outcome="failed")
            if not failed:
                raise Failure("no collection failed: nobody hung")
            server.remove(apps.hung)
    shown = {name: {"collections": median(one["collections"] for one in each)} for name, each in found.items()}
    figures = {name: each | times(took[name]) for name, each in shown.items()}
    alone, among = figures[WITHOUT], figures[WITH]
    among["collections_share"] = among["collections"] / alone["collections"]
    among["p99_share"] = percentile(took[WITH], 0.99) / percentile(took[WITHOUT], 0.99)
    return figures


def start(_: str, __: int) -> Mapping[str, Figures]:
    """To the line that says it is ready; then to all collected, and some time later."""
    with Apps() as apps, ours() as server:
        alone = server.memory()["server_mib"]
        began = time.perf_counter()
        server.declare(apps.good[:1])
        first = (time.perf_counter() - began) * 1000
        server.declare(apps.good[1:])
        server.scrapes(5.0, 1.0)
        memory = server.memory()
        return {
            OURS: {"start_ms": server.start_ms, "alone_mib": alone, "first_ms": first, **memory},
        }
