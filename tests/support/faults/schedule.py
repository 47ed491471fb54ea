"""Which faults are played, and when: drawn from a seed, so that a run can be repeated."""

from __future__ import annotations

import random
from collections.abc import Container, Iterator
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
    TERMINATE_BACKENDS = "terminate backends"
    """pg_terminate_backend for all connections of the coordinators."""
    RESTART_DATABASE = "restart database"
    CRASH_DATABASE = "crash database"
    """An immediate stop; then it recovers."""


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
    Kind.TERMINATE_BACKENDS: 6,
    Kind.RESTART_DATABASE: 2,
    Kind.CRASH_DATABASE: 2,
}
"""Weights of what happens between two kills of a server."""
_OF_ENGINES = (Kind.TERMINATE_BACKENDS, Kind.RESTART_DATABASE, Kind.CRASH_DATABASE)


def schedule(seed: int, of_engine: Container[Kind] = ()) -> Iterator[Step]:
    """Endless: every other fault kills a server, under load that has had time to build up.

    Of the faults that an engine alone can suffer those are played that it names.
    """
    chance = random.Random(seed)
    beside = {kind: weight for kind, weight in _BESIDE.items() if kind not in _OF_ENGINES or kind in of_engine}
    while True:
        yield Step(chance.uniform(0.2, 0.9), Kind.KILL_SERVER, chance.choice((0.0, 0.0, 0.3)), chance.random())
        [kind] = chance.choices(list(beside), list(beside.values()))
        lasts_s = chance.choice((0.1, 0.3, 0.6, 2.5 if kind == Kind.STOP_WORKER else 1.0))
        yield Step(chance.uniform(0.0, 0.2), kind, lasts_s, chance.random())
