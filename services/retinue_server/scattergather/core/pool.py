"""A pool at work: its topology, what its calls take, and what it has under way."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from retinue_server.scattergather.core.rules import LatencyWindow, TokenBucket

if TYPE_CHECKING:
    from retinue_server.scattergather.core.replicas import Replica
    from retinue_server.scattergather.core.topology import Pool, Shard
    from retinue_server.scattergather.core.turns import Turns

_SHEDDING_S = 0.1
"""How long after a refusal nothing is hedged."""


class Member(msgspec.Struct, frozen=True):
    """A shard, its place in the pool's order, and who serves it."""

    place: int
    shard: Shard
    replicas: tuple[Replica, ...]


class Topology(msgspec.Struct, frozen=True):
    """What one request sees of a pool from its beginning to its end."""

    pool: Pool
    version: int
    members: tuple[Member, ...]


class LivePool:
    """What outlives a request: latencies, budget, counts. On the event loop only."""

    def __init__(self, topology: Topology, turns: Turns, share: int = 1) -> None:
        self.topology, self.turns = topology, turns
        self._share = share
        self.latencies = LatencyWindow()
        self.budget = self._bucket()
        self.open_calls = self.unsent = self.running = 0
        """Shards asked and not answered; those of them that are not asked yet; requests."""
        self.shed_at = float("-inf")
        self.draw = random.random  # spreads load; nothing secret
        self.ended: Counter[str] = Counter()
        """Requests by end: complete, partial, or the name of a code."""
        self.attempts: Counter[tuple[str, str]] = Counter()
        """Calls by kind and outcome."""
        self.expected = self.answered = 0
        """Leaves, over all requests."""
        self.denied = 0
        """Hedges and retries that the budget did not allow."""
        self.overhead_s = self.straggler_s = 0.0
        self.measured = 0

    def update(self, topology: Topology) -> None:
        """The pool from now on; what was learnt stays. Requests under way keep the topology that they saw."""
        if topology.pool.budget != self.topology.pool.budget:
            self.topology = topology
            self.budget = self._bucket()
        self.topology = topology

    def _bucket(self) -> TokenBucket:
        said = self.topology.pool.budget
        return TokenBucket(said.ratio, said.burst / self._share)

    @property
    def pool(self) -> Pool:
        """Its settings."""
        return self.topology.pool

    def admits(self, calls: int) -> bool:
        """Whether a request with so many calls may begin: one may always, beside others only within the limits.

        What is to be sent may be more than `max_unsent` if nothing else is.
        """
        limits = self.pool.limits
        if not self.running:
            return True
        return self.open_calls + calls <= limits.max_calls // self._share and (
            not self.unsent or self.unsent + calls <= limits.max_unsent // self._share
        )

    def hedge_delay_s(self, now: float) -> float | None:
        """When a slow call gets company; None while none does."""
        said = self.pool.hedging
        if not (said.enabled and self.pool.idempotent) or now - self.shed_at < _SHEDDING_S:
            return None
        if len(self.latencies) < said.min_samples:
            return None
        return max(said.min_delay_s, self.latencies.quantile(said.quantile))
