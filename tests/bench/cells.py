"""What is measured: a cell is one workload, played by one system in one round."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.brokers import BROKERS, Broker, fresh
from bench.figures import undelivered
from bench.install import ensure
from bench.processes import Adapter, Failure, Usage, peak_rss_mib
from bench.results import Played

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bench.systems import System

PATIENCE = 300.0
_EMPTY = 30.0


@dataclass
class Entrant:
    """A system with its server running and its producer connected."""

    system: System
    where: Path
    broker: Broker
    producer: Adapter
    rounds: int = 0

    def queue(self) -> str:
        """A queue that nothing was ever in."""
        self.rounds += 1
        return f"bench-{self.rounds}"

    def usage(self) -> Usage:
        return self.broker.server.usage()

    def work(self, queue: str, count: int) -> Work:
        return Work(self, queue, count)


class Work:
    """A worker process on a queue, until it has handled so many tasks."""

    def __init__(self, entrant: Entrant, queue: str, count: int) -> None:
        self._entrant, self._queue, self._count = entrant, queue, count
        self._file = entrant.where / f"{queue}.handled"
        arguments = [entrant.broker.url, queue, str(count), str(self._file)]
        environment = entrant.system.environment()
        self.adapter = Adapter([*entrant.system.command("work"), *arguments], entrant.where, **environment)

    def ready(self) -> None:
        self.adapter.answer(PATIENCE)

    def done(self) -> dict[str, Any]:
        """What the worker says after the last task: first_ns, last_ns, cpu_seconds."""
        while (said := self.adapter.answer(PATIENCE)).get("event") != "done":
            pass
        return said

    def delivered(self, expected: range) -> dict[int, int]:
        """When each task was handled (ns), once the peer's store is empty. Raises Failure if not each exactly once."""
        self._until_nothing_is_left()
        self.adapter.tell("write")
        while self.adapter.answer(PATIENCE).get("event") != "written":
            pass
        rows = [_row(line) for line in self._file.read_text().splitlines()]
        self._file.unlink()
        if wrong := undelivered(expected, [number for number, _ in rows]):
            raise Failure(f"not delivered exactly once: {wrong}")
        return dict(rows)

    def _until_nothing_is_left(self) -> None:
        end = time.monotonic() + _EMPTY
        while left := self._entrant.producer.ask(do="left", queue=self._queue)["left"]:
            if time.monotonic() > end:
                raise Failure(f"{left} of {self._count} tasks are left in the store after all were handled")
            time.sleep(0.05)


def _row(line: str) -> tuple[int, int]:
    number, at = line.split()
    return int(number), int(at)


@dataclass
class Round:
    """What one round gave: figures by name."""

    figures: dict[str, float] = field(default_factory=dict)

    def cost(self, used: Usage, count: int) -> None:
        """What the server used, per task."""
        self.figures["server_cpu_us"] = used.cpu_seconds / count * 1e6
        self.figures["bytes"] = used.bytes_written / count
        self.figures["fsyncs"] = used.fsyncs / count


def enter(stack: ExitStack, system: System, name: str = "") -> Entrant:
    """Starts the system's server and its producer."""
    where = fresh(name or system.name)
    broker = stack.enter_context(BROKERS[system.broker](where))
    producer = Adapter([*system.command("produce"), broker.url], where, **system.environment())
    stack.callback(producer.close)
    producer.answer(PATIENCE)
    return Entrant(system, where, broker, producer)


def enqueueing(mode: str) -> Callable[[Entrant, int], Round]:
    """Enqueues `count` tasks; nobody works on them. What was enqueued must be there, by the peer's own count."""

    def play(entrant: Entrant, count: int) -> Round:
        queue, before = entrant.queue(), entrant.usage()
        seconds = entrant.producer.ask(do="enqueue", queue=queue, first=0, count=count, mode=mode)["seconds"]
        used = entrant.usage() - before
        if (left := entrant.producer.ask(do="left", queue=queue)["left"]) != count:
            raise Failure(f"{left} tasks are in the store, not {count}")
        done = Round({"rate": count / seconds, "server_rss_mib": peak_rss_mib(entrant.broker.server.pid)})
        done.cost(used, count)
        return done

    return play


def process(entrant: Entrant, count: int) -> Round:
    """Burns down a queue that is full already, with one worker process: from its first to its last task."""
    queue = entrant.queue()
    fill(entrant, queue, count)
    before = entrant.usage()
    work = entrant.work(queue, count)
    try:
        done = work.done()
        used = entrant.usage() - before
        found = Round({"worker_rss_mib": peak_rss_mib(work.adapter.pid)})
        work.delivered(range(count))
    finally:
        work.adapter.close()
    found.figures["rate"] = (count - 1) / (done["last_ns"] - done["first_ns"]) * 1e9
    found.figures["worker_cpu_us"] = done["cpu_seconds"] / count * 1e6
    found.figures["server_rss_mib"] = peak_rss_mib(entrant.broker.server.pid)
    found.cost(used, count)
    return found


def fill(entrant: Entrant, queue: str, count: int) -> None:
    mode = next(mode for mode in ("bulk", "pipelined", "one") if mode in entrant.system.modes)
    entrant.producer.ask(do="enqueue", queue=queue, first=0, count=count, mode=mode)


def cycle(entrant: Entrant, count: int) -> Round:
    """Enqueues (pipelined) while a worker that waits already works: from the first call to the last task."""
    queue = entrant.queue()
    work = entrant.work(queue, count)
    try:
        work.ready()
        before, start = entrant.usage(), time.monotonic_ns()
        mode = "pipelined" if "pipelined" in entrant.system.modes else "one"
        entrant.producer.ask(do="enqueue", queue=queue, first=0, count=count, mode=mode)
        done = work.done()
        used = entrant.usage() - before
        found = Round({"worker_rss_mib": peak_rss_mib(work.adapter.pid)})
        work.delivered(range(count))
    finally:
        work.adapter.close()
    found.figures["rate"] = count / (done["last_ns"] - start) * 1e9
    found.figures["worker_cpu_us"] = done["cpu_seconds"] / count * 1e6
    found.figures["server_rss_mib"] = peak_rss_mib(entrant.broker.server.pid)
    found.cost(used, count)
    return found


@dataclass(frozen=True)
class Cell:
    """A workload, what it needs, and how many tasks Retinue plays it with."""

    name: str
    title: str
    play: Callable[[Entrant, int], Round]
    tasks: int
    mode: str = ""
    pins: str = "server on core 0, producer and worker on core 1"

    def takes(self, system: System) -> bool:
        return not self.mode or self.mode in system.modes

    def count(self, system: System, tasks: int | None) -> int:
        share = system.share.get(self.name, system.share.get("", 1.0))
        return max(int((tasks or self.tasks) * share), 100)


CELLS = {
    cell.name: cell
    for cell in (
        Cell("process", "Processing by one worker process, real dispatch", process, 60_000),
        Cell("enqueue_bulk", "Bulk enqueue, 100 per call", enqueueing("bulk"), 60_000, "bulk"),
        Cell("enqueue_one", "Enqueue, each awaited before the next", enqueueing("one"), 20_000, "one"),
        Cell("enqueue_pipelined", "Enqueue, 64 awaited at once", enqueueing("pipelined"), 20_000, "pipelined"),
        Cell("cycle", "Enqueue (64 at once) and process at the same time", cycle, 30_000),
    )
}


def play(
    cell: Cell, systems: list[System], rounds: int, tasks: int | None, say: Callable[[str], None]
) -> dict[str, Played]:
    """All systems in every round, each starting at another place; one that fails is out, and says why."""
    table = {system.name: Played(cell.count(system, tasks)) for system in systems}
    with ExitStack() as stack:
        entrants = list(_enter(stack, systems, table, say))
        for number in range(rounds):
            turn = number % max(len(entrants), 1)
            for entrant in [*entrants[turn:], *entrants[:turn]]:
                _round(cell, entrant, table[entrant.system.name], say)
    return table


def _enter(
    stack: ExitStack, systems: list[System], table: dict[str, Played], say: Callable[[str], None]
) -> Iterator[Entrant]:
    for system in systems:
        try:
            for need in system.needs:
                ensure(need)
            yield enter(stack, system)
        except (Failure, OSError) as error:
            table[system.name].void = str(error)
            say(f"  {system.name:14} void: {error}")


def _round(cell: Cell, entrant: Entrant, played: Played, say: Callable[[str], None]) -> None:
    if played.void:
        return
    try:
        found = cell.play(entrant, played.tasks)
    except Failure as error:
        played.void = str(error)
        say(f"  {entrant.system.name:14} void: {error}")
        return
    played.rounds.append(found.figures)
    say(f"  {entrant.system.name:14} " + "  ".join(f"{key} {value:,.1f}" for key, value in found.figures.items()))
