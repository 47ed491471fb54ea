"""The engines play the same random stories as memory and answer alike; see support/workqueue_machine.py."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from support.postgres import Postgres
from support.workqueue_machine import QueueMachine

from retinue_server.workqueue.engine import Engine
from retinue_server.workqueue.engines.memory import MemoryEngine
from retinue_server.workqueue.engines.postgres import PostgresEngine
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


class PostgresAgainstMemory(QueueMachine):
    """The clock is the story's; what follows from PostgreSQL's own is claimed in test_workqueue_postgres."""

    postgres: Postgres
    schema: str

    def engines(self) -> list[Engine]:
        self.postgres.empty(self.schema)
        return [
            MemoryEngine(),
            PostgresEngine(self.postgres.url, schema=self.schema, connections=1, own_clock=False),
        ]


PostgresAgainstMemory.TestCase.settings = settings(
    max_examples=6, stateful_step_count=50, deadline=None, phases=[Phase.generate], database=None
)


class TestPostgresAgainstMemory(PostgresAgainstMemory.TestCase):  # type: ignore[misc,valid-type] # hypothesis makes it
    @pytest.fixture(autouse=True)
    def _server(self, postgres: Postgres) -> Iterator[None]:
        PostgresAgainstMemory.postgres, PostgresAgainstMemory.schema = postgres, postgres.schema()
        yield
        postgres.drop(PostgresAgainstMemory.schema)
