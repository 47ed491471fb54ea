"""`make bench-ambassador`: plays cells, keeps the figures, prints the tables."""

from __future__ import annotations

import sys

from bench import turns
from bench.ambassador import page
from bench.ambassador.cells import CELLS

if __name__ == "__main__":
    about = "What a hop through an ambassador costs, beside nutcracker, HAProxy and an Envoy by hand."
    sys.exit(turns.main("ambassador", about, CELLS, page, "ambassador"))
