"""What is under test: the settings of the server, and the faults that an engine alone can suffer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.faults.schedule import Kind
from support.postgres import Postgres


@dataclass(frozen=True)
class Engine:
    """An engine that is ready for servers."""

    name: str
    env: Mapping[str, str]
    """The server's settings."""
    coordinators: int = 1
    renewed_at_start: bool = True
    """See Policy."""
    faults: Mapping[Kind, Callable[[], None]] = field(default_factory=dict)
    """Each returns when the engine can be reached again, or is about to be."""
    module: str = "retinue_server"


Prepare = Callable[[Path], AbstractContextManager[Engine]]
"""Makes an engine ready in an empty directory."""


@contextmanager
def sqlite(_: Path) -> Iterator[Engine]:
    """One file, one coordinator."""
    yield Engine("sqlite", {"RETINUE_WORKQUEUE__ENGINE": "sqlite"})


@contextmanager
def postgres(_: Path, *, coordinators: int = 2, **settings: str) -> Iterator[Engine]:
    """A database of its own, and two coordinators on it."""
    directory = Path(tempfile.mkdtemp(prefix="retinue-postgres-"))
    directory.chmod(0o755)  # root's database belongs to another
    database = Postgres.create(directory / "server")
    try:
        yield Engine(
            "postgres",
            {
                "RETINUE_WORKQUEUE__ENGINE": "postgres",
                "RETINUE_WORKQUEUE__POSTGRES__URL": database.url,
                **settings,
            },
            coordinators,
            renewed_at_start=False,
            faults={
                Kind.TERMINATE_BACKENDS: lambda: terminate_backends(database),
                Kind.RESTART_DATABASE: lambda: _again(database, lambda: database.stop("fast")),
                Kind.CRASH_DATABASE: lambda: _again(database, lambda: database.stop("immediate")),
            },
        )
    finally:
        database.stop("immediate")
        shutil.rmtree(directory)


def terminate_backends(database: Postgres) -> None:
    """Ends every connection of the coordinators."""
    database.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )


def _again(database: Postgres, stop: Callable[[], None]) -> None:
    stop()
    database.start()


ENGINES: Mapping[str, Prepare] = {"sqlite": sqlite, "postgres": postgres}
