"""G1 to G5 under load and kills, from what clients in two languages asked and were told."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from contract.client import Client as Api
from servers import start_server
from support.faults.campaign import QUEUE, Campaign, Size
from support.faults.clients import PATH, WORKERS, Client, Crew
from support.faults.engines import sqlite
from support.faults.report import summarised, table
from support.faults.schedule import Kind, Step
from support.history import Event, Op, Story, Verdict, read
from support.history.checks import check
from workers import eventually

if TYPE_CHECKING:
    from servers import RunningServer

pytestmark = pytest.mark.timeout(900)  # the first build of the Go worker compiles what the client stands on

LEASE_S = 1.0


def test_the_history_under_kills_breaks_no_rule(tmp_path: Path, go_worker: Path) -> None:
    """On SQLite; test_postgres has the other engine's."""
    seed = random.SystemRandom().getrandbits(31)
    with sqlite(tmp_path) as engine, Campaign(tmp_path, engine, seed, go_worker, Size(4, 800, rate=200)) as campaign:
        began = time.monotonic()
        campaign.run()
        campaign.settle()
        story = campaign.story()
    faults = {str(kind): count for kind, count in campaign.faults.items()}
    report, findings = summarised(story, engine.name, seed, time.monotonic() - began, faults)
    assert findings == [], table(report)
    assert report.acknowledged >= 800
    assert report.second_executions > 0


@pytest.mark.parametrize(
    ("defect", "caught_by"),
    [
        ("acknowledge_before_commit", {"lost"}),
        ("accept_a_stale_completion", {"not_shared"}),
        ("refund_twice", {"counted"}),
    ],
)
def test_a_broken_server_is_caught(defect: str, caught_by: set[str], tmp_path: Path, go_worker: Path) -> None:
    """Of a defect that shows under a crash only, the checks must find it after two."""
    crashes = defect == "acknowledge_before_commit"
    size = Size(kills=2, tasks=500) if crashes else Size(kills=0, tasks=500, rate=300)
    with sqlite(tmp_path) as engine:
        broken = replace(
            engine, env={**engine.env, "DEFECT": defect, "PYTHONPATH": PATH}, module="faults.broken_server"
        )
    with Campaign(tmp_path, broken, 7, go_worker, size) as campaign:
        campaign.run(repeat(Step(0.5, Kind.KILL_SERVER if crashes else Kind.CUT, 0, 0)))
        campaign.settle()
        story = campaign.story()
    assert caught_by <= {finding.check for finding in check(story)}


class Stage:
    """A server with workers that hold every lease for a while."""

    def __init__(self, server: RunningServer, history: Path, go_worker: Path) -> None:
        self.api, self._server, self._history = Api(server.control), server, history
        self.crew = Crew(QUEUE, 1, history, go_worker)

    def worker(self, kind: str, hold_s: float) -> Client:
        return self.crew.start(
            kind, self._server.address, "--lease", str(LEASE_S), "--hold", str(hold_s), "--threads", "1"
        )

    def holds(self, task_id: str) -> bool:
        """Whether it was leased once, and nobody has completed it."""
        leases = Story(self.events(), []).in_order(task_id)
        return len(leases) == 1 and not any(one.op == Op.COMPLETE for one in leases[0].settlements)

    def has_lease(self, task_id: str) -> bool:
        return bool(Story(self.events(), []).in_order(task_id))

    def events_of(self, client: Client) -> list[Event]:
        return [event for event in self.events() if event.who == client.name]

    def events(self) -> list[Event]:
        return read(self._history)


@pytest.fixture
def stage(tmp_path: Path, go_worker: Path) -> Iterator[Stage]:
    history = tmp_path / "history"
    history.mkdir()
    server = start_server(tmp_path)
    stage = Stage(server, history, go_worker)
    yield stage
    stage.crew.kill_all()
    stage.api.channel.close()
    server.kill()


def stopped_amid_a_task(stage: Stage, worker: Client) -> str:
    """Stops the only worker while it holds a task: that one's id. It gets another if it was faster than we."""
    while True:
        [result] = stage.api.EnqueueTasks(tasks=[{"queue_id": QUEUE}]).results
        eventually(lambda task_id=result.task_id: stage.has_lease(task_id), "the worker has the task")
        worker.signal(signal.SIGSTOP)
        if stage.holds(result.task_id):
            return str(result.task_id)
        worker.signal(signal.SIGCONT)


@pytest.mark.parametrize(("first", "second"), [("python", "library"), ("library", "go"), ("go", "python")])
def test_a_worker_that_was_stopped_for_three_leases_publishes_nothing(stage: Stage, first: str, second: str) -> None:
    stopped = stage.worker(first, hold_s=LEASE_S / 2)
    task_id = stopped_amid_a_task(stage, stopped)
    over = time.monotonic() + 3 * LEASE_S
    other = stage.worker(second, hold_s=0)
    stage.api.WaitTask(task_id=task_id, wait_duration={"seconds": 50})
    time.sleep(max(0, over - time.monotonic()))  # the claim is about three leases
    said = len(stage.events_of(stopped))
    stopped.signal(signal.SIGCONT)
    eventually(lambda: len(stage.events_of(stopped)) >= said + 2, "the first worker asks, and is answered")
    stage.crew.end(*WORKERS)
    story = Story(stage.events(), [])
    stale, fresh = story.in_order(task_id)
    assert (stale.who, fresh.who) == (stopped.name, other.name)
    assert [s.reason for s in stale.settlements if s.op == Op.COMPLETE] in ([], ["LEASE_LOST"])
    assert fresh.of(Op.COMPLETE, Verdict.ACCEPTED)
    assert list(story.accepted_completions(task_id)) == [2]
