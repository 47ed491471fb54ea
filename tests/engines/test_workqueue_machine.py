"""SQLite plays the same random stories as memory and answers alike; see support/workqueue_machine.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from support.workqueue_machine import QueueMachine

from retinue_server.workqueue.engine import Engine
from retinue_server.workqueue.engines.memory import MemoryEngine
from retinue_server.workqueue.engines.sqlite import SqliteEngine


def no_fatal(error: BaseException) -> None:
    raise AssertionError(error)


class SqliteAgainstMemory(QueueMachine):
    def engines(self) -> list[Engine]:
        self.directory = tempfile.TemporaryDirectory()
        return [MemoryEngine(), SqliteEngine(Path(self.directory.name) / "queue.db", no_fatal)]

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


SqliteAgainstMemory.TestCase.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
TestSqliteAgainstMemory = SqliteAgainstMemory.TestCase
