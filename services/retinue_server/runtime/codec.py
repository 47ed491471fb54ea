"""How a method's messages are read from and written to the bytes of a transport."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from retinue_server.runtime.errors import InvalidArgument, Reason, ResourceExhausted, Violation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.descriptor import Descriptor, FieldDescriptor
    from google.protobuf.message import Message

    from retinue_server.runtime.dispatch import Method

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""What gRPC clients and servers take by default."""
MAX_REPLY_BYTES = 3 * 1024 * 1024
"""No message of ours exceeds this, so that every client's default limit has room."""


@dataclass(frozen=True, slots=True)
class Codec:
    """`decode` raises InvalidArgument; `encode` raises ResourceExhausted for a reply that is too large.

    What handlers see in between is a message, or its serialised bytes where the method is raw.
    """

    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]


def proto_codec(method: Method, max_bytes: int = MAX_REPLY_BYTES) -> Codec:
    """The binary form; raw methods take and give the bytes as they are."""

    def decode(data: bytes) -> Message:
        try:
            return method.request_type.FromString(data)
        except DecodeError:
            name = method.request_type.DESCRIPTOR.full_name
            raise _unreadable(f"it must be a serialised {name}") from None

    def encode(reply: Message) -> bytes:
        return _checked(reply.SerializeToString(), max_bytes)

    def encode_raw(reply: bytes) -> bytes:
        return _checked(reply, max_bytes)

    return Codec(bytes, encode_raw) if method.raw else Codec(decode, encode)


def json_codec(method: Method, max_bytes: int = MAX_REPLY_BYTES) -> Codec:
    """Protobuf's JSON form, names as in the proto or in lowerCamelCase; unknown fields are refused."""

    def decode(data: bytes) -> Message:
        value = _parse_json(data or b"{}")
        unknown = list(_unknown_fields(value, cast("Descriptor", method.request_type.DESCRIPTOR), ""))
        if unknown:
            raise InvalidArgument(f"cannot read the request: no field {unknown[0].field}", unknown)
        try:
            return json_format.ParseDict(value, method.request_type())
        except (json_format.ParseError, ValueError, TypeError, RecursionError) as error:
            raise _unreadable(str(error)) from None

    def encode(reply: Message) -> bytes:
        _check_size(reply.ByteSize(), max_bytes)
        return json_format.MessageToJson(reply, indent=None).encode()

    def decode_raw(data: bytes) -> bytes:
        return decode(data).SerializeToString()

    def encode_raw(reply: bytes) -> bytes:
        return encode(method.response_type.FromString(reply))

    return Codec(decode_raw, encode_raw) if method.raw else Codec(decode, encode)


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_without_doubles)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"it must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise _unreadable("it must be a JSON object")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _unknown_fields(value: object, kind: Descriptor, path: str) -> Iterator[Violation]:
    """Every field that the message does not have; well-known types have JSON forms of their own."""
    if not isinstance(value, dict) or kind.full_name.startswith("google.protobuf."):
        return
    known = {name: field for field in kind.fields for name in (field.name, field.json_name)}
    for name, inner in value.items():
        if name not in known:
            yield Violation(path + name, f"{kind.name} has no such field")
        else:
            yield from _unknown_within(inner, known[name], path + name)


def _unknown_within(value: object, field: FieldDescriptor, path: str) -> Iterator[Violation]:
    kind = field.message_type
    if kind is None:
        return
    if kind.GetOptions().map_entry:
        entry = kind.fields_by_name["value"]
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield from _unknown_within(inner, entry, f"{path}[{key}]")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unknown_fields(inner, kind, f"{path}[{index}].")
    else:
        yield from _unknown_fields(value, kind, path + ".")


def _unreadable(why: str) -> InvalidArgument:
    return InvalidArgument(f"cannot read the request: {why}", [Violation("", why)])


def _checked(data: bytes, limit: int) -> bytes:
    _check_size(len(data), limit)
    return data


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ResourceExhausted(
            f"cannot reply: the message has {size} bytes, more than {limit}; ask for less, by smaller pages",
            reason=Reason.MESSAGE_TOO_LARGE,
            bytes=size,
            limit=limit,
        )
