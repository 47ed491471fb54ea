"""How a method's messages are read from and written to the bytes of a transport."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from google.protobuf.message import DecodeError

from retinue_server.runtime.errors import InvalidArgument, Reason, ResourceExhausted, Violation

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from retinue_server.runtime.dispatch import Method

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""What gRPC clients and servers take by default."""
MAX_REPLY_BYTES = 3 * 1024 * 1024
"""No message of ours exceeds this, so that every client's default limit has room."""


class Codec(msgspec.Struct, frozen=True):
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
            raise unreadable(f"it must be a serialised {name}") from None

    def encode(reply: Message) -> bytes:
        return _checked(reply.SerializeToString(), max_bytes)

    def encode_raw(reply: bytes) -> bytes:
        return _checked(reply, max_bytes)

    return Codec(bytes, encode_raw) if method.raw else Codec(decode, encode)


def unreadable(why: str) -> InvalidArgument:
    """What to raise for bytes that are no request."""
    return InvalidArgument(f"cannot read the request: {why}", [Violation("", why)])


def _checked(data: bytes, limit: int) -> bytes:
    check_size(len(data), limit)
    return data


def check_size(size: int, limit: int) -> None:
    """Raises ResourceExhausted for a reply that is too large."""
    if size > limit:
        raise ResourceExhausted(
            f"cannot reply: the message has {size} bytes, more than {limit}; ask for less, by smaller pages",
            reason=Reason.MESSAGE_TOO_LARGE,
            bytes=size,
            limit=limit,
        )
