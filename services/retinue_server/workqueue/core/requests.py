"""What callers ask of the core, already translated from the wire; `limits.py` checks it."""

from __future__ import annotations

import struct
from typing import NamedTuple

from msgspec import Struct

from retinue_server.workqueue.engine import Failure, Outcome, RetryOverrides, TaskBody, TaskFilter, TaskRow

_TOKEN = struct.Struct(">BQQQ")
_TOKEN_VERSION = 1


class LeaseRef(NamedTuple):
    """The right to end one lease: which task, which epoch, and a number that can't be guessed."""

    seq: int
    epoch: int
    nonce: int

    def token(self) -> bytes:
        """As workers carry it."""
        return _TOKEN.pack(_TOKEN_VERSION, self.seq, self.epoch, self.nonce)

    @classmethod
    def of(cls, row: TaskRow) -> LeaseRef:
        """Of a task's latest lease."""
        return cls(row.seq, row.lease_epoch, row.lease_nonce)

    @classmethod
    def parse(cls, token: bytes) -> LeaseRef | None:
        """None if these bytes were never a token."""
        if len(token) != _TOKEN.size or token[0] != _TOKEN_VERSION:
            return None
        _, seq, epoch, nonce = _TOKEN.unpack(token)
        return None if max(seq, epoch, nonce) >= 1 << 63 else cls(seq, epoch, nonce)


class NewTask(Struct, frozen=True):
    """A task as a producer describes it; the body holds what the rules don't look at."""

    queue_id: str
    body: TaskBody = TaskBody()
    task_id: str = ""
    priority: int = 0
    start_ms: int | None = None
    delay_ms: int | None = None
    expire_ms: int | None = None
    expire_delay_ms: int | None = None
    attempt_ms: int | None = None
    idempotency_key: str = ""
    reject_conflict: bool = False
    inline_bytes: int = 0
    """The size of an inline payload, or of all the input if that is within the limit; 0 for a blob."""
    plain: bool = False
    """Whether it says nothing beside queue and inline payload, as most tasks do: nothing else need be looked at."""


class Enqueue(Struct, frozen=True):
    """A batch from a producer."""

    tasks: tuple[NewTask, ...]
    atomic: bool = False
    request_id: str = ""
    fingerprint: bytes = b""
    """Tells this request from others under the same request_id."""


class LeaseAsk(Struct, frozen=True):
    """A worker asks for tasks; a lease of None is as long as the queue says."""

    queue_id: str
    worker_id: str
    max_tasks: int = 1
    lease_ms: int | None = None
    request_id: str = ""
    max_bytes: int = 0
    """How many payload bytes the reply has room for."""


class Extend(Struct, frozen=True):
    """A lease that shall last longer; None = as granted."""

    lease: LeaseRef
    lease_ms: int | None = None


class Complete(Struct, frozen=True):
    """A success, with what came out and what comes next."""

    lease: LeaseRef
    result: bytes = b""
    result_blob: str = ""
    follow_ups: tuple[NewTask, ...] = ()
    inline_bytes: int = 0
    outcome = Outcome.COMPLETED


class Fail(Struct, frozen=True):
    """A failed attempt."""

    lease: LeaseRef
    failure: Failure
    final: bool = False
    delay_ms: int | None = None
    outcome = Outcome.FAILED


class Release(Struct, frozen=True):
    """A task given back."""

    lease: LeaseRef
    delay_ms: int = 0
    outcome = Outcome.RELEASED


Settlement = Complete | Fail | Release


class Selection(Struct, frozen=True):
    """Tasks by id, or by filter up to a count."""

    task_ids: tuple[str, ...] = ()
    wanted: TaskFilter | None = None
    max_count: int = 1_000
    dry_run: bool = False


class Reschedule(Struct, frozen=True):
    """Another time or priority; None = as it is."""

    task_id: str
    start_ms: int | None = None
    delay_ms: int | None = None
    priority: int | None = None


class SettingsPatch(Struct, frozen=True):
    """The settings that a caller named; None = not named."""

    lease_ms: int | None = None
    attempt_ms: int | None = None
    retry: RetryOverrides | None = None
    max_lease_expirations: int | None = None
    retention_ms: int | None = None
    dead_retention_ms: int | None = None
    max_tasks: int | None = None
