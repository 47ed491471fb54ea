"""Helpers over the generated stubs: queues, workers, elections, typed errors.

    from retinue.client import Queue, Worker
    from retinue.client import election

Names are loaded on first use: `retinue.client.errors` costs no worker, `retinue.client` no command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinue.client.channel import Connection
    from retinue.client.election import Election, ElectionEvent, NotElected, Term, TermLost
    from retinue.client.errors import (
        AlreadyExists,
        DeadlineExceeded,
        FailedPrecondition,
        InvalidArgument,
        LeaseLost,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        RetinueError,
        Unauthenticated,
        Unavailable,
        Unimplemented,
    )
    from retinue.client.queue import Enqueued, Queue
    from retinue.client.worker import Done, Failed, Job, Released, Worker, WorkerEvent

__all__ = [
    "AlreadyExists",
    "Connection",
    "DeadlineExceeded",
    "Done",
    "Election",
    "ElectionEvent",
    "Enqueued",
    "Failed",
    "FailedPrecondition",
    "InvalidArgument",
    "Job",
    "LeaseLost",
    "NotElected",
    "NotFound",
    "PermissionDenied",
    "Queue",
    "Released",
    "ResourceExhausted",
    "RetinueError",
    "Term",
    "TermLost",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Worker",
    "WorkerEvent",
]

_HOMES = {"Connection": "channel", "Enqueued": "queue", "Queue": "queue"}
_HOMES |= dict.fromkeys(("Election", "ElectionEvent", "NotElected", "Term", "TermLost"), "election")
_HOMES |= dict.fromkeys(("Done", "Failed", "Job", "Released", "Worker", "WorkerEvent"), "worker")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
