"""The guarantees of the work queue in simulated worlds; each seed is another one, and replays exactly.

pytest tests/faults/test_simulation.py                                    what CI plays
pytest tests/faults/test_simulation.py --schedules 1000000 -n auto        a million, on all cores
make faults SCHEDULES=1000000                                             the same, beside the other faults
pytest tests/faults/test_simulation.py --seed 4711 --schedules 1          one again, with its trace if it fails
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from support.workqueue_simulation.broken import BROKEN, Broken
from support.workqueue_simulation.schedule import Verdict, play

ENOUGH = 3_000
"""How many schedules a broken variant may survive at most."""
TESTS = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """A simulated disk refuses often, and each time the sweeper says so."""
    caplog.set_level("CRITICAL")


@pytest.mark.timeout(600)
def test_the_guarantees_hold_whatever_goes_wrong(seeds: range) -> None:
    for seed in seeds:
        verdict = play(seed)
        if verdict.violations:
            pytest.fail(told(verdict, with_trace=len(seeds) == 1), pytrace=False)


def told(verdict: Verdict, *, with_trace: bool) -> str:
    """What a person needs who wants to know why."""
    trace = f"{verdict.history.trace()}\n\n" if with_trace else ""
    broken = "\n".join(f"at {v.at:.4f}: {v.claim}: {v.what}" for v in verdict.violations)
    replay = f"pytest tests/faults/test_simulation.py -k guarantees --seed {verdict.seed} --schedules 1"
    return f"{trace}seed {verdict.seed}\n{broken}\nreplay with: {replay}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_the_simulation_finds_what(broken: Broken) -> None:
    with broken.in_place():
        seeds = chain(range(broken.shows, ENOUGH), range(broken.shows))
        claims = (broken.claim in {v.claim for v in play(seed, broken.parts).violations} for seed in seeds)
        assert any(claims), f"{ENOUGH} schedules, and nobody noticed"


def test_a_seed_replays_exactly() -> None:
    digests = [play(seed).history.digest() for seed in range(20)]
    assert [play(seed).history.digest() for seed in reversed(range(20))] == digests[::-1]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_seed_replays_exactly_in_another_process(hash_seed: str) -> None:
    program = "from support.workqueue_simulation.schedule import play; print(play(7).history.digest())"
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(paths())}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == play(7).history.digest()


def paths() -> Iterator[str]:
    yield str(TESTS)
    yield str(TESTS.parent / "services")
    yield str(TESTS.parent / "clients" / "python")
