"""The google.rpc details of a refusal."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2 as details_pb2
from google.rpc.status_pb2 import Status

from retinue_server.runtime.errors import DOMAIN, InvalidArgument, RetinueError
from retinue_server.runtime.wire import to_duration

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from retinue_server.runtime.errors import Code, Reason

BYTES = 4608
"""Limit of a serialised Status: 6 KiB as base64, so that with the message it stays under the 8 KiB of
metadata that a Java client takes by default."""


def serialised(error: RetinueError, message: str) -> bytes:
    """As `status`; who is overloaded refuses with the same words again and again."""
    if isinstance(error, InvalidArgument) or error.more is not None:
        return bytes(status(error, message).SerializeToString())
    return _alike(error.code, message, error.reason, error.retry_ms, tuple(error.metadata.items()))


@lru_cache(maxsize=64)
def _alike(
    code: Code,
    message: str,
    reason: Reason,
    retry_ms: int,
    metadata: tuple[tuple[str, str], ...],
) -> bytes:
    found = RetinueError(message, reason=reason, retry_ms=retry_ms, **dict(metadata))
    found.code = code  # type: ignore[misc] # the class's, elsewhere
    return bytes(status(found, message).SerializeToString())


def status(error: RetinueError, message: str) -> Status:
    """What the error says, as far as it fits."""
    info = details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    retry = details_pb2.RetryInfo(retry_delay=to_duration(error.retry_ms)) if error.retry_ms > 0 else None
    _add_metadata(info, error.metadata)
    room = BYTES - len(message.encode()) - info.ByteSize() - 256  # 256: type URLs, RetryInfo, omitted
    fields = _fitting(error, room) if isinstance(error, InvalidArgument) else None
    if fields is not None and isinstance(error, InvalidArgument):
        omitted = len(error.violations) - len(fields.field_violations)
        if omitted:
            info.metadata["omitted"] = str(omitted)
    found = Status(code=error.code, message=message, details=[_pack(d) for d in (info, fields, retry) if d])
    if error.more is not None and len(error.more[1]) < BYTES - found.ByteSize():
        found.details.add(type_url=f"type.googleapis.com/{error.more[0]}", value=error.more[1])
    return found


def _add_metadata(info: details_pb2.ErrorInfo, metadata: dict[str, str]) -> None:
    """Adds pairs while they leave half of the room to the violations."""
    for key, value in metadata.items():
        if info.ByteSize() + len(key) + len(value.encode()) < BYTES // 2:
            info.metadata[key] = value


def _fitting(error: InvalidArgument, room: int) -> details_pb2.BadRequest:
    """The violations that fit, in order."""
    fields = details_pb2.BadRequest()
    for violation in error.violations:
        fields.field_violations.add(field=violation.field, description=violation.description)
        if fields.ByteSize() > room:
            del fields.field_violations[-1]
            break
    return fields


def _pack(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed
