"""What `make demo DEMO=...` shows: every way to lose a leader, and no stale write taken; and that a search in shards
answers as one big index does, or tells what is missing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_the_demo_of_leader_election_ends_well() -> None:
    said = demo("leaderelection")
    for what in ("app is killed", "app is stopped", "app is frozen", "server is killed"):
        assert what in said
    assert "writes under token 3: refused" in said
    assert "overlaps: 0; stale writes refused: 1" in said


@pytest.mark.timeout(900)
def test_the_demo_of_scatter_gather_ends_well() -> None:
    """Fewer queries than a person gets to see."""
    said = demo("scattergather", DEMO_QUERIES="80")
    documents = re.search(r"([\d,]+) documents of Python's library", said)
    assert documents
    assert int(documents[1].replace(",", "")) > 2000
    phases = "all leaves are well", "one is stopped", "two levels", "two levels, one stopped", "in part, without both"
    for what in (*phases, "both are back"):
        assert re.search(rf"│ {what} +│ +\d+ │ +all ", said), said
    assert "strict: UNAVAILABLE, without shard-5" in said
    assert "half is enough: partial, 7 of 8" in said
    assert "230 of 230 answers as of one index: same documents, same order, same scores" in said
    tree = said[said.index("$ retinue scatter recent") :]
    hedged = r"^half-0 .*\n(  .*\n)*  shard-2 .* lost .*shard-2[ab].sock *\n  └ hedge .* won "
    assert re.search(hedged, tree, re.MULTILINE), tree


def demo(name: str, **environment: str) -> str:
    """What it prints; it ends well."""
    done = subprocess.run(
        [sys.executable, f"deploy/demo/{name}.py"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
