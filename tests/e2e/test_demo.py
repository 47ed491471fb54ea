"""`make demo DEMO=leaderelection` shows what it says: every way to lose a leader, and no stale write taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(120)
def test_the_demo_of_leader_election_ends_well() -> None:
    done = subprocess.run(
        [sys.executable, "deploy/demo/leaderelection.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("app is killed", "app is stopped", "app is frozen", "server is killed"):
        assert what in done.stdout
    assert "writes under token 3: refused" in done.stdout
    assert "overlaps: 0; stale writes refused: 1" in done.stdout
