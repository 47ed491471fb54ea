"""Which faults are played, and when: drawn from a seed, so that a run can be repeated."""

from __future__ import annotations

import random
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What is done."""

    KILL_SERVER = "kill server"
    STOP_SERVER = "stop server"
    """SIGSTOP, then SIGCONT."""
    KILL_WORKER = "kill worker"
    STOP_WORKER = "stop worker"
    KILL_PRODUCER = "kill producer"
    CUT = "cut connections"
    DELAY = "delay"
    TRICKLE = "trickle"
    REPLIES_ONLY = "replies only"
    REQUESTS_ONLY = "requests only"
    HALF_OPEN = "half-open"


class Step(NamedTuple):
    """One fault: after a pause, for a while."""

    pause_s: float
    kind: Kind
    lasts_s: float
    pick: float
    """Which of several targets, in [0, 1)."""


_BESIDE = {
    Kind.STOP_SERVER: 2,
    Kind.KILL_WORKER: 10,
    Kind.STOP_WORKER: 4,
    Kind.KILL_PRODUCER: 2,
    Kind.CUT: 4,
    Kind.DELAY: 2,
    Kind.TRICKLE: 2,
    Kind.REPLIES_ONLY: 2,
    Kind.REQUESTS_ONLY: 3,
    Kind.HALF_OPEN: 2,
}
"""Weights of what happens between two kills of the server."""


def schedule(seed: int) -> Iterator[Step]:
    """Endless: every other fault kills the server, under load that has had time to build up."""
    chance = random.Random(seed)
    while True:
        yield Step(chance.uniform(0.2, 0.9), Kind.KILL_SERVER, chance.choice((0.0, 0.0, 0.3)), chance.random())
        [kind] = chance.choices(list(_BESIDE), list(_BESIDE.values()))
        lasts_s = chance.choice((0.1, 0.3, 0.6, 2.5 if kind == Kind.STOP_WORKER else 1.0))
        yield Step(chance.uniform(0.0, 0.2), kind, lasts_s, chance.random())
