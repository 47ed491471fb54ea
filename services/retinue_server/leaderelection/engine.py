"""The port of leader election: what a store must do, each method one atomic step, and what it tells.

A store holds one record per election, for ever: `epoch` is the token, and it must not begin again. Version numbers are
compared for equality alone. Nothing here depends on the wall clock; instants of it are stored for people.

Every method but `watch` and `unwatch` raises `Unavailable` when the store can't be reached or does not answer in time:
then whether it took effect is not known. All are safe to repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

from msgspec import Struct

TERMS_KEPT = 64
"""How many past terms of an election a store remembers; the contract promises 16."""


class Scope(IntEnum):
    """How far leadership reaches; numbered as ElectionScope in the contract."""

    PROCESS = 1
    HOST = 2
    CLUSTER = 3


class Capabilities(Struct, frozen=True):
    """What a store can do."""

    engine: str
    scope: Scope
    min_lease_ms: int = 1_000
    poll_ms: int = 1_000
    """How often to look again while somebody waits, whether or not a change was told."""


class EndReason(IntEnum):
    """Why a term ended; numbered as in the contract."""

    UNKNOWN = 0
    RESIGNED = 1
    APP_SILENT = 2
    APP_DEAD = 3
    DISCONNECTED = 4
    UNHEALTHY = 5
    STEPPED_DOWN = 6
    ENGINE_LOST = 7
    SERVER_STOPPED = 8
    EXPIRED = 9


class Claim(Struct, frozen=True):
    """A candidate who wants to lead."""

    election_id: str
    candidate_id: str
    session_id: str
    """Unique to the candidate and secret: by it the store knows its holder again."""
    value: str
    lease_ms: int
    release_delay_ms: int
    """What the next one waits if this term runs out in the store."""
    wall_ms: int
    """When it was made, for people."""


class Record(Struct, frozen=True):
    """An election as the store has it."""

    election_id: str
    domain: str
    """Within which epochs compare."""
    epoch: int
    """The token of the present term, or of the last one."""
    version: str
    """Another one after every change, renewals included."""
    candidate_id: str = ""
    """Who leads; empty = nobody."""
    session_id: str = ""
    value: str = ""
    lease_ms: int = 0
    release_delay_ms: int = 0
    acquire_ms: int = 0
    """Wall time, for people."""
    step_down: bool = False
    """Somebody asked the leader to step down."""
    left_ms: int | None = None
    """What is left of the lease, where the store can tell (0 = it is over); None = who wants to know must watch."""


class Hold(NamedTuple):
    """A term that this server holds."""

    election_id: str
    session_id: str
    epoch: int


class Granted(NamedTuple):
    """The claimant leads. If it did already, its lease begins again."""

    record: Record
    delay_ms: int = 0
    """What to wait before acting: the release delay of a term that ran out."""


class Refused(NamedTuple):
    """Somebody else leads, or is before the claimant in line."""

    record: Record | None


class Term(Struct, frozen=True):
    """A term, for the history. Times are wall times, for people."""

    epoch: int
    domain: str
    candidate_id: str
    acquire_ms: int
    end_ms: int | None = None
    reason: EndReason = EndReason.UNKNOWN


class Engine(Protocol):
    """A store of elections."""

    capabilities: Capabilities

    async def start(self) -> None:
        """Returns when it can serve; raises what keeps it from that."""

    async def stop(self) -> None:
        """Frees what it uses. Holds stay as they are, to run out."""

    def listen(self, told: Callable[[str], None]) -> None:
        """Whom to call, on the event loop, with the name of a watched election when it may have changed."""

    def watch(self, election_id: str) -> None:
        """Begins to tell of changes; they come soon, may come twice, and may be missed (`poll_ms`)."""

    def unwatch(self, election_id: str) -> None:
        """Ends that."""

    async def claim(self, claim: Claim, watched: str | None = None) -> Granted | Refused:
        """Makes the claimant leader, with the next epoch, if nobody leads or the lease is over.

        `watched` is the version of a record that the caller has seen unchanged for longer than its lease: if it is
        still that, it is over. A claimant whose session leads already is granted the same term, renewed. A store that
        keeps a line remembers a refused claimant until it withdraws or its lease there runs out; claim again.
        """

    async def withdraw(self, election_id: str, session_id: str) -> None:
        """Leaves the line, if the store keeps one."""

    async def renew(self, holds: Sequence[Hold]) -> Sequence[Record | None]:
        """Begins the leases of terms again, all in as few writes as it can; None for what is no longer held."""

    async def release(self, hold: Hold, reason: EndReason, wall_ms: int) -> bool:
        """Ends a term, so that the next claim succeeds; whether it was still held."""

    async def proclaim(self, hold: Hold, value: str) -> Record | None:
        """Publishes a value; None if the term is no longer held."""

    async def ask_step_down(self, election_id: str, epoch: int) -> Record | None:
        """Marks the term; the record as it is then. None if nobody leads under that epoch."""

    async def read(self, election_id: str) -> Record | None:
        """The record, not older than the call; None before the first claim."""

    async def records(self, after: str, limit: int) -> Sequence[Record]:
        """Records by name, behind that one."""

    async def terms(self, election_id: str, before: int | None, limit: int) -> Sequence[Term]:
        """Terms with an epoch below `before`, the latest first; the present one among them."""
