"""The ports: calls to leaves, and whom discovery finds. Neither knows of merging, policies or retries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Metadata = tuple[tuple[str, str], ...]


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How leaves are checked, and by which certificate the root shows itself. Files are read anew when they change."""

    ca_file: str = ""
    """Empty takes the system's certificate authorities."""
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""
    """The name that certificates must have, where it is not the address's host."""


class Target(msgspec.Struct, frozen=True):
    """Whom to call, and how: equal targets share a connection."""

    address: str
    """HOST:PORT or unix:PATH."""
    method: str
    """/package.Service/Method."""
    max_reply_bytes: int
    tls: Tls | None = None
    stream: bool = False
    """Whether queries go over one stream (LeafService.QueryStream), and not each by a call."""


class Done(Protocol):
    """Is told how a call ended."""

    def __call__(self, code: int, message: str, reply: bytes | None, /) -> None:
        """A canonical code, what was said with it, and the reply's bytes if the code is 0."""


class Line(Protocol):
    """A way to one endpoint, connected as long as it is open."""

    connected: bool
    """Whether a call would be sent at once."""

    def call(self, data: bytes, timeout_s: float, metadata: Metadata, done: Done) -> Callable[[], None]:
        """Begins a call; gives what cancels it.

        `done` is called once, on the event loop and never within `call`; after a cancellation it may be called or not.
        A connection that can't be made fails with UNAVAILABLE; a reply over `max_reply_bytes` with RESOURCE_EXHAUSTED.
        """

    def close(self) -> None:
        """Ends the connection, and with it the calls that are under way."""


class Leaves(Protocol):
    """Opens lines. A part of the process: between `start` and `stop`."""

    def open(self, target: Target, changed: Callable[[], None]) -> Line:
        """Begins to connect, and goes on until the line is closed; `changed` is called when `connected` does change."""

    async def start(self) -> None:
        """Ready to open lines."""

    async def stop(self) -> None:
        """Closes what is still open."""


class Discovery(Protocol):
    """Finds the addresses of one name, again and again."""

    def watch(self, name: str, found: Callable[[Sequence[str]], None]) -> Callable[[], None]:
        """Calls `found` with all addresses, HOST:PORT, sorted and each once; gives what ends it.

        It is called at first and whenever they changed, with none if there are none any more. While nothing can be
        found out, which is another matter, what was found last stands, and the log says so once. `found` is called on
        the event loop and never within `watch`.
        """

    async def start(self) -> None:
        """Ready to watch."""

    async def stop(self) -> None:
        """Ends all watching."""


class UserMerge(Protocol):
    """One merge by the user's MergeService."""

    def add(self, shard_id: str, payload: bytes) -> None:
        """A reply; where they are not streamed, in the order in which they are to be merged."""

    async def finish(self, expected: int, answered: int, *, complete: bool) -> bytes:
        """The answer, after the last reply; raises RetinueError."""

    def cancel(self) -> None:
        """Nobody waits for the answer; also after it has come."""


class UserMerges(Protocol):
    """Calls MergeServices. A part of the process."""

    def begin(self, address: str, pool_id: str, payload: bytes, *, timeout_s: float, stream: bool) -> UserMerge:
        """A merge whose answer must have come within `timeout_s`."""

    async def start(self) -> None:
        """Ready to call."""

    async def stop(self) -> None:
        """Ends what is still open."""
