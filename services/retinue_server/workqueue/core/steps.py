"""What one atomic step does to the store. Every function here runs inside `Engine.write`, whole or not at all.

A step returns its answer; what happened on the way it tells the `Ledger`, whose events are published once the step is
durable. Refusals of single items are values (RetinueError), not raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from retinue_server.runtime.errors import (
    AlreadyExists,
    Code,
    FailedPrecondition,
    NotFound,
    Reason,
    ResourceExhausted,
    RetinueError,
)
from retinue_server.workqueue.core import limits, rules
from retinue_server.workqueue.core.events import EventType, Ledger
from retinue_server.workqueue.core.requests import (
    Complete,
    Enqueue,
    Extend,
    Fail,
    LeaseAsk,
    NewTask,
)
from retinue_server.workqueue.engine import (
    REDRIVABLE,
    UNFINISHED,
    WAITING,
    Instant,
    QueueRow,
    QueueSettings,
    QueueState,
    RetryPolicy,
    State,
    Task,
    TaskFilter,
    TaskRow,
    Transaction,
    View,
)

if TYPE_CHECKING:
    from retinue_server.workqueue.core.requests import Release, Reschedule, Selection, Settlement

REQUEST_MEMORY_MS = 3_600_000
_SWEEP, _RECOVERY = 500, 2_000
"""How many tasks a sweep, or a block of the recovery, touches in one step."""
_READY = State.READY  # looking a member up takes as long as making a row
_ROW_BYTES = 1_024
"""More than a lease takes on the wire beside input and labels; about what a task takes on disk beside its input."""


class Enqueued(NamedTuple):
    """How one task of a batch fared."""

    task_id: str
    existing: bool = False
    error: RetinueError | None = None


class Granted(NamedTuple):
    """A lease as handed out: the task, and how long lease and attempt last from now."""

    task: Task
    max_attempts: int
    lease_left_ms: int
    attempt_left_ms: int | None


class Extended(Struct, frozen=True):
    """How one extension fared; `lease_ms` from now."""

    task_id: str = ""
    lease_ms: int = 0
    cancel_requested: bool = False
    error: RetinueError | None = None


class Settled(NamedTuple):
    """How one settlement fared."""

    state: State | None = None
    follow_ups: tuple[str, ...] = ()
    error: RetinueError | None = None


class Selected(Struct, frozen=True):
    """How many tasks a bulk step touched, and the refusals by task_id."""

    count: int
    errors: dict[str, RetinueError]


Lacking = Mapping[str, RetinueError]
"""Blobs that were looked for and are not there, with what to say of each."""


class Context(Struct, frozen=True):
    """What a step needs beside the store."""

    now: Instant
    ledger: Ledger
    random: Callable[[], float]
    strict_queues: bool = False


# Producers


def enqueue(tx: Transaction, asked: Enqueue, ids: Sequence[str], lacking: Lacking, ctx: Context) -> list[Enqueued]:
    """Takes a batch in; `ids` are for tasks without one of their own, `lacking` refuses blobs not there."""
    if asked.request_id and (known := tx.request(asked.request_id)):
        return _replayed(known, asked)
    results = _insert(tx, asked.tasks, ids, lacking, ctx, parent=None)
    if asked.atomic:
        _all_or_none(results)
    if asked.request_id:
        reply = msgspec.json.encode([(r.task_id, r.existing, r.error and _remembered(r.error)) for r in results])
        tx.save_request(asked.request_id, asked.fingerprint, reply, ctx.now.wall_ms + REQUEST_MEMORY_MS)
    return results


def _replayed(known: tuple[bytes, bytes], asked: Enqueue) -> list[Enqueued]:
    fingerprint, reply = known
    if fingerprint != asked.fingerprint:
        raise AlreadyExists(
            f"cannot enqueue: request_id {asked.request_id!r} was used for another request",
            reason=Reason.REQUEST_CONFLICT,
        )
    items = msgspec.json.decode(reply, type=list[tuple[str, bool, _Refusal | None]])
    return [Enqueued(task_id, existing, refusal.error() if refusal else None) for task_id, existing, refusal in items]


class _Refusal(Struct, frozen=True, array_like=True):
    """An error as it is remembered with its request."""

    code: Code
    message: str
    reason: Reason
    retry_ms: int
    metadata: dict[str, str]

    def error(self) -> RetinueError:
        kinds = {kind.code: kind for kind in (NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted)}
        return kinds[self.code](self.message, reason=self.reason, retry_ms=self.retry_ms, **self.metadata)


def _remembered(error: RetinueError) -> _Refusal:
    return _Refusal(error.code, error.message, error.reason, error.retry_ms, error.metadata)


def _all_or_none(results: list[Enqueued]) -> None:
    for index, result in enumerate(results):
        if result.error is not None:
            result.error.metadata["index"] = str(index)
            raise result.error


def _insert(
    tx: Transaction,
    tasks: Sequence[NewTask],
    ids: Sequence[str],
    lacking: Lacking,
    ctx: Context,
    *,
    parent: TaskRow | None,
) -> list[Enqueued]:
    admission = _Admission(tx, tasks, ctx, parent)
    results: list[Enqueued] = []
    taken: list[Task] = []
    for task, made_id in zip(tasks, ids, strict=True):
        lost = lacking.get(task.body.input_blob)
        result = Enqueued(task.task_id, error=lost) if lost else admission.check(task, task.task_id or made_id)
        results.append(result)
        if result.error is None and not result.existing:
            new = _new_task(task, result.task_id, ctx.now, parent)
            admission.admit(new)
            taken.append(new)
    if taken and parent is None:
        tx.claim_room(_ROW_BYTES * len(taken) + sum([len(task.body.input) for task in taken]))
    tx.insert(taken)
    ctx.ledger.add_all(EventType.ENQUEUED, [task.row for task in taken])
    return results


def _new_task(task: NewTask, task_id: str, now: Instant, parent: TaskRow | None) -> Task:
    if task.plain and parent is None:
        return Task(TaskRow(0, task_id, task.queue_id, _READY, 0, now.wall_ms, now.wall_ms), task.body)
    start_ms = task.start_ms if task.start_ms is not None else now.wall_ms + (task.delay_ms or 0)
    expire_ms = now.wall_ms + task.expire_delay_ms if task.expire_delay_ms is not None else task.expire_ms
    ready = start_ms <= now.wall_ms
    row = TaskRow(
        seq=0,
        task_id=task_id,
        queue_id=task.queue_id,
        state=State.READY if ready else State.SCHEDULED,
        priority=task.priority,
        create_ms=now.wall_ms,
        ready_ms=now.wall_ms if ready else start_ms,
        expire_ms=expire_ms,
        attempt_ms=task.attempt_ms,
        idempotency_key=task.idempotency_key,
        parent_task_id=parent.task_id if parent else "",
    )
    return Task(row, task.body)


class _Admission:
    """Decides, task by task, what may come in; looks everything up once per batch."""

    def __init__(self, tx: Transaction, tasks: Sequence[NewTask], ctx: Context, parent: TaskRow | None) -> None:
        self._tx, self._ctx, self._parent = tx, ctx, parent
        self._queues: dict[str, QueueRow | RetinueError] = {}
        self._room: dict[str, int] = {}
        self._taken_ids = dict.fromkeys(tx.by_id([t.task_id for t in tasks if t.task_id]))
        self._by_key: dict[tuple[str, str], tuple[str, bytes]] = {}
        self._look_up_keys(tasks)

    def check(self, task: NewTask, task_id: str) -> Enqueued:
        queue = self._queues.get(task.queue_id) or self._queue(task.queue_id)
        if isinstance(queue, RetinueError):
            return Enqueued(task.task_id, error=queue)
        if error := limits.payload_error(task.inline_bytes):
            return Enqueued(task.task_id, error=error)
        return Enqueued(task_id) if task.plain and not self._room else self._among_others(task, task_id, queue)

    def _among_others(self, task: NewTask, task_id: str, queue: QueueRow) -> Enqueued:
        """Whether what it says of itself, or the queue's limit, keeps it out."""
        if task.idempotency_key and (known := self._by_key.get((task.queue_id, task.idempotency_key))):
            return self._same_key(task, *known)
        if task.task_id in self._taken_ids:
            return Enqueued(task_id, error=_task_exists(task_id))
        if self._room.get(task.queue_id, 1) <= 0:
            return Enqueued(task.task_id, error=_queue_full(queue))
        return Enqueued(task_id)

    def admit(self, new: Task) -> None:
        row = new.row
        self._taken_ids[row.task_id] = None
        if row.idempotency_key:
            self._by_key[row.queue_id, row.idempotency_key] = (row.task_id, new.body.input)
        if row.queue_id in self._room:
            self._room[row.queue_id] -= 1

    def _same_key(self, task: NewTask, task_id: str, known_input: bytes) -> Enqueued:
        if not task.reject_conflict and known_input == task.body.input:
            return Enqueued(task_id, existing=True)
        why = "a task with another input has it" if known_input != task.body.input else "a task has it"
        error = AlreadyExists(
            f"cannot enqueue under idempotency key {task.idempotency_key!r}: {why}",
            reason=Reason.IDEMPOTENCY_CONFLICT,
            task_id=task_id,
        )
        return Enqueued(task_id, error=error)

    def _queue(self, queue_id: str) -> QueueRow | RetinueError:
        self._queues[queue_id] = found = self._admitting(queue_id)
        return found

    def _admitting(self, queue_id: str) -> QueueRow | RetinueError:
        queue = self._tx.queue(queue_id)
        if queue is None:
            if self._ctx.strict_queues:
                return queue_not_found(queue_id)
            queue = QueueRow(queue_id, QueueState.ACTIVE, QueueSettings(), self._ctx.now.wall_ms)
            self._tx.save_queue(queue)
        if queue.state == QueueState.DRAINING and self._parent is None:
            return FailedPrecondition(
                f"cannot enqueue: queue {queue_id} is draining",
                reason=Reason.QUEUE_DRAINING,
                queue_id=queue_id,
            )
        if queue.settings.max_tasks:
            self._room[queue_id] = queue.settings.max_tasks - _unfinished(self._tx, queue_id)
        return queue

    def _look_up_keys(self, tasks: Sequence[NewTask]) -> None:
        keys: dict[str, list[str]] = {}
        for task in tasks:
            if task.idempotency_key:
                keys.setdefault(task.queue_id, []).append(task.idempotency_key)
        for queue_id, wanted in keys.items():
            rows = self._tx.by_key(queue_id, wanted)
            bodies = self._tx.bodies([row.seq for row in rows.values()])
            for key, row in rows.items():
                self._by_key[queue_id, key] = (row.task_id, bodies[row.seq].input)


# Workers


def lease(tx: Transaction, asked: LeaseAsk, nonce: int, ctx: Context) -> list[Granted]:
    """Hands out ready tasks."""
    queue = tx.queue(asked.queue_id)
    if queue is None:
        return []
    if asked.request_id and (again := _live_leases(tx, asked, ctx.now)):
        return [_granted(task, queue, ctx.now) for task in again]
    if queue.state == QueueState.PAUSED:
        return []
    ready = _fitting(_startable(tx, asked, queue, ctx), asked.max_bytes)
    term = rules.Term(queue.settings, ctx.now, asked.worker_id, asked.lease_ms, nonce, asked.request_id)
    rows = [rules.leased(task.row, term) for task in ready]
    tx.save(rows)
    ctx.ledger.add_all(EventType.LEASED, rows)
    return [_granted(Task(row, task.body), queue, ctx.now) for row, task in zip(rows, ready, strict=True)]


def _granted(task: Task, queue: QueueRow, now: Instant) -> Granted:
    row = task.row
    retry = queue.settings.retry
    return Granted(
        task,
        retry.max_attempts if task.body.retry is None else rules.effective_retry(retry, task.body.retry).max_attempts,
        (row.lease_until or now.lease_ms) - now.lease_ms,
        None if row.attempt_until is None else row.attempt_until - now.lease_ms,
    )


def _live_leases(tx: Transaction, asked: LeaseAsk, now: Instant) -> list[Task]:
    known = tx.by_lease_request(asked.queue_id, asked.request_id)
    return [t for t in known if t.row.worker_id == asked.worker_id and rules.is_live(t.row, now)]


def _startable(tx: Transaction, asked: LeaseAsk, queue: QueueRow, ctx: Context) -> list[Task]:
    """What is ready; tasks past their expiry end on the way, so that none of them hides one behind it."""
    while True:
        found = tx.ready(asked.queue_id, asked.max_tasks)
        late = [row for row, _ in found if row.expire_ms is not None and row.expire_ms <= ctx.now.wall_ms]
        if not late:
            return found
        _expire(tx, [rules.expired(row, queue.settings, ctx.now) for row in late], ctx)


def _fitting(tasks: Sequence[Task], max_bytes: int) -> Sequence[Task]:
    """As many as the reply has room for, but at least one."""
    room = max_bytes
    for index, (_, body) in enumerate(tasks if max_bytes else ()):
        room -= len(body.input) + _ROW_BYTES
        if body.labels:
            room -= sum(len(key) + 4 * len(value) for key, value in body.labels.items())
        if room < 0 and index:
            return tasks[:index]
    return tasks


def extend(tx: Transaction, asked: Sequence[Extend], ctx: Context) -> list[Extended]:
    """Makes leases last longer."""
    rows = tx.by_seq([item.lease.seq for item in asked])
    results: list[Extended] = []
    for item in asked:
        row = rows.get(item.lease.seq)
        if row is None or not rules.holds(row, item.lease.epoch, item.lease.nonce) or not rules.is_live(row, ctx.now):
            error = FailedPrecondition("cannot extend: the lease is no longer yours; stop", reason=Reason.LEASE_LOST)
            results.append(Extended(error=error))
            continue
        rows[row.seq] = row = rules.extended(row, item.lease_ms, ctx.now)
        lasts_ms = (row.lease_until or ctx.now.lease_ms) - ctx.now.lease_ms
        results.append(Extended(row.task_id, lasts_ms, row.cancel_requested))
    tx.save(list(rows.values()))
    return results


def settle(
    tx: Transaction, asked: Sequence[Settlement], ids: Sequence[str], lacking: Lacking, ctx: Context
) -> list[Settled]:
    """Ends leases, in order; `ids` are for follow-ups without one of their own, `lacking` refuses blobs not there."""
    rows = tx.by_seq([item.lease.seq for item in asked])
    desk = _Desk(tx, rows, iter(ids), lacking, ctx)
    results = [desk.settle(item) for item in asked]
    tx.save(list(desk.changed.values()))
    return results


class _Desk:
    """Settles one item after the other, so that a later one sees what an earlier one did."""

    def __init__(
        self, tx: Transaction, rows: dict[int, TaskRow], ids: Iterable[str], lacking: Lacking, ctx: Context
    ) -> None:
        self._tx, self._rows, self._ids, self._lacking, self._ctx = tx, rows, iter(ids), lacking, ctx
        self._queues: dict[str, QueueRow] = {}
        self.changed: dict[int, TaskRow] = {}

    def settle(self, item: Settlement) -> Settled:
        own_ids = [next(self._ids) for _ in item.follow_ups] if isinstance(item, Complete) else []
        seq, epoch, nonce = item.lease
        row = self._rows.get(seq)
        if row is None or not rules.holds(row, epoch, nonce) or not rules.is_live(row, self._ctx.now):
            return _repeated(item, row)
        if isinstance(item, Complete):
            return self._complete(item, row, own_ids)
        after = self._fail(item, row) if isinstance(item, Fail) else self._release(item, row)
        self._put(after)
        return Settled(after.state)

    def _complete(self, item: Complete, row: TaskRow, ids: Sequence[str]) -> Settled:
        if error := limits.payload_error(item.inline_bytes) or self._lacking.get(item.result_blob):
            return Settled(row.state, error=error)
        try:
            made = self._follow_up(item, row, ids) if item.follow_ups else ()
        except RetinueError as error:
            return Settled(row.state, error=error)
        if item.result or item.result_blob:
            self._tx.save_result(row.seq, item.result, item.result_blob)
        self._put(rules.completed(row, self._queue(row.queue_id).settings, self._ctx.now))
        return Settled(State.SUCCEEDED, made)

    def _follow_up(self, item: Complete, row: TaskRow, ids: Sequence[str]) -> tuple[str, ...]:
        """Takes all follow-ups in, or raises why not."""
        with self._tx.savepoint(), self._ctx.ledger.savepoint():
            results = _insert(self._tx, item.follow_ups, ids, self._lacking, self._ctx, parent=row)
            _all_or_none(results)
        return tuple(result.task_id for result in results)

    def _fail(self, item: Fail, row: TaskRow) -> TaskRow:
        queue = self._queue(row.queue_id)
        failure = replace(item.failure, record_ms=self._ctx.now.wall_ms, attempt=row.attempt)
        self._tx.save_failure(row.seq, failure)
        return rules.failed(
            row,
            queue.settings,
            _retry_of(self._tx, row, queue),
            self._ctx.now,
            jitter=self._ctx.random(),
            final=item.final,
            delay_ms=item.delay_ms,
        )

    def _release(self, item: Release, row: TaskRow) -> TaskRow:
        return rules.released(row, self._queue(row.queue_id).settings, self._ctx.now, item.delay_ms)

    def _put(self, row: TaskRow) -> None:
        self._rows[row.seq] = self.changed[row.seq] = row
        self._ctx.ledger.add(_EVENT_OF[row.state], row)

    def _queue(self, queue_id: str) -> QueueRow:
        if queue_id not in self._queues:
            self._queues[queue_id] = require_queue(self._tx, queue_id)
        return self._queues[queue_id]


def _repeated(item: Settlement, row: TaskRow | None) -> Settled:
    """What a settlement of a lease that is not live is told; a failure that is repeated, what came of it then."""
    refused = rules.refusal(row, item)
    if row is None or refused is not None:
        return Settled(error=refused)
    came_of_it = row.state if row.state in (State.DEAD, State.CANCELLED) else State.RETRYING
    return Settled(came_of_it if isinstance(item, Fail) else row.state)


# Time


def recover(tx: Transaction, ctx: Context, after_seq: int) -> int | None:
    """At start: live leases get one full term. In blocks; gives where to go on, or None at the end."""
    rows = tx.leased(after_seq, _RECOVERY)
    tx.save([rules.recovered(row, ctx.now, _attempt_ms(tx, row)) for row in rows])
    return rows[-1].seq if rows else None


def sweep(tx: Transaction, ctx: Context) -> bool:
    """Does what time brings, up to a block of each kind; whether there may be more to do at once."""
    now = ctx.now
    found = [
        _sweep_due(tx, ctx),
        _sweep_lapsed(tx, ctx),
        _sweep_expired(tx, ctx),
        _delete(tx, tx.deletable(now.wall_ms, _SWEEP), ctx),
        tx.forget_requests(now.wall_ms, _SWEEP),
    ]
    return any(count >= _SWEEP for count in found)


def _sweep_due(tx: Transaction, ctx: Context) -> int:
    rows = [rules.became_due(row) for row in tx.due(ctx.now.wall_ms, _SWEEP)]
    tx.save(rows)
    ctx.ledger.add_all(EventType.READY, rows)
    return len(rows)


def _sweep_lapsed(tx: Transaction, ctx: Context) -> int:
    rows = tx.lapsed(ctx.now.lease_ms, _SWEEP)
    changed = []
    for row in rows:
        queue = require_queue(tx, row.queue_id)
        after, failure = rules.lapsed(row, queue.settings, _retry_of(tx, row, queue), ctx.now, ctx.random())
        if failure:
            tx.save_failure(row.seq, failure)
        changed.append(after)
        ctx.ledger.add(EventType.LEASE_EXPIRED, row)
        ctx.ledger.add(_EVENT_OF[after.state], after)
    tx.save(changed)
    return len(rows)


def _sweep_expired(tx: Transaction, ctx: Context) -> int:
    rows = [
        rules.expired(row, require_queue(tx, row.queue_id).settings, ctx.now)
        for row in tx.expired(ctx.now.wall_ms, _SWEEP)
    ]
    _expire(tx, rows, ctx)
    return len(rows)


def _expire(tx: Transaction, rows: Sequence[TaskRow], ctx: Context) -> None:
    tx.save(rows)
    ctx.ledger.add_all(EventType.EXPIRED, rows)


def _delete(tx: Transaction, rows: Sequence[TaskRow], ctx: Context) -> int:
    tx.delete(rows)
    ctx.ledger.add_all(EventType.DELETED, rows)
    return len(rows)


# Operators


def create_queue(tx: Transaction, queue: QueueRow) -> QueueRow:
    """A queue with these settings, new or as it is."""
    known = tx.queue(queue.queue_id)
    if known is None:
        tx.save_queue(queue)
        return queue
    if known.settings != queue.settings:
        raise AlreadyExists(
            f"cannot create queue {queue.queue_id}: it exists with other settings; use UpdateQueue",
            reason=Reason.QUEUE_EXISTS,
            queue_id=queue.queue_id,
        )
    return known


def change_queue(tx: Transaction, queue_id: str, change: Callable[[QueueRow], QueueRow]) -> QueueRow:
    """A queue with other settings or in another state."""
    queue = change(require_queue(tx, queue_id))
    tx.save_queue(queue)
    return queue


def delete_queue(tx: Transaction, queue_id: str, *, force: bool, ctx: Context) -> int:
    """Removes a queue, with its tasks if forced; how many there were."""
    require_queue(tx, queue_id)
    total = sum(tx.counts(queue_id).values())
    if total and not force:
        raise FailedPrecondition(
            f"cannot delete queue {queue_id}: it has {total} tasks; purge it, or use force",
            reason=Reason.QUEUE_NOT_EMPTY,
            queue_id=queue_id,
            tasks=total,
        )
    while rows := tx.matching(TaskFilter(queue_id=queue_id), 0, 1_000):
        _delete(tx, rows, ctx)
    tx.delete_queue(queue_id)
    return total


def purge(tx: Transaction, queue_id: str, *, include_finished: bool, ctx: Context) -> int:
    """Deletes up to 1,000 tasks that no worker has; how many."""
    require_queue(tx, queue_id)
    states = tuple(s for s in State if s != State.LEASED) if include_finished else WAITING
    return _delete(tx, tx.matching(TaskFilter(queue_id=queue_id, states=states), 0, 1_000), ctx)


def cancel(tx: Transaction, asked: Selection, ctx: Context) -> Selected:
    """Cancels what waits, asks workers to stop the rest."""

    def one(row: TaskRow) -> TaskRow:
        return rules.cancelled(row, require_queue(tx, row.queue_id).settings, ctx.now)

    return _change_selected(tx, asked, UNFINISHED, one, ctx)


def redrive(tx: Transaction, asked: Selection, ctx: Context) -> Selected:
    """Makes finished tasks that did not succeed ready again."""
    return _change_selected(tx, asked, REDRIVABLE, lambda row: rules.redriven(row, ctx.now), ctx)


def delete(tx: Transaction, asked: Selection, ctx: Context) -> Selected:
    """Removes tasks that no worker has."""
    states = tuple(s for s in State if s != State.LEASED)
    rows, errors = _selected(tx, asked, states)
    doomed = []
    for row in rows:
        try:
            rules.check_deletable(row)
        except RetinueError as error:
            errors[row.task_id] = error
        else:
            doomed.append(row)
    if not asked.dry_run:
        _delete(tx, doomed, ctx)
    return Selected(len(doomed), errors)


def reschedule(tx: Transaction, asked: Reschedule, ctx: Context) -> TaskRow:
    """Gives a waiting task another time or priority."""
    row = tx.by_id([asked.task_id]).get(asked.task_id)
    if row is None:
        raise task_not_found(asked.task_id)
    start_ms = ctx.now.wall_ms + asked.delay_ms if asked.delay_ms is not None else asked.start_ms
    after = rules.rescheduled(row, start_ms, asked.priority, ctx.now)
    tx.save([after])
    if (after.state, after.ready_ms) != (row.state, row.ready_ms):
        ctx.ledger.add(_EVENT_OF[after.state], after)
    return after


def _change_selected(
    tx: Transaction,
    asked: Selection,
    states: tuple[State, ...],
    change: Callable[[TaskRow], TaskRow],
    ctx: Context,
) -> Selected:
    rows, errors = _selected(tx, asked, states)
    changed: list[TaskRow] = []
    count = 0
    for row in rows:
        try:
            after = change(row)
        except RetinueError as error:
            errors[row.task_id] = error
            continue
        count += 1
        if after is not row:
            changed.append(after)
    if not asked.dry_run:
        tx.save(changed)
        ctx.ledger.add_states(changed)
    return Selected(count, errors)


def _selected(
    tx: Transaction, asked: Selection, states: tuple[State, ...]
) -> tuple[list[TaskRow], dict[str, RetinueError]]:
    if asked.wanted is None:
        rows = tx.by_id(list(dict.fromkeys(asked.task_ids)))
        missing = {task_id: task_not_found(task_id) for task_id in asked.task_ids if task_id not in rows}
        return list(rows.values()), dict(missing)
    within = tuple(s for s in states if s in asked.wanted.states) if asked.wanted.states else states
    if not within:
        return [], {}
    return tx.matching(replace(asked.wanted, states=within), 0, asked.max_count), {}


# Shared


def require_queue(view: View, queue_id: str) -> QueueRow:
    """The queue; raises NotFound."""
    queue = view.queue(queue_id)
    if queue is None:
        raise queue_not_found(queue_id)
    return queue


def queue_not_found(queue_id: str) -> NotFound:
    """QUEUE_NOT_FOUND."""
    return NotFound(f"cannot find queue {queue_id}: create it first", reason=Reason.QUEUE_NOT_FOUND, queue_id=queue_id)


def task_not_found(task_id: str) -> NotFound:
    """TASK_NOT_FOUND."""
    return NotFound(
        f"cannot find task {task_id}: it never was, or its retention is over",
        reason=Reason.TASK_NOT_FOUND,
        task_id=task_id,
    )


def _task_exists(task_id: str) -> AlreadyExists:
    return AlreadyExists(
        f"cannot enqueue {task_id}: a task of that id exists", reason=Reason.TASK_EXISTS, task_id=task_id
    )


def _queue_full(queue: QueueRow) -> ResourceExhausted:
    return ResourceExhausted(
        f"cannot enqueue: queue {queue.queue_id} holds its {queue.settings.max_tasks} unfinished tasks",
        reason=Reason.QUEUE_FULL,
        retry_ms=1_000,
        queue_id=queue.queue_id,
    )


def _unfinished(tx: Transaction, queue_id: str) -> int:
    counts = tx.counts(queue_id)
    return sum(counts.get(state, 0) for state in UNFINISHED)


def _retry_of(tx: Transaction, row: TaskRow, queue: QueueRow) -> RetryPolicy:
    return rules.effective_retry(queue.settings.retry, tx.bodies([row.seq])[row.seq].retry)


def _attempt_ms(tx: Transaction, row: TaskRow) -> int:
    return require_queue(tx, row.queue_id).settings.attempt_ms if row.attempt_ms is None else row.attempt_ms


_EVENT_OF = {
    State.SCHEDULED: EventType.SCHEDULED,
    State.READY: EventType.READY,
    State.RETRYING: EventType.RETRYING,
    State.SUCCEEDED: EventType.SUCCEEDED,
    State.DEAD: EventType.DEAD,
    State.CANCELLED: EventType.CANCELLED,
    State.EXPIRED: EventType.EXPIRED,
}
"""What is told when a task comes to a state other than by being enqueued or leased."""
