"""A system that is played: its server, its producer, its workers, and whether it delivered."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from bench.brokers import BROKERS, Broker, fresh
from bench.figures import undelivered
from bench.processes import Adapter, Failure, Usage

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from bench.systems import System

PATIENCE = 300.0
_EMPTY, _POLL = 30.0, 0.005


@dataclass
class Entrant:
    """A system with its server running and its producer connected."""

    system: System
    where: Path
    broker: Broker
    producer: Adapter
    rounds: int = 0
    notes: dict[str, float] = field(default_factory=dict)
    """What a cell keeps from round to round."""

    def queue(self) -> str:
        """A queue that nothing was ever in."""
        self.rounds += 1
        return f"bench-{self.rounds}"

    def usage(self) -> Usage:
        return self.broker.usage()

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.adapter.close()

    def ready(self) -> None:
        """Returns once the worker waits for tasks."""
        self.adapter.answer(PATIENCE)

    def done(self) -> dict[str, Any]:
        """What the worker says after the last task: first_ns, last_ns, cpu_seconds."""
        while (said := self.adapter.answer(PATIENCE)).get("event") != "done":
            pass
        return said

    def emptied(self) -> int:
        """When (ns) the peer's store first said that nothing is left: the last acknowledgement is in."""
        end = time.monotonic() + _EMPTY
        while left := self._entrant.producer.ask(do="left", queue=self._queue)["left"]:
            if time.monotonic() > end:
                raise Failure(f"{left} of {self._count} tasks are left in the store after all were handled")
            time.sleep(_POLL)
        return time.monotonic_ns()

    def delivered(self, expected: range) -> dict[int, int]:
        """When each task was handled (ns). Raises Failure unless each was exactly once; after emptied()."""
        self.adapter.tell("write")
        while self.adapter.answer(PATIENCE).get("event") != "written":
            pass
        rows = [_row(line) for line in self._file.read_text().splitlines()]
        self._file.unlink()
        if wrong := undelivered(expected, [number for number, _ in rows]):
            raise Failure(f"not delivered exactly once: {wrong}")
        return dict(rows)


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
