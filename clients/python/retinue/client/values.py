"""JSON values of messages (`google.protobuf.Value`) as Python values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf import struct_pb2

EXACT = 2**53
"""Whole numbers up to it are exact as doubles."""


def plain(content: struct_pb2.Value) -> Any:
    """The Python value of a JSON value; whole numbers as int."""
    match content.WhichOneof("kind"):
        case "number_value":
            number = content.number_value
            return int(number) if number.is_integer() and abs(number) <= EXACT else number
        case "struct_value":
            return {key: plain(item) for key, item in content.struct_value.fields.items()}
        case "list_value":
            return [plain(item) for item in content.list_value.values]
        case "string_value":
            return content.string_value
        case "bool_value":
            return content.bool_value
    return None
