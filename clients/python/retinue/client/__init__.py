"""Helpers over the generated stubs: queues, workers, elections, scatter/gather, ambassador, adapter, typed errors.

    from retinue.client import Queue, Worker
    from retinue.client import election
    from retinue.client import Pool, serve_leaf
    from retinue.client import Ambassador
    from retinue.client import Adapter

Names are loaded on first use: `retinue.client.errors` costs no worker, `retinue.client` no command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinue.client.adapter import Adapter
    from retinue.client.ambassador import Ambassador, NotActive
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
    from retinue.client.leaf import LeafServer, Merging, Partial, Query, Refusal, serve_leaf, serve_merge
    from retinue.client.pool import Answer, Pool, ScatterFailed, ShardFailure, ShardReply
    from retinue.client.queue import Enqueued, Queue
    from retinue.client.worker import Done, Failed, Job, Released, Worker, WorkerEvent

__all__ = [
    "Adapter",
    "AlreadyExists",
    "Ambassador",
    "Answer",
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
    "LeafServer",
    "LeaseLost",
    "Merging",
    "NotActive",
    "NotElected",
    "NotFound",
    "Partial",
    "PermissionDenied",
    "Pool",
    "Query",
    "Queue",
    "Refusal",
    "Released",
    "ResourceExhausted",
    "RetinueError",
    "ScatterFailed",
    "ShardFailure",
    "ShardReply",
    "Term",
    "TermLost",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Worker",
    "WorkerEvent",
    "serve_leaf",
    "serve_merge",
]

_HOMES = {"Adapter": "adapter", "Connection": "channel", "Enqueued": "queue", "Queue": "queue"}
_HOMES |= dict.fromkeys(("Election", "ElectionEvent", "NotElected", "Term", "TermLost"), "election")
_HOMES |= dict.fromkeys(("Ambassador", "NotActive"), "ambassador")
_HOMES |= dict.fromkeys(("Answer", "Pool", "ScatterFailed", "ShardFailure", "ShardReply"), "pool")
_HOMES |= dict.fromkeys(("LeafServer", "Merging", "Partial", "Query", "Refusal", "serve_leaf", "serve_merge"), "leaf")
_HOMES |= dict.fromkeys(("Done", "Failed", "Job", "Released", "Worker", "WorkerEvent"), "worker")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
