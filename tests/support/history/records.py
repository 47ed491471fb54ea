"""The lines of a history.

`at` is nanoseconds of CLOCK_BOOTTIME, `who` the process, `n` its own number of the call.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec
from msgspec import Struct


class Op(StrEnum):
    """What was asked."""

    ENQUEUE = "enqueue"
    LEASE = "lease"
    EXTEND = "extend"
    COMPLETE = "complete"
    FAIL = "fail"
    RELEASE = "release"
    REDRIVE = "redrive"


class Outcome(StrEnum):
    """How a call as a whole was answered."""

    OK = "ok"
    """Item by item: those that are not named as refused took effect."""
    REFUSED = "refused"
    """Nothing took effect."""
    UNKNOWN = "unknown"
    """The answer was lost, or leaves it open."""


class Item(Struct, frozen=True, omit_defaults=True):
    """One thing of a batch."""

    task: str
    epoch: int = 0
    """Which lease of the task; 0 where none is meant."""
    lasts_ms: int = 0
    """Extensions: how long from now."""
    follow_ups: int = 0
    """Completions: how many come with it."""
    final: bool = False
    """Failures: no other attempt."""


class Call(Struct, frozen=True, omit_defaults=True, tag="call"):
    """About to be sent. One message on a stream that carries several kinds is several calls."""

    at: int
    who: str
    n: int
    op: Op
    items: tuple[Item, ...] = ()
    stream: int = 0
    """The number of the stream that it goes over; 0 = a call of its own."""


class Reply(Struct, frozen=True, omit_defaults=True, tag="reply"):
    """What came back; of a stream, how it ended."""

    at: int
    who: str
    n: int
    outcome: Outcome
    refused: dict[int, str] = {}
    """With OK: the reasons by the number of the item."""
    reason: str = ""
    """With REFUSED and UNKNOWN."""


class Grant(Struct, frozen=True, omit_defaults=True):
    """A lease that came."""

    task: str
    epoch: int
    attempt: int
    lasts_ms: int


class Leased(Struct, frozen=True, omit_defaults=True, tag="leased"):
    """Leases came; `n` is the call or the stream that they came on."""

    at: int
    who: str
    n: int
    since: int
    """Before this they can't have been granted: when the call, or the credit that they use up, was sent."""
    leases: tuple[Grant, ...]


class Fault(Struct, frozen=True, omit_defaults=True, tag="fault"):
    """Something was done to a process or a connection.

    The kinds that checkers know: `kill` of a `server` (the old one writes nothing any more) and `start` of it (before
    the new one runs). The others are for the reader.
    """

    at: int
    who: str
    kind: str
    target: str


Event = Call | Reply | Leased | Fault


class TaskRecord(Struct, frozen=True, omit_defaults=True):
    """A task as it stood at the end."""

    task: str
    state: str
    """The contract's name without its prefix."""
    attempt: int = 0
    lease_expirations: int = 0
    lease_epoch: int = 0
    parent: str = ""
    parent_epoch: int = 0
    """The lease under which its parent was completed, as the completing worker wrote it into a label."""
    result: str | None = None
    """The lease that it was completed under, as the completing worker wrote it there; None = not looked at."""


decode = msgspec.json.Decoder(Event).decode
encode = msgspec.json.Encoder().encode
