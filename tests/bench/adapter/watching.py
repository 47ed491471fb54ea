"""What watchers cost."""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING

from bench.adapter.players import PATIENCE, Apps, Figures, ours, program
from bench.processes import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OURS = "retinue"
_WATCHERS, _TURN_S = 100, 4.0
_NAME, _TARGETS, _SERIES = "shop_part_3_calls", ("app-0", "app-1"), 100


def watchers(_: str, turns: int) -> Mapping[str, Figures]:
    """CPU without and with them, in turns."""
    without, among, told, lost = list[float](), list[float](), list[float](), 0.0
    with ExitStack() as stack:
        apps, server = stack.enter_context(Apps()), stack.enter_context(ours())
        server.declare(apps.good)
        for _turn in range(turns):
            without.append(_cores(server.cpu, _TURN_S))
            with program("watchers", server.address, str(_WATCHERS), _NAME, *_TARGETS) as (process, _told):
                before = process.ask(PATIENCE)
                began = time.perf_counter()
                among.append(_cores(server.cpu, _TURN_S))
                after = process.ask(PATIENCE)
                took = time.perf_counter() - began
            messages = (after["messages"] - before["messages"]) / _WATCHERS / took
            series = (after["series"] - before["series"]) / _WATCHERS / took
            if series < _SERIES * 0.7 or messages < 0.7 * len(_TARGETS):
                raise Failure(f"watchers were told of {series:.0f} series in {messages:.1f} messages a second")
            told.append(series)
            lost += after["coalesced"]
    cores = median(b - a for a, b in zip(without, among, strict=True))
    return {
        OURS: {
            "without": median(without),
            "with": median(among),
            "cores": cores,
            "series_rate": median(told),
            "coalesced": lost,
        }
    }


def _cores(cpu: Callable[[], float], seconds: float) -> float:
    began, before = time.perf_counter(), cpu()
    time.sleep(seconds)
    return (cpu() - before) / (time.perf_counter() - began)
