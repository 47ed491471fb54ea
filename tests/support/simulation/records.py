"""What happened in a simulated world: an append-only history, read by invariants and by people."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple


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
    at, *rest = record
    return f"{at:10.4f}  {type(record).__name__:<9} " + "  ".join(_short(item) for item in rest)


def _short(item: Any) -> str:
    text = item if isinstance(item, str) else repr(item)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


_LONGEST = 1_200
