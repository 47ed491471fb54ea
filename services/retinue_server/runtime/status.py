"""What a caller is told when a call fails: the canonical code, the message and google.rpc details."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2 as details_pb2
from google.rpc.status_pb2 import Status

from retinue_server.runtime.errors import DOMAIN, Code, InvalidArgument, Reason, RetinueError
from retinue_server.runtime.wire import to_duration

if TYPE_CHECKING:
    from google.protobuf.message import Message

DETAILS_KEY = "grpc-status-details-bin"
"""The trailing metadata that carries a serialised google.rpc.Status."""

log = logging.getLogger(__name__)

DETAILS_BYTES = 4608
"""Limit of a serialised Status: 6 KiB as base64, so that with the message it stays under the 8 KiB of
metadata that a Java client takes by default."""
MESSAGE_CHARS = 512
"""Limit of a message: percent-encoded, a character can take twelve bytes."""


class Refusal(Exception):
    """The end of a call with a status other than OK, ready for any transport."""

    def __init__(self, code: Code, message: str, status: bytes = b"") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        """A serialised google.rpc.Status, the value of `grpc-status-details-bin`; empty without details."""
        self.trailing: tuple[tuple[str, str | bytes], ...] = ()
        """More trailing metadata, as an upstream gave it."""


def refusal(error: RetinueError) -> Refusal:
    """What the caller sees of a domain error; its cause goes to the log."""
    if error.__cause__ is not None:
        log.warning("%s: %r", error.message, error.__cause__)
    message = _shorten(error.message)
    return Refusal(error.code, message, _status(error, message).SerializeToString())


def unexpected(error: BaseException, method: str) -> Refusal:
    """INTERNAL with an id that finds the traceback in the log; nothing of the cause goes out."""
    error_id = os.urandom(6).hex()
    log.error("%s failed unexpectedly, error id %s", method, error_id, exc_info=error)
    message = f"internal error {error_id}: the server's log says more under this id"
    return refusal(RetinueError(message, reason=Reason.INTERNAL, error_id=error_id))


def _shorten(message: str) -> str:
    return message if len(message) <= MESSAGE_CHARS else message[: MESSAGE_CHARS - 1] + "…"


def _status(error: RetinueError, message: str) -> Status:
    info = details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    retry = details_pb2.RetryInfo(retry_delay=to_duration(error.retry_ms)) if error.retry_ms > 0 else None
    _add_metadata(info, error.metadata)
    room = DETAILS_BYTES - len(message.encode()) - info.ByteSize() - 256  # 256: type URLs, RetryInfo, omitted
    fields = _fitting(error, room) if isinstance(error, InvalidArgument) else None
    if fields is not None and isinstance(error, InvalidArgument):
        omitted = len(error.violations) - len(fields.field_violations)
        if omitted:
            info.metadata["omitted"] = str(omitted)
    return Status(code=error.code, message=message, details=[_pack(d) for d in (info, fields, retry) if d])


def _add_metadata(info: details_pb2.ErrorInfo, metadata: dict[str, str]) -> None:
    """Adds pairs while they leave half of the room to the violations."""
    for key, value in metadata.items():
        if info.ByteSize() + len(key) + len(value.encode()) < DETAILS_BYTES // 2:
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
