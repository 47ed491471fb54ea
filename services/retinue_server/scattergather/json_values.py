"""Between JSON text and google.protobuf.Value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from retinue_server.runtime.errors import Violation
from retinue_server.scattergather.core.merges import MAX_DEPTH

if TYPE_CHECKING:
    from collections.abc import MutableSequence

_encode = msgspec.json.Encoder().encode
_EXACT = 1 << 53
"""Up to here a double has every whole number, which is then written without a fraction."""


def text(value: Value, field: str, violations: MutableSequence[Violation]) -> bytes:
    """The JSON text of a value; what is no JSON adds a violation."""
    try:
        return _encode(_plain(value))
    except ValueError as error:
        violations.append(Violation(field, str(error)))
        return b""


def _plain(value: Value) -> Any:
    kind = value.WhichOneof("kind")
    match kind:
        case "number_value":
            return _number(value.number_value)
        case "struct_value":
            return {key: _plain(inner) for key, inner in value.struct_value.fields.items()}
        case "list_value":
            return [_plain(inner) for inner in value.list_value.values]
        case "string_value" | "bool_value":
            return getattr(value, kind)
        case _:
            return None


def _number(number: float) -> float:
    if number != number or number in (float("inf"), float("-inf")):  # noqa: PLR0124 - NaN
        raise ValueError("must have finite numbers")
    return int(number) if number.is_integer() and abs(number) <= _EXACT else number


def _double(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        raise ValueError("it has a number that no double holds") from None


def message(plain: Any, depth: int = 0) -> Value:
    """The message of a JSON value; raises ValueError for one that no message holds."""
    if depth >= MAX_DEPTH and isinstance(plain, list | dict):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    match plain:
        case None:
            return Value(null_value=0)  # type: ignore[arg-type] # NULL_VALUE
        case bool():
            return Value(bool_value=plain)
        case int() | float():
            return Value(number_value=_double(plain))
        case str():
            return Value(string_value=plain)
        case list():
            return Value(list_value=ListValue(values=[message(item, depth + 1) for item in plain]))
        case _:
            fields = {key: message(item, depth + 1) for key, item in plain.items()}
            return Value(struct_value=Struct(fields=fields))
