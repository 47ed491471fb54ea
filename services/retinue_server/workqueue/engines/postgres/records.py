"""Rows and bodies as the tables have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import msgspec
from msgspec.structs import replace

from retinue_server.workqueue.engine import (
    FINISHED,
    Failure,
    Outcome,
    QueueRow,
    QueueSettings,
    QueueState,
    RetryOverrides,
    State,
    Task,
    TaskBody,
    TaskFilter,
    TaskRow,
)
from retinue_server.workqueue.engines.postgres.literals import (
    blobs,
    escaped,
    ints,
    sparse,
    sparse_texts,
    texts,
    unescaped,
)
from retinue_server.workqueue.engines.postgres.statements import ROW

Value = str | bytes | None
"""A parameter."""

DAY_MS = 86_400_000
SHORT_MS = 3_600_000
"""What is kept for less is deleted row by row when its time comes, and told as an event."""
ROW_BY_ROW = -1
"""The `drop_day` of what is deleted row by row."""

_encode = msgspec.json.Encoder().encode
_decode_labels = msgspec.json.Decoder(dict[str, str]).decode
_decode_retry = msgspec.json.Decoder(RetryOverrides).decode
_decode_failure = msgspec.json.Decoder(Failure).decode
_decode_settings = msgspec.json.Decoder(QueueSettings).decode
_STATES = {int(state): state for state in State}
_READY, _IN_USE = State.READY, State.LEASED  # looking a member up takes as long as making a row
_OUTCOMES = {int(outcome): outcome for outcome in Outcome}


def queue(values: Sequence[Any]) -> QueueRow:
    """From queue_id, state, settings, create_ms."""
    queue_id, state, settings, create_ms = values
    return QueueRow(queue_id, QueueState(state), _decode_settings(settings), create_ms)


def queue_settings(row: QueueRow) -> str:
    """As stored."""
    return _encode(row.settings).decode()


def task_row(values: Sequence[Any]) -> TaskRow:
    """From the columns of ROW."""
    (
        seq, task_id, queue_id, state, priority, create_ms, ready_ms, expire_ms, attempt_ms, attempt, expirations,
        epoch, nonce, lease_ms, lease_until, attempt_until, worker_id, request_id, outcome, cancel, start_ms, end_ms,
        delete_ms, key, parent,
    ) = values  # fmt: skip
    return TaskRow(
        seq, task_id, queue_id, _STATES[state], priority, create_ms, ready_ms, expire_ms, attempt_ms, attempt,
        expirations, epoch, nonce, lease_ms, lease_until, attempt_until, unescaped(worker_id), unescaped(request_id),
        _OUTCOMES[outcome], cancel, start_ms, end_ms, delete_ms, unescaped(key), parent,
    )  # fmt: skip


def task(values: Sequence[Any]) -> Task:
    """From the columns of ROW, then those of BODY."""
    return Task(task_row(values[: len(ROW)]), body(values[len(ROW) :]))


def fresh(queue_id: str, values: Sequence[Any]) -> Task:
    """A ready task that was never leased, from the columns of FRESH."""
    (
        seq, _, task_id, priority, create_ms, ready_ms, expire_ms, attempt_ms, key, parent, given, task_type, labels,
        retry, traceparent, input_blob,
    ) = values  # fmt: skip
    row = TaskRow(
        seq, task_id, queue_id, _READY, priority, create_ms, ready_ms, expire_ms, attempt_ms,
        idempotency_key=unescaped(key) if key else "", parent_task_id=parent,
    )  # fmt: skip
    wide = TaskBody(
        given,
        unescaped(task_type) if task_type else "",
        {} if labels == "{}" else _labels(labels),
        _decode_retry(retry) if retry else None,
        unescaped(traceparent) if traceparent else "",
        input_blob,
    )
    return Task(row, wide)


def body(values: Sequence[Any]) -> TaskBody:
    """From the columns of BODY."""
    given, task_type, labels, retry, traceparent, input_blob, result, result_blob, failure = values
    return TaskBody(
        given,
        unescaped(task_type),
        {} if labels == "{}" else _labels(labels),
        _decode_retry(retry) if retry else None,
        unescaped(traceparent),
        input_blob,
        result,
        result_blob,
        _decode_failure(failure) if failure else None,
    )


def left(wide: TaskBody, result: tuple[bytes, str] | None, failure: str | None) -> TaskBody:
    """A body with what an attempt left on it since it was read."""
    if result is not None:
        wide = replace(wide, result=result[0], result_blob=result[1])
    return wide if failure is None else replace(wide, failure=_decode_failure(failure))


def drop_day(row: TaskRow, days: frozenset[int]) -> int:
    """The partition of history for a row: its day's, if there is one."""
    if row.delete_ms is None or row.end_ms is None or row.delete_ms - row.end_ms < SHORT_MS:
        return ROW_BY_ROW
    day = row.delete_ms // DAY_MS
    return day if day in days else ROW_BY_ROW


def failure_text(failure: Failure) -> str:
    """As stored."""
    return _encode(failure).decode()


def labels_text(labels: Mapping[str, str]) -> str:
    """As stored: JSON whose texts have no NUL, so that PostgreSQL can look into it."""
    return _encode({escaped(key): escaped(value) for key, value in labels.items()}).decode() if labels else "{}"


def _labels(text: str) -> dict[str, str]:
    return {unescaped(key): unescaped(value) for key, value in _decode_labels(text).items()}


def is_fresh(new: Task) -> bool:
    """Whether a task is as producers' are: waiting, and never touched by a worker."""
    row, wide = new
    plain = TaskRow(
        0, row.task_id, row.queue_id, row.state, row.priority, row.create_ms, row.ready_ms, row.expire_ms,
        row.attempt_ms, idempotency_key=row.idempotency_key, parent_task_id=row.parent_task_id,
    )  # fmt: skip
    return plain == row and row.state in (State.READY, State.SCHEDULED) and not left_something(wide)


def left_something(wide: TaskBody) -> bool:
    """Whether an attempt left anything on a body."""
    return bool(wide.result or wide.result_blob or wide.failure)


_ROW_SHAPE = [name for name in TaskRow.__struct_fields__ if name not in ("seq", "task_id", "idempotency_key")]
_BODY_SHAPE = [name for name in TaskBody.__struct_fields__ if name not in ("input", "traceparent")]
_row_shape, _body_shape = attrgetter(*_ROW_SHAPE), attrgetter(*_BODY_SHAPE)


def runs(tasks: Iterable[Task]) -> list[list[Task]]:
    """Neighbours that are alike but for what each has of its own."""
    return [list(run) for _, run in groupby(tasks, _shape)]


def _shape(task: Task) -> tuple[Any, ...]:
    return _row_shape(task.row), _body_shape(task.body)


def alike(tasks: Sequence[Task], others: Sequence[Task]) -> bool:
    """Whether two runs are one."""
    return _shape(tasks[0]) == _shape(others[0])


def inserted_alike(tasks: Sequence[Task]) -> list[Value]:
    """The parameters of `insert_alike`."""
    row, wide = tasks[0]
    return [
        texts([row.task_id for row, _ in tasks]),
        blobs([wide.input for _, wide in tasks]),
        sparse_texts([wide.traceparent for _, wide in tasks], ""),
        sparse_texts([row.idempotency_key for row, _ in tasks], ""),
        row.queue_id,
        *_numbers(row.state, row.priority, row.create_ms, row.ready_ms, row.expire_ms, row.attempt_ms),
        row.parent_task_id,
        escaped(wide.task_type),
        labels_text(wide.labels),
        _encode(wide.retry).decode() if wide.retry else None,
        wide.input_blob,
    ]


def _numbers(*values: int | None) -> list[str | None]:
    return [None if value is None else str(int(value)) for value in values]


def inserted(tasks: Sequence[Task]) -> list[Value]:
    """The parameters of `insert`."""
    rows, bodies = [task.row for task in tasks], [task.body for task in tasks]
    return [
        texts([row.queue_id for row in rows]),
        ints([row.state for row in rows]),
        sparse([row.priority for row in rows], 0),
        ints([row.create_ms for row in rows]),
        ints([row.ready_ms for row in rows]),
        sparse([row.expire_ms for row in rows], None),
        sparse([row.attempt_ms for row in rows], None),
        texts([row.task_id for row in rows]),
        sparse_texts([row.idempotency_key for row in rows], ""),
        sparse_texts([row.parent_task_id for row in rows], ""),
        sparse_texts([wide.task_type for wide in bodies], ""),
        sparse_texts([labels_text(wide.labels) for wide in bodies], "{}"),
        sparse_texts([_encode(wide.retry).decode() if wide.retry else None for wide in bodies], None),
        sparse_texts([wide.traceparent for wide in bodies], ""),
        sparse_texts([wide.input_blob for wide in bodies], ""),
        blobs([wide.input for wide in bodies]),
    ]


def saved(rows: Sequence[TaskRow]) -> list[str]:
    """The parameters of `save`, and the first ones of `finish`."""
    return [
        ints([row.seq for row in rows]),
        ints([row.state for row in rows]),
        sparse([row.priority for row in rows], 0),
        ints([row.ready_ms for row in rows]),
        sparse([row.expire_ms for row in rows], None),
        ints([row.attempt for row in rows]),
        sparse([row.lease_expirations for row in rows], 0),
        ints([row.lease_epoch for row in rows]),
        ints([row.lease_nonce for row in rows]),
        ints([row.lease_ms for row in rows]),
        sparse([row.lease_until for row in rows], None),
        sparse([row.attempt_until for row in rows], None),
        sparse_texts([row.worker_id for row in rows], ""),
        sparse_texts([row.lease_request_id for row in rows], ""),
        sparse([row.outcome for row in rows], Outcome.NONE),
        sparse([row.cancel_requested for row in rows], False),  # noqa: FBT003 - the default that is left out
        sparse([row.start_ms for row in rows], None),
        sparse([row.end_ms for row in rows], None),
        sparse([row.delete_ms for row in rows], None),
    ]


Change = tuple[Any, ...]
"""What rows that change alike change to: the state, then the rest."""

_LEASED = ("attempt", "lease_epoch", "lease_nonce", "lease_ms", "lease_until", "attempt_until", "worker_id",
           "lease_request_id", "start_ms")  # fmt: skip
_ENDED = ("outcome", "end_ms", "delete_ms")
_CLEARED = ("lease_until", "attempt_until", "worker_id", "lease_request_id", "cancel_requested")
_clear = (None, None, "", "", False)


_NEVER = {
    "seq", "task_id", "queue_id", "create_ms", "attempt_ms", "idempotency_key", "parent_task_id",
}  # fmt: skip
"""What no step changes."""


def _all_but(*names: str) -> Callable[[TaskRow], Change]:
    changed = {"state", *names, *_NEVER}
    return attrgetter(*(name for name in TaskRow.__struct_fields__ if name not in changed))


_leased_to, _beside_leased = attrgetter("state", *_LEASED), _all_but(*_LEASED)
_ended_to, _beside_ended = attrgetter("state", *_ENDED), _all_but(*_ENDED, *_CLEARED)
_cleared = attrgetter(*_CLEARED)


def usual_change(before: TaskRow, after: TaskRow) -> Change | None:
    """The change, if it is that of a lease granted or ended as nearly all are."""
    if before.state == _READY and after.state == _IN_USE:
        return _leased_to(after) if _beside_leased(before) == _beside_leased(after) else None
    if before.state != _IN_USE or after.state not in FINISHED or _cleared(after) != _clear:
        return None
    return (*_ended_to(after), after.queue_id) if _beside_ended(before) == _beside_ended(after) else None


def change_texts(change: Change) -> list[str | None]:
    """As parameters."""
    return [
        value if value is None else escaped(value) if isinstance(value, str) else str(int(value)) for value in change
    ]


def conditions(wanted: TaskFilter, *, old: bool, first: int) -> tuple[str, list[str]]:
    """A filter as SQL over `t` and `b`, or over `h`, with its parameters numbered from `first`."""
    hot, wide = ("h", "h") if old else ("t", "b")
    terms: list[tuple[str, str]] = []
    if wanted.queue_id:
        terms.append((f"{wide}.queue_id = ${{}}::text", wanted.queue_id))
    if wanted.states:
        terms.append((f"{hot}.state = ANY (${{}}::smallint[])", ints(wanted.states)))
    if wanted.task_type:
        terms.append((f"{wide}.task_type = ${{}}::text", escaped(wanted.task_type)))
    if wanted.parent_task_id:
        terms.append((f"{wide}.parent_task_id = ${{}}::text AND {wide}.parent_task_id <> ''", wanted.parent_task_id))
    if wanted.created_after_ms is not None:
        terms.append((f"{wide}.create_ms >= ${{}}::bigint", str(wanted.created_after_ms)))
    if wanted.created_before_ms is not None:
        terms.append((f"{wide}.create_ms < ${{}}::bigint", str(wanted.created_before_ms)))
    if wanted.labels:
        terms.append((f"{wide}.labels::jsonb @> ${{}}::jsonb", labels_text(wanted.labels)))
    sql = [term.format(first + index) for index, (term, _) in enumerate(terms)]
    return " AND ".join(["true", *sql]), [value for _, value in terms]


def may_be_hot(wanted: TaskFilter) -> bool:
    """Whether unfinished tasks can match."""
    return not wanted.states or any(state not in FINISHED for state in wanted.states)


def may_be_old(wanted: TaskFilter) -> bool:
    """Whether finished tasks can match."""
    return not wanted.states or any(state in FINISHED for state in wanted.states)
