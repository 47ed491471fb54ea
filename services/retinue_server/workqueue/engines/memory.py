"""Memory: for tests, and for queues that may be lost with the process. Other engines are held against it.

Plain dictionaries; what a step writes is noted in a journal of undo actions until it is through. The ready tasks of a
queue are a heap with lazy deletion; the sweeps look through all tasks, which is fine for what belongs in memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from msgspec.structs import replace

from retinue_server.workqueue.engine import (
    WAITING,
    Capabilities,
    Durability,
    Failure,
    QueueRow,
    QueueTotals,
    State,
    Task,
    TaskBody,
    TaskFilter,
    TaskRow,
    Transaction,
    View,
)

T = TypeVar("T")


class MemoryEngine:
    """The store in this process; see the module."""

    capabilities = Capabilities("memory", Durability.MEMORY)

    def __init__(self) -> None:
        self._store = _Store()

    async def start(self) -> None:
        """Nothing to open."""

    async def stop(self) -> None:
        """Nothing to close."""

    async def write(self, step: Callable[[Transaction], T]) -> T:
        with self._store.savepoint():
            return step(self._store)

    async def read(self, query: Callable[[View], T]) -> T:
        return query(self._store)

    def room(self) -> None:
        """Not known: the process's memory has no reserve."""


class _Store:
    """See engine.Transaction."""

    def __init__(self) -> None:
        self._queues: dict[str, QueueRow] = {}
        self._rows: dict[int, TaskRow] = {}
        self._bodies: dict[int, TaskBody] = {}
        self._seqs: dict[str, int] = {}
        self._keys: dict[tuple[str, str], int] = {}
        self._requests: dict[str, tuple[bytes, bytes, int]] = {}
        self._heaps: dict[str, list[tuple[int, int]]] = {}
        self._next_seq = 1
        self._undo: list[Callable[[], object]] = []
        self._depth = 0

    @contextmanager
    def _undoing(self) -> Iterator[None]:
        mark = len(self._undo)
        self._depth += 1
        try:
            yield
        except BaseException:
            while len(self._undo) > mark:
                self._undo.pop()()
            raise
        finally:
            self._depth -= 1
            if not self._depth:
                self._undo.clear()

    def now(self) -> None:
        """The server's clocks count."""

    def savepoint(self) -> AbstractContextManager[None]:
        return self._undoing()

    # View

    def queue(self, queue_id: str) -> QueueRow | None:
        return self._queues.get(queue_id)

    def queues(self, after: str, limit: int) -> list[QueueRow]:
        return [self._queues[name] for name in sorted(self._queues) if name > after][:limit]

    def counts(self, queue_id: str) -> dict[State, int]:
        counts: dict[State, int] = {}
        for row in self._of(queue_id):
            counts[row.state] = counts.get(row.state, 0) + 1
        return counts

    def totals(self, queue_id: str) -> QueueTotals:
        rows = sorted(self._of(queue_id), key=_seq)
        first_in_line: dict[int, TaskRow] = {}
        for row in rows:
            if row.state == State.READY:
                first_in_line.setdefault(row.priority, row)
        oldest = min((row.ready_ms for row in first_in_line.values()), default=None)
        return QueueTotals(oldest, len({row.worker_id for row in rows if row.state == State.LEASED}))

    def by_id(self, task_ids: Sequence[str]) -> dict[str, TaskRow]:
        return {task_id: self._rows[self._seqs[task_id]] for task_id in task_ids if task_id in self._seqs}

    def bodies(self, seqs: Sequence[int]) -> dict[int, TaskBody]:
        return {seq: self._bodies[seq] for seq in seqs if seq in self._bodies}

    def page(self, wanted: TaskFilter, before_seq: int | None, limit: int) -> list[Task]:
        below = [r for r in self._rows.values() if before_seq is None or r.seq < before_seq]
        found = [r for r in sorted(below, key=_seq, reverse=True) if self._matches(r, wanted)]
        return [Task(r, replace(self._bodies[r.seq], input=b"", result=b"")) for r in found[:limit]]

    def referenced(self, blob_ids: Sequence[str]) -> set[str]:
        used = {blob for body in self._bodies.values() for blob in (body.input_blob, body.result_blob)}
        return used.intersection(blob_ids)

    # Transaction

    def save_queue(self, queue: QueueRow) -> None:
        self._set(self._queues, queue.queue_id, queue)

    def delete_queue(self, queue_id: str) -> None:
        self._drop(self._queues, queue_id)

    def by_seq(self, seqs: Sequence[int]) -> dict[int, TaskRow]:
        return {seq: self._rows[seq] for seq in seqs if seq in self._rows}

    def by_key(self, queue_id: str, keys: Sequence[str]) -> dict[str, TaskRow]:
        return {key: self._rows[self._keys[queue_id, key]] for key in keys if (queue_id, key) in self._keys}

    def by_lease_request(self, queue_id: str, request_id: str) -> list[Task]:
        rows = [r for r in self._of(queue_id) if r.state == State.LEASED and r.lease_request_id == request_id]
        return [Task(r, self._bodies[r.seq]) for r in sorted(rows, key=_order)]

    def ready(self, queue_id: str, limit: int) -> list[Task]:
        heap = self._heaps.get(queue_id, [])
        taken: list[tuple[int, int]] = []
        while heap and len(taken) < limit:
            entry = heapq.heappop(heap)
            row = self._rows.get(entry[1])
            if row is not None and row.state == State.READY and _order(row) == entry and entry not in taken[-1:]:
                taken.append(entry)
        for entry in taken:
            heapq.heappush(heap, entry)
        return [Task(self._rows[seq], self._bodies[seq]) for _, seq in taken]

    def due(self, wall_ms: int, limit: int) -> list[TaskRow]:
        states = (State.SCHEDULED, State.RETRYING)
        rows = [r for r in self._rows.values() if r.state in states and r.ready_ms <= wall_ms]
        return sorted(rows, key=lambda r: (r.ready_ms, r.seq))[:limit]

    def lapsed(self, lease_ms: int, limit: int) -> list[TaskRow]:
        rows = [r for r in self._rows.values() if r.lease_until is not None and r.lease_until <= lease_ms]
        return sorted(rows, key=lambda r: (r.lease_until or 0, r.seq))[:limit]

    def expired(self, wall_ms: int, limit: int) -> list[TaskRow]:
        rows = [r for r in self._expiring() if (r.expire_ms or 0) <= wall_ms]
        return sorted(rows, key=lambda r: (r.expire_ms or 0, r.seq))[:limit]

    def deletable(self, wall_ms: int, limit: int) -> list[TaskRow]:
        rows = [r for r in self._rows.values() if r.delete_ms is not None and r.delete_ms <= wall_ms]
        return sorted(rows, key=lambda r: (r.delete_ms or 0, r.seq))[:limit]

    def leased(self, after_seq: int, limit: int) -> list[TaskRow]:
        rows = [r for r in self._rows.values() if r.state == State.LEASED and r.seq > after_seq]
        return sorted(rows, key=_seq)[:limit]

    def matching(self, wanted: TaskFilter, after_seq: int, limit: int) -> list[TaskRow]:
        rows = [r for r in self._rows.values() if r.seq > after_seq and self._matches(r, wanted)]
        return sorted(rows, key=_seq)[:limit]

    def next_times(self) -> tuple[int | None, int | None]:
        rows = self._rows.values()
        due = [r.ready_ms for r in rows if r.state in (State.SCHEDULED, State.RETRYING)]
        due += [r.expire_ms for r in self._expiring() if r.expire_ms is not None]
        lapses = [r.lease_until for r in rows if r.lease_until is not None]
        return min(due, default=None), min(lapses, default=None)

    def claim_room(self, size: int) -> None:
        """There is room until there is no memory."""

    def insert(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            row = replace(task.row, seq=self._next_seq)
            self._next_seq += 1
            self._set(self._bodies, row.seq, task.body)
            self._set(self._seqs, row.task_id, row.seq)
            if row.idempotency_key:
                self._set(self._keys, (row.queue_id, row.idempotency_key), row.seq)
            self._put(row)

    def save(self, rows: Sequence[TaskRow]) -> None:
        for row in rows:
            self._put(row)

    def save_result(self, seq: int, result: bytes, result_blob: str) -> None:
        self._set(self._bodies, seq, replace(self._bodies[seq], result=result, result_blob=result_blob))

    def save_failure(self, seq: int, failure: Failure) -> None:
        self._set(self._bodies, seq, replace(self._bodies[seq], failure=failure))

    def delete(self, rows: Sequence[TaskRow]) -> None:
        for row in rows:
            self._drop(self._rows, row.seq)
            self._drop(self._bodies, row.seq)
            self._drop(self._seqs, row.task_id)
            if row.idempotency_key:
                self._drop(self._keys, (row.queue_id, row.idempotency_key))

    def request(self, request_id: str) -> tuple[bytes, bytes] | None:
        known = self._requests.get(request_id)
        return known[:2] if known else None

    def save_request(self, request_id: str, fingerprint: bytes, reply: bytes, forget_ms: int) -> None:
        self._set(self._requests, request_id, (fingerprint, reply, forget_ms))

    def forget_requests(self, wall_ms: int, limit: int) -> int:
        past = [name for name, (_, _, forget_ms) in self._requests.items() if forget_ms <= wall_ms][:limit]
        for name in past:
            self._drop(self._requests, name)
        return len(past)

    # Below

    def _put(self, row: TaskRow) -> None:
        self._set(self._rows, row.seq, row)
        if row.state == State.READY:
            heapq.heappush(self._heaps.setdefault(row.queue_id, []), _order(row))

    def _set(self, table: dict[K, V], key: K, value: V) -> None:
        if key in table:
            before = table[key]
            self._undo.append(lambda: table.__setitem__(key, before))
        else:
            self._undo.append(lambda: table.pop(key))
        table[key] = value

    def _drop(self, table: dict[K, V], key: K) -> None:
        before = table.pop(key)
        self._undo.append(lambda: table.__setitem__(key, before))

    def _of(self, queue_id: str) -> Iterable[TaskRow]:
        return (row for row in self._rows.values() if row.queue_id == queue_id)

    def _expiring(self) -> Iterable[TaskRow]:
        return (row for row in self._rows.values() if row.expire_ms is not None and row.state in WAITING)

    def _matches(self, row: TaskRow, wanted: TaskFilter) -> bool:
        body = self._bodies[row.seq]
        return (
            wanted.queue_id in ("", row.queue_id)
            and (not wanted.states or row.state in wanted.states)
            and wanted.task_type in ("", body.task_type)
            and wanted.parent_task_id in ("", row.parent_task_id)
            and (wanted.created_after_ms is None or row.create_ms >= wanted.created_after_ms)
            and (wanted.created_before_ms is None or row.create_ms < wanted.created_before_ms)
            and all(body.labels.get(key) == value for key, value in wanted.labels.items())
        )


K = TypeVar("K")
V = TypeVar("V")


def _seq(row: TaskRow) -> int:
    return row.seq


def _order(row: TaskRow) -> tuple[int, int]:
    return -row.priority, row.seq
