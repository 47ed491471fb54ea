"""What callers ask of the core, already translated from the wire; `limits.py` checks it."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from retinue_server.leaderelection.engine import EndReason

if TYPE_CHECKING:
    from retinue_server.leaderelection.engine import Record

DEFAULT_LEASE_MS = 15_000
DEFAULT_APP_LEASE_MS = 2_000


class Liveness(IntEnum):
    """Numbered as in the contract."""

    MESSAGE = 1
    STREAM = 2


class OnDisconnect(IntEnum):
    """Numbered as in the contract."""

    KEEP = 1
    RELEASE = 2


class Standing(Struct, frozen=True):
    """Who stands for what, and how."""

    election_id: str
    candidate_id: str
    session_id: str = ""
    value: str = ""
    lease_ms: int = DEFAULT_LEASE_MS
    app_lease_ms: int = DEFAULT_APP_LEASE_MS
    release_delay_ms: int = 0
    liveness: Liveness = Liveness.MESSAGE
    on_disconnect: OnDisconnect = OnDisconnect.KEEP
    proof_file: str = ""


class Token(NamedTuple):
    """A fencing token."""

    domain: str
    value: int


class Leadership(NamedTuple):
    """What a leader is told; `valid_ms` counts from before it sent the message with that sequence."""

    election_id: str
    candidate_id: str
    session_id: str
    token: Token
    valid_ms: int
    sequence: int


class View(Struct, frozen=True):
    """What others see of an election; without a record, nobody ever led."""

    election_id: str
    record: Record | None = None
    led: bool = False
    """Whether the record's lease is not over, as far as is known."""


class Standby(NamedTuple):
    """Event: the session stands by."""

    session_id: str
    view: View


class Elected(NamedTuple):
    """Event: the session leads."""

    leadership: Leadership


class Ack(NamedTuple):
    """Event: a heartbeat was read; None = the session does not lead."""

    sequence: int
    valid_ms: int | None


class AtRisk(NamedTuple):
    """Event: renewing fails."""

    left_ms: int


class StepDownRequested(NamedTuple):
    """Event: somebody asked the leader to step down."""


class Lost(NamedTuple):
    """Event: the session leads no more."""

    reason: EndReason


class Draining(NamedTuple):
    """Event: the server is stopping."""

    grace_ms: int


class Transition(NamedTuple):
    """What became of a term of this server: `elected`, `at risk`, `renewed` after that, or `ended`."""

    kind: str
    election_id: str
    candidate_id: str
    token: Token
    reason: EndReason = EndReason.UNKNOWN


Event = Standby | Elected | Ack | AtRisk | StepDownRequested | Lost | Draining

IsDead = Callable[[], bool]
"""Whether an app is proven dead."""
