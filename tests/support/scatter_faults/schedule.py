"""Which faults are played, and when: drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What is done."""

    SLOW = "slow leaf"
    RACE = "leaf as slow as its hedge"
    FAIL = "errors"
    FLAP = "flapping leaf"
    STALL = "headers, then nothing"
    OVERSIZE = "replies too large"
    CORRUPT = "corrupt replies"
    PART = "half answers"
    OVERLOADED = "overloaded leaf"
    REFUSES = "leaf refuses"
    CUT = "cut connections"
    REFUSED = "connections refused"
    HALF_OPEN = "nothing passes"
    FIRST_BYTE = "first byte, then nothing"
    LATE = "late replies"
    HELD = "replies held back"
    TRICKLE = "trickle"
    KILL = "kill leaves"
    STOP = "stop leaves"
    SHRINK = "pool file: one replica less"
    MISDIRECT = "pool file: a shard points elsewhere"
    KILL_ROOT = "kill root"


OF_HOUSE = frozenset({Kind.KILL, Kind.STOP})
"""They hit a process with its leaves."""
OF_POOLS = frozenset({Kind.SHRINK, Kind.MISDIRECT})
"""They hit a shard, in every pool."""
_RARE = frozenset({Kind.KILL_ROOT})


class Step(NamedTuple):
    """One fault: after a pause, for a while; others go on meanwhile."""

    pause_s: float
    kind: Kind
    lasts_s: float
    pick: float
    """Which of several targets, in [0, 1)."""


def schedule(seed: int) -> Iterator[Step]:
    """Endless: decks with each of the kinds, most of them twice, each deck shuffled."""
    chance = random.Random(seed)
    deck = [kind for kind in Kind for _ in range(1 if kind in _RARE else 2)]
    while True:
        chance.shuffle(deck)
        for kind in deck:
            yield Step(chance.uniform(0.0, 0.6), kind, chance.choice((0.3, 0.8, 2.0, 4.0)), chance.random())
