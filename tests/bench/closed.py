"""Closed loops: as fast as it goes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

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
        done = Round({"rate": count / seconds, "server_rss_mib": entrant.broker.peak_rss_mib()})
        done.cost(used, count)
        return done

    return play


def enqueue(entrant: Entrant, queue: str, count: int, mode: str = "") -> float:
    """Seconds; without a mode by the fastest way that the peer has."""
    fastest = next(way for way in ("bulk", "pipelined", "one") if way in entrant.system.modes)
    return float(entrant.producer.ask(do="enqueue", queue=queue, first=0, count=count, mode=mode or fastest)["seconds"])


def process(entrant: Entrant, count: int) -> Round:
    """Burns down a full queue with one worker process: from its first task until the store is empty."""
    queue = entrant.queue()
    enqueue(entrant, queue, count)
    before = entrant.usage()
    found, first, end = _burned(entrant, entrant.work(queue, count), before, count)
    found.figures["rate"] = count / (end - first) * 1e9
    return found


def cycle(entrant: Entrant, count: int) -> Round:
    """Enqueues (pipelined) while a worker that waits already works: from the first call until the store is empty."""
    queue = entrant.queue()
    work = entrant.work(queue, count)
    work.ready()
    before, start = entrant.usage(), time.monotonic_ns()
    enqueue(entrant, queue, count, "pipelined" if "pipelined" in entrant.system.modes else "one")
    found, _, end = _burned(entrant, work, before, count)
    found.figures["rate"] = count / (end - start) * 1e9
    return found


def whole(entrant: Entrant, count: int) -> Round:
    """Enqueues all in batches of 100, then burns it down: tasks over the time of both, starting up not counted."""
    queue, before = entrant.queue(), entrant.usage()
    seconds = enqueue(entrant, queue, count)
    found, first, end = _burned(entrant, entrant.work(queue, count), before, count)
    found.figures["rate"] = count / (seconds + (end - first) / 1e9)
    found.figures["cpu_us"] = found.figures["server_cpu_us"] + found.figures["worker_cpu_us"]
    return found


def _burned(entrant: Entrant, work: Work, before: Usage, count: int) -> tuple[Round, int, int]:
    """What server and worker used since `before`, when the first task was handled and when the store was empty (ns).

    It is sure then that each task was delivered exactly once.
    """
    with work:
        done = work.done()
        end = work.emptied()
        found = Round({"worker_rss_mib": peak_rss_mib(work.adapter.pid)})
        found.cost(entrant.usage() - before, count)
        work.delivered(range(count))
    found.figures["worker_cpu_us"] = done["cpu_seconds"] / count * 1e6
    found.figures["server_rss_mib"] = entrant.broker.peak_rss_mib()
    return found, done["first_ns"], end
