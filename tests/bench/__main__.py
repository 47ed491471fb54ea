"""`make bench`: plays cells, keeps the figures, prints the tables."""

from __future__ import annotations

import argparse
import sys

from bench.cells import CELLS, play
from bench.systems import SYSTEMS


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="bench", description="Retinue beside its peers, in one run.")
    p.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS), metavar="CELL")
    p.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="SYSTEM")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--tasks", type=int, help="instead of each cell's own number")
    return p


def main() -> int:
    flags = parser().parse_args()
    for name in flags.cells:
        cell = CELLS[name]
        print(f"{name}: {cell.title}", flush=True)
        systems = [SYSTEMS[system] for system in flags.systems if cell.takes(SYSTEMS[system])]
        play(cell, systems, flags.rounds, flags.tasks, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
