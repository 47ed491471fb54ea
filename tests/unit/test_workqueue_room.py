"""Claims about the disk reserve, over a disk that the test makes up."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from retinue_server.runtime.errors import Reason, ResourceExhausted
from retinue_server.workqueue.engine import Room
from retinue_server.workqueue.engines import room
from retinue_server.workqueue.engines.room import DiskRoom

MIB = 1024**2


@dataclass
class Disk:
    """What statvfs tells, what is free inside the file, and the time."""

    free: int = 100 * MIB
    total: int = 1000 * MIB
    inside: int = 0
    now: float = 100.0

    def tell(self, _: Path) -> object:
        return SimpleNamespace(f_bavail=self.free // 4096, f_blocks=self.total // 4096, f_frsize=4096)

    def becomes(self, free: int) -> None:
        """Other programs take or give; the next look sees it."""
        self.free = free
        self.now += 10


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(room, "os", SimpleNamespace(statvfs=made.tell))
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def make(disk: Disk, reserve: int = 10 * MIB) -> DiskRoom:
    return DiskRoom(Path("/data"), reserve, "tasks", lambda: disk.inside)


def refused(made: DiskRoom, size: int) -> bool:
    try:
        made.claim(size)
    except ResourceExhausted as error:
        assert (error.reason, error.retry_ms) == (Reason.DISK_FULL, 5_000)  # noqa: PT017 - one of two answers
        return True
    return False


def test_new_data_stops_at_the_reserve_and_comes_again_when_there_is_clearly_room(disk: Disk) -> None:
    made = make(disk)
    assert not refused(made, MIB)
    disk.becomes(10 * MIB)
    assert refused(made, 1)
    assert not made.report.admitting
    disk.becomes(10 * MIB + 4096)
    assert refused(made, 1), "else it would open and close all the time"
    disk.becomes(12 * MIB)
    assert not refused(made, 1)
    assert made.report == Room(12 * MIB, admitting=True)


def test_what_is_let_in_between_two_looks_counts(disk: Disk) -> None:
    made = make(disk)
    assert not refused(made, 50 * MIB)
    disk.free -= 50 * MIB
    assert refused(made, 50 * MIB)


def test_an_estimate_that_was_too_high_refuses_nothing_while_there_is_room(disk: Disk) -> None:
    made = make(disk)
    assert not refused(made, 80 * MIB)
    assert not refused(made, 80 * MIB), "it looks again before it refuses"


def test_free_pages_inside_the_file_are_room(disk: Disk) -> None:
    made = make(disk)
    disk.becomes(5 * MIB)
    assert refused(made, 1)
    disk.inside = 50 * MIB
    disk.becomes(5 * MIB)
    assert not refused(made, 1)
    assert made.report.free_bytes == 55 * MIB
    disk.becomes(2 * MIB)
    assert refused(made, 1), "the log, through which all goes, needs room outside"
    assert made.tight
    disk.becomes(5 * MIB)
    assert not refused(made, 1)
    assert not made.tight


def test_of_a_small_disk_an_eighth_is_reserved(disk: Disk) -> None:
    disk.total = 40 * MIB
    made = make(disk, 64 * MIB)
    disk.becomes(6 * MIB)
    assert not refused(made, 1)
    disk.becomes(5 * MIB)
    assert refused(made, 1)


def test_without_a_reserve_only_a_disk_that_ran_out_refuses_and_it_does_for_a_while(disk: Disk) -> None:
    made = make(disk, 0)
    disk.becomes(2 * MIB)
    assert not refused(made, 1)
    assert made.ran_out().reason == Reason.DISK_FULL
    disk.now += 0.5
    assert refused(made, 1), "a quota is not seen from here"
    disk.now += 1
    assert not refused(made, 1)


def test_a_change_of_the_condition_is_told_once(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    made = make(disk)
    with caplog.at_level(logging.INFO):
        for free in (1, 1, 100 * MIB, 100 * MIB, 1):
            disk.becomes(free)
            for _ in range(5):
                refused(made, 1)
        for _ in range(5):
            made.ran_out()
    told = [record.getMessage().split(":")[0] for record in caplog.records]
    closed, opened = "no more tasks are taken in", "tasks are taken in again"
    assert told == [closed, opened, closed, closed]


def test_the_real_disk_is_looked_at(tmp_path: Path) -> None:
    made = DiskRoom(tmp_path, 0, "blobs")
    made.look()
    assert made.report.admitting
    assert 0 < made.report.free_bytes <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
