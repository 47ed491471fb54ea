"""Closed loops: as fast as it goes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bench.entrants import Entrant, Round
from bench.processes import Failure, Usage, peak_rss_mib

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.entrants import Work


def enqueueing(mode: str) -> Callable[[Entrant, int], Round]:
    """Enqueues `count` tasks; nobody works on them. What was enqueued must be there, by the peer's own count."""

    def play(entrant: Entrant, count: int) -> Round:
        queue, before = entrant.queue(), entrant.usage()
        seconds = enqueue(entrant, queue, count, mode)
        used = entrant.usage() - before
        if (left := entrant.producer.ask(do="left", queue=queue)["left"]) != count:
            raise Failure(f"{left} tasks are in the store, not {count}")
        done = Round({"rate": count / seconds, "server_rss_mib": peak_rss_mib(entrant.broker.server.pid)})
        done.cost(used, count)
        return done

    return play


def enqueue(entrant: Entrant, queue: str, count: int, mode: str = "") -> float:
    """Seconds; without a mode by the fastest way that the peer has."""
    fastest = next(way for way in ("bulk", "pipelined", "one") if way in entrant.system.modes)
    return float(entrant.producer.ask(do="enqueue", queue=queue, first=0, count=count, mode=mode or fastest)["seconds"])


def process(entrant: Entrant, count: int) -> Round:
    """Burns down a queue that is full already, with one worker process: from its first to its last task."""
    queue = entrant.queue()
    enqueue(entrant, queue, count)
    before = entrant.usage()
    with entrant.work(queue, count) as work:
        done = work.done()
        found = _worked(entrant, work, done, entrant.usage() - before, count)
    found.figures["rate"] = (count - 1) / (done["last_ns"] - done["first_ns"]) * 1e9
    return found


def cycle(entrant: Entrant, count: int) -> Round:
    """Enqueues (pipelined) while a worker that waits already works: from the first call to the last task."""
    queue = entrant.queue()
    with entrant.work(queue, count) as work:
        work.ready()
        before, start = entrant.usage(), time.monotonic_ns()
        enqueue(entrant, queue, count, "pipelined" if "pipelined" in entrant.system.modes else "one")
        done = work.done()
        found = _worked(entrant, work, done, entrant.usage() - before, count)
    found.figures["rate"] = count / (done["last_ns"] - start) * 1e9
    return found


def whole(entrant: Entrant, count: int) -> Round:
    """Enqueues all in batches of 100, then burns it down: tasks over the time of both, starting up not counted."""
    queue, before = entrant.queue(), entrant.usage()
    seconds = enqueue(entrant, queue, count)
    with entrant.work(queue, count) as work:
        done = work.done()
        found = _worked(entrant, work, done, entrant.usage() - before, count)
    working = (done["last_ns"] - done["first_ns"]) / 1e9
    return Round({"rate": count / (seconds + working)} | found.figures | {"cpu_us": sum(_cpu(found))})


def _cpu(found: Round) -> tuple[float, float]:
    return found.figures["server_cpu_us"], found.figures["worker_cpu_us"]


def _worked(entrant: Entrant, work: Work, done: dict[str, Any], used: Usage, count: int) -> Round:
    """What server and worker used, once it is sure that each task was delivered exactly once."""
    found = Round({"worker_rss_mib": peak_rss_mib(work.adapter.pid)})
    work.delivered(range(count))
    found.figures["worker_cpu_us"] = done["cpu_seconds"] / count * 1e6
    found.figures["server_rss_mib"] = peak_rss_mib(entrant.broker.server.pid)
    found.cost(used, count)
    return found
