"""Cells that are played in turns: round by round, each system once, in an order that turns; and a bench's command."""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from bench import results
from bench.processes import HERE, HOME, Failure
from bench.results import Played

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType

    Figures = Mapping[str, float]
    Play = Callable[[str, int], Mapping[str, Figures]]


@dataclass(frozen=True)
class Player:
    """Plays a cell once: given a name and how often to do it, it gives the figures of one system or several."""

    play: Play
    count: int


@dataclass(frozen=True)
class Cell:
    """A workload and who plays it; `rounds` at most."""

    title: str
    note: str
    systems: Mapping[str, Player]
    rounds: int = 100


def play(cell: Cell, names: Sequence[str], rounds: int) -> dict[str, Played]:
    """Round by round, in an order that turns; a system that fails is void and plays no more."""
    played: dict[str, Played] = {}
    for number in range(min(rounds, cell.rounds)):
        turn = number % max(len(names), 1)
        for name in [*names[turn:], *names[:turn]]:
            if not (name in played and played[name].void):
                _play(name, cell.systems[name], played)
    return {name: played[name] for name in sorted(played, key=lambda name: [*names, name].index(name))}


def _play(name: str, player: Player, played: dict[str, Played]) -> None:
    try:
        for system, figures in player.play(name, player.count).items():
            played.setdefault(system, Played(player.count)).rounds.append(dict(figures))
            print(f"  {system}: " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    except (Failure, AssertionError, OSError, TimeoutError, grpc.RpcError) as error:
        reason = " ".join(str(error).split())[:200].replace("|", "/") or type(error).__name__
        played.setdefault(name, Played(player.count)).void = reason
        print(f"  {name}: void: {reason}", flush=True)


def _parser(name: str, description: str, cells: Mapping[str, Cell]) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=f"bench.{name}", description=description)
    p.add_argument("--cells", nargs="*", default=list(cells), choices=list(cells), metavar="CELL")
    p.add_argument("--systems", nargs="*", default=[], metavar="SYSTEM", help="instead of all that a cell has")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--reference", action="store_true", help="keep it as the committed results, and write the page")
    return p


def _machine() -> dict[str, str]:
    """As the queue's, and how much precedence we have on a machine that others may use, too."""
    with contextlib.suppress(OSError):
        os.nice(-10 - os.nice(0))
        Path("/proc/self/autogroup").write_text(
            "-10"
        )  # where sessions share the processor, nice counts within ours only
    return results.machine() | {"nice": str(os.nice(0))}


def main(name: str, description: str, cells: Mapping[str, Cell], page: ModuleType, stem: str) -> int:
    """`make bench-NAME`: plays cells, keeps the figures, prints the tables; `stem` names the page and its results."""
    flags = _parser(name, description, cells).parse_args()
    store = HERE / "results" / f"{stem}.json" if flags.reference else HOME / f"{name}.json"
    found = results.load(store)
    found.command, found.machine = f"make bench-{name}", _machine()
    played = results.Results(machine=found.machine)
    for key in flags.cells:
        cell = cells[key]
        print(f"{key}: {cell.title}", flush=True)
        names = [system for system in cell.systems if system in (flags.systems or cell.systems)]
        circumstances = results.circumstances()
        systems = play(cell, names, flags.rounds)
        played.cells[key] = found.cells[key] = results.PlayedCell(cell.title, cell.note, systems, circumstances)
        results.store(store, found)
        if flags.reference:
            (HERE / f"{stem}.md").write_text(page.page(found))
    print("\n" + page.render(played))
    return 0
