"""Protobuf's wire format, as far as it is written and read here without messages."""

from __future__ import annotations

_SMALL = 0x80
"""A varint below it is one byte."""


def varint(number: int) -> bytes:
    """Of 0 or more."""
    out = bytearray()
    while number >= _SMALL:
        out.append(number & 0x7F | _SMALL)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(tag: bytes, content: bytes) -> bytes:
    """A field of bytes."""
    return tag + varint(len(content)) + content


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends; raises ValueError."""
    number = shift = 0
    while at < len(data) and shift < 64:  # noqa: PLR2004 - bits
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < _SMALL:
            return number, at
        shift += 7
    raise ValueError("no varint where one must be")
