"""`make bench-elections`: plays cells, keeps the figures, prints the tables."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from bench import results
from bench.elections import page
from bench.elections.cells import CELLS, play
from bench.processes import HERE, HOME

REFERENCE = HERE / "results" / "leaderelection.json"
README = HERE / "leaderelection.md"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="bench.elections", description="Leader election beside its peers, in one run.")
    p.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS), metavar="CELL")
    p.add_argument("--systems", nargs="*", default=[], metavar="SYSTEM", help="instead of all that a cell has")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--reference", action="store_true", help="keep it as the committed results, write leaderelection.md")
    p.add_argument("--store", type=Path, default=HOME / "elections.json", help="where the figures are kept, by cell")
    return p


def machine() -> dict[str, str]:
    """As the queue's, and how much precedence we have on a machine that others may use, too."""
    with contextlib.suppress(PermissionError):
        os.nice(-10 - os.nice(0))
    return results.machine() | {"nice": str(os.nice(0))}


def main() -> int:
    flags = parser().parse_args()
    if flags.reference:
        flags.store = REFERENCE
    found = results.load(flags.store)
    found.command, found.machine = "make bench-elections", machine()
    played = results.Results(machine=found.machine)
    for name in flags.cells:
        cell = CELLS[name]
        print(f"{name}: {cell.title}", flush=True)
        systems = play(
            cell, [system for system in cell.systems if system in (flags.systems or cell.systems)], flags.rounds
        )
        played.cells[name] = found.cells[name] = results.PlayedCell(cell.title, cell.note, systems)
        results.store(flags.store, found)
        if flags.reference:
            README.write_text(page.page(found))
    print("\n" + page.render(played))
    return 0


if __name__ == "__main__":
    sys.exit(main())
