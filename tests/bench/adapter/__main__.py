"""`make bench-adapter`: plays cells, keeps the figures, prints the tables."""

from __future__ import annotations

import sys

from bench import turns
from bench.adapter import page
from bench.adapter.cells import CELLS

if __name__ == "__main__":
    about = "What a collected series costs, and what readers notice of collections."
    sys.exit(turns.main("adapter", about, CELLS, page, "adapter"))
