"""The settings of the work queue (`workqueue:` in the file, RETINUE_WORKQUEUE__… in the environment)."""
# Annotations are no text here, as in runtime/config.py.

from pathlib import Path
from typing import Annotated, Literal

import msgspec


class PostgresSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the engine `postgres` finds its database."""

    url: str = ""
    """postgresql://USER@HOST:PORT/DATABASE?…, as libpq takes it. Give a password by the environment or by a file."""
    password_file: Path | None = None
    """A file whose content is the password; read at every connect."""
    schema: str = "retinue"
    """Where its tables are; coordinators that share a schema share their queues."""
    connections: int = 2
    """How many connections write at the same time; two more read, two carry blobs, one listens."""
    prepared_statements: bool = True
    """false behind a pooler that gives each transaction another connection and does not follow them (PgBouncer)."""
    listen_url: str = ""
    """A way to the database past the pooler, to hear of others' tasks at once; empty = the url."""


class WorkQueueSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may set."""

    engine: Literal["sqlite", "postgres", "memory"] = "sqlite"
    """Where tasks live."""
    postgres: PostgresSettings = PostgresSettings()
    strict_queues: bool = False
    """Queues must be created before use."""
    max_blob_bytes: int = 5 * 1024**3
    """How large a blob may be."""
    disk_reserve_bytes: Annotated[int, msgspec.Meta(ge=0)] = 64 * 1024**2
    """While less is free on disk, new tasks and blobs are refused and what is there can be worked off; an eighth of
    the disk at most, 0 = none."""
    blob_idle_seconds: int = 3_600
    """How long a blob that no task refers to is kept after it was last asked for."""
