"""What happened in a simulated world: an append-only history, read by invariants and by people."""

from __future__ import annotations

import enum
import hashlib
from typing import Any, NamedTuple

import msgspec


class Called(NamedTuple):
    """A client made a call."""

    at: float
    call: int
    node: str
    verb: str
    args: tuple[Any, ...]


class Arrived(NamedTuple):
    """A copy of it reached a server."""

    at: float
    call: int
    node: str
    verb: str
    args: tuple[Any, ...]


class Answered(NamedTuple):
    """The server sent its answer, or its error."""

    at: float
    call: int
    node: str
    verb: str
    args: tuple[Any, ...]
    answer: Any


class HungUp(NamedTuple):
    """The server was told that nobody waits for the answer any more."""

    at: float
    call: int
    node: str


class Received(NamedTuple):
    """The client has an answer."""

    at: float
    call: int
    node: str
    answer: Any


class GaveUp(NamedTuple):
    """The client goes without an answer; what its call did it does not know."""

    at: float
    call: int
    node: str
    why: str


class Noted(NamedTuple):
    """A fault, or something else that people want to see in a trace."""

    at: float
    node: str
    what: str


class History:
    """Records in the order in which they happened."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.add = self.records.append

    def digest(self) -> str:
        """The same for the same history."""
        return hashlib.sha256("\n".join(map(repr, self.records)).encode()).hexdigest()

    def trace(self) -> str:
        """One line a record."""
        return "\n".join(map(_line, self.records))


def _line(record: Any) -> str:
    what = record.told() if hasattr(record, "told") else "  ".join(map(brief, record[1:]))
    return f"{record.at:10.4f}  {type(record).__name__:<12}  {what}"


def brief(item: Any) -> str:
    """A value as a person wants to read it: names of enumerations, and of a struct only what is not as always."""
    if isinstance(item, enum.Enum):
        return item.name
    if isinstance(item, msgspec.Struct):
        return f"{type(item).__name__}({', '.join(f'{name}={brief(value)}' for name, value in _said(item))})"
    if isinstance(item, tuple):
        name = type(item).__name__ if hasattr(item, "_fields") else ""
        return f"{name}({', '.join(map(brief, item))})"
    if isinstance(item, list):
        return f"[{', '.join(map(brief, item))}]"
    return item if isinstance(item, str) else repr(item)


def _said(item: msgspec.Struct) -> list[tuple[str, Any]]:
    fields = msgspec.structs.fields(item)
    return [(f.name, value) for f in fields if (value := getattr(item, f.name)) != f.default and value not in _EMPTY]


_EMPTY: tuple[Any, ...] = (None, "", b"", {}, ())
