"""The Connect protocol's forms: codes, error JSON, envelopes, timeouts. No I/O.

Follows the specification at https://connectrpc.com/docs/protocol for unary calls and server streams in
JSON.
"""

from __future__ import annotations

import base64
import json
import struct
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pool, json_format
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2 as _details  # noqa: F401 - so that they are known, whoever refused
from google.rpc.status_pb2 import Status

from retinue_server.runtime.errors import Code, InvalidArgument, Violation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.any_pb2 import Any as AnyMessage

    from retinue_server.runtime.status import Refusal

UNARY_TYPE = "application/json"
STREAM_TYPE = "application/connect+json"
END_STREAM = 0x02
"""The flag of a stream's last envelope."""

_COMPRESSED = 0x01
_HEADER = struct.Struct(">BI")
_MAX_TIMEOUT_DIGITS = 10

HTTP_STATUS = {
    Code.CANCELLED: 499,
    Code.UNKNOWN: 500,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.DATA_LOSS: 500,
    Code.UNAUTHENTICATED: 401,
}


def code_name(code: Code) -> str:
    """As Connect spells it."""
    return "canceled" if code is Code.CANCELLED else code.name.lower()


def error_json(refusal: Refusal) -> dict[str, Any]:
    """The error object of a unary reply or of an end of stream."""
    error: dict[str, Any] = {"code": code_name(refusal.code), "message": refusal.message}
    if refusal.status:
        error["details"] = [_detail(detail) for detail in Status.FromString(refusal.status).details]
    return error


def end_stream(refusal: Refusal | None, trailing: Iterable[tuple[str, str | bytes]]) -> bytes:
    """The last envelope of a stream."""
    end: dict[str, Any] = {} if refusal is None else {"error": error_json(refusal)}
    for key, value in trailing:
        end.setdefault("metadata", {}).setdefault(key, []).append(header_value(value))
    return envelope(json.dumps(end).encode(), END_STREAM)


def envelope(data: bytes, flags: int = 0) -> bytes:
    """One message of a stream, with its five bytes of flags and length."""
    return _HEADER.pack(flags, len(data)) + data


def open_envelope(body: bytes) -> bytes:
    """The one message of a server stream's request; raises InvalidArgument."""
    if len(body) < _HEADER.size:
        raise _invalid("it must be one envelope: 5 bytes of flags and length, then the message")
    flags, length = _HEADER.unpack_from(body)
    if flags & _COMPRESSED:
        raise _invalid("its envelope is compressed, which is not offered here")
    if len(body) != _HEADER.size + length:
        raise _invalid(f"it must be one envelope of {length} bytes, but {len(body) - _HEADER.size} came")
    return body[_HEADER.size :]


def timeout_s(header: str | None) -> float | None:
    """Seconds of a `connect-timeout-ms` header; raises InvalidArgument."""
    if header is None:
        return None
    if not header.isascii() or not header.isdecimal() or len(header) > _MAX_TIMEOUT_DIGITS:
        raise _invalid("connect-timeout-ms must be a number of at most 10 digits")
    return int(header) / 1000


def header_value(value: str | bytes) -> str:
    """A binary value in base64 without padding, as metadata whose key ends in `-bin` asks."""
    return value if isinstance(value, str) else _base64(value)


def _detail(detail: AnyMessage) -> dict[str, Any]:
    name = detail.type_url.rpartition("/")[2]
    return {"type": name, "value": _base64(detail.value), **_readable(name, detail.value)}


def _readable(name: str, value: bytes) -> dict[str, Any]:
    """For people; nothing of a message that is not known here."""
    try:
        kind = GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))
        return {"debug": json_format.MessageToDict(kind.FromString(value))}
    except (KeyError, DecodeError):
        return {}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).rstrip(b"=").decode()


def _invalid(why: str) -> InvalidArgument:
    return InvalidArgument(f"cannot read the request: {why}", [Violation("", why)])
