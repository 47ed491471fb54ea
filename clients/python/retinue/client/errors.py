"""What a call may raise: one class per canonical code, with the reason and the details the server sent.

`reason` is a `retinue.error.v1.ErrorReason` without its prefix, or empty if the failure was not the server's
word (no server, no route). A client that does not know a reason acts on the class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from retinue.workqueue.v1.task_pb2 import ItemStatus

_DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Violation(NamedTuple):
    """One field that is wrong, by its path in the request, and what would be right."""

    field: str
    description: str


class RetinueError(Exception):
    """A call that was refused or lost.

    `code` is the canonical code, `metadata` what the server adds for programs, `violations` every field that
    is wrong, `retry_after` the seconds after which it is worth trying again (None = the server named none).
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = metadata or {}
        self.violations = violations
        self.retry_after = retry_after

    def __str__(self) -> str:
        fields = "; ".join(f"{v.field}: {v.description}" for v in self.violations)
        return f"{self.message} [{self.reason or self.code.name}]" + (f" ({fields})" if fields else "")


class InvalidArgument(RetinueError):
    """The request can never succeed as it stands; `violations` names what is wrong."""


class NotFound(RetinueError):
    pass


class AlreadyExists(RetinueError):
    pass


class FailedPrecondition(RetinueError):
    pass


class LeaseLost(FailedPrecondition):
    """The lease ended: expired, released, cancelled, or another worker's. What was done must not be
    published.
    """


class ResourceExhausted(RetinueError):
    pass


class OutOfRange(RetinueError):
    pass


class Aborted(RetinueError):
    pass


class Unavailable(RetinueError):
    """The server can't be reached or is not ready; whether the call took effect is not known."""


class DeadlineExceeded(RetinueError):
    """The deadline came before the answer; whether the call took effect is not known."""


class Unimplemented(RetinueError):
    pass


class PermissionDenied(RetinueError):
    pass


class Unauthenticated(RetinueError):
    pass


class Cancelled(RetinueError):
    pass


_CLASSES: dict[grpc.StatusCode, type[RetinueError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def _class_of(code: grpc.StatusCode, reason: str) -> type[RetinueError]:
    return LeaseLost if reason == "LEASE_LOST" else _CLASSES.get(code, RetinueError)


def from_rpc_error(error: Any) -> RetinueError:
    """The typed form of what grpc raised, sync or asyncio."""
    details = _details(error.trailing_metadata() or ())
    code: grpc.StatusCode = error.code()
    info = _first(details, error_details_pb2.ErrorInfo())
    return _class_of(code, info.reason)(
        code,
        error.details() or code.name,
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=_violations(details),
        retry_after=_retry_after(details),
    )


def unpack(error: Any, into: Any) -> bool:
    """Fills a message from the details of what grpc raised; False if they have none of its type."""
    return any(detail.Unpack(into) for detail in _details(error.trailing_metadata() or ()))


def from_item_status(status: ItemStatus) -> RetinueError:
    """The typed form of one refused item of a batch."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _class_of(code, status.reason)(code, status.message or status.reason, reason=status.reason)


def _details(trailer: Any) -> list[Any]:
    packed = next((value for key, value in trailer if key == _DETAILS_KEY), None)
    return list(status_pb2.Status.FromString(packed).details) if packed else []


def _first(details: list[Any], into: Any) -> Any:
    any(detail.Unpack(into) for detail in details)  # stops at the first of this type
    return into


def _violations(details: list[Any]) -> tuple[Violation, ...]:
    bad = _first(details, error_details_pb2.BadRequest())
    return tuple(Violation(v.field, v.description) for v in bad.field_violations)


def _retry_after(details: list[Any]) -> float | None:
    info = error_details_pb2.RetryInfo()
    if not any(detail.Unpack(info) for detail in details):
        return None
    return float(info.retry_delay.ToTimedelta().total_seconds())
