"""Claims about the SQLite engine when its file fails under it."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import apsw
import pytest

from retinue_server.runtime.errors import Unavailable
from retinue_server.workqueue.engine import QueueRow, QueueSettings, QueueState, State, Task, TaskBody, TaskRow
from retinue_server.workqueue.engines import sqlite
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

    async with asyncio.timeout(60):
        with monkeypatch.context() as patch:
            patch.setattr(engine._store, "reload", away)
            for step in (fail, add_a_queue):
                with pytest.raises(Unavailable):
                    await engine.write(step)
        assert await engine.read(lambda view: view.queue("q")) is None
        await engine.write(add_a_queue)
        assert await engine.read(lambda view: view.queue("q")) is not None
    await engine.stop()


@pytest.mark.parametrize("arrays", [True, False])
async def test_a_build_of_sqlite_without_arrays_stores_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, arrays: bool
) -> None:
    monkeypatch.setattr(sqlite, "_HAS_ARRAYS", arrays)
    engine = SqliteEngine(tmp_path / "queue.db", no_fatal)
    await engine.start()
    await engine.write(add_a_queue)
    tasks = [Task(TaskRow(i, f"t{i}", "q", State.READY, 0, 1, 1), TaskBody(bytes(i))) for i in range(1, 121)]
    await engine.write(lambda tx: tx.insert(tasks))
    assert await engine.write(lambda tx: tx.ready("q", 200)) == tasks
    await engine.stop()


async def test_a_failed_sync_is_fatal_and_its_callers_are_not_told_ok(tmp_path: Path) -> None:
    told: list[BaseException] = []
    engine = SqliteEngine(tmp_path / "queue.db", told.append)
    await engine.start()

    def unsynced(_: Transaction) -> None:
        raise apsw.exception_for(apsw.SQLITE_IOERR_FSYNC)

    async with asyncio.timeout(60):
        with pytest.raises(Unavailable):
            await engine.write(unsynced)
    await engine.stop()
    assert [type(error) for error in told] == [apsw.IOError]


async def test_a_log_that_a_slow_reader_let_grow_is_cut_when_the_reader_has_gone(tmp_path: Path) -> None:
    engine = SqliteEngine(tmp_path / "queue.db", no_fatal)
    await engine.start()
    await engine.write(add_a_queue)
    log = tmp_path / "queue.db-wal"
    body = TaskBody(bytes(1024 * 1024))
    names = (f"t{i}" for i in itertools.count())

    async def put_4_mib() -> None:
        tasks = [Task(TaskRow(0, next(names), "q", State.READY, 0, 1, 1), body) for _ in range(4)]
        await engine.write(lambda tx: tx.insert(tasks))

    reader = apsw.Connection(str(tmp_path / "queue.db"))
    with reader:
        assert reader.execute("SELECT count(*) FROM task").get == 0
        for _ in range(6):
            await put_4_mib()
        assert log.stat().st_size > 20 * 1024**2
    reader.close()
    for _ in range(3):
        await put_4_mib()
    assert log.stat().st_size <= 16 * 1024**2
    await engine.stop()
