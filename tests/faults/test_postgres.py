"""What can befall a database and its coordinators; the histories must show nothing of it but delay."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.tables import Row
from support.faults.campaign import Campaign, Size
from support.faults.engines import postgres
from support.faults.report import summarised
from support.faults.schedule import Kind, Step
from support.history import Story

pytestmark = pytest.mark.timeout(900)  # the first build of the Go worker compiles what the client stands on

MS = 1_000_000


def test_whatever_befalls_the_database_or_a_coordinator_breaks_no_rule(
    tmp_path: Path, go_worker: Path, row: Row
) -> None:
    """All in one story: two coordinators on one database, under load."""
    size = Size(kills=0, tasks=0, rate=300)
    with postgres(tmp_path) as engine, Campaign(tmp_path, engine, 1, go_worker, size) as campaign:
        campaign.play(*[Step(0.5, Kind.TERMINATE_BACKENDS, 0, 0)] * 6)
        campaign.play(*(Step(1.0, kind, 0, 0) for kind in (Kind.RESTART_DATABASE, Kind.CRASH_DATABASE)))
        campaign.play(Step(1.0, Kind.KILL_SERVER, 4.0, 0))
        campaign.play(Step(0.2, Kind.STOP_WORKER, 2.5, 0.9), Step(0.2, Kind.KILL_WORKER, 0, 0.1))
        campaign.settle()
        story = campaign.story()
    report, findings = summarised(story, engine.name, 1, 0, {})
    assert findings == []
    assert report.second_executions > 0
    killed, started = _outage(story)
    leases = sorted(lease.at for task in story.executions for lease in story.in_order(task))
    elsewhere = next(at for at in leases if at > killed)
    assert elsewhere < started
    row("one of two coordinators killed", first_lease_elsewhere_ms=round((elsewhere - killed) / MS))


def _outage(story: Story) -> tuple[int, int]:
    """When the first server to be killed was killed, and when it was started again."""
    killed = next(fault.at for fault in story.faults if (fault.kind, fault.target) == ("kill", "server"))
    return killed, next(f.at for f in story.faults if f.at > killed and (f.kind, f.target) == ("start", "server"))
