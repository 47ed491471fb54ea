"""The errors a core may raise, and the one place that says which canonical code each of them has.

No grpc and no protobuf here, so that cores may import it; `interceptors.py` turns a `RetinueError` into a status with
its details. Messages read "cannot X: Y" and say what to do. `RetinueError.__cause__` goes to the log, never to callers.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import ClassVar, NamedTuple

DOMAIN = "retinue"
"""The `ErrorInfo.domain` of every error."""


class Code(IntEnum):
    """The canonical codes, with the numbers of google.rpc.Code."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(StrEnum):
    """`ErrorInfo.reason`: the names of retinue.error.v1.ErrorReason without their prefix (a test holds them equal)."""

    INVALID_FIELD = "INVALID_FIELD"
    PAGE_TOKEN_EXPIRED = "PAGE_TOKEN_EXPIRED"  # noqa: S105 - a reason, not a secret
    INTERNAL = "INTERNAL"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    ROLE_REQUIRED = "ROLE_REQUIRED"
    CONCURRENCY_LIMIT = "CONCURRENCY_LIMIT"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    ENGINE_UNAVAILABLE = "ENGINE_UNAVAILABLE"
    ENGINE_CAPABILITY = "ENGINE_CAPABILITY"
    DISK_FULL = "DISK_FULL"
    UPSTREAM_UNAVAILABLE = "UPSTREAM_UNAVAILABLE"
    QUEUE_NOT_FOUND = "QUEUE_NOT_FOUND"
    QUEUE_EXISTS = "QUEUE_EXISTS"
    QUEUE_NOT_EMPTY = "QUEUE_NOT_EMPTY"
    QUEUE_DRAINING = "QUEUE_DRAINING"
    QUEUE_FULL = "QUEUE_FULL"
    TASK_NOT_FOUND = "TASK_NOT_FOUND"
    TASK_EXISTS = "TASK_EXISTS"
    IDEMPOTENCY_CONFLICT = "IDEMPOTENCY_CONFLICT"
    REQUEST_CONFLICT = "REQUEST_CONFLICT"
    ILLEGAL_TRANSITION = "ILLEGAL_TRANSITION"
    LEASE_LOST = "LEASE_LOST"
    ALREADY_FINALIZED = "ALREADY_FINALIZED"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    BLOB_NOT_FOUND = "BLOB_NOT_FOUND"
    BLOB_MISMATCH = "BLOB_MISMATCH"
    WATCH_TOKEN_EXPIRED = "WATCH_TOKEN_EXPIRED"  # noqa: S105 - a reason, not a secret
    ELECTION_NOT_FOUND = "ELECTION_NOT_FOUND"
    CANDIDATE_EXISTS = "CANDIDATE_EXISTS"
    SESSION_NOT_FOUND = "SESSION_NOT_FOUND"
    STALE_TOKEN = "STALE_TOKEN"  # noqa: S105 - a reason, not a secret
    TOKEN_DOMAIN_MISMATCH = "TOKEN_DOMAIN_MISMATCH"  # noqa: S105 - a reason, not a secret
    SESSION_MISMATCH = "SESSION_MISMATCH"
    ELECTION_LIMIT = "ELECTION_LIMIT"
    OBSERVER_LIMIT = "OBSERVER_LIMIT"
    SESSION_RESUMED = "SESSION_RESUMED"
    POOL_NOT_FOUND = "POOL_NOT_FOUND"
    POOL_EMPTY = "POOL_EMPTY"
    POOL_NOT_IDEMPOTENT = "POOL_NOT_IDEMPOTENT"
    SCATTER_TOO_DEEP = "SCATTER_TOO_DEEP"
    SCATTER_LIMIT = "SCATTER_LIMIT"
    GATHER_TOO_LARGE = "GATHER_TOO_LARGE"
    COVERAGE_NOT_MET = "COVERAGE_NOT_MET"
    LEAF_REFUSED = "LEAF_REFUSED"
    MERGE_FAILED = "MERGE_FAILED"
    UPSTREAM_NOT_FOUND = "UPSTREAM_NOT_FOUND"
    ADDRESS_TAKEN = "ADDRESS_TAKEN"
    PORT_IN_USE = "PORT_IN_USE"
    LISTEN_IMMUTABLE = "LISTEN_IMMUTABLE"
    UPSTREAM_REFERENCE = "UPSTREAM_REFERENCE"
    UPSTREAM_FROM_FILE = "UPSTREAM_FROM_FILE"
    CAPABILITY_MISSING = "CAPABILITY_MISSING"
    ENDPOINT_FORBIDDEN = "ENDPOINT_FORBIDDEN"
    STALE_ETAG = "STALE_ETAG"
    UPSTREAM_LIMIT = "UPSTREAM_LIMIT"
    UPSTREAM_NOT_PUSHED = "UPSTREAM_NOT_PUSHED"
    UPSTREAM_NOT_HTTP = "UPSTREAM_NOT_HTTP"
    UPSTREAM_NOT_ACTIVE = "UPSTREAM_NOT_ACTIVE"
    UPSTREAM_OVERFLOW = "UPSTREAM_OVERFLOW"
    UPSTREAM_UNHEALTHY = "UPSTREAM_UNHEALTHY"
    UPSTREAM_TIMEOUT = "UPSTREAM_TIMEOUT"
    TARGET_NOT_FOUND = "TARGET_NOT_FOUND"
    TARGET_EXISTS = "TARGET_EXISTS"
    TARGET_FROM_FILE = "TARGET_FROM_FILE"
    TARGET_IMMUTABLE = "TARGET_IMMUTABLE"
    TARGET_LIMIT = "TARGET_LIMIT"
    TARGET_NOT_REPORT = "TARGET_NOT_REPORT"
    RULE_PACK_NOT_FOUND = "RULE_PACK_NOT_FOUND"
    METRICS_TOO_OLD = "METRICS_TOO_OLD"
    WATCHER_LIMIT = "WATCHER_LIMIT"


class Violation(NamedTuple):
    """One field that is wrong: its path as in the proto (`tasks[2].priority`), and what would be right."""

    field: str
    description: str


class RetinueError(Exception):
    """What a caller is told: a code, a stable reason, a message, and what a program needs to react."""

    code: ClassVar[Code] = Code.INTERNAL

    def __init__(
        self, message: str, *, reason: Reason = Reason.INTERNAL, retry_ms: int = 0, **metadata: object
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.retry_ms = retry_ms
        """When it is worth trying again, in milliseconds; 0 = trying again won't help."""
        self.metadata = {key: str(value) for key, value in metadata.items()}
        self.more: tuple[str, bytes] | None = None
        """A further detail for the caller: the full name of its message, and the message serialised."""


class InvalidArgument(RetinueError):
    """The request can never succeed as it stands; every violation is named."""

    code = Code.INVALID_ARGUMENT

    def __init__(self, message: str, violations: list[Violation]) -> None:
        super().__init__(message, reason=Reason.INVALID_FIELD)
        self.violations = violations


class NotFound(RetinueError):
    code = Code.NOT_FOUND


class AlreadyExists(RetinueError):
    code = Code.ALREADY_EXISTS


class FailedPrecondition(RetinueError):
    """The state of the thing forbids it; repeating won't help until that state changes."""

    code = Code.FAILED_PRECONDITION


class ResourceExhausted(RetinueError):
    code = Code.RESOURCE_EXHAUSTED


class OutOfRange(RetinueError):
    code = Code.OUT_OF_RANGE


class Aborted(RetinueError):
    code = Code.ABORTED


class Unavailable(RetinueError):
    code = Code.UNAVAILABLE


class DeadlineExceeded(RetinueError):
    """A time that was set beforehand, and not by the caller, is over."""

    code = Code.DEADLINE_EXCEEDED


class Unimplemented(RetinueError):
    """The chosen engine can't do it, as its capabilities say."""

    code = Code.UNIMPLEMENTED


class PermissionDenied(RetinueError):
    code = Code.PERMISSION_DENIED


class Unauthenticated(RetinueError):
    code = Code.UNAUTHENTICATED
