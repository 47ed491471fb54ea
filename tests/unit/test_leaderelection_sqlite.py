"""What the engine sqlite does where its disk is slow, and what servers of one file hear of each other."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from retinue_server.leaderelection.engine import Claim, EndReason, Granted, Hold
from retinue_server.leaderelection.engines.sqlite import SqliteEngine

SYNC_S = 0.05
FAST = apsw.vfs_names()[0]


def no_fatal(error: BaseException) -> None:
    raise AssertionError(error)


class SlowFile(apsw.VFSFile):
    """A file whose sync takes as long as on a disk under load."""

    def xSync(self, flags: int) -> None:  # noqa: N802 - SQLite's name
        time.sleep(SYNC_S)
        super().xSync(flags)


class SlowDisk(apsw.VFS):
    def __init__(self) -> None:
        super().__init__("slow", FAST, makedefault=True)

    def xOpen(self, name: Any, flags: Any) -> SlowFile:  # noqa: N802 - SQLite's name
        return SlowFile(FAST, name, flags)


@pytest.fixture
def slow_disk() -> Iterator[None]:
    disk = SlowDisk()
    yield
    apsw.set_default_vfs(FAST)
    disk.unregister()


async def test_another_server_is_told_of_a_change_whose_sync_takes_time(slow_disk: None, tmp_path: Path) -> None:
    one, other = (SqliteEngine(tmp_path / "elections.db", no_fatal) for _ in range(2))
    await one.start()
    await other.start()
    told: asyncio.Queue[str] = asyncio.Queue()
    other.listen(told.put_nowait)
    try:
        granted = await one.claim(Claim("e", "c", "s", "", 60_000, 0, 0))
        assert isinstance(granted, Granted)
        other.watch("e")
        other._file_changed()
        while other._looking is not None:  # it has heard of the claim
            await asyncio.sleep(0.01)
        while not told.empty():
            told.get_nowait()
        await one.release(Hold("e", "s", 1), EndReason.RESIGNED, 0)
        assert await asyncio.wait_for(told.get(), 60) == "e"
    finally:
        await one.stop()
        await other.stop()


@asynccontextmanager
async def two_servers(tmp_path: Path) -> AsyncIterator[tuple[SqliteEngine, SqliteEngine, asyncio.Queue[str]]]:
    """Two engines on one file; the first watches two elections, and the queue has what it is told."""
    one, other = (SqliteEngine(tmp_path / "elections.db", no_fatal) for _ in range(2))
    await one.start()
    await other.start()
    told: asyncio.Queue[str] = asyncio.Queue()
    one.listen(told.put_nowait)
    one.watch("ours")
    one.watch("theirs")
    try:
        async with asyncio.timeout(60):
            yield one, other, told
    finally:
        await one.stop()
        await other.stop()


def claim(election_id: str) -> Claim:
    return Claim(election_id, "c", "s", "", 60_000, 0, 0)


async def test_a_server_is_told_of_the_changes_of_others_not_of_its_own(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, other, told):
        await one.claim(claim("ours"))
        await one.release(Hold("ours", "s", 1), EndReason.RESIGNED, 0)
        await other.claim(claim("theirs"))
        assert await told.get() == "theirs"


async def test_a_change_between_a_commit_and_its_touch_is_not_taken_for_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_servers(tmp_path) as (one, other, told):
        assert one._inotify is not None
        one._inotify.close()  # their touch is hidden by ours: nothing but our own look can tell
        loop, utime = asyncio.get_running_loop(), os.utime

        def interrupted(*where: Any, **when: Any) -> None:
            monkeypatch.setattr(os, "utime", utime)
            asyncio.run_coroutine_threadsafe(other.claim(claim("theirs")), loop).result(20)
            utime(*where, **when)

        monkeypatch.setattr(os, "utime", interrupted)
        await one.claim(claim("ours"))
        while await told.get() != "theirs":
            pass
