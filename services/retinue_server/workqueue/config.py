"""The settings of the work queue (`workqueue:` in the file, RETINUE_WORKQUEUE__… in the environment)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


class WorkQueueSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may set."""

    engine: Literal["sqlite", "memory"] = "sqlite"
    """Where tasks live."""
    strict_queues: bool = False
    """Queues must be created before use."""
    max_blob_bytes: int = 5 * 1024**3
    """How large a blob may be."""
    disk_reserve_bytes: Annotated[int, msgspec.Meta(ge=0)] = 64 * 1024**2
    """While less is free on disk, new tasks and blobs are refused and what is there can be worked off; an eighth of
    the disk at most, 0 = none."""
    blob_idle_seconds: int = 3_600
    """How long a blob that no task refers to is kept after it was last asked for."""
