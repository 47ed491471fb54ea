"""SQLite: one file, one writer thread, group commit.

All steps that wait when the writer is free run in one SQLite transaction, each inside a savepoint of its own; their
callers are answered after the one commit. A lone step is committed at once. WAL with `synchronous=FULL`: what is
acknowledged survives power loss. Reads run beside it, on a thread and a connection of their own; only the writer's
connection checkpoints, between two groups, and itself rather than by SQLite's automatism, which would swallow its
errors. After a failed sync, of a commit or a checkpoint, the process ends: what is on disk is not known, and the next
start finds out.

Disk: new data is refused while less than the reserve is free (`room.py`), free pages of the file counted in, since
deleting does not shrink it. What is written then is bounded: the log is checkpointed before it has grown far, and its
file is used again. A group that does not fit all the same is run once more without what takes in new data.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import lru_cache
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import apsw
import msgspec

from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import Reason, RetinueError, Unavailable
from retinue_server.runtime.files import make_directory
from retinue_server.workqueue.engine import (
    Capabilities,
    Durability,
    Failure,
    Outcome,
    QueueRow,
    QueueSettings,
    QueueState,
    QueueTotals,
    RetryOverrides,
    Room,
    State,
    Task,
    TaskBody,
    TaskFilter,
    TaskRow,
    Transaction,
    View,
)
from retinue_server.workqueue.engines.groups import Step, Steps, answer
from retinue_server.workqueue.engines.room import RESERVE_BYTES, DiskRoom

T = TypeVar("T")

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_CHECKPOINT_PAGES = 1_000
"""How long the log may be before it is moved into the file."""
_CAUTIOUS_PAGES = 64
"""The same while nothing new is let in: what lies beyond the end of the file needs room, which others may take."""
_LOG_FILE_BYTES = 16 * 1024**2
"""To what the log's file is cut when it was longer (a slow reader had kept it from being moved)."""
_BUSY_MS = 5_000
"""How long the writer waits for another process that holds the file."""

_COLUMNS = ["queue" if name == "queue_id" else name for name in TaskRow.__struct_fields__]
"""A column is named as its field and stands in its place."""
_QUEUE, _STATE, _OUTCOME = (_COLUMNS.index(name) for name in ("queue", "state", "outcome"))
_CANCEL, _WIDTH = _COLUMNS.index("cancel_requested"), len(_COLUMNS)
_CACHED = 16_384
"""How many leased rows are known by heart at most; a worker that settles in time finds its own there."""
_ROW = ", ".join(f"task.{name}" for name in _COLUMNS)
_BODY = [
    "input",
    "task_type",
    "labels",
    "retry",
    "traceparent",
    "input_blob",
    "result",
    "result_blob",
    "failure",
]
_WHOLE = f"{_ROW}, " + ", ".join(f"body.{name}" for name in _BODY)
_GIVEN = [name for name in TaskRow.__struct_fields__ if name not in ("seq", "queue_id")]
_INSERT_TASK = f"INSERT INTO task (seq, queue, {', '.join(_GIVEN)}) VALUES "  # noqa: S608 - constants
_TASK_VALUES = f"({', '.join('?' * len(_COLUMNS))})"
_INSERT_BODY = f"INSERT INTO body (seq, {', '.join(_BODY)}) VALUES "  # noqa: S608 - constants
_BODY_VALUES = f"({', '.join('?' * (1 + len(_BODY)))})"
_given = attrgetter(*_GIVEN)
_BLOCK = 50
"""How many rows one statement inserts at most; it stays in the statement cache."""
_MANY = 8
"""How many neighbours make a run, which differ in task_id, input and traceparent alone: the rest goes in once."""
_HAS_ARRAYS = hasattr(apsw, "carray") and "ENABLE_CARRAY" in apsw.compile_options
_ROW_SHAPE = [name for name in TaskRow.__struct_fields__ if name not in ("seq", "task_id")]
_BODY_SHAPE = [name for name in TaskBody.__struct_fields__ if name not in ("input", "traceparent")]
_row_shape, _body_shape = attrgetter(*_ROW_SHAPE), attrgetter(*_BODY_SHAPE)
_ALIKE_TASKS = (
    f"INSERT INTO task (task_id, seq, {', '.join(_ROW_SHAPE).replace('queue_id', 'queue')})"  # noqa: S608 - constants
    f" SELECT value, ? + rowid, {', '.join('?' * len(_ROW_SHAPE))} FROM carray(?)"
)
_ALIKE_BODIES = f"INSERT INTO body ({', '.join(_BODY_SHAPE)}, seq, input, traceparent) VALUES "  # noqa: S608 - constants
_SHARED = ", ".join(f"?{number}" for number in range(1, len(_BODY_SHAPE) + 1))

_fields = msgspec.structs.astuple
_encode = msgspec.json.Encoder().encode
_decode_labels = msgspec.json.Decoder(dict[str, str]).decode
_decode_retry = msgspec.json.Decoder(RetryOverrides).decode
_decode_failure = msgspec.json.Decoder(Failure).decode
_decode_settings = msgspec.json.Decoder(QueueSettings).decode


class SqliteEngine:
    """The store in one file; see the module. `fatal` is called when the disk can no longer be trusted."""

    capabilities = Capabilities("sqlite", Durability.DISK)

    def __init__(
        self, path: Path, fatal: Callable[[BaseException], None], *, reserve_bytes: int = RESERVE_BYTES
    ) -> None:
        self._path = path
        self._fatal = fatal
        self._disk = DiskRoom(path.parent, reserve_bytes, "tasks", self._free_inside)
        self._log_pages = self._checked_pages = 0
        """How long the log is, and up to where a checkpoint has looked at it."""
        self._log_is_gone = False
        """Whether nothing was written since the log's file was emptied, not even by a group that failed."""
        self._steps = Steps()
        self._writer: threading.Thread | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._failed = False
        """Whether the last group failed, and the traces of it are not yet removed."""
        self._store: _Store
        self._view: _View

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._store, self._view = await asyncio.to_thread(self._open)
        except (apsw.Error, OSError) as error:
            raise StartError(
                f"cannot open {self._path}: {error}; mend it, restore a backup, or choose another with --data-dir DIR"
            ) from error
        self._reader = ThreadPoolExecutor(1, "workqueue-reader")
        self._writer = threading.Thread(target=self._write_steps, args=(loop,), name="workqueue-writer", daemon=True)
        self._writer.start()

    async def stop(self) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        self._steps.end()
        await asyncio.to_thread(writer.join)
        if self._reader is not None:
            await asyncio.to_thread(self._reader.shutdown)
        await asyncio.to_thread(self._close)

    def write(self, step: Callable[[Transaction], T]) -> asyncio.Future[T]:
        if self._writer is None:
            raise Unavailable("cannot write: the engine is stopped", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=500)
        return self._steps.do(step)

    async def read(self, query: Callable[[View], T]) -> T:
        if self._reader is None or self._writer is None:
            raise Unavailable("cannot read: the engine is stopped", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=500)
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._run_query, query)

    def _open(self) -> tuple[_Store, _View]:
        make_directory(self._path.parent)
        writer = apsw.Connection(str(self._path))
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            f"busy_timeout = {_BUSY_MS}",
            "temp_store = MEMORY",
            f"journal_size_limit = {_LOG_FILE_BYTES}",
        ):
            writer.pragma(*pragma.split(" = "))
        _migrate(writer, self._path)
        writer.set_wal_hook(self._note_commit)  # instead of the automatic checkpoint
        with suppress(apsw.FullError):  # the log goes on where it ended
            writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        reader = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READWRITE)
        reader.pragma("query_only", True)  # noqa: FBT003 - apsw's own shape
        reader.pragma("wal_autocheckpoint", 0)
        store = _Store(writer, self._disk)
        return store, _View(reader, store.tally)

    def _close(self) -> None:
        self._view.db.close()
        self._store.db.close()

    def _run_query(self, query: Callable[[View], T]) -> T:
        try:
            with self._view.db:
                result = query(self._view)
        except apsw.Error as error:
            raise _translated(error) from error
        return result

    # The writer thread

    def _write_steps(self, loop: asyncio.AbstractEventLoop) -> None:
        while group := self._steps.next_group():
            admitting = self._disk.report.admitting
            try:
                self._recover()
                self._run(group)
            except Exception as error:  # noqa: BLE001 - a writer that ends would let every caller wait for ever
                self._undo(group, error)
            if admitting and not self._disk.report.admitting:
                self._look_after_disk()  # before anybody hears of it, while there is room for what the log holds
            loop.call_soon_threadsafe(answer, group)
            self._look_after_disk()

    def _run(self, group: list[Step]) -> None:
        try:
            self._commit(group)
        except apsw.Error as error:
            if not _is_full(error):
                raise
            self._disk.ran_out()  # once more, without what takes in new data: what ends work may still fit
            self._failed = True
            self._recover()
            self._commit(group)

    def _commit(self, group: list[Step]) -> None:
        self._store.db.execute("BEGIN IMMEDIATE")
        self._store.alone = len(group) == 1
        for step in group:
            step.run(self._store, (apsw.Error,))
        self._store.db.execute("COMMIT")
        self._store.committed()

    def _undo(self, group: list[Step], error: Exception) -> None:
        """Nothing of the group is durable: all of it fails."""
        if _is_failed_sync(error):
            self._fatal(error)
        self._failed = True
        told = self._disk.ran_out() if _is_full(error) else _translated(error)
        for step in group:
            step.fail(told)
        with suppress(Exception):  # it is tried again before the next group, and that one is told
            self._recover()

    def _recover(self) -> None:
        """Removes what a failed group left, in the database and by heart; raises while that can't be done."""
        if not self._failed:
            return
        self._log_is_gone = False  # what did not fit ends in the middle of the log, and keeps the disk full
        if self._store.db.in_transaction:
            self._store.db.execute("ROLLBACK")
        self._store.reload()
        self._failed = False

    # The disk, on the writer thread

    def room(self) -> Room:
        return self._disk.report

    def _free_inside(self) -> int:
        db = self._store.db
        return int(db.pragma("freelist_count")) * int(db.pragma("page_size"))

    def _note_commit(self, _: apsw.Connection, __: str, pages: int) -> int:
        if pages < self._log_pages:  # it was begun again
            self._checked_pages = 0
        self._log_pages = pages
        self._log_is_gone = False
        return int(apsw.SQLITE_OK)

    def _look_after_disk(self) -> None:
        """Between two groups: what must not run inside one."""
        try:
            self._disk.look()
            if self._disk.tight and not self._log_is_gone:
                self._give_log_back()
            elif self._log_pages - self._checked_pages >= (
                _CHECKPOINT_PAGES if self._disk.report.admitting else _CAUTIOUS_PAGES
            ):
                self._checkpoint()
        except Exception as error:  # noqa: BLE001 - as above; the next group is told, if it concerns it
            if _is_failed_sync(error):
                self._fatal(error)
            if _is_full(error):
                self._disk.ran_out()
            else:
                _log.warning("cannot look after the disk: %s", error)

    def _checkpoint(self) -> None:
        """Moves the log into the file, as far as no reader needs it; the next one takes what is left."""
        self._checked_pages = self._log_pages
        self._store.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _give_log_back(self) -> None:
        """Empties the log's file, unless a reader is in it: its room may be all that is missing to go on."""
        self._store.db.set_busy_timeout(0)  # nobody waits for a reader; the next group tries again
        try:
            self._store.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.BusyError:
            return
        finally:
            self._store.db.set_busy_timeout(_BUSY_MS)
        self._log_is_gone = True
        self._log_pages = self._checked_pages = 0


class _Tally:
    """Tasks by queue number and state, so that counting costs nothing.

    The writer thread counts in `current` and shows `committed` to the others, key by key, after each commit.
    """

    def __init__(self) -> None:
        self.committed: dict[tuple[int, int], int] = {}
        self.current: Counter[tuple[int, int]] = Counter()
        self._journal: list[tuple[tuple[int, int], int]] = []

    def load(self, counts: Iterable[tuple[int, int, int]]) -> None:
        """Takes over what the tables say."""
        self.current = Counter({(queue, state): count for queue, state, count in counts})
        self.committed = dict(self.current)
        self._journal.clear()

    def add(self, changes: Mapping[tuple[int, int], int]) -> None:
        """Counts a change."""
        self.current.update(changes)
        self._journal.extend(changes.items())

    def mark(self) -> int:
        """Where the journal stands, for `undo`."""
        return len(self._journal)

    def undo(self, mark: int) -> None:
        """Takes back what was counted since."""
        while len(self._journal) > mark:
            key, count = self._journal.pop()
            self.current[key] -= count

    def commit(self) -> None:
        """Shows what was counted."""
        for key, _ in self._journal:
            self.committed[key] = self.current[key]
        self._journal.clear()

    @staticmethod
    def of(counts: dict[tuple[int, int], int], queue: int) -> dict[State, int]:
        """One queue's counts."""
        return {state: count for state in State if (count := counts.get((queue, state), 0))}


class _View:
    """Reads; see engine.View."""

    def __init__(self, db: apsw.Connection, tally: _Tally) -> None:
        self.db = db
        self.tally = tally

    def queue(self, queue_id: str) -> QueueRow | None:
        found = self._queue_and_no(queue_id)
        return found[1] if found else None

    def _queue_and_no(self, queue_id: str) -> tuple[int, QueueRow] | None:
        sql = "SELECT no, queue_id, state, settings, create_ms FROM queue WHERE queue_id = ?"
        for no, *row in self.db.execute(sql, (queue_id,)):
            return int(no), _queue(*row)
        return None

    def queues(self, after: str, limit: int) -> list[QueueRow]:
        sql = "SELECT queue_id, state, settings, create_ms FROM queue WHERE queue_id > ? ORDER BY queue_id LIMIT ?"
        return [_queue(*row) for row in self.db.execute(sql, (after, limit))]

    def counts(self, queue_id: str) -> dict[State, int]:
        return self.tally.of(self.tally.committed, self._no(queue_id))

    def totals(self, queue_id: str) -> QueueTotals:
        no = self._no(queue_id)
        oldest = self.db.execute(_OLDEST_READY, (no, no)).get
        workers = self.db.execute(
            "SELECT count(DISTINCT worker_id) FROM task INDEXED BY task_leased WHERE state = 3 AND queue = ?",
            (no,),
        ).get
        return QueueTotals(oldest, workers)

    def by_id(self, task_ids: Sequence[str]) -> dict[str, TaskRow]:
        return {row.task_id: row for row in self._rows_in("task_id", task_ids)}

    def bodies(self, seqs: Sequence[int]) -> dict[int, TaskBody]:
        sql = f"SELECT seq, {', '.join(_BODY)} FROM body WHERE seq = ?"  # noqa: S608 - constants
        return {seq: _body(body) for wanted in seqs for seq, *body in self.db.execute(sql, (wanted,))}

    def page(self, wanted: TaskFilter, before_seq: int | None, limit: int) -> list[Task]:
        where, values = self._where(wanted)
        light = _WHOLE.replace("body.input,", "x'',").replace("body.result,", "x'',")
        sql = f"SELECT {light} FROM task JOIN body USING (seq) WHERE seq < ? AND {where} ORDER BY seq DESC LIMIT ?"  # noqa: S608 - constants
        before = (1 << 62) if before_seq is None else before_seq
        return [self._task(row) for row in self.db.execute(sql, (before, *values, limit))]

    def referenced(self, blob_ids: Sequence[str]) -> set[str]:
        sql = (
            "SELECT 1 WHERE EXISTS (SELECT 1 FROM body WHERE input_blob = ?1 AND input_blob <> '')"
            " OR EXISTS (SELECT 1 FROM body WHERE result_blob = ?1 AND result_blob <> '')"
        )
        return {blob_id for blob_id in blob_ids if self.db.execute(sql, (blob_id,)).get}

    def _rows_in(self, column: str, values: Sequence[object]) -> list[TaskRow]:
        sql = f"SELECT {_ROW} FROM task WHERE {column} = ?"  # noqa: S608 - constants
        return [self._row(row) for value in values for row in self.db.execute(sql, (value,))]

    def _where(self, wanted: TaskFilter) -> tuple[str, list[Any]]:
        """A filter as SQL over task and body."""
        terms: list[tuple[str, Sequence[Any]]] = [("1", ())]
        if wanted.queue_id:
            terms.append(("queue = ?", (self._no(wanted.queue_id),)))
        if wanted.states:
            terms.append((f"state IN ({', '.join(str(int(s)) for s in wanted.states)})", ()))
        if wanted.task_type:
            terms.append(("task_type = ?", (wanted.task_type,)))
        if wanted.parent_task_id:
            terms.append(("parent_task_id = ? AND parent_task_id <> ''", (wanted.parent_task_id,)))
        if wanted.created_after_ms is not None:
            terms.append(("create_ms >= ?", (wanted.created_after_ms,)))
        if wanted.created_before_ms is not None:
            terms.append(("create_ms < ?", (wanted.created_before_ms,)))
        terms.extend(("labels ->> ? = ?", (f'$."{key}"', value)) for key, value in wanted.labels.items())
        return " AND ".join(sql for sql, _ in terms), [value for _, values in terms for value in values]

    def _no(self, queue_id: str) -> int:
        found = self._queue_and_no(queue_id)
        return found[0] if found else -1

    def _name(self, no: int) -> str:
        return str(self.db.execute("SELECT queue_id FROM queue WHERE no = ?", (no,)).get)

    def _row(self, row: Sequence[Any]) -> TaskRow:
        return _task_row(self._name(row[_QUEUE]), row)

    def _task(self, row: Sequence[Any]) -> Task:
        return Task(self._row(row), _body(row[len(_COLUMNS) :]))


class _Store(_View):
    """Reads and writes inside the writer's transaction; see engine.Transaction. Knows all queues by heart."""

    def __init__(self, db: apsw.Connection, disk: DiskRoom) -> None:
        super().__init__(db, _Tally())
        self._disk = disk
        self._queues: dict[str, tuple[int, QueueRow]] = {}
        self._names: dict[int, str] = {}
        self._seen: dict[int, TaskRow] = {}
        """The rows that this transaction has read or saved, as they are now."""
        self._leased: dict[int, TaskRow] = {}
        """Rows that the last transactions left LEASED, as they are now; the oldest first."""
        self._next_seq = 1
        self.alone = False
        """Whether the next savepoint is that of the transaction's only step."""
        self.queue_changes = 0
        self.reload()

    def reload(self) -> None:
        """Forgets what it knows by heart and asks the tables."""
        self.forget_rows()
        self.reload_queues()
        self._next_seq = (self.db.execute("SELECT max(seq) FROM task").get or 0) + 1
        self.tally.load(self.db.execute(_COUNT))

    def reload_queues(self) -> None:
        """The same for the queues alone."""
        self._queues = {
            row[1]: (row[0], _queue(*row[1:]))
            for row in self.db.execute("SELECT no, queue_id, state, settings, create_ms FROM queue")
        }
        self._names = {no: queue_id for queue_id, (no, _) in self._queues.items()}
        self.queue_changes = 0

    def now(self) -> None:
        """The server's clocks count."""

    def savepoint(self) -> AbstractContextManager[None]:
        whole, self.alone = self.alone, False
        return _Savepoint(self, whole=whole)

    def counts(self, queue_id: str) -> dict[State, int]:
        return self.tally.of(self.tally.current, self._no(queue_id))

    def save_queue(self, queue: QueueRow) -> None:
        sql = (
            "INSERT INTO queue (queue_id, state, settings, create_ms) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (queue_id) DO UPDATE SET state = excluded.state, settings = excluded.settings RETURNING no"
        )
        settings = _encode(queue.settings).decode()
        no = self.db.execute(sql, (queue.queue_id, int(queue.state), settings, queue.create_ms)).get
        self._queues[queue.queue_id] = (no, queue)
        self._names[no] = queue.queue_id
        self.queue_changes += 1

    def delete_queue(self, queue_id: str) -> None:
        self.db.execute("DELETE FROM queue WHERE queue_id = ?", (queue_id,))
        no, _ = self._queues.pop(queue_id)
        del self._names[no]
        self.queue_changes += 1

    def committed(self) -> None:
        """What was written is durable now."""
        self.tally.commit()
        for seq, row in self._seen.items():
            if row.state is State.LEASED:
                self._leased[seq] = row
            else:
                self._leased.pop(seq, None)
        self._seen.clear()
        while len(self._leased) > _CACHED:
            del self._leased[next(iter(self._leased))]

    def forget_rows(self) -> None:
        """After something was undone."""
        self._seen.clear()
        self._leased.clear()

    def by_seq(self, seqs: Sequence[int]) -> dict[int, TaskRow]:
        found = {}
        for seq in seqs:
            if (row := self._seen.get(seq) or self._leased.get(seq) or self._read(seq)) is not None:
                found[seq] = self._seen[seq] = row
        return found

    def _read(self, seq: int) -> TaskRow | None:
        return next(iter(self._rows_in("seq", [seq])), None)

    def by_key(self, queue_id: str, keys: Sequence[str]) -> dict[str, TaskRow]:
        sql = f"SELECT {_ROW} FROM task WHERE queue = ? AND idempotency_key = ? AND idempotency_key <> ''"  # noqa: S608 - constants
        no = self._no(queue_id)
        return {key: self._row(row) for key in keys for row in self.db.execute(sql, (no, key))}

    def by_lease_request(self, queue_id: str, request_id: str) -> list[Task]:
        sql = (
            f"SELECT {_WHOLE} FROM task INDEXED BY task_request JOIN body USING (seq) WHERE lease_request_id = ?"  # noqa: S608 - constants
            " AND lease_request_id <> '' AND queue = ? AND state = 3 ORDER BY priority DESC, seq"
        )
        return [self._task(row) for row in self.db.execute(sql, (request_id, self._no(queue_id)))]

    def ready(self, queue_id: str, limit: int) -> list[Task]:
        sql = (
            f"SELECT {_WHOLE} FROM task INDEXED BY task_ready JOIN body USING (seq) WHERE queue = ? AND state = 2"  # noqa: S608 - constants
            " ORDER BY priority DESC, seq LIMIT ?"
        )
        return [self._task(row) for row in self.db.execute(sql, (self._no(queue_id), limit))]

    def due(self, wall_ms: int, limit: int) -> list[TaskRow]:
        return self._found("state IN (1, 4) AND ready_ms <= ? ORDER BY ready_ms LIMIT ?", wall_ms, limit)

    def lapsed(self, lease_ms: int, limit: int) -> list[TaskRow]:
        return self._found("state = 3 AND lease_until <= ? ORDER BY lease_until LIMIT ?", lease_ms, limit)

    def expired(self, wall_ms: int, limit: int) -> list[TaskRow]:
        where = "expire_ms IS NOT NULL AND state IN (1, 2, 4) AND expire_ms <= ? ORDER BY expire_ms LIMIT ?"
        return self._found(where, wall_ms, limit)

    def deletable(self, wall_ms: int, limit: int) -> list[TaskRow]:
        return self._found("delete_ms IS NOT NULL AND delete_ms <= ? ORDER BY delete_ms LIMIT ?", wall_ms, limit)

    def leased(self, after_seq: int, limit: int) -> list[TaskRow]:
        first = "SELECT seq FROM task INDEXED BY task_leased WHERE state = 3 AND seq > ? ORDER BY seq LIMIT ?"
        return self._found(f"seq IN ({first}) ORDER BY seq", after_seq, limit)

    def matching(self, wanted: TaskFilter, after_seq: int, limit: int) -> list[TaskRow]:
        where, values = self._where(wanted)
        sql = f"SELECT {_ROW} FROM task JOIN body USING (seq) WHERE seq > ? AND {where} ORDER BY seq LIMIT ?"  # noqa: S608 - constants
        return [self._row(row) for row in self.db.execute(sql, (after_seq, *values, limit))]

    def next_times(self) -> tuple[int | None, int | None]:
        due = [self.db.execute(sql).get for sql in (_NEXT_DUE, _NEXT_EXPIRY)]
        return min((d for d in due if d is not None), default=None), self.db.execute(_NEXT_LAPSE).get

    def claim_room(self, size: int) -> None:
        self._disk.claim(2 * size)  # in the log, then in the file

    def insert(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            return
        others: list[tuple[int, Task]] = []
        for _, neighbours in groupby(tasks, _shape):
            run = list(neighbours)
            seq, self._next_seq = self._next_seq, self._next_seq + len(run)
            if len(run) >= _MANY and _HAS_ARRAYS:
                self._insert_alike(seq, run)
            else:
                others.extend(enumerate(run, seq))
            row = run[0].row
            self.tally.add({(self._queues[row.queue_id][0], int(row.state)): len(run)})
        self._insert_in_blocks(
            _INSERT_TASK, _TASK_VALUES, [(seq, self._queues[row.queue_id][0], *_given(row)) for seq, (row, _) in others]
        )
        self._insert_in_blocks(_INSERT_BODY, _BODY_VALUES, [(seq, *_body_values(body)) for seq, (_, body) in others])

    def _insert_alike(self, seq: int, run: Sequence[Task]) -> None:
        """What they have in common is bound once."""
        row, body = run[0]
        no, shape = self._queues[row.queue_id][0], _row_shape(row)
        ids = apsw.carray(tuple([row.task_id for row, _ in run]))
        self.db.execute(_ALIKE_TASKS, (seq - 1, no, *shape[1:], ids))
        shared = dict(zip(_BODY, _body_values(body), strict=True))
        common = [shared[name] for name in _BODY_SHAPE]
        own = [(number, body.input, body.traceparent) for number, (_, body) in enumerate(run, seq)]
        for start in range(0, len(own), _BLOCK):
            block = own[start : start + _BLOCK]
            self.db.execute(_ALIKE_BODIES + _own_values(len(block)), (*common, *chain.from_iterable(block)))

    def _insert_in_blocks(self, insert: str, values: str, rows: Sequence[tuple[Any, ...]]) -> None:
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            self.db.execute(insert + ", ".join([values] * len(block)), tuple(chain.from_iterable(block)))

    def save(self, rows: Sequence[TaskRow]) -> None:
        """Writes the columns that changed, with one statement for all rows that changed alike.

        Thousands of small statements would hand the interpreter's lock to the event loop as often, and wait for it.
        """
        alike: dict[_Changes, list[int]] = {}
        moved: Counter[tuple[str, State, State]] = Counter()
        seen = self._seen
        for row in rows:
            seq = row.seq
            before = seen.get(seq) or self.by_seq([seq])[seq]
            seen[seq] = row
            moved[row.queue_id, before.state, row.state] += 1
            changes = _changes(before, row)
            if changes in alike:
                alike[changes].append(seq)
            else:
                alike[changes] = [seq]
        for changes, seqs in alike.items():
            self._update(changes, seqs)
        self._count_moves(moved)

    def _count_moves(self, moved: Mapping[tuple[str, State, State], int]) -> None:
        for (queue_id, before, after), count in moved.items():
            if before is not after:
                no = self._queues[queue_id][0]
                self.tally.add({(no, int(before)): -count, (no, int(after)): count})

    def _update(self, changes: _Changes, seqs: Sequence[int]) -> None:
        columns, values = changes
        if not columns:
            return
        setting = ", ".join([f"{column} = ?" for column in columns])
        if len(seqs) == 1:
            self.db.execute(f"UPDATE task SET {setting} WHERE seq = ?", (*values, seqs[0]))  # noqa: S608 - constants
            return
        sql = f"UPDATE task SET {setting} WHERE seq IN (SELECT value FROM json_each(?))"  # noqa: S608 - constants
        self.db.execute(sql, (*values, _encode(seqs).decode()))

    def save_result(self, seq: int, result: bytes, result_blob: str) -> None:
        self.db.execute("UPDATE body SET result = ?, result_blob = ? WHERE seq = ?", (result, result_blob, seq))

    def save_failure(self, seq: int, failure: Failure) -> None:
        self.db.execute("UPDATE body SET failure = ? WHERE seq = ?", (_encode(failure).decode(), seq))

    def delete(self, rows: Sequence[TaskRow]) -> None:
        seqs = _encode([row.seq for row in rows]).decode()
        self.db.execute("DELETE FROM task WHERE seq IN (SELECT value FROM json_each(?))", (seqs,))
        self.db.execute("DELETE FROM body WHERE seq IN (SELECT value FROM json_each(?))", (seqs,))
        gone = Counter((self._queues[row.queue_id][0], int(row.state)) for row in rows)
        self.tally.add({key: -count for key, count in gone.items()})
        for row in rows:
            self._seen.pop(row.seq, None)
            self._leased.pop(row.seq, None)

    def request(self, request_id: str) -> tuple[bytes, bytes] | None:
        for row in self.db.execute("SELECT fingerprint, reply FROM request WHERE request_id = ?", (request_id,)):
            return bytes(row[0]), bytes(row[1])
        return None

    def save_request(self, request_id: str, fingerprint: bytes, reply: bytes, forget_ms: int) -> None:
        self.db.execute("INSERT INTO request VALUES (?, ?, ?, ?)", (request_id, fingerprint, reply, forget_ms))

    def forget_requests(self, wall_ms: int, limit: int) -> int:
        sql = "DELETE FROM request WHERE request_id IN (SELECT request_id FROM request WHERE forget_ms <= ? LIMIT ?)"
        self.db.execute(sql, (wall_ms, limit))
        return self.db.changes()

    def _queue_and_no(self, queue_id: str) -> tuple[int, QueueRow] | None:
        return self._queues.get(queue_id)

    def _name(self, no: int) -> str:
        return self._names[no]

    def _row(self, row: Sequence[Any]) -> TaskRow:
        found = self._seen.get(row[0])
        if found is None:
            found = self._seen[row[0]] = _task_row(self._names[row[_QUEUE]], row)
        return found

    def _found(self, where: str, *values: int) -> list[TaskRow]:
        return [self._row(row) for row in self.db.execute(f"SELECT {_ROW} FROM task WHERE {where}", values)]  # noqa: S608 - constants


_NAMED = "SAVEPOINT step", "RELEASE step", "ROLLBACK TO step; RELEASE step"
_TRANSACTION = "", "", "ROLLBACK; BEGIN IMMEDIATE"
"""Statements to begin, to end and to undo: the only step of a transaction needs no savepoint in it."""


class _Savepoint:
    """Undoes, in the database and in what the store knows by heart, when left by an exception.

    An error of the database itself is left alone: SQLite may have ended the transaction, and the group is undone whole.
    """

    def __init__(self, store: _Store, *, whole: bool) -> None:
        self._store = store
        self._begin, self._end, self._take_back = _TRANSACTION if whole else _NAMED
        self._tally_mark, self._queue_mark = store.tally.mark(), store.queue_changes

    def __enter__(self) -> None:
        if self._begin:
            self._store.db.execute(self._begin)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            if self._end:
                self._store.db.execute(self._end)
        elif not issubclass(kind, apsw.Error):
            self._undo()

    def _undo(self) -> None:
        self._store.db.execute(self._take_back)
        self._store.tally.undo(self._tally_mark)
        self._store.forget_rows()
        if self._store.queue_changes != self._queue_mark:
            self._store.reload_queues()


_OLDEST_READY = """
WITH RECURSIVE level (priority) AS (
  SELECT max(priority) FROM task INDEXED BY task_ready WHERE queue = ?1 AND state = 2
  UNION ALL
  SELECT (SELECT max(task.priority) FROM task INDEXED BY task_ready
          WHERE queue = ?1 AND state = 2 AND task.priority < level.priority)
  FROM level WHERE level.priority IS NOT NULL
)
SELECT min((SELECT ready_ms FROM task INDEXED BY task_ready
            WHERE queue = ?2 AND state = 2 AND task.priority = level.priority ORDER BY seq LIMIT 1))
FROM level WHERE priority IS NOT NULL
"""
"""The oldest of each priority's first, found by hopping from priority to priority in the index."""

_COUNT = """
SELECT queue, 2, count(*) FROM task INDEXED BY task_ready WHERE state = 2 GROUP BY queue
UNION ALL
SELECT queue, 3, count(*) FROM task INDEXED BY task_leased WHERE state = 3 GROUP BY queue
UNION ALL
SELECT queue, state, count(*) FROM task INDEXED BY task_due WHERE state IN (1, 4) GROUP BY queue, state
UNION ALL
SELECT queue, state, count(*) FROM task INDEXED BY task_deletable WHERE delete_ms IS NOT NULL GROUP BY queue, state
"""
"""All tasks by queue and state; what is finished, and nothing else, has a time to be deleted."""

_NEXT_DUE = "SELECT min(ready_ms) FROM task INDEXED BY task_due WHERE state IN (1, 4)"
_NEXT_EXPIRY = (
    "SELECT min(expire_ms) FROM task INDEXED BY task_expiring WHERE expire_ms IS NOT NULL AND state IN (1, 2, 4)"
)
_NEXT_LAPSE = "SELECT min(lease_until) FROM task INDEXED BY task_leased WHERE state = 3"


def _migrate(db: apsw.Connection, path: Path) -> None:
    """Brings the schema up to date; refuses one that a newer server made."""
    version = int(db.pragma("user_version"))
    if version > SCHEMA_VERSION:
        raise StartError(
            f"cannot open {path}: its schema is version {version}, newer than {SCHEMA_VERSION}; use a newer server"
        )
    if version < 1:
        with db:
            db.execute(Path(__file__).with_name("schema.sql").read_text())
            db.pragma("user_version", 1)


def _is_full(error: Exception) -> bool:
    """The index beside the log is full by an error of its own."""
    return isinstance(error, apsw.FullError) or getattr(error, "extendedresult", 0) == apsw.SQLITE_IOERR_SHMSIZE


def _is_failed_sync(error: Exception) -> bool:
    syncs = (apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC, apsw.SQLITE_IOERR_TRUNCATE)
    return getattr(error, "extendedresult", 0) in syncs


def _translated(error: Exception) -> RetinueError:
    down = Unavailable(
        "cannot go on: the engine failed; see the server's log",
        reason=Reason.ENGINE_UNAVAILABLE,
        retry_ms=1_000,
    )
    down.__cause__ = error
    return down


def _queue(queue_id: str, state: int, settings: str, create_ms: int) -> QueueRow:
    return QueueRow(queue_id, QueueState(state), _decode_settings(settings), create_ms)


_Changes = tuple[tuple[str, ...], tuple[Any, ...]]
"""Columns and their new values."""


def _changes(before: TaskRow, after: TaskRow) -> _Changes:
    usual = _USUAL.get((before.state, after.state))
    if usual is not None and usual.rest(before) == usual.rest(after):
        return usual.columns, usual.values(after)
    both = list(zip(_COLUMNS, _fields(before), _fields(after), strict=True))
    changed = [(column, new) for column, old, new in both if new != old]
    return tuple(column for column, _ in changed), tuple(value for _, value in changed)


class _Usual:
    """The columns that a frequent transition changes; nothing is compared one by one where the rest is as it was."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.values = attrgetter(*columns)
        self.rest = attrgetter(*(name for name in TaskRow.__struct_fields__ if name not in columns))


_LEASE = ("lease_until", "attempt_until", "worker_id", "lease_request_id", "outcome")
_USUAL = {
    (State.READY, State.LEASED): _Usual(
        "state", "attempt", "lease_epoch", "lease_nonce", "lease_ms", "start_ms", *_LEASE
    ),
    (State.LEASED, State.SUCCEEDED): _Usual("state", "end_ms", "delete_ms", *_LEASE),
    (State.LEASED, State.LEASED): _Usual("lease_until", "attempt_until"),
}


_STATES = {int(state): state for state in State}
_OUTCOMES = {int(outcome): outcome for outcome in Outcome}


def _task_row(queue_id: str, row: Sequence[Any]) -> TaskRow:
    """From the columns in the order of _COLUMNS."""
    fields = list(row)
    fields[_QUEUE] = queue_id
    fields[_STATE], fields[_OUTCOME] = _STATES[fields[_STATE]], _OUTCOMES[fields[_OUTCOME]]
    fields[_CANCEL] = fields[_CANCEL] == 1
    return TaskRow(*fields[:_WIDTH])


@lru_cache(_BLOCK)
def _own_values(count: int) -> str:
    """So many rows of _ALIKE_BODIES."""
    first = len(_BODY_SHAPE) + 1
    return ", ".join([f"({_SHARED}, ?{at}, ?{at + 1}, ?{at + 2})" for at in range(first, first + 3 * count, 3)])


def _shape(task: Task) -> tuple[Any, ...]:
    """All but task_id, input and traceparent."""
    return _row_shape(task.row), _body_shape(task.body)


def _body_values(body: TaskBody) -> tuple[Any, ...]:
    return (
        body.input,
        body.task_type,
        _encode(body.labels).decode() if body.labels else "{}",
        _encode(body.retry).decode() if body.retry else None,
        body.traceparent,
        body.input_blob,
        body.result,
        body.result_blob,
        _encode(body.failure).decode() if body.failure else None,
    )


def _body(values: Sequence[Any]) -> TaskBody:
    given, task_type, labels, retry, traceparent, input_blob, result, result_blob, failure = values[:9]
    return TaskBody(
        given,
        task_type,
        {} if labels == "{}" else _decode_labels(labels),
        _decode_retry(retry) if retry else None,
        traceparent,
        input_blob,
        result,
        result_blob,
        _decode_failure(failure) if failure else None,
    )
