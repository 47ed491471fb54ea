"""What becomes of a task: one pure function per transition of the state machine.

Each takes the row as it stands and gives the row as it shall be; which transitions are legal is checked here, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from retinue_server.runtime.errors import FailedPrecondition, Reason
from retinue_server.workqueue.engine import (
    REDRIVABLE,
    WAITING,
    Failure,
    Instant,
    Outcome,
    QueueSettings,
    RetryOverrides,
    RetryPolicy,
    State,
    TaskRow,
)

if TYPE_CHECKING:
    from retinue_server.workqueue.core.requests import Settlement

ATTEMPT_DEADLINE = "ATTEMPT_DEADLINE"
LEASE_EXPIRED = "LEASE_EXPIRED"


def effective_retry(queue: RetryPolicy, task: RetryOverrides | None) -> RetryPolicy:
    """The queue's policy with the task's own words over it."""
    if task is None:
        return queue
    said = {name: value for name in task.__struct_fields__ if (value := getattr(task, name)) is not None}
    return replace(queue, **said)


def backoff_ms(policy: RetryPolicy, attempt: int, jitter: float) -> int:
    """The wait after failed attempt number `attempt`, drawn by `jitter` in [0, 1).

    Exponential backoff with full jitter, after Marc Brooker, "Exponential Backoff And Jitter" (AWS blog, 2015).
    """
    try:
        ceiling = policy.initial_backoff_ms * policy.multiplier ** (attempt - 1)
    except OverflowError:
        ceiling = float(policy.max_backoff_ms)
    return int(min(ceiling, policy.max_backoff_ms) * jitter)


def waiting(row: TaskRow, ready_ms: int, now: Instant) -> TaskRow:
    """READY, or SCHEDULED if its time has not come."""
    if ready_ms <= now.wall_ms:
        return replace(row, state=State.READY, ready_ms=now.wall_ms)
    return replace(row, state=State.SCHEDULED, ready_ms=ready_ms)


def became_due(row: TaskRow) -> TaskRow:
    """SCHEDULED, RETRYING -> READY; `ready_ms` already says when."""
    return replace(row, state=State.READY)


class Term(NamedTuple):
    """What the leases that are granted together have in common; a `lease_ms` of None is the queue's."""

    settings: QueueSettings
    now: Instant
    worker_id: str
    lease_ms: int | None
    nonce: int
    request_id: str


def leased(row: TaskRow, term: Term) -> TaskRow:
    """READY -> LEASED: a new attempt under a new epoch."""
    settings, now, worker_id, lease_ms, nonce, request_id = term
    lease_ms = settings.lease_ms if lease_ms is None else lease_ms
    attempt_ms = settings.attempt_ms if row.attempt_ms is None else row.attempt_ms
    attempt_until = now.lease_ms + attempt_ms if attempt_ms else None
    return replace(
        row,
        state=State.LEASED,
        attempt=row.attempt + 1,
        lease_epoch=row.lease_epoch + 1,
        lease_nonce=nonce,
        lease_ms=lease_ms,
        lease_until=_earlier(now.lease_ms + lease_ms, attempt_until),
        attempt_until=attempt_until,
        worker_id=worker_id,
        lease_request_id=request_id,
        outcome=Outcome.NONE,
        start_ms=now.wall_ms,
    )


def holds(row: TaskRow | None, epoch: int, nonce: int) -> bool:
    """Whether this is the task's latest lease, live or not."""
    return row is not None and row.lease_epoch == epoch and row.lease_nonce == nonce


def is_live(row: TaskRow, now: Instant) -> bool:
    """Whether the latest lease has neither ended nor run out."""
    return row.state == State.LEASED and row.lease_until is not None and row.lease_until > now.lease_ms


def extended(row: TaskRow, lease_ms: int | None, now: Instant) -> TaskRow:
    """The lease lasts `lease_ms` from now (None = as granted), but never past the attempt's deadline."""
    lasts_ms = row.lease_ms if lease_ms is None else lease_ms
    return replace(row, lease_until=_earlier(now.lease_ms + lasts_ms, row.attempt_until))


def recovered(row: TaskRow, now: Instant, attempt_ms: int) -> TaskRow:
    """After a restart of the coordinator a live lease gets one full term on the new process's lease clock.

    What is left of the attempt is taken from the wall clock, the only one that both processes share.
    """
    attempt_until = None
    if attempt_ms:
        attempt_until = now.lease_ms + max(0, (row.start_ms or now.wall_ms) + attempt_ms - now.wall_ms)
    return replace(row, attempt_until=attempt_until, lease_until=_earlier(now.lease_ms + row.lease_ms, attempt_until))


def completed(row: TaskRow, settings: QueueSettings, now: Instant) -> TaskRow:
    """LEASED -> SUCCEEDED."""
    return _finished(row, State.SUCCEEDED, settings, now, Outcome.COMPLETED)


def failed(
    row: TaskRow,
    settings: QueueSettings,
    retry: RetryPolicy,
    now: Instant,
    *,
    jitter: float,
    final: bool = False,
    delay_ms: int | None = None,
    outcome: Outcome = Outcome.FAILED,
) -> TaskRow:
    """LEASED -> RETRYING while attempts are left, else DEAD; CANCELLED if that was asked for."""
    if row.cancel_requested:
        return _finished(row, State.CANCELLED, settings, now, outcome)
    if final or row.attempt >= retry.max_attempts:
        return _finished(row, State.DEAD, settings, now, outcome)
    wait = backoff_ms(retry, row.attempt, jitter) if delay_ms is None else delay_ms
    return _unleased(row, outcome, state=State.RETRYING, ready_ms=now.wall_ms + wait)


def released(row: TaskRow, settings: QueueSettings, now: Instant, delay_ms: int) -> TaskRow:
    """LEASED -> READY or SCHEDULED, the attempt refunded; CANCELLED if that was asked for."""
    if row.cancel_requested:
        return _finished(row, State.CANCELLED, settings, now, Outcome.RELEASED)
    free = _unleased(row, Outcome.RELEASED, attempt=row.attempt - 1)
    return waiting(free, now.wall_ms + delay_ms, now)


def lapsed(
    row: TaskRow, settings: QueueSettings, retry: RetryPolicy, now: Instant, jitter: float
) -> tuple[TaskRow, Failure | None]:
    """What becomes of a lease that ran out, and the failure to record.

    Past the attempt's deadline the attempt failed. Otherwise the worker is gone: the attempt is refunded, and the
    task is READY again until it has cost `max_lease_expirations` leases.
    """
    if row.attempt_until is not None and row.attempt_until <= now.lease_ms:
        failure = Failure(ATTEMPT_DEADLINE, "the attempt took longer than it may", now.wall_ms, row.attempt)
        return failed(row, settings, retry, now, jitter=jitter, outcome=Outcome.LAPSED), failure
    expirations = row.lease_expirations + 1
    if row.cancel_requested:
        return _finished(row, State.CANCELLED, settings, now, Outcome.LAPSED), None
    if expirations >= settings.max_lease_expirations:
        failure = Failure(LEASE_EXPIRED, f"{expirations} leases expired: no worker came back", now.wall_ms, row.attempt)
        dead = _finished(row, State.DEAD, settings, now, Outcome.LAPSED)
        return replace(dead, attempt=row.attempt - 1, lease_expirations=expirations), failure
    free = _unleased(row, Outcome.LAPSED, attempt=row.attempt - 1, lease_expirations=expirations)
    return waiting(free, now.wall_ms, now), None


def cancelled(row: TaskRow, settings: QueueSettings, now: Instant) -> TaskRow:
    """Waiting -> CANCELLED; LEASED is asked to stop. Raises FailedPrecondition for a task that ended otherwise."""
    if row.state == State.CANCELLED or row.cancel_requested:
        return row
    if row.state == State.LEASED:
        return replace(row, cancel_requested=True)
    _require(row, WAITING, "cancel")
    return _finished(row, State.CANCELLED, settings, now, row.outcome)


def expired(row: TaskRow, settings: QueueSettings, now: Instant) -> TaskRow:
    """Waiting -> EXPIRED."""
    return _finished(row, State.EXPIRED, settings, now, row.outcome)


def redriven(row: TaskRow, now: Instant) -> TaskRow:
    """DEAD, CANCELLED, EXPIRED -> READY: counters start again, the epoch does not; an old expiry no longer holds."""
    _require(row, REDRIVABLE, "redrive")
    fresh = replace(
        row,
        attempt=0,
        lease_expirations=0,
        cancel_requested=False,
        end_ms=None,
        delete_ms=None,
        expire_ms=None,
    )
    return waiting(fresh, now.wall_ms, now)


def rescheduled(row: TaskRow, ready_ms: int | None, priority: int | None, now: Instant) -> TaskRow:
    """A waiting task with another time (None = the same) or priority."""
    _require(row, WAITING, "reschedule")
    row = row if priority is None else replace(row, priority=priority)
    return row if ready_ms is None else waiting(row, ready_ms, now)


def check_deletable(row: TaskRow) -> None:
    """Raises FailedPrecondition for a task that a worker has."""
    _require(row, tuple(set(State) - {State.LEASED}), "delete")


def refusal(row: TaskRow | None, wanted: Settlement) -> FailedPrecondition | None:
    """Why a settlement of a lease that is not live is refused; None if it repeats what was accepted (G4)."""
    if not holds(row, wanted.lease.epoch, wanted.lease.nonce) or row is None or row.outcome in _LOST:
        return FailedPrecondition(
            "cannot settle: the lease is no longer yours; don't publish its work", reason=Reason.LEASE_LOST
        )
    if row.outcome == wanted.outcome:
        return None
    return FailedPrecondition(
        f"cannot settle: this lease already ended otherwise and the task is {row.state.name}",
        reason=Reason.ALREADY_FINALIZED,
        task_id=row.task_id,
        state=row.state.name,
    )


_LOST = (Outcome.NONE, Outcome.LAPSED)


def _require(row: TaskRow, allowed: tuple[State, ...], verb: str) -> None:
    if row.state not in allowed:
        raise FailedPrecondition(
            f"cannot {verb} {row.task_id}: it is {row.state.name}",
            reason=Reason.ILLEGAL_TRANSITION,
            task_id=row.task_id,
            state=row.state.name,
        )


def _unleased(row: TaskRow, outcome: Outcome, **changes: object) -> TaskRow:
    return replace(
        row,
        outcome=outcome,
        lease_until=None,
        attempt_until=None,
        worker_id="",
        lease_request_id="",
        **changes,
    )


def _finished(row: TaskRow, state: State, settings: QueueSettings, now: Instant, outcome: Outcome) -> TaskRow:
    kept_ms = settings.dead_retention_ms if state == State.DEAD else settings.retention_ms
    return replace(
        row,
        state=state,
        outcome=outcome,
        lease_until=None,
        attempt_until=None,
        worker_id="",
        lease_request_id="",
        cancel_requested=False,
        end_ms=now.wall_ms,
        delete_ms=now.wall_ms + kept_ms,
    )


def _earlier(time: int, other: int | None) -> int:
    return time if other is None else min(time, other)
