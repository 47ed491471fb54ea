"""What tasks take in and give back, as Python values.

`str` travels as text, `bytes` as data, every other value as JSON. Up to 256 KiB go inline, more goes to the
blob store. JSON whose numbers a double can't hold exactly travels as JSON text, so that what is loaded equals
what was sent; whole numbers come back as `int`.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, TypeAlias

from google.protobuf import struct_pb2

from retinue.client.values import EXACT, plain
from retinue.workqueue.v1 import task_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Content: TypeAlias = "pb.Payload | str | bytes | bool | float | Sequence[Any] | Mapping[str, Any] | None"
"""What may be given for a payload; None = empty."""

INLINE_BYTES = 256 * 1024
TEXT, JSON = "text/plain; charset=utf-8", "application/json"


def payload(content: Content, content_type: str = "") -> pb.Payload:
    """The payload of a value, inline whatever its size. Raises TypeError or ValueError for what JSON can't
    hold.
    """
    match content:
        case pb.Payload():
            return content
        case None:
            return pb.Payload(content_type=content_type)
        case str():
            return pb.Payload(text=content, content_type=content_type)
        case bytes() | bytearray() | memoryview():
            return pb.Payload(data=bytes(content), content_type=content_type)
        case _:
            return _json_payload(content, content_type)


def readable(content: bytes, content_type: str = "") -> pb.Payload:
    """The payload of a file's bytes: text if they are, so that people and grpcurl can read it; data if
    not.
    """
    try:
        text = content.decode() if b"\0" not in content else None
    except UnicodeDecodeError:
        text = None
    return payload(content if text is None else text, content_type)


def _json_payload(content: Any, content_type: str) -> pb.Payload:
    if not _exact(content):
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
        return pb.Payload(text=text, content_type=content_type or JSON)
    return pb.Payload(json=_value(content), content_type=content_type)


def _exact(content: Any) -> bool:
    match content:
        case bool() | str() | None:
            return True
        case int():
            return abs(content) <= EXACT
        case float():
            return math.isfinite(content)
        case dict():
            return all(_exact(value) for value in content.values())
        case list() | tuple():
            return all(_exact(value) for value in content)
    return False  # json.dumps names the type


def _value(content: Any) -> struct_pb2.Value:
    match content:
        case None:
            return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
        case bool():
            return struct_pb2.Value(bool_value=content)
        case str():
            return struct_pb2.Value(string_value=content)
        case int() | float():
            return struct_pb2.Value(number_value=content)
        case dict():
            fields = {str(key): _value(value) for key, value in content.items()}
            return struct_pb2.Value(struct_value=struct_pb2.Struct(fields=fields))
    return struct_pb2.Value(list_value=struct_pb2.ListValue(values=[_value(item) for item in content]))


def size(content: pb.Payload) -> int:
    """How many bytes count against the inline limit."""
    match content.WhichOneof("content"):
        case "text":
            return len(content.text.encode())
        case "data":
            return len(content.data)
        case "json":
            return content.json.ByteSize()
    return 0


def raw(content: pb.Payload) -> bytes:
    """An inline payload as the bytes of a file; JSON as its text. Empty for an empty one."""
    match content.WhichOneof("content"):
        case "text":
            return content.text.encode()
        case "data":
            return content.data
        case "json":
            return json.dumps(plain(content.json), ensure_ascii=False).encode()
        case "blob":
            raise ValueError("cannot read a blob without a connection: use Queue.load")
    return b""


def value(content: pb.Payload) -> Any:
    """The Python value of an inline payload."""
    match content.WhichOneof("content"):
        case "text":
            return typed(content.text.encode(), content.content_type or TEXT)
        case "json":
            return plain(content.json)
        case "data":
            return typed(content.data, content.content_type)
        case None:
            return None
    raise ValueError("cannot read a blob without a connection: use Queue.load")


def typed(content: bytes, content_type: str) -> Any:
    """Bytes as their media type says: JSON parsed, text decoded, all else as they are."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == JSON:
        return json.loads(content)
    return content.decode(errors="replace") if kind == "text/plain" else content


def blob_content_type(content: pb.Payload) -> str:
    """The media type that lets a blob load as the value it would have been inline."""
    fallback = {"text": TEXT, "json": JSON}.get(content.WhichOneof("content") or "", "")
    return content.content_type or fallback
