"""Which faults are played, and when: drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What is done."""

    WEIGHTS = "weights"
    POLICY = "policies"
    CERTIFICATES = "certificates"
    UNREADABLE = "certificates that can't be read"
    REFUSED = "a certificate that Envoy refuses"
    FAILS = "a server fails"
    HANGS = "a server hangs"
    CUTS = "a server breaks off"
    GONE = "a server is gone"
    KILL_ENVOY = "kill Envoy"
    KILL_CONTROL = "kill the control plane"


OF_SERVERS = frozenset({Kind.FAILS, Kind.HANGS, Kind.CUTS, Kind.GONE})
"""They hit upstreams of their own; whoever else is hit by them is a finding."""


class Step(NamedTuple):
    """One fault: after a pause, for a while."""

    pause_s: float
    kind: Kind
    lasts_s: float
    pick: float
    """Whatever else is drawn, in [0, 1)."""


def schedule(seed: int, kinds: Iterable[Kind]) -> Iterator[Step]:
    """Endless: decks with each of the kinds, each deck shuffled."""
    chance = random.Random(seed)
    deck = sorted(kinds)
    while True:
        chance.shuffle(deck)
        for kind in deck:
            yield Step(chance.uniform(0.0, 0.3), kind, chance.choice((0.3, 0.6, 1.2)), chance.random())
