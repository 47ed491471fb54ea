"""`make bench`: plays cells, keeps the figures, prints the tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import results, tables
from bench.cells import CELLS, play
from bench.processes import HERE, HOME
from bench.systems import SYSTEMS

README = HERE / "README.md"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="bench", description="Retinue beside its peers, in one run.")
    p.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS), metavar="CELL")
    p.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="SYSTEM")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--tasks", type=int, help="instead of each cell's own number")
    p.add_argument("--reference", action="store_true", help="keep it as the committed results, write README.md")
    p.add_argument("--store", type=Path, default=HOME / "last.json", help="where the figures are kept, by cell")
    return p


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    flags = parser().parse_args()
    if flags.reference:
        flags.store = results.REFERENCE
    found = results.load(flags.store)
    found.machine = results.machine()
    played = results.Results(machine=found.machine)
    for name in flags.cells:
        cell = CELLS[name]
        say(f"{name}: {cell.title}")
        systems = [SYSTEMS[system] for system in flags.systems if cell.takes(SYSTEMS[system])]
        circumstances = results.circumstances()
        table = play(cell, systems, flags.rounds, flags.tasks, say)
        played.cells[name] = found.cells[name] = results.PlayedCell(cell.title, cell.pins, table, circumstances)
        results.store(flags.store, found)
        if flags.reference:
            README.write_text(tables.page(found))
    say("\n" + tables.render(played))
    return 0


if __name__ == "__main__":
    sys.exit(main())
