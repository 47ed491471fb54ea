"""The cells: what is measured, in which order, and how often."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.closed import cycle, enqueueing, process, whole
from bench.entrants import Entrant, Round, enter
from bench.install import ensure
from bench.life import backlog, idle, restart, start
from bench.open_loop import open_loop
from bench.processes import Failure
from bench.results import Played
from bench.systems import SYSTEMS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.systems import System


_PEERS = tuple(name for name in SYSTEMS if name.partition("-")[0] != "retinue")
_ALL = ("retinue", *_PEERS)
_OURS = ("retinue",)
_ON_POSTGRES = ("retinue", "retinue-postgres", "procrastinate", "river", "pg-boss", "graphile-worker")
_OBSERVED = ("retinue", "retinue-metrics", "retinue-tracing")


@dataclass(frozen=True)
class Cell:
    """A workload, who plays it, and how many tasks Retinue plays it with."""

    name: str
    title: str
    play: Callable[[Entrant, int], Round]
    tasks: int
    systems: tuple[str, ...] = _ALL
    mode: str = ""
    pins: str = "server on core 0, producer and worker on core 1"

    def takes(self, system: System) -> bool:
        return system.name in self.systems and (not self.mode or self.mode in system.modes)

    def count(self, system: System, tasks: int | None) -> int:
        """How many tasks a system plays it with; Retinue's own cells keep theirs."""
        if self.systems == _OURS:
            return self.tasks
        share = system.share.get(self.name, system.share.get("", 1.0))
        return max(int((tasks or self.tasks) * share), 100)


CELLS = {
    cell.name: cell
    for cell in (
        Cell("process", "Processing by one worker process, real dispatch", process, 60_000),
        Cell("enqueue_bulk", "Bulk enqueue, 100 per call", enqueueing("bulk"), 60_000, mode="bulk"),
        Cell("enqueue_one", "Enqueue, each awaited before the next", enqueueing("one"), 4_000, mode="one"),
        Cell("enqueue_pipelined", "Enqueue, 64 awaited at once", enqueueing("pipelined"), 30_000, mode="pipelined"),
        Cell("cycle", "Enqueue (64 at once) and process at the same time", cycle, 30_000),
        Cell("open", "Open loop: from due to started, at shares of the own capacity", open_loop, 20_000),
        Cell("postgres", "On PostgreSQL: enqueue, 100 per call, then process", whole, 40_000, _ON_POSTGRES),
        Cell("backlog", "Lease rate with a million waiting, 100 per call", backlog, 20_000, _OURS),
        Cell("restart", "Restart after SIGKILL, 1,000,000 tasks, 10,000 leases", restart, 1_000_000, _OURS),
        Cell("idle", "An idle server, and one with 1,000 workers that wait", idle, 1_000, _OURS),
        Cell("start", "Starting a server, its memory and modules", start, 5, _OURS),
        Cell("observed", "Metrics and unsampled tracing: enqueue and process", whole, 60_000, _OBSERVED),
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
