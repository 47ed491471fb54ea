"""Python values as PostgreSQL reads them: arrays as one literal, and texts that may hold a NUL.

psycopg would adapt lists element by element; one join is several times cheaper, and with every parameter being text or
bytes, a statement is prepared once. Arrays of bytes go as they are on the wire: that is cheaper at both ends.
PostgreSQL's text can't hold NUL, protobuf's strings can: it is escaped by ESC.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import msgspec

_ESC = "\x1b"
_encode = msgspec.json.Encoder().encode
_ARRAY = Struct("!iiIii").pack
"""How many dimensions, whether there may be NULLs, of what type, how long, from which index on."""
_length = Struct("!i").pack
_BYTEA = 17


def ints(values: Sequence[int | None]) -> str:
    """An array of integers or booleans."""
    return "{" + _encode(values).decode()[1:-1] + "}"  # JSON's null, true and false are PostgreSQL's, too


def sparse(values: Sequence[int | None], default: int | None) -> str:
    """The same, empty if all are the default."""
    return "{}" if values.count(default) == len(values) else ints(values)


def texts(values: Sequence[str | None]) -> str:
    """An array of texts."""
    joined = '","'.join([value for value in values if value is not None])
    plain = "\\" not in joined and "\x00" not in joined and _ESC not in joined
    if plain and None not in values and joined.count('"') == 2 * (len(values) - 1):
        return '{"' + joined + '"}'
    return "{" + ",".join(["NULL" if value is None else _quoted(escaped(value)) for value in values]) + "}"


def sparse_texts(values: Sequence[str | None], default: str | None) -> str:
    """The same, empty if all are the default."""
    return "{}" if values.count(default) == len(values) else texts(values)


def blobs(values: Sequence[bytes | None]) -> str | bytes:
    """An array of bytea, as it is on the wire; empty if all are None."""
    if values.count(None) == len(values):
        return "{}"
    head = _ARRAY(1, 1, _BYTEA, len(values), 1)
    return head + b"".join([_length(-1) if value is None else _length(len(value)) + value for value in values])


def escaped(value: str) -> str:
    """A text without NUL."""
    if "\x00" not in value and _ESC not in value:
        return value
    return value.replace(_ESC, _ESC + "e").replace("\x00", _ESC + "0")


def unescaped(value: str) -> str:
    """What `escaped` was given."""
    if _ESC not in value:
        return value
    return value.replace(_ESC + "0", "\x00").replace(_ESC + "e", _ESC)


def _quoted(value: str) -> str:
    value = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{value}"'
