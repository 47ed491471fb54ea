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


@pytest.mark.timeout(120)
def test_the_demo_of_leader_election_ends_well() -> None:
    said = demo("leaderelection")
    for what in ("app is killed", "app is stopped", "app is frozen", "server is killed"):
        assert what in said
    assert "writes under token 3: refused" in said
    assert "overlaps: 0; stale writes refused: 1" in said


@pytest.mark.timeout(320)
def test_the_demo_of_scatter_gather_ends_well() -> None:
    """Fewer queries than a person gets to see."""
    said = demo("scattergather", DEMO_QUERIES="80")
    assert "16 leaves, 8 shards of 2 replicas" in said
    documents = re.search(r"([\d,]+) documents of Python's library", said)
    assert documents
    assert int(documents[1].replace(",", "")) > 2000
    for what in ("all leaves are well", "two levels", "shard-2[ab] is stopped", "the others, in part", "both are back"):
        assert re.search(rf"{what} +│ +\d+ │ +all ", said), said
    assert re.search(r"strict: UNAVAILABLE: cannot answer: \d of 8 leaves answered, .*shard-5: ", said)
    assert "coverage 7 of 8 in each answer" in said
    assert "160 of 160 answers as of one index: same documents, same order, same scores" in said
    assert re.search(r"shard-2 .*primary .*shard-2[ab] .* lost", said), "the tree has the call that was hedged"
    assert re.search(r"shard-2 .*hedge .*shard-2[ab] .* won", said), "and the hedge"


def demo(name: str, **environment: str) -> str:
    """What it prints; it ends well."""
    done = subprocess.run(
        [sys.executable, f"deploy/demo/{name}.py"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
