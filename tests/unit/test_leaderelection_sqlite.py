"""What the engine sqlite does where its disk is slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
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
        assert await asyncio.wait_for(told.get(), 5) == "e"
    finally:
        await one.stop()
        await other.stop()
