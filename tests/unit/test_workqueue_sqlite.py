"""Claims about the SQLite engine when its file fails under it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import apsw
import pytest

from retinue_server.runtime.errors import Unavailable
from retinue_server.workqueue.engine import QueueRow, QueueSettings, QueueState
from retinue_server.workqueue.engines.sqlite import SqliteEngine

if TYPE_CHECKING:
    from pathlib import Path

    from retinue_server.workqueue.engine import Transaction


def no_fatal(error: BaseException) -> None:
    raise AssertionError(error)


def add_a_queue(tx: Transaction) -> None:
    tx.save_queue(QueueRow("q", QueueState.ACTIVE, QueueSettings(), 7))


def fail(tx: Transaction) -> None:
    add_a_queue(tx)
    raise apsw.IOError("the disk is away")


async def test_an_engine_that_cannot_read_its_file_answers_every_caller_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SqliteEngine(tmp_path / "queue.db", no_fatal)
    await engine.start()

    def away() -> None:
        raise apsw.CorruptError("still away")

    async with asyncio.timeout(10):
        with monkeypatch.context() as patch:
            patch.setattr(engine._store, "reload", away)
            for step in (fail, add_a_queue):
                with pytest.raises(Unavailable):
                    await engine.write(step)
        assert await engine.read(lambda view: view.queue("q")) is None
        await engine.write(add_a_queue)
        assert await engine.read(lambda view: view.queue("q")) is not None
    await engine.stop()


async def test_a_failed_sync_is_fatal_and_its_callers_are_not_told_ok(tmp_path: Path) -> None:
    told: list[BaseException] = []
    engine = SqliteEngine(tmp_path / "queue.db", told.append)
    await engine.start()

    def unsynced(_: Transaction) -> None:
        raise apsw.exception_for(apsw.SQLITE_IOERR_FSYNC)

    async with asyncio.timeout(10):
        with pytest.raises(Unavailable):
            await engine.write(unsynced)
    await engine.stop()
    assert [type(error) for error in told] == [apsw.IOError]
