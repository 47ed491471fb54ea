"""The guarantees of the work queue as a model that is told a history, record by record, and says what broke them.

It knows the state machine by its own words, not by the core's rules, and only what the history says: calls, answers,
and the changes that became durable. Each violation begins with the claim that it breaks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from retinue_server.runtime.errors import Reason, RetinueError
from retinue_server.workqueue.core.requests import Complete, Enqueue, Extend, Fail, LeaseAsk, LeaseRef, Settlement
from retinue_server.workqueue.core.steps import Enqueued, Extended, Granted, Selected, Settled
from retinue_server.workqueue.engine import (
    FINISHED,
    REDRIVABLE,
    UNFINISHED,
    WAITING,
    Outcome,
    QueueRow,
    QueueState,
    State,
    Task,
    TaskBody,
    TaskRow,
)
from support.simulation.records import Answered, Arrived, Called, HungUp, Noted
from support.workqueue_simulation.history import (
    REFUSED,
    Booted,
    Changed,
    Ended,
    QueueChanged,
    Resumed,
    Serving,
    Stalled,
    difference,
)

LATE_S = 4.0
"""What time brings is overdue after this long: sweeps come every second."""
WOKEN_S = 2.0
"""Who waits for what is there is overdue after this long: three commits of the slowest disk."""

DURABLE = "G1 answered is durable"
EXPLAINED = "G2 every second execution is explained"
ONCE = "G3 at most one completion"
FOLLOW_UPS = "G3 follow-ups exactly once"
REPLAYS = "G4 the same is answered the same"
COUNTED = "G5 counted exactly"
ORDER = "G6 first come, first started"
LEGAL = "legal transitions only"
HONEST = "a live lease is not refused"
PROMPT = "nobody waits for what is there"
ENDS = "every task ends"
UNSEEN = "no error goes unseen"

_LEASING = ("lease", "stream")


class Violation(NamedTuple):
    """What was broken, and how."""

    claim: str
    at: float
    what: str


class _Lease:
    """What the history says of one lease."""

    def __init__(self, row: TaskRow) -> None:
        self.task_id, self.worker_id = row.task_id, row.worker_id
        self.outcome = Outcome.NONE
        """How it ended, once that was durable."""
        self.lasts: set[int] = set()
        """The milliseconds that it was said to last from then on, by durable changes."""


class Model:
    """See the module."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self.rows: dict[int, TaskRow] = {}
        self._queues: dict[str, QueueRow] = {}
        self._bodies: dict[int, TaskBody] = {}
        self._inserted: set[str] = set()
        self._deleted: set[str] = set()
        self._names: dict[bytes, str] = {}
        self._leases: dict[LeaseRef, _Lease] = {}
        self._timed_by: dict[int, str] = {}
        """Which server's clock a lease's end is read on."""
        self._cancelled: set[str] = set()
        """Tasks that were cancelled, or asked to stop, at some time."""
        self._children: dict[str, list[bytes]] = {}
        """Follow-ups that the current step has inserted, by parent."""
        self._step = 0
        self._asked: defaultdict[LeaseRef, list[Settlement]] = defaultdict(list)
        self._accepted: dict[str, LeaseRef] = {}
        self._replies: dict[str, list[Any]] = {}
        self._known: dict[tuple[int, LeaseRef, Outcome], Outcome] = {}
        """How a lease had ended when a call that would end it arrived."""
        self._gone: set[str] = set()
        """Workers of which the server heard that they don't wait for a lease any more."""
        self._lessees: dict[int, str] = {}
        """Who calls for a lease, by call."""
        self._zero: dict[str, int] = {}
        self._server = ""
        self._running_since: float | None = None
        self._jumped = self._refused = 0.0
        """When the wall clock was last set, and when the disk last refused a group: the sweep of it may be late."""
        self._ready_since: dict[int, float] = {}
        self._ended_since: dict[str, float] = {}
        self._open_since: dict[str, float] = {}
        self._waiting: dict[int, Arrived] = {}
        self._at = 0.0
        self._tell: dict[type, Callable[[Any], None]] = {
            Called: self._called,
            Arrived: self._arrived,
            Answered: self._answered,
            HungUp: self._hung_up,
            Changed: self._changed,
            QueueChanged: self._queue_changed,
            Booted: self._booted,
            Serving: self._serving,
            Ended: self._stops,
            Stalled: self._stops,
            Resumed: self._resumed,
            Noted: self._noted,
        }

        self._check: dict[str, Callable[[Answered], None]] = {
            "enqueue": self._enqueued,
            "lease": self._granted,
            "stream": self._granted,
            "settle": self._settled_all,
            "extend": self._extended_all,
            "cancel": self._cancel_answered,
            "wait": self._told,
        }

    def tell(self, record: Any) -> None:
        """Takes one record into account."""
        self._at = record.at
        if tell := self._tell.get(type(record)):
            tell(record)

    def finish(self, *, ended: bool) -> None:
        """The history is over; `ended` says that faults had stopped for long enough for all tasks to end."""
        self._overdue(list(self._ready_since), list(self._waiting.values()))
        self._overdue_waits(list(self._waiting.values()))
        left = [row for row in self.rows.values() if row.state in UNFINISHED]
        if not ended:
            self.broken(ENDS, f"{len(left)} did not: {left[:3]}")

    def compare(self, stored: dict[int, TaskRow]) -> None:
        """What is stored must be what the history says."""
        if stored != self.rows:
            self.broken(COUNTED, f"stored are {stored}, told were {self.rows}")

    def broken(self, claim: str, what: str) -> None:
        """Notes a violation."""
        self.violations.append(Violation(claim, self._at, what))

    # Servers

    def _booted(self, record: Booted) -> None:
        self._server, self._zero[record.node] = record.node, record.zero_ms

    def _serving(self, record: Serving) -> None:
        self._running_since = record.at
        for row in self.rows.values():
            if row.state == State.LEASED and self._timed_by[row.seq] != record.node:
                self.broken(EXPLAINED, f"{row.task_id}: its lease was not recovered by {record.node}")

    def _stops(self, record: Ended | Stalled) -> None:
        waiting = list(self._waiting.values())
        self._overdue(list(self._ready_since), waiting)
        self._overdue_waits(waiting)
        self._running_since = None
        if isinstance(record, Ended):
            self._waiting.clear()

    def _resumed(self, record: Resumed) -> None:
        self._running_since = record.at

    def _noted(self, record: Noted) -> None:
        if record.node == "clock":
            self._jumped = record.at
        elif record.what == REFUSED:
            self._refused = record.at

    # Queues

    def _queue_changed(self, record: QueueChanged) -> None:
        queue = record.queue
        if queue.state == QueueState.PAUSED:
            self._overdue([seq for seq in self._ready_since if self.rows[seq].queue_id == queue.queue_id])
        else:
            was = self._queues.get(queue.queue_id)
            if was is None or was.state == QueueState.PAUSED:
                self._open_since[queue.queue_id] = record.at
        self._queues[queue.queue_id] = queue

    # Changes of tasks

    def _changed(self, record: Changed) -> None:
        if record.step != self._step:
            self._step_over()
            self._step = record.step
        row = record.before or record.after
        assert row is not None
        if record.before != self.rows.get(row.seq):
            self.broken(LEGAL, f"{row.task_id} was not as the step found it: {record}")
        if record.after is None:
            self._deletion(record, row)
        elif record.before is None:
            self._insertion(record, record.after)
        else:
            self._move(record, record.before, record.after)

    def _step_over(self) -> None:
        for parent, names in self._children.items():
            self.broken(FOLLOW_UPS, f"{names} came without a completion of {parent}")
        self._children.clear()

    def _insertion(self, record: Changed, row: TaskRow) -> None:
        body, queue = record.body, self._queues[row.queue_id]
        assert body is not None
        fresh = row.attempt, row.lease_expirations, row.lease_epoch, row.outcome
        expected = State.READY if row.ready_ms <= record.now.wall_ms else State.SCHEDULED
        if fresh != (0, 0, 0, Outcome.NONE) or row.state != expected:
            self.broken(LEGAL, f"a new task is {row}")
        if row.task_id in self._inserted:
            self.broken(REPLAYS, f"{row.task_id} was enqueued twice")
        if body.input in self._names and not row.idempotency_key:
            self.broken(REPLAYS, f"{body.input!r} was enqueued as {self._names[body.input]} and as {row.task_id}")
        self._insertion_admitted(row, queue)
        if row.parent_task_id:
            self._children.setdefault(row.parent_task_id, []).append(body.input)
        self._names[body.input] = row.task_id
        self._inserted.add(row.task_id)
        self._bodies[row.seq] = body
        self._put(row)

    def _insertion_admitted(self, row: TaskRow, queue: QueueRow) -> None:
        of_queue = [other for other in self.rows.values() if other.queue_id == row.queue_id]
        if row.idempotency_key and any(other.idempotency_key == row.idempotency_key for other in of_queue):
            self.broken(REPLAYS, f"{row.task_id}: key {row.idempotency_key} was there")
        unfinished = sum(other.state in UNFINISHED for other in of_queue)
        if queue.settings.max_tasks and unfinished >= queue.settings.max_tasks:
            self.broken(COUNTED, f"{row.task_id} is one more than {queue.queue_id} takes")
        if queue.state == QueueState.DRAINING and not row.parent_task_id:
            self.broken(LEGAL, f"{row.task_id} came to {queue.queue_id} while it drained")

    def _deletion(self, record: Changed, row: TaskRow) -> None:
        if row.state == State.LEASED:
            self.broken(LEGAL, f"deleted while leased: {row}")
        self._ready_over(row)
        self._deleted.add(row.task_id)
        del self.rows[row.seq]

    def _move(self, record: Changed, before: TaskRow, after: TaskRow) -> None:
        if before == after and before.state != State.LEASED:
            return  # written again as it was
        for why in self._wrong(record, before, after):
            self.broken(why[0], f"{why[1]}: {difference(before, after)}")
        if before.state == State.LEASED and after.state != State.LEASED:
            if (lease := self._leases.get(LeaseRef.of(before))) is not None:
                lease.outcome = after.outcome
            if after.state == State.SUCCEEDED:
                self._succeeded(before)
        if after.state == State.LEASED:
            self._leased(record, after)
        if after.state == State.CANCELLED or after.cancel_requested:
            self._cancelled.add(after.task_id)
        self._put(after)

    def _put(self, row: TaskRow) -> None:
        self.rows[row.seq] = row
        if row.state == State.READY:
            self._ready_since.setdefault(row.seq, self._at)
        else:
            self._ready_over(row)
        if row.state in FINISHED:
            self._ended_since.setdefault(row.task_id, self._at)
        else:
            self._ended_since.pop(row.task_id, None)

    def _leased(self, record: Changed, row: TaskRow) -> None:
        lease = self._leases.setdefault(LeaseRef.of(row), _Lease(row))
        lease.lasts.add((row.lease_until or 0) - record.now.lease_ms)
        self._timed_by[row.seq] = record.node

    def _succeeded(self, row: TaskRow) -> None:
        ref = LeaseRef.of(row)
        asked = [item for item in self._asked[ref] if isinstance(item, Complete)]
        wanted = [sorted(task.body.input for task in item.follow_ups) for item in asked]
        got = sorted(self._children.pop(row.task_id, []))
        if got not in wanted:
            self.broken(FOLLOW_UPS, f"{row.task_id} was completed with {wanted} and brought {got}")

    # What a change may be

    def _wrong(self, record: Changed, before: TaskRow, after: TaskRow) -> Iterator[tuple[str, str]]:
        fixed = ("seq", "task_id", "queue_id", "create_ms", "attempt_ms", "idempotency_key", "parent_task_id")
        if any(getattr(before, name) != getattr(after, name) for name in fixed):
            yield LEGAL, "what is fixed changed"
        if before.state == State.LEASED:
            yield from self._wrong_while_leased(record, before, after)
        elif after.state == State.LEASED:
            yield from self._wrong_lease(record, before, after)
        elif before.state in WAITING:
            yield from self._wrong_while_waiting(record, before, after)
        else:
            yield from self._wrong_redrive(before, after)

    def _wrong_lease(self, record: Changed, before: TaskRow, after: TaskRow) -> Iterator[tuple[str, str]]:
        now, queue = record.now, self._queues[before.queue_id]
        if before.state != State.READY or queue.state == QueueState.PAUSED:
            yield LEGAL, "leased, and it was not to be had"
        if before.expire_ms is not None and before.expire_ms <= now.wall_ms:
            yield LEGAL, "leased after its expiry"
        if _counters(before, after) != (1, 0, 1):
            yield COUNTED, "a lease counts one attempt and one epoch"
        attempt_ms = queue.settings.attempt_ms if before.attempt_ms is None else before.attempt_ms
        ends = now.lease_ms + after.lease_ms
        if after.lease_until != (min(ends, now.lease_ms + attempt_ms) if attempt_ms else ends):
            yield LEGAL, "a lease ends when its term or its attempt is over"
        if any(_order(row) < _order(before) for row in self._ready_in(before.queue_id) if row.seq != before.seq):
            yield ORDER, "another was before it"
        if after.lease_request_id and self._is_replay(record, after):
            yield REPLAYS, "a request that has live leases was given more"

    def _is_replay(self, record: Changed, after: TaskRow) -> bool:
        return any(
            row.state == State.LEASED
            and row.queue_id == after.queue_id
            and (row.lease_request_id, row.worker_id) == (after.lease_request_id, after.worker_id)
            and row.lease_nonce != after.lease_nonce
            and (row.lease_until or 0) > record.now.lease_ms
            for row in self.rows.values()
        )

    def _wrong_while_leased(self, record: Changed, before: TaskRow, after: TaskRow) -> Iterator[tuple[str, str]]:
        if after.state == State.LEASED:
            yield from self._wrong_extension(record, before, after)
            return
        live = (before.lease_until or 0) > record.now.lease_ms
        if after.outcome == Outcome.LAPSED:
            if live or self._timed_by[before.seq] != record.node:
                yield EXPLAINED, "its lease was not over"
        elif not live:
            yield ONCE, "its lease was over"
        elif not self._was_asked(before, after.outcome):
            yield EXPLAINED, "nobody asked for it"
        if self._lapsed_late(record, before):
            yield PROMPT, "its lease was over long ago"
        wanted = self._after(record, before, after)
        if (after.state, *_counters(before, after)) not in wanted:
            yield COUNTED, f"not one of {wanted}"

    def _lapsed_late(self, record: Changed, before: TaskRow) -> bool:
        if self._running_since is None or self._timed_by[before.seq] != record.node:
            return False
        over = ((before.lease_until or 0) - self._zero[record.node]) / 1000
        return record.at - max(over, self._running_since, self._refused) > LATE_S

    def _was_asked(self, before: TaskRow, outcome: Outcome) -> bool:
        if any(item.outcome == outcome for item in self._asked[LeaseRef.of(before)]):
            return True
        return outcome == Outcome.RELEASED and before.worker_id in self._gone

    def _after(self, record: Changed, before: TaskRow, after: TaskRow) -> set[tuple[State, int, int, int]]:
        """States and changes of attempt, expirations and epoch that the end of a lease may bring."""
        if after.outcome == Outcome.COMPLETED:
            return {(State.SUCCEEDED, 0, 0, 0)}
        if before.cancel_requested:
            return {(State.CANCELLED, 0, 0, 0)}
        if after.outcome == Outcome.RELEASED:
            return {(State.READY, -1, 0, 0), (State.SCHEDULED, -1, 0, 0)}
        deadline = before.attempt_until is not None and before.attempt_until <= record.now.lease_ms
        if after.outcome == Outcome.LAPSED and not deadline:
            most = self._queues[before.queue_id].settings.max_lease_expirations
            dead = before.lease_expirations + 1 >= most
            return {(State.DEAD if dead else State.READY, -1, 1, 0)}
        final = any(isinstance(item, Fail) and item.final for item in self._asked[LeaseRef.of(before)])
        dead = before.attempt >= self._max_attempts(before) or (final and after.outcome == Outcome.FAILED)
        return {(State.DEAD if dead else State.RETRYING, 0, 0, 0)}

    def _max_attempts(self, row: TaskRow) -> int:
        own = self._bodies[row.seq].retry
        if own is not None and own.max_attempts is not None:
            return own.max_attempts
        return self._queues[row.queue_id].settings.retry.max_attempts

    def _wrong_extension(self, record: Changed, before: TaskRow, after: TaskRow) -> Iterator[tuple[str, str]]:
        if _counters(before, after) != (0, 0, 0) or LeaseRef.of(before) != LeaseRef.of(after):
            yield COUNTED, "leased anew while it was leased"
        if after.attempt_until is not None and (after.lease_until or 0) > after.attempt_until:
            yield LEGAL, "a lease that outlasts its attempt"
        if self._timed_by[before.seq] != record.node:
            ends = record.now.lease_ms + after.lease_ms
            if after.lease_until != (ends if after.attempt_until is None else min(ends, after.attempt_until)):
                yield EXPLAINED, "recovered for another time than a full term"
        elif after.lease_until != before.lease_until and (before.lease_until or 0) <= record.now.lease_ms:
            yield EXPLAINED, "extended after its end"

    def _wrong_while_waiting(self, record: Changed, before: TaskRow, after: TaskRow) -> Iterator[tuple[str, str]]:
        wall_ms = record.now.wall_ms
        if _counters(before, after) != (0, 0, 0):
            yield COUNTED, "what waits is not counted"
        if after.state == State.EXPIRED:
            if before.expire_ms is None or before.expire_ms > wall_ms:
                yield LEGAL, "expired before its time"
        elif after.state == State.READY:
            if after.ready_ms > wall_ms and (before.state, before.ready_ms) != (State.READY, after.ready_ms):
                yield LEGAL, "ready before its time"
            elif before.state != State.READY and self._due_late(record, after):
                yield PROMPT, "due long ago"
        elif after.state not in (State.CANCELLED, State.SCHEDULED, before.state):
            yield LEGAL, "no such transition"

    def _due_late(self, record: Changed, after: TaskRow) -> bool:
        if self._running_since is None or record.now.wall_ms - after.ready_ms <= LATE_S * 1000:
            return False
        return record.at - max(self._running_since, self._jumped, self._refused) > LATE_S

    @staticmethod
    def _wrong_redrive(before: TaskRow, after: TaskRow) -> Iterator[tuple[str, str]]:
        if before.state not in REDRIVABLE or after.state != State.READY or after.cancel_requested:
            yield LEGAL, "no such transition"
        if (after.attempt, after.lease_expirations, after.lease_epoch) != (0, 0, before.lease_epoch):
            yield COUNTED, "a redriven task starts anew under the next epoch"

    def _ready_in(self, queue_id: str) -> list[TaskRow]:
        return [self.rows[seq] for seq in self._ready_since if self.rows[seq].queue_id == queue_id]

    # Calls

    def _called(self, record: Called) -> None:
        if record.verb == "settle":
            for item in record.args[0]:
                self._asked[item.lease].append(item)
        elif record.verb in _LEASING:
            self._lessees[record.call] = record.args[0].worker_id

    def _arrived(self, record: Arrived) -> None:
        if record.verb in (*_LEASING, "wait"):
            self._waiting[record.call] = record
        elif record.verb == "settle":
            for item in record.args[0]:
                if lease := self._leases.get(item.lease):
                    self._known[record.call, item.lease, item.outcome] = lease.outcome

    def _hung_up(self, record: HungUp) -> None:
        if record.call in self._lessees:
            self._gone.add(self._lessees[record.call])
        waiting = self._waiting.pop(record.call, None)
        if waiting is not None:
            self._wait_is_over(waiting)

    def _answered(self, record: Answered) -> None:
        waiting = self._waiting.pop(record.call, None)
        if waiting is not None:
            self._wait_is_over(waiting)
        if isinstance(record.answer, RetinueError):
            return
        if check := self._check.get(record.verb):
            check(record)

    def _enqueued(self, record: Answered) -> None:
        asked: Enqueue = record.args[0]
        answer: list[Enqueued] = record.answer
        for result in answer:
            if result.error is None and result.task_id not in self._inserted:
                self.broken(DURABLE, f"{result.task_id} was acknowledged and is not on disk")
        plain = [(r.task_id, r.existing, r.error and r.error.reason) for r in answer]
        if asked.request_id and self._replies.setdefault(asked.request_id, plain) != plain:
            self.broken(REPLAYS, f"{asked.request_id} got {plain} after {self._replies[asked.request_id]}")

    def _granted(self, record: Answered) -> None:
        asked: LeaseAsk = record.args[0]
        answer: list[Granted] = record.answer
        for granted in answer:
            ref = LeaseRef.of(granted.task.row)
            lease = self._leases.get(ref)
            if lease is None:
                self.broken(DURABLE, f"{ref} was granted and is not on disk")
            elif lease.worker_id != asked.worker_id:
                self.broken(EXPLAINED, f"{ref} is of {lease.worker_id} and was given to {asked.worker_id}")
            elif granted.lease_left_ms > max(lease.lasts):
                self.broken(EXPLAINED, f"{ref} lasts {lease.lasts} ms and {granted.lease_left_ms} were promised")

    def _settled_all(self, record: Answered) -> None:
        for item, settled in zip(record.args[0], record.answer, strict=True):
            self._settled(record, item, settled)

    def _settled(self, record: Answered, item: Settlement, settled: Settled) -> None:
        lease = self._leases.get(item.lease)
        if settled.error is None:
            self._accept(item, lease)
        elif settled.error.reason == Reason.LEASE_LOST:
            row = self.rows.get(item.lease.seq)
            now = int(record.at * 1000) + self._zero[record.node]
            if row and LeaseRef.of(row) == item.lease and row.state == State.LEASED and (row.lease_until or 0) > now:
                self.broken(HONEST, f"{item.lease} was refused: {row}")
        self._replayed(record, item, settled)

    def _accept(self, item: Settlement, lease: _Lease | None) -> None:
        if lease is None or lease.outcome == Outcome.NONE:
            self.broken(DURABLE, f"{item.outcome.name} of {item.lease} was accepted and is not on disk")
        elif lease.outcome != item.outcome:
            self.broken(ONCE, f"{item.outcome.name} of {item.lease} was accepted, and it ended {lease.outcome.name}")
        if not isinstance(item, Complete) or lease is None:
            return
        if (first := self._accepted.setdefault(lease.task_id, item.lease)) != item.lease:
            self.broken(ONCE, f"{item.lease} of {lease.task_id} was accepted after {first}")

    def _replayed(self, record: Answered, item: Settlement, settled: Settled) -> None:
        """A lease that had ended before the call came, and is still the task's latest, tells how."""
        ended = self._known.pop((record.call, item.lease, item.outcome), Outcome.NONE)
        row = self.rows.get(item.lease.seq)
        if ended in (Outcome.NONE, Outcome.LAPSED) or row is None or LeaseRef.of(row) != item.lease:
            return
        reason = settled.error and settled.error.reason
        if reason != (None if ended == item.outcome else Reason.ALREADY_FINALIZED):
            self.broken(REPLAYS, f"{item.outcome.name} of {item.lease}, ended {ended.name}, was answered {reason}")

    def _extended_all(self, record: Answered) -> None:
        for item, extended in zip(record.args[0], record.answer, strict=True):
            self._extended(record, item, extended)

    def _extended(self, record: Answered, item: Extend, extended: Extended) -> None:
        lease = self._leases.get(item.lease)
        if extended.error is None:
            if lease is None or extended.lease_ms not in lease.lasts:
                self.broken(DURABLE, f"{item.lease} was extended by {extended.lease_ms} ms, which is not on disk")
            return
        row = self.rows.get(item.lease.seq)
        now = int(record.at * 1000) + self._zero[record.node]
        if row and LeaseRef.of(row) == item.lease and row.state == State.LEASED and (row.lease_until or 0) > now:
            self.broken(HONEST, f"{item.lease} was not extended: {row}")

    def _cancel_answered(self, record: Answered) -> None:
        answer: Selected = record.answer
        for task_id in record.args[0].task_ids:
            if task_id not in answer.errors and task_id not in self._cancelled:
                self.broken(DURABLE, f"{task_id} was cancelled, and is not on disk")

    def _told(self, record: Answered) -> None:
        task: Task = record.answer
        seen = self.rows.get(task.row.seq)
        if seen is None and task.row.task_id not in self._inserted:
            self.broken(DURABLE, f"{task.row.task_id} was shown and is not on disk")

    # Waiting

    def _ready_over(self, row: TaskRow) -> None:
        if row.seq in self._ready_since:
            self._overdue([row.seq])
            del self._ready_since[row.seq]

    def _wait_is_over(self, waiting: Arrived) -> None:
        if waiting.verb in _LEASING:
            self._overdue(list(self._ready_since), [waiting])
        else:
            self._overdue_waits([waiting])

    def _overdue(self, ready: list[int], waiting: list[Arrived] | None = None) -> None:
        """Ready tasks that somebody has been waiting for, and was not given, for too long."""
        if self._running_since is None:
            return
        for call in list(self._waiting.values()) if waiting is None else waiting:
            if call.verb not in _LEASING:
                continue
            queue_id = call.args[0].queue_id
            queue = self._queues.get(queue_id)
            for seq in ready if queue and queue.state != QueueState.PAUSED else ():
                if self.rows[seq].queue_id != queue_id:
                    continue
                since = max(self._ready_since[seq], call.at, self._running_since, self._open_since[queue_id])
                if self._at - since > WOKEN_S:
                    self.broken(PROMPT, f"{self.rows[seq].task_id} was ready, call {call.call} waited: since {since}")

    def _overdue_waits(self, waiting: list[Arrived]) -> None:
        for call in waiting:
            if call.verb != "wait" or self._running_since is None:
                continue
            ended = self._ended_since.get(call.args[0])
            if ended is not None and self._at - max(ended, call.at, self._running_since) > WOKEN_S:
                self.broken(PROMPT, f"{call.args[0]} has ended, call {call.call} waited on: since {ended}")


def _counters(before: TaskRow, after: TaskRow) -> tuple[int, int, int]:
    return (
        after.attempt - before.attempt,
        after.lease_expirations - before.lease_expirations,
        after.lease_epoch - before.lease_epoch,
    )


def _order(row: TaskRow) -> tuple[int, int]:
    return -row.priority, row.seq
