"""G1 and G2 of leader election under faults, from what three apps believed; and broken ones, which must be caught."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from faults.tables import Row
from support.election_faults.engines import ENGINES, Prepare, postgres, sqlite
from support.election_faults.report import rows, total
from support.election_faults.schedule import Kind, Step
from support.election_faults.trial import Broken, Trial
from support.faults.proxy import Mode

pytestmark = pytest.mark.timeout(900)  # many rounds, and what starts of engines take on a busy machine

_SECONDS = 15.0
_LEASE_S, _APP_LEASE_S = 3.0, 1.0
_ROUNDS = 40
"""Within so many a defect must have shown."""
LATE_ACK = (
    (Mode.REQUESTS_ONLY, 0.27),  # a heartbeat is heard, and its answer held back
    (Mode.HALF_OPEN, 0.35),
    (Mode.REPLIES_ONLY, 0.9),  # the answer comes, and no other heartbeat is heard
)
"""In leases of 1 s: what was granted 0.4 s ago comes now."""


@pytest.mark.parametrize("name", ["sqlite", "etcd", "postgres"])
def test_nobody_leads_beside_another_whatever_befalls_them(name: str, tmp_path: Path, row: Row) -> None:
    seed = random.SystemRandom().getrandbits(31)
    began = time.monotonic()
    with ENGINES[name](tmp_path) as engine, Trial(tmp_path, engine, seed) as trial:
        trial.run(6, _SECONDS)
        told = [*rows(name, trial.terms(), trial.faults), total(name, seed, time.monotonic() - began, trial)]
        assert trial.findings() == [], "\n".join(told)
    row("elections", engine=name, seed=seed, faults=len(trial.faults), transitions=len(trial.terms()) - 1)


def rounds(trial: Trial, *, defect: bool) -> set[str]:
    """What the checks find of late answers."""
    for _ in range(_ROUNDS if defect else 2):
        trial.withhold(*LATE_ACK)
        if found := {finding.check for finding in trial.findings()}:
            return found
    return set()


@pytest.mark.parametrize(("defect", "found"), [("", set()), ("count_from_receipt", {"overlap"})])
def test_a_client_that_counts_from_the_receipt_of_late_answers_is_caught(
    defect: str, found: set[str], tmp_path: Path
) -> None:
    with sqlite(tmp_path) as engine:
        patient = replace(engine, lease_s=_LEASE_S)
    with Trial(tmp_path, patient, 1, Broken(app=defect), _APP_LEASE_S) as trial:
        assert rounds(trial, defect=bool(defect)) == found


@pytest.mark.parametrize(
    ("defect", "prepare", "step"),
    [
        ("release_when_the_stream_ends", sqlite, Step(0.2, Kind.CUT_APP, 0, 0)),
        ("forget_the_engine_s_lease", postgres, Step(0.2, Kind.HALF_OPEN_ENGINE, 4.0, 0)),
    ],
)
def test_a_broken_server_is_caught(defect: str, prepare: Prepare, step: Step, tmp_path: Path) -> None:
    with prepare(tmp_path) as engine, Trial(tmp_path, engine, 1, Broken(server=defect)) as trial:
        assert "overlap" in until_found(trial, step)


def until_found(trial: Trial, step: Step) -> set[str]:
    """What the checks find after a step; it is played again if the machine let nobody see the defect."""
    for _ in range(_ROUNDS):
        _, token = trial.await_leader()
        trial.play(step)
        trial.await_successor(token)
        if "overlap" in (found := {finding.check for finding in trial.findings()}):
            break
    return found
