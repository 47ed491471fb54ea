"""The port of the work queue: what an engine stores, finds and makes durable. It decides nothing.

Every change of a task is a *step*: a function of `core/steps.py` over a `Transaction`, run by `Engine.write` as one
atomic unit. The rules so stand once for all engines, and an engine is judged by one exercise (tests/engines).

Units: wall times (`…_ms` that name an instant) are milliseconds since the Unix epoch; lease times (`lease_until`,
`attempt_until`) are milliseconds of the lease clock, whose zero means nothing; durations are milliseconds.
"""
# Annotations are no text here, as in runtime/config.py: stores decode some of these records.

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeVar

from msgspec import Struct

T = TypeVar("T")


class State(IntEnum):
    """Where a task stands; numbered as TaskState in the contract."""

    SCHEDULED = 1
    READY = 2
    LEASED = 3
    RETRYING = 4
    SUCCEEDED = 5
    DEAD = 6
    CANCELLED = 7
    EXPIRED = 8


WAITING = (State.SCHEDULED, State.READY, State.RETRYING)
UNFINISHED = (*WAITING, State.LEASED)
FINISHED = (State.SUCCEEDED, State.DEAD, State.CANCELLED, State.EXPIRED)
REDRIVABLE = (State.DEAD, State.CANCELLED, State.EXPIRED)


class Outcome(IntEnum):
    """How a task's last lease ended; it outlives the lease so that a repeated settlement finds its answer."""

    NONE = 0
    COMPLETED = 1
    FAILED = 2
    RELEASED = 3
    LAPSED = 4


class QueueState(IntEnum):
    """Whether a queue gives and takes; numbered as in the contract."""

    ACTIVE = 1
    PAUSED = 2
    DRAINING = 3


class Durability(IntEnum):
    """What an acknowledged change has survived; numbered as in the contract."""

    MEMORY = 1
    OS = 2
    DISK = 3


class Capabilities(Struct, frozen=True):
    """What an engine declares; what it can't do is answered UNIMPLEMENTED, never ignored."""

    engine: str
    durability: Durability
    many_coordinators: bool = False
    own_clock: bool = False
    """Transactions tell the time, by a clock that outlives coordinators: their leases need no recovery at a start."""


class Instant(Struct, frozen=True):
    """Now, on both clocks."""

    wall_ms: int
    lease_ms: int


class RetryPolicy(Struct, frozen=True):
    """How a failed task is retried."""

    max_attempts: int = 5
    initial_backoff_ms: int = 1_000
    max_backoff_ms: int = 300_000
    multiplier: float = 2.0


class RetryOverrides(Struct, frozen=True, omit_defaults=True):
    """What a task says itself of its retries; None = the queue's."""

    max_attempts: int | None = None
    initial_backoff_ms: int | None = None
    max_backoff_ms: int | None = None
    multiplier: float | None = None


class QueueSettings(Struct, frozen=True):
    """The rules of one queue; the defaults are the contract's."""

    lease_ms: int = 30_000
    attempt_ms: int = 0
    retry: RetryPolicy = RetryPolicy()
    max_lease_expirations: int = 3
    retention_ms: int = 24 * 3_600_000
    dead_retention_ms: int = 14 * 24 * 3_600_000
    max_tasks: int = 0


class QueueRow(Struct, frozen=True):
    """A queue as stored."""

    queue_id: str
    state: QueueState
    settings: QueueSettings
    create_ms: int


class Failure(Struct, frozen=True):
    """Why an attempt failed."""

    reason: str
    message: str
    record_ms: int = 0
    attempt: int = 0


class TaskRow(Struct, frozen=True, gc=False):
    """The narrow, hot part of a task: all that rules decide on."""

    seq: int
    """Given by the engine in the order of insertion; never told to callers but inside tokens."""
    task_id: str
    queue_id: str
    state: State
    priority: int
    create_ms: int
    ready_ms: int
    """When it becomes (SCHEDULED, RETRYING) or became ready."""
    expire_ms: int | None = None
    attempt_ms: int | None = None
    """The task's own limit for an attempt; None = the queue's."""
    attempt: int = 0
    lease_expirations: int = 0
    lease_epoch: int = 0
    lease_nonce: int = 0
    lease_ms: int = 0
    lease_until: int | None = None
    """While LEASED: when the lease or the attempt ends, whichever comes first (lease clock)."""
    attempt_until: int | None = None
    worker_id: str = ""
    lease_request_id: str = ""
    outcome: Outcome = Outcome.NONE
    cancel_requested: bool = False
    start_ms: int | None = None
    end_ms: int | None = None
    delete_ms: int | None = None
    idempotency_key: str = ""
    parent_task_id: str = ""


class TaskBody(Struct, frozen=True):
    """The wide part of a task: what it carries. `input` and `result` are serialised Payloads."""

    input: bytes = b""
    task_type: str = ""
    labels: Mapping[str, str] = {}
    retry: RetryOverrides | None = None
    traceparent: str = ""
    input_blob: str = ""
    result: bytes = b""
    result_blob: str = ""
    failure: Failure | None = None


class Task(NamedTuple):
    """A task, whole."""

    row: TaskRow
    body: TaskBody


class TaskFilter(Struct, frozen=True):
    """Picks tasks; every field that is set must match."""

    queue_id: str = ""
    states: tuple[State, ...] = ()
    labels: Mapping[str, str] = {}
    task_type: str = ""
    created_after_ms: int | None = None
    created_before_ms: int | None = None
    parent_task_id: str = ""


class QueueTotals(Struct, frozen=True):
    """What statistics tell of a queue beside its counts."""

    oldest_ready_ms: int | None
    workers: int


class Room(Struct, frozen=True):
    """What is left for new data, as it was looked at last."""

    free_bytes: int
    admitting: bool
    """False while new data is refused, so that what is there can be worked off."""


class View(Protocol):
    """Reads one consistent snapshot that includes every change acknowledged before it was opened."""

    def queue(self, queue_id: str) -> QueueRow | None:
        """The queue, or None."""

    def queues(self, after: str, limit: int) -> list[QueueRow]:
        """Queues whose id is greater than `after`, by id."""

    def counts(self, queue_id: str) -> dict[State, int]:
        """Tasks by state; states without tasks may be absent."""

    def totals(self, queue_id: str) -> QueueTotals:
        """The earliest `ready_ms` of those that are first in line in their priority; how many workers have leases."""

    def by_id(self, task_ids: Sequence[str]) -> dict[str, TaskRow]:
        """The tasks that exist, by task_id. In a transaction they are locked until its end."""

    def bodies(self, seqs: Sequence[int]) -> dict[int, TaskBody]:
        """The bodies that exist, by seq."""

    def page(self, wanted: TaskFilter, before_seq: int | None, limit: int) -> list[Task]:
        """Matching tasks below `before_seq`, newest first, bodies without input and result."""

    def referenced(self, blob_ids: Sequence[str]) -> set[str]:
        """Those of the blobs that a task refers to."""


class Transaction(View, Protocol):
    """What a step may do. Reads see the step's own writes; rows read are locked until it ends."""

    def now(self) -> Instant | None:
        """Now, by the clock of an engine that has its own (the same throughout the transaction); else None."""

    def savepoint(self) -> AbstractContextManager[None]:
        """Undoes, when left by an exception, all that was written inside it."""

    def save_queue(self, queue: QueueRow) -> None:
        """Inserts or replaces."""

    def delete_queue(self, queue_id: str) -> None:
        """Removes a queue that has no tasks."""

    def by_seq(self, seqs: Sequence[int]) -> dict[int, TaskRow]:
        """The tasks that exist, by seq."""

    def by_key(self, queue_id: str, keys: Sequence[str]) -> dict[str, TaskRow]:
        """The queue's tasks with these idempotency keys, by key."""

    def by_lease_request(self, queue_id: str, request_id: str) -> list[Task]:
        """LEASED tasks that were leased under this request_id, in the order of leasing."""

    def ready(self, queue_id: str, limit: int) -> list[Task]:
        """READY tasks, higher priority first, then lower seq; ones that another transaction has are passed over."""

    def due(self, wall_ms: int, limit: int) -> list[TaskRow]:
        """SCHEDULED and RETRYING tasks with `ready_ms <= wall_ms`, earliest first."""

    def lapsed(self, lease_ms: int, limit: int) -> list[TaskRow]:
        """LEASED tasks with `lease_until <= lease_ms`, earliest first."""

    def expired(self, wall_ms: int, limit: int) -> list[TaskRow]:
        """Waiting tasks with `expire_ms <= wall_ms`, earliest first."""

    def deletable(self, wall_ms: int, limit: int) -> list[TaskRow]:
        """Finished tasks with `delete_ms <= wall_ms`, earliest first."""

    def leased(self, after_seq: int, limit: int) -> list[TaskRow]:
        """LEASED tasks above `after_seq`, by seq."""

    def matching(self, wanted: TaskFilter, after_seq: int, limit: int) -> list[TaskRow]:
        """Matching tasks above `after_seq`, oldest first."""

    def next_times(self) -> tuple[int | None, int | None]:
        """When `due` or `expired` (wall clock) and `lapsed` (lease clock) will next have something."""

    def claim_room(self, size: int) -> None:
        """Asked before new data of about `size` bytes comes in, but not before what lets work end.

        Raises ResourceExhausted (DISK_FULL) when the rest of the disk is kept for that.
        """

    def insert(self, tasks: Sequence[Task]) -> None:
        """Stores new tasks and gives each the next seq (the rows' own is ignored)."""

    def save(self, rows: Sequence[TaskRow]) -> None:
        """Stores the rows of tasks that exist."""

    def save_result(self, seq: int, result: bytes, result_blob: str) -> None:
        """Stores what an attempt gave."""

    def save_failure(self, seq: int, failure: Failure) -> None:
        """Stores why an attempt failed."""

    def delete(self, rows: Sequence[TaskRow]) -> None:
        """Removes tasks and their bodies."""

    def request(self, request_id: str) -> tuple[bytes, bytes] | None:
        """(fingerprint, reply) of a remembered request."""

    def save_request(self, request_id: str, fingerprint: bytes, reply: bytes, forget_ms: int) -> None:
        """Remembers a request until `forget_ms` (wall clock)."""

    def forget_requests(self, wall_ms: int, limit: int) -> int:
        """Forgets requests whose time has come; how many."""


class Engine(Protocol):
    """Runs steps. Raises Unavailable while it can't be reached, ResourceExhausted (DISK_FULL) when it can't grow."""

    capabilities: Capabilities

    async def start(self) -> None:
        """Opens or creates the store and brings its schema up to date; raises what keeps it from serving."""

    async def stop(self) -> None:
        """Closes it; every acknowledged write is durable."""

    def write(self, step: Callable[[Transaction], T]) -> Awaitable[T]:
        """Runs the step atomically and returns its value once it is durable; what the step raises undoes it alone.

        Steps take effect one after the other, in the order of the calls. Once begun a step is not cancelled: a
        cancelled caller does not learn its value, but it takes effect.
        """

    async def read(self, query: Callable[[View], T]) -> T:
        """Runs a query that changes nothing, beside the writes."""

    def room(self) -> Room | None:
        """What is left for new tasks, as of the last second or so; None if the engine does not know."""


class BlobStat(Struct, frozen=True):
    """A kept blob."""

    blob_id: str
    size: int
    create_ms: int


class BlobWriter(Protocol):
    """An upload that is under way; nothing of it can be seen before `commit`."""

    async def write(self, data: bytes) -> None:
        """Appends. Raises ResourceExhausted (DISK_FULL, PAYLOAD_TOO_LARGE)."""

    async def commit(self, expected_id: str, expected_size: int) -> BlobStat:
        """Makes it durable and visible; raises InvalidArgument (BLOB_MISMATCH), keeping nothing, if it is another."""

    async def abort(self) -> None:
        """Drops it; does nothing after `commit`."""


class BlobStore(Protocol):
    """Keeps content under its SHA-256."""

    async def start(self) -> None:
        """Creates what is missing and drops uploads that a crash left behind."""

    async def stop(self) -> None:
        """Nothing is under way any more."""

    def upload(self) -> BlobWriter:
        """Begins an upload."""

    async def stat(self, blob_id: str) -> BlobStat | None:
        """The blob, or None; prolongs its life."""

    async def read(self, blob_id: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; empty at the end. Raises NotFound (BLOB_NOT_FOUND)."""

    async def idle(self, age_ms: int, limit: int) -> list[str]:
        """Blobs that were neither uploaded nor looked up for `age_ms`."""

    async def delete(self, blob_id: str, age_ms: int) -> None:
        """Removes it if it is still idle."""

    async def room(self) -> Room | None:
        """Looks what is left for new blobs; None if the store does not know."""
