"""What is declared of a target."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from retinue_server.adapter.core.collection import Limits


class Kind(IntEnum):
    """What an app speaks; as in the contract."""

    PROMETHEUS = 1
    JSON = 2
    REDIS = 3
    MEMCACHED = 4
    POSTGRESQL = 5
    NGINX = 6
    STATSD = 7
    REPORT = 8
    OTLP = 9


TOLD = frozenset({Kind.STATSD, Kind.REPORT, Kind.OTLP})
"""Kinds that are not asked: they tell."""


class State(IntEnum):
    """How a target does; as in the contract."""

    PENDING = 1
    UP = 2
    DEGRADED = 3
    LIMITED = 4
    STALE = 5
    DOWN = 6
    MISCONFIGURED = 7


class Spec(msgspec.Struct, frozen=True):
    """All of it, with its defaults."""

    target_id: str
    kind: Kind
    endpoint: str = ""
    credentials_file: str = ""
    rule_pack: str = ""
    service: str = ""
    interval_s: float = 10.0
    timeout_s: float = 5.0
    limits: Limits = Limits()

    @property
    def own_labels(self) -> dict[str, str]:
        """The values of the reserved labels."""
        return {
            "instance": self.endpoint.rpartition("@")[2] or self.target_id,
            "kind": self.kind.name.lower(),
            "service": self.service or self.target_id,
            "target": self.target_id,
        }
