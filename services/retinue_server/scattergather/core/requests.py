"""What a request asks, and what becomes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from retinue_server.scattergather.engine import Metadata  # noqa: TC001 - of a port's annotations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retinue_server.scattergather.core.pool import Topology
    from retinue_server.scattergather.core.topology import Shard


class Policy(msgspec.Struct, frozen=True):
    """What is good enough."""

    min_coverage: float = 1.0
    min_shards: int = 0
    soft_deadline_s: float | None = None
    first_k: int = 0
    no_hedge: bool = False

    @property
    def strict(self) -> bool:
        """Whether only all shards will do."""
        return self.min_coverage >= 1


STRICT = Policy()


class Coverage(NamedTuple):
    """In leaves; see the contract."""

    expected: int
    answered: int
    complete: bool


class Reply(msgspec.Struct, frozen=True):
    """A leaf's answer, unwrapped."""

    payload: bytes
    coverage: Coverage | None = None
    """None = all of the shard."""


class Malformed(Exception):
    """A reply that is none."""


class Question(Protocol):
    """What leaves are asked, and how their replies are read; knows the form that is on the wire."""

    def data(self, shards: Sequence[Shard], attempt: int) -> bytes:
        """The request for one shard, or for those of a batch."""

    def metadata(self, shards: Sequence[Shard], attempt: int) -> Metadata:
        """What goes with it."""

    def read(self, data: bytes) -> Reply:
        """Raises Malformed."""


class Ask(msgspec.Struct, frozen=True):
    """A request, checked."""

    pool_id: str
    scatter_id: str
    topology: Topology
    """The one that it sees, whatever changes meanwhile."""
    question: Question
    route_keys: tuple[str, ...] = ()
    shard_ids: tuple[str, ...] = ()
    input_ids: tuple[str, ...] | None = None
    """The shards that have an input of their own; None where all get the same."""
    policy: Policy = STRICT
    timeout_s: float | None = None
    """What the caller gives it; None = the pool's."""
    payload: bytes = b""
    """What every leaf is asked, for the merge of the user; empty where each is asked something else."""
    path: tuple[str, ...] = ()
    """The roots above."""
    parent_scatter_id: str = ""
    trace_id: str = ""


class Outcome(NamedTuple):
    """What became of a shard."""

    shard_id: str
    code: int
    message: str
    attempts: int
    coverage: Coverage | None


class Stats(NamedTuple):
    """What a request cost."""

    shards: int
    attempts: int
    hedges: int
    hedges_won: int
    retries: int
    gathered_bytes: int
    elapsed_s: float
    slowest_s: float
    slowest_shard_id: str


class Gathered(NamedTuple):
    """A request's end, before its replies are merged."""

    scatter_id: str
    version: int
    coverage: Coverage
    failures: list[Outcome]
    failed_by_code: dict[str, int]
    stats: Stats
