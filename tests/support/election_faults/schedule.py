"""Which faults are played, and when: drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Container, Iterator
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What is done."""

    KILL_APP = "kill app"
    KILL_PROVEN = "kill app, death proven"
    KILL_SERVER = "kill server"
    STOP_APP = "stop app"
    """SIGSTOP beyond both leases, then SIGCONT."""
    STOP_SERVER = "stop server"
    RESIGN = "resign"
    STEP_DOWN = "step down"
    APP_CLOCK = "app's clock"
    """Killed, and started with another clock; this is about what comes afterwards, with the faults to come."""
    SERVER_CLOCK = "server's clock"
    CUT_APP = "cut app - server"
    LATE_APP = "late replies server - app"
    HELD_APP = "held replies server - app"
    HALF_OPEN_APP = "half-open app - server"
    CUT_ENGINE = "cut server - engine"
    LATE_ENGINE = "late replies engine - server"
    HELD_ENGINE = "held replies engine - server"
    HALF_OPEN_ENGINE = "half-open server - engine"
    STOP_ENGINE = "stop engine"
    RESTART_ENGINE = "restart engine"
    CRASH_ENGINE = "crash engine"
    TERMINATE_BACKENDS = "terminate backends"


LINK = frozenset({Kind.CUT_ENGINE, Kind.LATE_ENGINE, Kind.HELD_ENGINE, Kind.HALF_OPEN_ENGINE})
"""Between server and engine, where there is a connection."""
OF_ENGINE = frozenset({Kind.STOP_ENGINE, Kind.RESTART_ENGINE, Kind.CRASH_ENGINE, Kind.TERMINATE_BACKENDS})
"""What an engine alone can suffer, if it says how."""
_OFTEN = (Kind.KILL_APP, Kind.KILL_PROVEN, Kind.KILL_SERVER, Kind.RESIGN, Kind.STEP_DOWN)
_LONG = frozenset({Kind.STOP_APP, Kind.STOP_SERVER})


class Step(NamedTuple):
    """One fault: after a pause, for a while."""

    pause_s: float
    kind: Kind
    lasts: float
    """In engine leases."""
    pick: float
    """Below 0.8 the leader is hit; otherwise one of the others."""


def schedule(seed: int, kinds: Container[Kind]) -> Iterator[Step]:
    """Endless: decks with each of the kinds, those that cost little time twice, each deck shuffled."""
    chance = random.Random(seed)
    deck = [kind for kind in (*Kind, *_OFTEN) if kind in kinds]
    while True:
        chance.shuffle(deck)
        for kind in deck:
            lasts = 1.7 if kind in _LONG else chance.choice((0.1, 0.3, 0.6, 1.7))
            yield Step(chance.uniform(0.0, 0.4), kind, lasts, chance.random())
