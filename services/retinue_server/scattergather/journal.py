"""What is told of requests: spans where traces go out, and a line with its shards for one that was slow."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from retinue_server.runtime import telemetry
from retinue_server.runtime.errors import Code
from retinue_server.scattergather.core.scatter import End, Kind

if TYPE_CHECKING:
    from retinue_server.runtime.telemetry import Span
    from retinue_server.scattergather.core.pool import Topology
    from retinue_server.scattergather.core.requests import Reply
    from retinue_server.scattergather.core.scatter import Attempt, Part, Scatter
    from retinue_server.scattergather.engine import Metadata

_log = logging.getLogger(__name__)
_SLOWEST = 5
"""Of a request with more shards than have spans each, so many get one all the same."""
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
        self._span = telemetry.tracer().span(f"scatter {pool.pool_id}", attributes=attributes)
        context = telemetry.parse(self._span.traceparent)
        self.trace_id = context.trace_id if context else ""
        self._sampled = context is not None and context.sampled and telemetry.tracer().on
        passed = telemetry.TraceContext(context.trace_id, context.span_id, sampled=False) if context else None
        quiet = telemetry.format(passed) if passed and self._sampled else self._span.traceparent
        self._quiet: Metadata = (("traceparent", quiet),) if quiet else ()
        self._each = self._each and self._sampled

    def asked(self, attempt: Attempt) -> Metadata:
        if not self._each:
            return self._quiet
        attempt.trace = span = self._open(attempt)
        return (("traceparent", span.traceparent),)

    def _open(self, attempt: Attempt, start_ns: int | None = None) -> Span:
        links = [str(other.trace.traceparent) for other in attempt.part.open if other.trace]  # type: ignore[attr-defined] # a Span
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
            start_ns=start_ns,
        )

    def answered(self, part: Part, attempt: Attempt, reply: Reply) -> None:
        """The end says it."""

    def failed(self, part: Part) -> None:
        """The end says it."""

    def ended(self, scatter: Scatter) -> None:
        if self._sampled:
            self._finish(scatter)
        self._span.end()

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
        base = scatter.wall_ms * 1_000_000
        told = scatter.attempts if self._each else _telling(scatter.attempts)
        for attempt in told:
            start = base + int((attempt.started_at - scatter.begun_at) * _NANOS)
            end = base + int((attempt.ended_at - scatter.begun_at) * _NANOS)
            span: Span = attempt.trace or self._open(attempt, start)  # type: ignore[assignment] # a Span
            attempt.trace = None
            _close(span, attempt, max(start, end))


def _close(span: Span, attempt: Attempt, end_ns: int) -> None:
    """A loser is no error."""
    end = attempt.end or End.LOST
    span.set("retinue.scatter.outcome", end.name.lower())
    span.set("rpc.grpc.status_code", attempt.code)
    span.end(end_ns, Code(attempt.code).name if end is End.FAILED else "")


def _telling(attempts: list[Attempt]) -> list[Attempt]:
    slowest = sorted(attempts, key=lambda attempt: attempt.started_at - attempt.ended_at)[:_SLOWEST]
    return [
        attempt
        for attempt in attempts
        if attempt.end is End.FAILED or attempt.kind is not Kind.PRIMARY or attempt.part.hedged or attempt in slowest
    ]
