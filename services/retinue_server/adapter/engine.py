"""The port of sources: how the numbers of an app are had. One file in `engines/` for each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    from retinue_server.adapter.core.points import RawFamily


class SourceError(Exception):
    """The app could not be asked; the message is for people, without what a stranger must not know."""

    misconfigured = False
    """It answered, but not what its kind answers."""


class Unexpected(SourceError):
    """What came is not what the kind of target says."""

    misconfigured = True


class Answer(msgspec.Struct, array_like=True):
    """What an app said: one of these."""

    text: bytes = b""
    """Prometheus' text format or OpenMetrics, of this `content_type`; or JSON."""
    content_type: str = ""
    document: Any = None
    """Names and values, nested; the rule pack finds its way in it."""


class Source(Protocol):
    """Asks one app. Made when its target is declared, closed when that is gone; never used by two collections at
    once."""

    async def collect(self) -> Answer:
        """Asks once; raises SourceError. The caller cancels it when the target's time is over."""

    async def close(self) -> None:
        """Lets go of connections."""


class Listener(Protocol):
    """A source that is told."""

    address: str
    # It may have `reject`, which counts what was refused at once, and `use(pack)`, by which it is told of changed
    # rules; so may a Source.

    def drain(self) -> list[RawFamily]:
        """What was told so far, cumulative."""

    async def close(self) -> None:
        """Takes nothing more."""


Make = "Callable[[Spec], Source]"
"""Raises RetinueError with CAPABILITY_MISSING where a library is missing."""
