"""What a leaf can be told to do with calls."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct


class Kind(StrEnum):
    """How it ends a call."""

    ANSWER = "answer"
    PART = "part"
    """It answers for half of its shard."""
    FAIL = "fail"
    FLAP = "flap"
    """Every other call fails."""
    STALL = "stall"
    """Headers, and then nothing until the call is cancelled."""
    OVERSIZE = "oversize"
    CORRUPT = "corrupt"


class Behaviour(Struct, frozen=True):
    """Until it is told otherwise."""

    kind: Kind = Kind.ANSWER
    delay_s: float = 0.0
    """Before it does anything."""
    code: int = 14
    """With FAIL and FLAP."""
    size: int = 0
    """With OVERSIZE: bytes beside the answer."""
