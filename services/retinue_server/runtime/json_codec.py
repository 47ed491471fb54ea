"""How a method's messages are read from and written to JSON; loaded where there is an HTTP listener."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from google.protobuf import json_format

from retinue_server.runtime.codec import MAX_REPLY_BYTES, Codec, check_size, unreadable
from retinue_server.runtime.errors import InvalidArgument, Violation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor import Descriptor, FieldDescriptor
    from google.protobuf.message import Message

    from retinue_server.runtime.dispatch import Method


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
            raise unreadable(str(error)) from None

    def encode(reply: Message) -> bytes:
        check_size(reply.ByteSize(), max_bytes)
        return to_json(reply)

    def decode_raw(data: bytes) -> bytes:
        return decode(data).SerializeToString()

    def encode_raw(reply: bytes) -> bytes:
        return encode(method.response_type.FromString(reply))

    return Codec(decode_raw, encode_raw) if method.raw else Codec(decode, encode)


def to_json(message: Message) -> bytes:
    """A message on one line."""
    return json_format.MessageToJson(message, indent=None).encode()


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_without_doubles)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise unreadable(f"it must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise unreadable("it must be a JSON object")
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
