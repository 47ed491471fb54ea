"""Open loop: tasks come when they come, whether the system keeps up or not.

Arrivals are a Poisson process drawn from a seed. Latency counts from when a task was due, not from when it was sent:
a sender or a server that is held up delays the tasks behind it, and that counts (no coordinated omission).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from bench.closed import cycle
from bench.entrants import Round
from bench.figures import percentile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.entrants import Entrant

LOADS = (25, 50, 75)
"""Percent of the system's own capacity: what `cycle` gave right before."""
_SECONDS = 8.0
_SHARES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """The times, in seconds from now, of a Poisson process."""
    draw, at = random.Random(seed), 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        yield at


def open_loop(entrant: Entrant, count: int) -> Round:
    """Latencies from due to the handler's start, in ms, at each load."""
    capacity = cycle(entrant, count).figures["rate"]
    found = Round({"capacity": capacity})
    for load in LOADS:
        latencies = at_rate(entrant, capacity * load / 100, _SECONDS, entrant.rounds)
        for name, share in _SHARES.items():
            found.figures[f"{name}_{load}"] = percentile(latencies, share)
    return found


def at_rate(entrant: Entrant, rate: float, seconds: float, seed: int) -> list[float]:
    """How late, in ms, each task was started."""
    queue, times = entrant.queue(), list(arrivals(rate, seconds, seed))
    with entrant.work(queue, len(times)) as work:
        work.ready()
        start = entrant.producer.ask(do="open", queue=queue, times=times)["start_ns"]
        work.done()
        work.emptied()
        handled = work.delivered(range(len(times)))
    return [(handled[number] - start) / 1e6 - due * 1e3 for number, due in enumerate(times)]
