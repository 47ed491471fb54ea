"""What servicers translate alike: instants and durations as integer milliseconds, and opaque page tokens.

Cores count in whole milliseconds. Reading rounds up, so that nothing happens earlier than asked and no
positive duration becomes zero; writing is exact. What is out of range becomes a `Violation` in the caller's
list, so that a servicer can name every wrong field of a request at once.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Annotated, Generic, TypeVar

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from retinue_server.runtime.errors import InvalidArgument, OutOfRange, Reason, Violation

if TYPE_CHECKING:
    from collections.abc import MutableSequence

MIN_TIMESTAMP_MS = -62_135_596_800_000
"""0001-01-01T00:00:00Z, the earliest Timestamp."""
MAX_TIMESTAMP_MS = 253_402_300_799_999
"""9999-12-31T23:59:59.999Z, the latest Timestamp."""
MAX_DURATION_MS = 315_576_000_000_000
"""The longest Duration: 10,000 years."""

_NANOS_PER_MS = 1_000_000
_NANOS_PER_S = 1_000_000_000
_MAX_TOKEN_CHARS = 2048


def to_timestamp(ms: int) -> Timestamp:
    """The instant `ms` milliseconds after the Unix epoch."""
    seconds, rest = divmod(ms, 1000)
    return Timestamp(seconds=seconds, nanos=rest * _NANOS_PER_MS)


def to_duration(ms: int) -> Duration:
    """A span of `ms` milliseconds; of a negative one, both fields are negative, as Duration asks."""
    seconds, rest = divmod(abs(ms), 1000)
    sign = -1 if ms < 0 else 1
    return Duration(seconds=sign * seconds, nanos=sign * rest * _NANOS_PER_MS)


def timestamp_ms(
    value: Timestamp,
    field: str,
    violations: MutableSequence[Violation],
    *,
    low: int = MIN_TIMESTAMP_MS,
    high: int = MAX_TIMESTAMP_MS,
) -> int:
    """Milliseconds since the Unix epoch, rounded up; outside the limits adds a violation and gives `low`."""
    if not 0 <= value.nanos < _NANOS_PER_S:
        violations.append(Violation(field, "nanos must be from 0 to 999,999,999"))
        return low
    ms = _ceil_ms(value.seconds, value.nanos)
    if low <= ms <= high:
        return ms
    limits = f"{to_timestamp(low).ToJsonString()} to {to_timestamp(high).ToJsonString()}"
    violations.append(Violation(field, f"must be from {limits}"))
    return low


def duration_ms(
    value: Duration,
    field: str,
    violations: MutableSequence[Violation],
    *,
    low: int = 0,
    high: int = MAX_DURATION_MS,
) -> int:
    """Milliseconds, rounded up; outside `low`..`high` (milliseconds) adds a violation and gives `low`."""
    if not -_NANOS_PER_S < value.nanos < _NANOS_PER_S or value.seconds * value.nanos < 0:
        violations.append(Violation(field, "nanos must be under a second and have the sign of seconds"))
        return low
    ms = _ceil_ms(value.seconds, value.nanos)
    if low <= ms <= high:
        return ms
    violations.append(Violation(field, f"must be from {_seconds(low)} to {_seconds(high)}"))
    return low


def _ceil_ms(seconds: int, nanos: int) -> int:
    return seconds * 1000 - (-nanos // _NANOS_PER_MS)


def _seconds(ms: int) -> str:
    return f"{ms / 1000:,.3f}".rstrip("0").rstrip(".") + " s"


Position = TypeVar("Position")


Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""What stores and messages take for a number; in a position that callers could have made up."""


class PageTokens(Generic[Position]):
    """Page tokens of one list: opaque to callers, and refused when they come from elsewhere or are too old.

    `kind` names the list, `version` grows when the meaning of a position changes, and `position_type` is what
    a position is, anything msgspec can check (`tuple[int, str]`).
    """

    def __init__(self, kind: str, version: int, position_type: type[Position]) -> None:
        self._kind = kind
        self._version = version
        self._type = position_type

    def encode(self, position: Position) -> str:
        """The token that resumes after `position`."""
        data = msgspec.json.encode((self._kind, self._version, position))
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    def decode(self, token: str, field: str = "page_token") -> Position | None:
        """The position in a token, None for the empty one.

        Raises InvalidArgument when no list gave it, OutOfRange when it is of another list or version.
        """
        if not token:
            return None
        kind, version, position = _parse(token, field)
        if kind != self._kind:
            raise page_token_expired("it belongs to another list")
        if version != self._version:
            raise page_token_expired("it is of another version")
        try:
            return msgspec.convert(position, self._type)
        except msgspec.ValidationError:
            raise _malformed(field) from None


def page_token_expired(why: str) -> OutOfRange:
    """PAGE_TOKEN_EXPIRED."""
    return OutOfRange(
        f"cannot go on with the list by this page token: {why}; start again without one",
        reason=Reason.PAGE_TOKEN_EXPIRED,
    )


def _parse(token: str, field: str) -> tuple[str, int, object]:
    if len(token) > _MAX_TOKEN_CHARS:
        raise _malformed(field)
    try:
        data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        return msgspec.json.decode(data, type=tuple[str, int, object])
    except (binascii.Error, ValueError, RecursionError):  # msgspec's errors are ValueErrors
        raise _malformed(field) from None


def _malformed(field: str) -> InvalidArgument:
    text = "must be a next_page_token of this list, or empty"
    return InvalidArgument("cannot list: the page token is malformed", [Violation(field, text)])
