"""What can befall a database and its coordinators; the histories must show nothing of it but delay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.tables import Row
from support.faults.campaign import Campaign, Size
from support.faults.engines import postgres
from support.faults.schedule import Kind, Step
from support.history import Story
from support.history.checks import check

pytestmark = pytest.mark.timeout(240)  # the first build of the Go worker compiles what the client stands on

MS = 1_000_000


@pytest.fixture
def campaign(tmp_path: Path, go_worker: Path) -> Iterator[Campaign]:
    """Two coordinators on one database, under load."""
    with postgres(tmp_path) as engine, Campaign(tmp_path, engine, 1, go_worker, Size(kills=0, tasks=0)) as campaign:
        yield campaign


def story_of(campaign: Campaign, *steps: Step) -> Story:
    """Plays the steps."""
    campaign.play(*steps)
    campaign.settle()
    return campaign.story()


def test_backends_are_terminated_twice_a_second(campaign: Campaign) -> None:
    story = story_of(campaign, *[Step(0.5, Kind.TERMINATE_BACKENDS, 0, 0)] * 12)
    assert check(story) == []


@pytest.mark.parametrize("kind", [Kind.RESTART_DATABASE, Kind.CRASH_DATABASE])
def test_the_database_is_started_anew(campaign: Campaign, kind: Kind) -> None:
    assert check(story_of(campaign, *[Step(1.0, kind, 0, 0)] * 2)) == []


def test_when_one_of_two_coordinators_is_killed_the_other_leases_on(campaign: Campaign, row: Row) -> None:
    story = story_of(campaign, Step(1.0, Kind.KILL_SERVER, 2.0, 0))
    assert check(story) == []
    killed, started = _outage(story)
    leases = sorted(lease.at for task in story.executions for lease in story.in_order(task))
    elsewhere = next(at for at in leases if at > killed)
    assert elsewhere < started
    row("one of two coordinators killed", first_lease_elsewhere_ms=round((elsewhere - killed) / MS))


def _outage(story: Story) -> tuple[int, int]:
    """When the first server to be killed was killed, and when it was started again."""
    killed = next(fault.at for fault in story.faults if (fault.kind, fault.target) == ("kill", "server"))
    return killed, next(f.at for f in story.faults if f.at > killed and (f.kind, f.target) == ("start", "server"))
