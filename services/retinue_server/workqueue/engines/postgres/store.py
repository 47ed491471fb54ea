"""What steps see: reads, and writes that are kept back until a read needs them or the transaction ends.

Keeping back is what makes many small steps cheap over a network: the writes of a whole group go out as one statement of
each kind, in the round trip that commits. Each step, and each savepoint inside one, writes into a layer of its own; a
layer that is undone before it went out never was. Only one that went out has a savepoint in the database.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from retinue_server.workqueue.engine import (
    FINISHED,
    Failure,
    Instant,
    QueueRow,
    QueueTotals,
    State,
    Task,
    TaskBody,
    TaskFilter,
    TaskRow,
)
from retinue_server.workqueue.engines.postgres import records
from retinue_server.workqueue.engines.postgres.literals import (
    blobs,
    escaped,
    ints,
    sparse,
    sparse_texts,
    texts,
)
from retinue_server.workqueue.engines.postgres.marks import BEGINNING, Marks, Place
from retinue_server.workqueue.engines.postgres.statements import QUEUES_LOCK, REQUEST_LOCK, ROOM_LOCK

if TYPE_CHECKING:
    from retinue_server.workqueue.engines.postgres.leases import Leases
    from retinue_server.workqueue.engines.postgres.session import Session, Statement
    from retinue_server.workqueue.engines.postgres.statements import Statements


_READY, _LEASED = State.READY, State.LEASED  # looking a member up takes as long as making a row
_MANY = 8
"""From how many rows on a change has a statement of its own."""


class View:
    """Reads one snapshot; see engine.View."""

    _lock_hot = _lock_old = ""

    def __init__(self, session: Session, statements: Statements) -> None:
        self.session, self._sql = session, statements
        self._pending: list[Statement] = []
        """What goes out before the next read."""

    def begin(self) -> None:
        """The snapshot is taken with the first read."""
        self._pending = [("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", ())]

    def end(self) -> None:
        """Lets go of the snapshot."""
        if not self._pending:
            self.session.run([("COMMIT", ())])

    def queue(self, queue_id: str) -> QueueRow | None:
        found = self._select(self._sql["queue"], queue_id)
        return records.queue(found[0]) if found else None

    def queues(self, after: str, limit: int) -> list[QueueRow]:
        return [records.queue(row) for row in self._select(self._sql["queues_after"], after, str(limit))]

    def counts(self, queue_id: str) -> dict[State, int]:
        return {State(state): count for state, count in self._select(self._sql["counts"], queue_id)}

    def totals(self, queue_id: str) -> QueueTotals:
        return QueueTotals(*self._select(self._sql["totals"], queue_id)[0])

    def by_id(self, task_ids: Sequence[str]) -> dict[str, TaskRow]:
        found = {row.task_id: row for row in self._rows("by_id", texts(task_ids))} if task_ids else {}
        missing = [task_id for task_id in task_ids if task_id not in found]
        if missing:
            found.update((row.task_id, row) for row in self._old_rows("old_by_id", texts(missing)))
        return {task_id: found[task_id] for task_id in task_ids if task_id in found}

    def bodies(self, seqs: Sequence[int]) -> dict[int, TaskBody]:
        return self._bodies(seqs)

    def _bodies(self, seqs: Sequence[int]) -> dict[int, TaskBody]:
        found = {seq: records.body(body) for seq, *body in self._peek(self._sql["bodies"], ints(seqs))} if seqs else {}
        if missing := [seq for seq in seqs if seq not in found]:
            rows = self._peek(self._sql["old_bodies"], ints(missing))
            found.update((seq, records.body(body)) for seq, *body in rows)
        return found

    def page(self, wanted: TaskFilter, before_seq: int | None, limit: int) -> list[Task]:
        below = str((1 << 62) if before_seq is None else before_seq)
        columns = "{row}, {light}", "{old_row}, {old_light}"
        tasks = [records.task(row) for row in self._filtered(wanted, columns, "<", below, limit)]
        return sorted(tasks, key=_task_seq, reverse=True)[:limit]

    def referenced(self, blob_ids: Sequence[str]) -> set[str]:
        return {row[0] for row in self._select(self._sql["referenced"], texts(blob_ids))} if blob_ids else set()

    def _filtered(
        self, wanted: TaskFilter, columns: tuple[str, str], side: str, seq: str, limit: int
    ) -> list[tuple[Any, ...]]:
        """What matches on one side of a seq, nearest first, from both tables."""
        order = "DESC" if side == "<" else "ASC"
        found: list[tuple[Any, ...]] = []
        if records.may_be_hot(wanted):
            where, values = records.conditions(wanted, old=False, first=3)
            tables = "{schema}.body b JOIN {schema}.task t USING (seq)"
            sql = f"SELECT {columns[0]} FROM {tables} WHERE b.seq {side} $1::bigint AND {where} ORDER BY b.seq {order}"  # noqa: S608 - constants
            found += self._select(self._sql.fill(f"{sql} LIMIT $2::integer{self._lock_hot}"), seq, str(limit), *values)
        if records.may_be_old(wanted):
            where, values = records.conditions(wanted, old=True, first=3)
            tables = "{schema}.history h"
            where = f"{{kept}} AND {where}"
            sql = f"SELECT {columns[1]} FROM {tables} WHERE h.seq {side} $1::bigint AND {where} ORDER BY h.seq {order}"  # noqa: S608 - constants
            found += self._select(self._sql.fill(f"{sql} LIMIT $2::integer{self._lock_old}"), seq, str(limit), *values)
        return found

    def _rows(self, name: str, *values: str) -> list[TaskRow]:
        """Rows of unfinished tasks."""
        return [records.task_row(row) for row in self._select(self._sql[name] + self._lock_hot, *values)]

    def _old_rows(self, name: str, *values: str) -> list[TaskRow]:
        """Rows of finished tasks."""
        return [records.task_row(row) for row in self._select(self._sql[name] + self._lock_old, *values)]

    def _select(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Reads what the tables have, with all that was written before."""
        pending, self._pending = self._pending, []
        return self.session.run([*pending, (sql, values)])

    _peek = _select
    """Reads what no write that is kept back can change."""


class Exclusively(Exception):
    """A step is about to change queues; for that it must be alone."""


class _Request(NamedTuple):
    """What is remembered of an answered request."""

    request_id: str
    fingerprint: bytes
    reply: bytes
    forget_ms: int


class _Layer:
    """Writes that are kept back."""

    def __init__(self, queues: dict[str, QueueRow], asked: int = 0, *, is_out: bool = False) -> None:
        self.saves: dict[int, TaskRow] = {}
        self.results: dict[int, tuple[bytes, str]] = {}
        self.failures: dict[int, str] = {}
        self.deletes: dict[int, TaskRow] = {}
        self.inserts: list[list[Task]] = []
        """In runs of tasks that are alike."""
        self.requests: list[_Request] = []
        self.others: list[Statement] = []
        self.queues = queues
        """As they were before it."""
        self.asked = asked
        """How many requests had been taken for new before it."""
        self.is_out = is_out
        """Whether the database has a savepoint for it."""

    def take_over(self, upper: _Layer) -> None:
        """What an upper layer wrote is this one's now."""
        for seq in upper.deletes:
            self.saves.pop(seq, None)
            self.results.pop(seq, None)
            self.failures.pop(seq, None)
        self.saves |= upper.saves
        self.results |= upper.results
        self.failures |= upper.failures
        self.deletes |= upper.deletes
        self.inserts += upper.inserts
        self.requests += upper.requests
        self.others += upper.others

    def __bool__(self) -> bool:
        rows = self.saves or self.results or self.failures or self.deletes or self.inserts
        return bool(rows or self.requests or self.others)


class Store(View):
    """Reads and writes inside a writer's transaction; see engine.Transaction."""

    _lock_hot, _lock_old = " FOR UPDATE OF t", " FOR UPDATE"

    def __init__(
        self,
        session: Session,
        statements: Statements,
        days: Callable[[], frozenset[int]],
        marks: Marks,
        leases: Leases,
    ) -> None:
        super().__init__(session, statements)
        self._days, self._marks, self._leases = days, marks, leases
        """The days that have a partition of history; where to begin looking; what need not be read."""
        self._careful = False
        """Whether nothing is taken for granted."""
        self._before: dict[int, TaskRow] = {}
        """Unfinished tasks as the tables have them, as far as this transaction knows."""
        self._unproved: dict[int, int] = {}
        """Those of them that were known by heart, and by which transaction they were written."""
        self._granted: dict[int, TaskRow] = {}
        """Leases that this transaction wrote, to be known by heart."""
        self._taken: set[int] = set()
        """What it took of the leases known by heart."""
        self._asked: dict[str, bool] = {}
        """Requests that were taken for new without a look, and whether they are remembered."""
        self._versioned = True
        """Whether all it wrote bears its own number (not that of a savepoint)."""
        self._floors: dict[str, str] = {}
        """From where on this one has swept last."""
        self._queues: dict[str, QueueRow] = {}
        self._queues_version = -1
        self._layers = [_Layer(self._queues)]
        self._hot: set[int] = set()
        """Tasks that are known not to be in history: this transaction has read them, and so locked them."""
        self.ready_tasks: Counter[str] = Counter()
        """How many tasks became ready in this transaction, by queue."""
        self.time = Instant(0, 0)
        """When the transaction began, by the database's clock."""
        self._exclusive = False
        self.own_clock = True

    # The transaction

    def open(self, *, exclusive: bool, careful: bool) -> None:
        """Begins a transaction; all that a step may ask first comes with it. A careful one reads all it goes by."""
        self.ready_tasks = Counter()
        self._careful, self._versioned = careful, True
        self._before, self._unproved, self._granted, self._asked = {}, {}, {}, {}
        self._layers, self._pending, self._hot, self._exclusive = [_Layer(self._queues)], [], set(), exclusive
        lock = "pg_advisory_xact_lock" if exclusive else "pg_advisory_xact_lock_shared"
        begin = [
            ("BEGIN", ()),
            (_SET.format(lock=lock), (str(QUEUES_LOCK), self._sql.schema)),
            (self._sql["clock"], ()),
        ]
        [(version, now_ms)] = self.session.run(begin)
        self.time = Instant(now_ms, now_ms)
        if version != self._queues_version:
            found = [records.queue(row) for row in self.session.run([(self._sql["queues"], ())])]
            self._queues = {queue.queue_id: queue for queue in found}
            self._queues_version = version

    def writes(self) -> list[Statement]:
        """What is left to go out before the commit; the last one's answer is for `committed`."""
        writes = [*self._take(), *self._proofs(list(self._unproved)), *self._newness()]
        return [*writes, (self._sql["version"], ())] if self._granted and self._versioned else writes

    def committed(self, answers: list[tuple[Any, ...]]) -> None:
        """What was granted may be known by heart; `answers` are those of `writes`."""
        if self._granted and self._versioned:
            [version] = answers[-1]
            self._leases.put(self._granted.values(), version)

    def end(self) -> None:
        """The group is through, one way or the other."""
        self._leases.give_back(self._taken)
        self._taken = set()

    def forget(self) -> None:
        """The transaction came to nothing: what was learnt in it may be wrong."""
        if self._exclusive:
            self._queues_version = -1

    def now(self) -> Instant | None:
        return self.time if self.own_clock else None

    def claim_room(self, size: int) -> None:
        """The database's disk is not seen from here; the database refuses what does not fit."""

    def savepoint(self) -> AbstractContextManager[None]:
        return _Savepoint(self)

    def push(self) -> None:
        """Opens a layer."""
        self._layers.append(_Layer(self._queues, len(self._asked)))

    def pop(self, *, undo: bool) -> None:
        """Closes the top layer: what it wrote is the next one's, or never was."""
        top = self._layers.pop()
        name = f"s{len(self._layers)}"
        if not undo:
            self._layers[-1].take_over(top)
            if top.is_out:
                self._pending.append((f"RELEASE SAVEPOINT {name}", ()))
            return
        self._queues = top.queues
        self._asked.update(dict.fromkeys(list(self._asked)[top.asked :], False))
        if top.is_out:
            self._hot.clear()
            self._before.clear()
            self._granted.clear()
            self._pending = []
            self.session.run([(f"ROLLBACK TO SAVEPOINT {name}", ()), (f"RELEASE SAVEPOINT {name}", ())])

    # Reads

    def queue(self, queue_id: str) -> QueueRow | None:
        return self._queues.get(queue_id)

    def counts(self, queue_id: str) -> dict[State, int]:
        if not self._exclusive:
            self._pending.append((self._sql["lock_name"], (str(ROOM_LOCK), queue_id)))
        return super().counts(queue_id)

    def by_seq(self, seqs: Sequence[int]) -> dict[int, TaskRow]:
        if not self._careful:
            self._recall([seq for seq in seqs if seq not in self._hot])
        found = {seq: self._before[seq] for seq in seqs if seq in self._before}
        for layer in self._layers:
            if layer.saves:
                found.update({seq: layer.saves[seq] for seq in seqs if seq in layer.saves})
        if missing := [seq for seq in seqs if seq not in found]:
            found.update(self._fetch(missing))
        gone = [seq for layer in self._layers if layer.deletes for seq in seqs if seq in layer.deletes]
        return {seq: row for seq, row in found.items() if seq not in gone} if gone else found

    def _recall(self, seqs: Sequence[int]) -> None:
        """What is known of them by heart."""
        found = self._leases.take([seq for seq in seqs if seq not in self._taken])
        self._taken.update(found)
        self._hot.update(found)
        self._before.update({seq: row for seq, (row, _) in found.items()})
        self._unproved.update({seq: version for seq, (_, version) in found.items()})

    def _fetch(self, seqs: Sequence[int]) -> dict[int, TaskRow]:
        """Rows that were not written yet, which so are as the tables have them."""
        if not seqs:
            return {}
        rows = self._peek(self._sql["by_seq"] + self._lock_hot, ints(seqs))
        found = {row.seq: row for row in map(records.task_row, rows)}
        self._hot.update(found)
        self._before.update(found)
        if missing := [seq for seq in seqs if seq not in found]:
            old = self._peek(self._sql["old_by_seq"] + self._lock_old, ints(missing))
            found.update((row.seq, row) for row in map(records.task_row, old))
        return found

    def by_key(self, queue_id: str, keys: Sequence[str]) -> dict[str, TaskRow]:
        wanted = texts(keys)
        found = {row.idempotency_key: row for row in self._rows("by_key", queue_id, wanted)}
        if missing := [key for key in keys if key and key not in found]:
            rows = self._old_rows("old_by_key", queue_id, texts(missing))
            found.update((row.idempotency_key, row) for row in rows)
        return found

    def by_lease_request(self, queue_id: str, request_id: str) -> list[Task]:
        self._pending.append((self._sql["lock_name"], (str(REQUEST_LOCK), escaped(request_id))))
        return self._tasks(self._select(self._sql["by_lease_request"], queue_id, escaped(request_id)))

    def bodies(self, seqs: Sequence[int]) -> dict[int, TaskBody]:
        found = self._bodies(seqs)
        return {seq: self._with_what_was_left(seq, body) for seq, body in found.items()}

    def _with_what_was_left(self, seq: int, body: TaskBody) -> TaskBody:
        for layer in self._layers:
            body = records.left(body, layer.results.get(seq), layer.failures.get(seq))
        return body

    def ready(self, queue_id: str, limit: int) -> list[Task]:
        place = self._marks.place(queue_id)
        if place is not None:
            behind = str(place.priority), str(place.seq)
            tasks = self._ready_tasks("ready_behind", queue_id, str(limit), *behind)
            if len(tasks) == limit:
                self._marks.leased_upto(queue_id, _place(tasks, limit), None)
                return tasks
        began = time.monotonic()
        tasks = self._ready_tasks("ready", queue_id, str(limit))
        self._marks.leased_upto(queue_id, _place(tasks, limit), time.monotonic() - began)
        return tasks

    def _ready_tasks(self, name: str, queue_id: str, *values: str) -> list[Task]:
        found = self._select(self._sql[name], queue_id, *values)
        tasks = [records.fresh(queue_id, row) for row in found]
        if again := [seq for seq, epoch, *_ in found if epoch]:
            whole = {task.row.seq: task for task in map(records.task, self._peek(self._sql["whole"], ints(again)))}
            tasks = [whole.get(task.row.seq, task) for task in tasks]
        self._know(tasks)
        return tasks

    def due(self, wall_ms: int, limit: int) -> list[TaskRow]:
        return self._swept("due", wall_ms, limit)

    def lapsed(self, lease_ms: int, limit: int) -> list[TaskRow]:
        floor = str(self._marks.floor("lapsed", lease_ms))
        self._layers[-1].others.append((self._sql["push_lapses"], (str(lease_ms), str(limit), floor)))
        return self._swept("lapsed", lease_ms, limit)

    def expired(self, wall_ms: int, limit: int) -> list[TaskRow]:
        return self._swept("expired", wall_ms, limit)

    def _swept(self, kind: str, now_ms: int, limit: int) -> list[TaskRow]:
        floor = self._marks.floor(kind, now_ms)
        self._floors[kind] = str(floor)
        rows = self._picked(kind, now_ms, limit, str(floor))
        if len(rows) < limit:
            self._marks.swept(kind, now_ms, floor)
        return rows

    def deletable(self, wall_ms: int, limit: int) -> list[TaskRow]:
        return [records.task_row(row) for row in self._select(self._sql["deletable"], str(wall_ms), str(limit))]

    def leased(self, after_seq: int, limit: int) -> list[TaskRow]:
        return self._picked("leased", after_seq, limit)

    def matching(self, wanted: TaskFilter, after_seq: int, limit: int) -> list[TaskRow]:
        found = self._filtered(wanted, ("{row}", "{old_row}"), ">", str(after_seq), limit)
        rows = [records.task_row(row) for row in found]
        self._hot.update(row.seq for row in rows if row.state not in FINISHED)
        return sorted(rows, key=_seq)[:limit]

    def next_times(self) -> tuple[int | None, int | None]:
        floors = [self._floors.get(kind, str(BEGINNING)) for kind in ("due", "expired", "lapsed")]
        [(due, lapse)] = self._select(self._sql["next_times"], *floors)
        return due, lapse

    def request(self, request_id: str) -> tuple[bytes, bytes] | None:
        """Hardly any is a repeated one: it is taken for new until the commit, which fails if it isn't."""
        if not self._careful and request_id not in self._asked:
            self._asked[request_id] = False
            return None
        found = self._select(self._sql["request"], escaped(request_id))
        return (found[0][0], found[0][1]) if found else None

    def _rows(self, name: str, *values: str) -> list[TaskRow]:
        rows = super()._rows(name, *values)
        self._hot.update(row.seq for row in rows)
        return rows

    def _picked(self, name: str, time_or_seq: int, limit: int, *floor: str) -> list[TaskRow]:
        rows = [records.task_row(row) for row in self._select(self._sql[name], str(time_or_seq), str(limit), *floor)]
        self._hot.update(row.seq for row in rows)
        return rows

    def _tasks(self, found: Iterable[Sequence[Any]]) -> list[Task]:
        tasks = [records.task(row) for row in found]
        self._know(tasks)
        return tasks

    def _know(self, tasks: Sequence[Task]) -> None:
        """As the tables have them."""
        rows = {row.seq: row for row, _ in tasks}
        self._hot.update(rows)
        self._before.update(rows)

    def _select(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        pending = self._take()
        return self.session.run([*pending, (sql, values)])

    def _peek(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        pending, self._pending = self._pending, []
        return self.session.run([*pending, (sql, values)])

    # Writes

    def save_queue(self, queue: QueueRow) -> None:
        self._be_exclusive()
        values = (queue.queue_id, str(int(queue.state)), records.queue_settings(queue))
        if queue.queue_id in self._queues:
            self._change_queues((self._sql["update_queue"], values))
        else:
            self._change_queues((self._sql["insert_queue"], (*values, str(queue.create_ms))))
        self._queues = {**self._queues, queue.queue_id: queue}

    def delete_queue(self, queue_id: str) -> None:
        self._be_exclusive()
        self._change_queues((self._sql["delete_queue"], (queue_id,)))
        self._queues = {name: queue for name, queue in self._queues.items() if name != queue_id}

    def _be_exclusive(self) -> None:
        """Nobody else runs a step while a queue is changed; so all may know the queues by heart while they run one."""
        if not self._exclusive:
            raise Exclusively

    def _change_queues(self, statement: Statement) -> None:
        self._layers[-1].others += [statement, (self._sql["touch_queues"], ())]
        self._queues_version = -1

    def insert(self, tasks: Sequence[Task]) -> None:
        runs = records.runs(tasks)
        if not all(records.is_fresh(run[0]) for run in runs):
            self._insert_whole(tasks)
            return
        for run in runs:
            self._marks.ready(run[0].row.queue_id, run[0].row.priority, 1 << 62)
        self._layers[-1].inserts += runs

    def _insert_whole(self, tasks: Sequence[Task]) -> None:
        """Tasks that were somewhere else before: first as if they were new, then what came of them."""
        self._send_out(len(self._layers) - 1)
        seqs = self._select(self._sql["insert"] + " RETURNING seq", *records.inserted(tasks))
        for (seq,), (row, body) in zip(seqs, tasks, strict=True):
            self._hot.add(seq)
            self.save([replace(row, seq=seq)])
            if body.result or body.result_blob:
                self.save_result(seq, body.result, body.result_blob)
            if body.failure:
                self.save_failure(seq, body.failure)

    def save(self, rows: Sequence[TaskRow]) -> None:
        for row in rows:
            if row.state == _READY:
                self._marks.ready(row.queue_id, row.priority, row.seq)
        self._layers[-1].saves.update({row.seq: row for row in rows})

    def save_result(self, seq: int, result: bytes, result_blob: str) -> None:
        self._layers[-1].results[seq] = (result, result_blob)

    def save_failure(self, seq: int, failure: Failure) -> None:
        self._layers[-1].failures[seq] = records.failure_text(failure)

    def delete(self, rows: Sequence[TaskRow]) -> None:
        deletion = _Layer(self._queues)
        deletion.deletes.update((row.seq, row) for row in rows)
        self._layers[-1].take_over(deletion)

    def save_request(self, request_id: str, fingerprint: bytes, reply: bytes, forget_ms: int) -> None:
        self._layers[-1].requests.append(_Request(escaped(request_id), fingerprint, reply, forget_ms))
        if request_id in self._asked:
            self._asked[request_id] = True

    def forget_requests(self, wall_ms: int, limit: int) -> int:
        self._send_out(len(self._layers) - 1)
        return int(self._select(self._sql["forget_requests"], str(wall_ms), str(limit))[0][0])

    # What was kept back

    def _take(self) -> list[Statement]:
        """Everything that waits to go out, in order."""
        self._send_out(max((level for level, layer in enumerate(self._layers) if layer), default=0))
        pending, self._pending = self._pending, []
        return pending

    def _send_out(self, upto: int) -> None:
        """The layers up to that one, each after a savepoint of its own, so that it can be undone."""
        for level, layer in enumerate(self._layers[: upto + 1]):
            if level and not layer.is_out:
                self._pending.append((f"SAVEPOINT s{level}", ()))
                self._versioned = False
            self._pending += self._statements(layer)
            self._layers[level] = _Layer(layer.queues, layer.asked, is_out=True)

    def _statements(self, layer: _Layer) -> list[Statement]:
        if not layer:
            return []
        self.ready_tasks.update([row.queue_id for row in layer.saves.values() if row.state == _READY])
        for run in layer.inserts:
            if run[0].row.state == State.READY:
                self.ready_tasks[run[0].row.queue_id] += len(run)
        doomed = [seq for seq in layer.deletes if seq in self._unproved]
        statements = [*self._proofs(doomed), *self._saves(layer), *layer.others]
        for seq in layer.deletes:
            self._before.pop(seq, None)
            self._granted.pop(seq, None)
        hot = [seq for seq, row in layer.deletes.items() if seq in self._hot or row.state not in FINISHED]
        old = [seq for seq in layer.deletes if seq not in self._hot]
        if hot:
            statements.append((self._sql["delete_hot"], (ints(hot),)))
        if old:
            statements.append((self._sql["delete_old"], (ints(old),)))
        statements += self._inserts(layer.inserts)
        if layer.requests:
            statements.append((self._sql["save_requests"], _requested(layer.requests)))
        return statements

    def _saves(self, layer: _Layer) -> list[Statement]:
        statements: list[Statement] = []
        if layer.saves:
            statements += self._revivals([seq for seq in layer.saves if seq not in self._hot])
        alike, others = self._alike(layer.saves.values())
        for change, rows in alike.items():
            statements.append(self._same_change(change, rows, layer))
        statements += self._proofs([row.seq for row in others if row.seq in self._unproved])
        going_on = [row for row in others if row.state not in FINISHED]
        if going_on:
            statements.append((self._sql["save"], records.saved(going_on)))
        if ended := [row for row in others if row.state in FINISHED]:
            statements.append((self._sql["finish"], self._finished(ended, layer)))
        for rows in (*alike.values(), others):
            self._note(rows)
        left = {seq for seq in (*layer.results, *layer.failures) if not self._ends_in(layer, seq)}
        if left:
            statements.append((self._sql["save_bodies"], _results(sorted(left), layer)))
        return statements

    def _note(self, rows: Sequence[TaskRow]) -> None:
        """What the tables are about to have."""
        leased = {row.seq: row for row in rows if row.state == _LEASED}
        seqs = [row.seq for row in rows if row.seq not in leased]
        self._hot.difference_update([row.seq for row in rows if row.state in FINISHED])
        for seq in (*seqs, *leased):
            self._before.pop(seq, None)
        if self._granted:
            for seq in seqs:
                self._granted.pop(seq, None)
        self._granted.update(leased)

    def _alike(self, rows: Iterable[TaskRow]) -> tuple[dict[records.Change, list[TaskRow]], list[TaskRow]]:
        """Rows that change as most do, by what they change to; the others."""
        alike: dict[records.Change, list[TaskRow]] = {}
        others: list[TaskRow] = []
        for row in rows:
            before = self._before.get(row.seq)
            change = records.usual_change(before, row) if before else None
            if change is None:
                others.append(row)
            else:
                alike.setdefault(change, []).append(row)
        few = [change for change, same in alike.items() if len(same) < _MANY] if len(alike) > 1 else []
        for change in few:
            others += alike.pop(change)
        return alike, others

    def _same_change(self, change: records.Change, rows: Sequence[TaskRow], layer: _Layer) -> Statement:
        seqs = sorted([row.seq for row in rows])
        if change[0] == State.LEASED:
            return self._sql["lease"], (ints(seqs), *records.change_texts(change))
        versions = [self._unproved.pop(seq, None) for seq in seqs]
        day = records.drop_day(rows[0], self._days())
        results = _results(seqs, layer)
        return self._sql["end"], (
            *results,
            sparse(versions, None),
            str(len(seqs)),
            str(day),
            *records.change_texts(change),
        )

    def _proofs(self, seqs: Sequence[int]) -> list[Statement]:
        """That these are still as they were known by heart."""
        if not seqs:
            return []
        seqs = sorted(seqs)
        versions = [self._unproved.pop(seq) for seq in seqs]
        return [(self._sql["prove"], (ints(seqs), ints(versions), str(len(seqs))))]

    def _newness(self) -> list[Statement]:
        """That the requests which were taken for new, and were not remembered in the end, are none of old."""
        asked = [escaped(request_id) for request_id, is_saved in self._asked.items() if not is_saved]
        return [(self._sql["none_requested"], (texts(asked),))] if asked else []

    def _revivals(self, seqs: Sequence[int]) -> list[Statement]:
        """What was read elsewhere, or from history, may be in history."""
        if not seqs:
            return []
        self._hot.update(seqs)
        return [(self._sql["revive"], (ints(seqs),))]

    @staticmethod
    def _ends_in(layer: _Layer, seq: int) -> bool:
        row = layer.saves.get(seq)
        return row is not None and row.state in FINISHED

    def _finished(self, rows: Sequence[TaskRow], layer: _Layer) -> list[records.Value]:
        days = self._days()
        _, *results = _results([row.seq for row in rows], layer)
        return [*records.saved(rows), ints([records.drop_day(row, days) for row in rows]), *results]

    def _inserts(self, runs: Sequence[Sequence[Task]]) -> list[Statement]:
        """Long runs go as such, in their order; what is between them goes together."""
        statements: list[Statement] = []
        for is_long, some in groupby(_joined(runs), lambda run: len(run) >= _MANY):
            if is_long:
                statements += [(self._sql["insert_alike"], records.inserted_alike(run)) for run in some]
            else:
                statements.append((self._sql["insert"], records.inserted([task for run in some for task in run])))
        return statements


def _joined(runs: Iterable[Sequence[Task]]) -> list[list[Task]]:
    """The same with neighbours that are alike made one."""
    joined: list[list[Task]] = []
    for run in runs:
        if joined and records.alike(joined[-1], run):
            joined[-1] += run
        else:
            joined.append([*run])
    return joined


def _requested(requests: Sequence[_Request]) -> list[records.Value]:
    return [
        texts([request.request_id for request in requests]),
        blobs([request.fingerprint for request in requests]),
        blobs([request.reply for request in requests]),
        ints([request.forget_ms for request in requests]),
    ]


def _results(seqs: Sequence[int], layer: _Layer) -> list[records.Value]:
    """Them, and what attempts left on them."""
    results = [layer.results.get(seq) for seq in seqs]
    return [
        ints(seqs),
        blobs([result[0] if result else None for result in results]),
        sparse_texts([result[1] if result else None for result in results], None),
        sparse_texts([layer.failures.get(seq) for seq in seqs], None),
    ]


class _Savepoint:
    """A layer; an error of the database leaves it alone, since the whole transaction is undone then."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __enter__(self) -> None:
        self._store.push()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._store.pop(undo=kind is not None)


def _place(tasks: Sequence[Task], limit: int) -> Place | None:
    """Where to go on behind the last of them; None if there were no more."""
    return Place(tasks[-1].row.priority, tasks[-1].row.seq) if len(tasks) == limit else None


def _seq(row: TaskRow) -> int:
    return row.seq


def _task_seq(task: Task) -> int:
    return task.row.seq


_SET = """
SELECT set_config('synchronous_commit',
                  CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on'
                  ELSE current_setting('synchronous_commit') END, true),
       set_config('lock_timeout', '5s', true),
       set_config('idle_in_transaction_session_timeout', '10s', true),
       set_config('enable_seqscan', 'off', true),
       set_config('enable_hashjoin', 'off', true),
       set_config('enable_mergejoin', 'off', true),
       set_config('jit', 'off', true),
       {lock}($1::integer, hashtext($2::text))
"""
"""What holds for a transaction, so that it holds behind PgBouncer, too; then the lock of all queues.

All statements go by indexes; a plan that was made while a table was small must not read all of it when it no longer is.
"""
