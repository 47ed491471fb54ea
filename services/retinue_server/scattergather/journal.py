"""What is told of requests: spans where traces go out, and a line with its shards for one that was slow."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from retinue_server.runtime import telemetry
from retinue_server.runtime.errors import Code
from retinue_server.scattergather.core.scatter import End, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from retinue_server.runtime.telemetry import Span
    from retinue_server.scattergather.core.pool import Topology
    from retinue_server.scattergather.core.requests import Reply
    from retinue_server.scattergather.core.scatter import Attempt, Part, Scatter
    from retinue_server.scattergather.engine import Metadata

_log = logging.getLogger(__name__)
_SLOWEST = 5
"""Of a request with more shards than have spans each, so many get one all the same."""
_TOLD = 256
"""Spans of such a request: when all is down, each of ten thousand calls fails."""
_SHOWN = 20
_NANOS = 1_000_000_000


def slow(scatter: Scatter) -> None:
    """Logs a request that took long, with the shards that made it so; never their payloads."""
    limit, known = scatter.topology.pool.slow_s, scatter.gathered
    if limit is None or known is None or known.stats.elapsed_s < limit:
        return
    ranked = sorted(scatter.attempts, key=lambda attempt: attempt.started_at - attempt.ended_at)[:_SHOWN]
    _log.warning(
        "pool %s: request %s took %.3f s, %s of %s leaves answered, %s\n%s",
        scatter.ask.pool_id,
        scatter.scatter_id,
        known.stats.elapsed_s,
        known.coverage.answered,
        known.coverage.expected,
        Code(scatter.code).name,
        "\n".join(_row(attempt, scatter.begun_at) for attempt in ranked),
    )


def _row(attempt: Attempt, begun_at: float) -> str:
    end = (attempt.end or End.LOST).name.lower()
    return (
        f"  {attempt.part.members[0].shard.shard_id:16} {attempt.replica.address:24} {attempt.kind.name.lower():8}"
        f" from {attempt.started_at - begun_at:.3f} s for {attempt.ended_at - attempt.started_at:.3f} s, {end}"
        f"{'' if attempt.end is End.WON else ' ' + Code(attempt.code).name}"
    )


class Trace:
    """One span for the request and, up to the pool's bound, one for each call; above it only for those that tell most.

    The root encloses its calls, so that they are its children; a hedge is linked with the call that it stands beside.
    """

    def __init__(self, topology: Topology, shards: int) -> None:
        pool = topology.pool
        self._pool_id, self._method = pool.pool_id, pool.method
        self._each = shards <= pool.max_traced_attempts
        attributes: dict[str, str | int] = {
            "retinue.scatter.pool": pool.pool_id,
            "retinue.scatter.shards": shards,
            "retinue.scatter.topology": topology.version,
        }
        self._begun_ns = time.time_ns()
        self._span = telemetry.tracer().span(f"scatter {pool.pool_id}", attributes=attributes, start_ns=self._begun_ns)
        context = telemetry.parse(self._span.traceparent)
        self._sampled = context is not None and context.sampled and telemetry.tracer().on
        passed = telemetry.TraceContext(context.trace_id, context.span_id, sampled=False) if context else None
        quiet = telemetry.format(passed) if passed and self._sampled else self._span.traceparent
        self._quiet: Metadata = (("traceparent", quiet),) if quiet else ()
        self._each = self._each and self._sampled

    def asked(self, attempt: Attempt) -> Metadata:
        if not self._each:
            return self._quiet
        attempt.trace = span = self._open(attempt, attempt.part.open if attempt.kind is Kind.HEDGE else ())
        return (("traceparent", span.traceparent),)

    def _open(self, attempt: Attempt, beside: Iterable[Attempt]) -> Span:
        """A span for a call, linked with those beside which it stands as a hedge."""
        links = [str(other.trace.traceparent) for other in beside if other.trace]  # type: ignore[attr-defined] # a Span
        attributes: dict[str, str | int] = {
            "rpc.system": "grpc",
            "rpc.method": self._method.rpartition("/")[2],
            "server.address": attempt.replica.address,
            "retinue.scatter.shard": attempt.part.members[0].shard.shard_id,
            "retinue.scatter.attempt": attempt.kind.name.lower(),
        }
        return telemetry.tracer().span(
            self._method[1:],
            self._span.traceparent,
            links=links,
            attributes=attributes,
            kind="client",
            start_ns=self._ns(attempt.started_at, attempt),
        )

    def _ns(self, when: float, attempt: Attempt) -> int:
        """Since the epoch, of a moment of the request."""
        return self._begun_ns + int((when - attempt.part.begun_at) * _NANOS)

    def answered(self, part: Part, attempt: Attempt, reply: Reply) -> None:
        """The end says it."""

    def failed(self, part: Part) -> None:
        """The end says it."""

    def ended(self, scatter: Scatter) -> None:
        if self._sampled:
            self._finish(scatter)
        error = scatter.error
        self._span.end(error=error.code.name if error and error.code is not Code.CANCELLED else "")

    def _finish(self, scatter: Scatter) -> None:
        known = scatter.gathered
        assert known is not None
        stats, covered = known.stats, known.coverage
        found: dict[str, str | float] = {
            "expected": covered.expected,
            "answered": covered.answered,
            "complete": covered.complete,
            "attempts": stats.attempts,
            "hedges": stats.hedges,
            "hedges_won": stats.hedges_won,
            "retries": stats.retries,
            "bytes": stats.gathered_bytes,
            "slowest_shard": stats.slowest_shard_id,
            **{f"failed.{code.lower()}": count for code, count in known.failed_by_code.items()},
        }
        for key, value in found.items():
            self._span.set(f"retinue.scatter.{key}", value)
        told = scatter.attempts if self._each else _telling(scatter.attempts)
        if not self._each:
            self._open_late(told)
        for attempt in told:
            _close(attempt, self._ns(attempt.ended_at, attempt))
        for attempt in told:
            attempt.trace = None

    def _open_late(self, told: Sequence[Attempt]) -> None:
        """Hedges last: what they stand beside has its span by then."""
        for attempt in sorted(told, key=lambda one: one.kind is Kind.HEDGE):
            others = [one for one in told if _beside(attempt, one)] if attempt.kind is Kind.HEDGE else ()
            attempt.trace = self._open(attempt, others)


def _beside(hedge: Attempt, other: Attempt) -> bool:
    """Whether the other was under way when the hedge began."""
    return other.part is hedge.part and other.started_at <= hedge.started_at <= other.ended_at


def _close(attempt: Attempt, end_ns: int) -> None:
    """A loser is no error."""
    span: Span = attempt.trace  # type: ignore[assignment] # it has been opened
    end = attempt.end or End.LOST
    span.set("retinue.scatter.outcome", end.name.lower())
    span.set("rpc.grpc.status_code", attempt.code)
    span.end(end_ns, Code(attempt.code).name if end is End.FAILED else "")


def _telling(attempts: Sequence[Attempt]) -> list[Attempt]:
    slowest = sorted(attempts, key=lambda attempt: attempt.started_at - attempt.ended_at)[:_SLOWEST]
    others = [
        attempt
        for attempt in attempts
        if attempt.end is End.FAILED or attempt.kind is not Kind.PRIMARY or attempt.part.hedges
    ]
    return list(dict.fromkeys((*slowest, *others)))[:_TOLD]
