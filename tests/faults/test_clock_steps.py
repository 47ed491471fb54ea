"""G7: when the wall clock is set and the boot clock goes on, schedules follow the one and leases the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.client import Client
from contract.conftest import Serve, new_line
from contract.line import Line, seconds
from workers import eventually

HOUR_S = 3600.0


class WallClock:
    """The wall clock of a server under libfaketime."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0)

    def set(self, offset_s: float) -> None:
        """From now on it shows the right time and so much."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{offset_s:+.0f}\n")
        fresh.rename(self._file)

    def environment(self, library: Path) -> dict[str, str]:
        """What makes a process look at it."""
        return {
            "LD_PRELOAD": str(library),
            "DONT_FAKE_MONOTONIC": "1",  # nor the boot clock: a step moves the wall clock alone
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
        }


@pytest.fixture
def wall(tmp_path: Path) -> WallClock:
    """It is right at first."""
    return WallClock(tmp_path / "wall-clock")


@pytest.fixture
def line(serve: Serve, wall: WallClock) -> Iterator[Line]:
    """A queue of a server whose wall clock the test sets."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketime: apt-get install libfaketime")
    server = serve(**wall.environment(library))
    with Client(server.address) as app:
        yield new_line(app)


def test_a_step_forward_makes_what_is_due_ready_and_touches_no_lease(line: Line, wall: WallClock) -> None:
    lease = line.lend(attempt_duration=seconds(HOUR_S))
    line.extend(lease, lease_duration=seconds(HOUR_S / 2))
    due, later = line.put(delay_duration=seconds(HOUR_S)), line.put(delay_duration=seconds(3 * HOUR_S))
    stale = line.put(expire_duration=seconds(HOUR_S), delay_duration=seconds(HOUR_S / 2))
    wall.set(2 * HOUR_S)
    assert line.take_one().task_id == due
    eventually(lambda: line.state(stale) == "EXPIRED", "its expiry is over")
    assert line.state(later) == "SCHEDULED"
    assert line.take() == []
    assert not line.extend(lease).HasField("status")
    assert not line.complete(lease).HasField("status")
    assert (line.get(lease.task_id).attempt, line.get(lease.task_id).lease_expirations) == (1, 0)


def test_a_step_back_keeps_what_is_not_due_and_no_lease_beyond_its_term(line: Line, wall: WallClock) -> None:
    wall.set(2 * HOUR_S)
    eventually(lambda: _shows(line) > HOUR_S, "the server's wall clock is ahead")
    scheduled, ready = line.put(delay_duration=seconds(HOUR_S)), line.put(priority=-1)
    line.put()
    lease = line.take_one(lease_duration=seconds(1))
    wall.set(0)
    eventually(lambda: _shows(line) < HOUR_S, "the server's wall clock is right again")
    again = line.take_one()
    assert (again.task_id, again.lease_epoch) == (lease.task_id, 2)
    assert line.complete(lease).status.reason == "LEASE_LOST"
    assert line.take_one().task_id == ready
    assert line.state(scheduled) == "SCHEDULED"


def _shows(line: Line) -> float:
    """How far the server's wall clock is ahead of ours, in seconds."""
    task = line.get(line.put(priority=-9, delay_duration=seconds(9 * HOUR_S)))
    return float(task.create_time.ToSeconds() - time.time())
