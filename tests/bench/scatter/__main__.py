"""`make bench-scatter`: plays cells, keeps the figures, prints the tables."""

from __future__ import annotations

import sys

from bench import turns
from bench.scatter import page
from bench.scatter.cells import CELLS

if __name__ == "__main__":
    about = "What a root costs, and what it does about slow leaves and too many requests."
    sys.exit(turns.main("scatter", about, CELLS, page, "scattergather"))
