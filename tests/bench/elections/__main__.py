"""`make bench-elections`: plays cells, keeps the figures, prints the tables."""

from __future__ import annotations

import sys

from bench import turns
from bench.elections import page
from bench.elections.cells import CELLS

if __name__ == "__main__":
    about = "Leader election beside its peers, in one run."
    sys.exit(turns.main("elections", about, CELLS, page, "leaderelection"))
