"""Between the contract's messages and the core's records. What is malformed is named in `violations`, never guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue.scattergather.v1 import coverage_pb2 as coverage_pb
from retinue.scattergather.v1 import leaf_service_pb2 as leaf
from retinue.scattergather.v1 import scattergather_service_pb2 as api
from retinue.scattergather.v1 import topology_pb2 as topology_pb
from retinue.scattergather.v1 import topology_service_pb2 as topology_api
from retinue_server.runtime import wire
from retinue_server.runtime.codec import MAX_REPLY_BYTES
from retinue_server.runtime.errors import Code, Reason, Violation
from retinue_server.runtime.status import shorten
from retinue_server.scattergather import framing, json_values
from retinue_server.scattergather.core import limits, merges
from retinue_server.scattergather.core.requests import Policy
from retinue_server.scattergather.core.scatter import End, Kind, ScatterError
from retinue_server.scattergather.core.scatter import outcome as outcome_of
from retinue_server.scattergather.core.topology import GIVES_JSON, MergeKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.message import Message
    from google.protobuf.struct_pb2 import Value

    from retinue_server.scattergather.core.pool import Member, Topology
    from retinue_server.scattergather.core.requests import Coverage, Gathered, Outcome, Stats
    from retinue_server.scattergather.core.root import Answer, Plan, Recent
    from retinue_server.scattergather.core.scatter import Attempt, Part

_MAX_ATTEMPTS = 256
_MAX_DETAIL_BYTES = 3072
_DETAILS_BYTES = 4096
"""For the message, 512 bytes of other details, and what is missing."""
_ENOUGH = 100
"""Violations after which inputs are not looked at any more: there may be a million."""
_CERTAINLY_SMALL = 128 * 1024
"""Replies that fit in a message whatever is made of them; of more, it is looked at."""


class Reader:
    """Reads one request; `violations` has what was wrong with it."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def inputs(self, request: api.ScatterRequest) -> tuple[framing.Inputs, tuple[str, ...] | None]:
        """What each shard is asked, and the shards that have an input of their own."""
        kind = request.WhichOneof("input")
        if kind == "shard_inputs":
            each = {one.shard_id: self._input(one, i) for i, one in enumerate(request.shard_inputs.inputs)}
            return framing.Inputs(by_shard=each), tuple(one.shard_id for one in request.shard_inputs.inputs)
        if kind == "json":
            return framing.Inputs(self._json(request.json, "json")), None
        return framing.Inputs(self._sized(request.payload, "payload")), None

    def _input(self, one: api.ShardInput, index: int) -> bytes:
        if len(self.violations) > _ENOUGH:
            return b""
        field = f"shard_inputs.inputs[{index}]"
        if one.WhichOneof("input") == "json":
            return self._json(one.json, f"{field}.json")
        return self._sized(one.payload, f"{field}.payload")

    def _json(self, value: Value, field: str) -> bytes:
        return self._sized(json_values.text(value, field, self.violations), field)

    def _sized(self, data: bytes, field: str) -> bytes:
        if len(data) > limits.MAX_PAYLOAD_BYTES:
            self.violations.append(Violation(field, f"must be at most {limits.MAX_PAYLOAD_BYTES} bytes"))
        return data

    def policy(self, said: api.ScatterPolicy) -> Policy:
        """What is good enough."""
        soft = None
        if said.HasField("soft_deadline_duration"):
            field = "policy.soft_deadline_duration"
            soft = wire.duration_ms(said.soft_deadline_duration, field, self.violations) / 1000
        return Policy(
            min_coverage=said.min_coverage if said.HasField("min_coverage") else 1.0,
            min_shards=said.min_shards,
            soft_deadline_s=soft,
            first_k=said.first_k,
            no_hedge=said.no_hedge,
        )


def duration(seconds: float) -> Duration:
    """Of a span in seconds, exact to the microsecond."""
    found = wire.to_duration(0)
    micros = max(round(seconds * 1_000_000), 0)
    found.seconds, rest = divmod(micros, 1_000_000)
    found.nanos = rest * 1000
    return found


def coverage(known: Coverage) -> coverage_pb.Coverage:
    """How much of the pool."""
    return coverage_pb.Coverage(expected=known.expected, answered=known.answered, complete=known.complete)


def outcome(known: Outcome) -> coverage_pb.ShardOutcome:
    """What became of a shard."""
    return coverage_pb.ShardOutcome(
        shard_id=known.shard_id,
        code=known.code,
        message=known.message,
        attempts=known.attempts,
        coverage=coverage(known.coverage) if known.coverage is not None else None,
    )


def shard_reply(part: Part, index: int, attempt: Attempt, payload: bytes | None, *, as_json: bool) -> api.ShardReply:
    """What a shard said, unless that is left out; raises ScatterError for what no message holds."""
    known = outcome_of(part, index)
    said = api.ShardReply(
        reply=api.CollectedReply(shard_id=known.shard_id),
        outcome=outcome(known),
        elapsed_duration=duration(attempt.ended_at - part.begun_at),
        address=attempt.replica.address,
    )
    if payload is None:
        return said
    if as_json:
        said.reply.json.CopyFrom(_value(merges.parsed(payload), None))
    else:
        said.reply.payload = payload
    what = f"pass on the reply of {known.shard_id}"
    _check_size(said, len(payload), what, "set omit_payloads, or let leaves say less", None)
    return said


def summary(topology: Topology) -> topology_api.PoolSummary:
    """A pool in a list."""
    said, members = topology.pool, topology.members
    return topology_api.PoolSummary(
        pool_id=said.pool_id,
        merge=topology_pb.Merge.ValueType(said.merging.kind),
        shards=len(members),
        reachable_shards=sum(any(replica.line.connected for replica in member.replicas) for member in members),
        endpoints=len({replica.address for member in members for replica in member.replicas}),
        topology_version=topology.version,
        method=said.method,
    )


def stats(known: Stats) -> api.ScatterStats:
    """What a request cost."""
    return api.ScatterStats(
        shards=known.shards,
        attempts=known.attempts,
        hedges=known.hedges,
        hedges_won=known.hedges_won,
        retries=known.retries,
        gathered_bytes=known.gathered_bytes,
        elapsed_duration=duration(known.elapsed_s),
        slowest_duration=duration(known.slowest_s),
        slowest_shard_id=known.slowest_shard_id,
    )


def answer(found: Answer) -> api.ScatterResponse:
    """A request that succeeded; raises ScatterError for a result that no message holds."""
    response = answer_without_output(found)
    known = found.gathered
    if found.kind in GIVES_JSON:
        response.json.CopyFrom(_value(found.result, known))
    elif found.kind is MergeKind.COLLECT:
        response.collected.SetInParent()
        response.collected.replies.extend(_collected(found))
    else:
        response.payload = found.result
    advice = "ask for less, or fewer shards, or by ScatterStream with omit_output"
    _check_size(response, max(known.stats.gathered_bytes, len(response.payload)), "answer", advice, known)
    return response


def answer_without_output(found: Answer) -> api.ScatterResponse:
    """What became of a request that succeeded."""
    known = found.gathered
    return api.ScatterResponse(
        coverage=coverage(known.coverage),
        failures=[outcome(failure) for failure in known.failures],
        failed_by_code=known.failed_by_code,
        topology_version=known.version,
        stats=stats(known.stats),
        scatter_id=known.scatter_id,
    )


def _collected(found: Answer) -> Iterable[api.CollectedReply]:
    members, as_json = found.topology.members, found.topology.pool.merging.json_replies
    for place, payload in found.result:
        shard_id = members[place].shard.shard_id
        if as_json:
            yield api.CollectedReply(shard_id=shard_id, json=_value(merges.parsed(payload), found.gathered))
        else:
            yield api.CollectedReply(shard_id=shard_id, payload=payload)


def _value(plain: object, known: Gathered | None) -> Value:
    try:
        return json_values.message(plain)
    except ValueError as error:
        failure = ScatterError(Code.INTERNAL, f"cannot merge the replies: {error}", reason=Reason.MERGE_FAILED)
        failure.gathered = known
        raise failure from None


def _check_size(message: Message, data: int, what: str, advice: str, known: Gathered | None) -> None:
    """To look at the size costs as much as to serialise it; what is made of little data needs no look."""
    if data <= _CERTAINLY_SMALL or (size := message.ByteSize()) <= MAX_REPLY_BYTES:
        return
    text = f"cannot {what}: it has {size} bytes, and a message may have {MAX_REPLY_BYTES}; {advice}"
    failure = ScatterError(Code.RESOURCE_EXHAUSTED, text, reason=Reason.GATHER_TOO_LARGE)
    failure.gathered = known
    raise failure


def leaf_response(found: Answer) -> leaf.QueryResponse:
    """The answer of a root that is a leaf."""
    payload = _merged_bytes(found)
    response = leaf.QueryResponse(payload=payload, coverage=coverage(found.gathered.coverage))
    _check_size(response, len(payload), "answer the root above", "ask for less, or fewer shards", found.gathered)
    return response


def _merged_bytes(found: Answer) -> bytes:
    if found.kind in GIVES_JSON:
        return merges.encode(found.result)
    if found.kind is MergeKind.COLLECT:
        return api.CollectedReplies(replies=_collected(found)).SerializeToString()
    return bytes(found.result)


def add_failure(error: ScatterError) -> None:
    """Gives it the details of what is missing, for the caller."""
    known = error.gathered
    if known is None:
        return
    said = api.ScatterFailure(
        coverage=coverage(known.coverage),
        failures=[outcome(one) for one in known.failures],
        failed_by_code=known.failed_by_code,
        scatter_id=known.scatter_id,
    )
    room = min(_MAX_DETAIL_BYTES, _DETAILS_BYTES - len(shorten(error.message).encode()))
    while said.ByteSize() > room and said.failures:
        del said.failures[-1]
    error.more = (said.DESCRIPTOR.full_name, said.SerializeToString())


def endpoint_of(member: Member, now: float) -> Iterable[topology_pb.Endpoint]:
    """The replicas of a shard."""
    for replica in member.replicas:
        found = topology_pb.Endpoint(
            address=replica.address, connected=replica.line.connected, in_flight=replica.in_flight
        )
        if replica.seen:
            found.latency_duration.CopyFrom(duration(replica.latency_s(now)))
        yield found


def shard(member: Member, now: float) -> topology_pb.Shard:
    """A shard with its replicas."""
    said = member.shard
    return topology_pb.Shard(shard_id=said.shard_id, weight=said.weight, endpoints=endpoint_of(member, now))


def pool(topology: Topology, now: float) -> topology_pb.Pool:
    """A pool with its shards."""
    said = topology.pool
    return topology_pb.Pool(
        pool_id=said.pool_id,
        topology_version=topology.version,
        shards=[shard(member, now) for member in topology.members],
        merge=topology_pb.Merge.ValueType(said.merging.kind),
        top_k=said.merging.top_k,
        method=said.method,
        timeout_duration=duration(said.timeout_s),
        idempotent=said.idempotent,
    )


def plan(made: Plan, now: float) -> api.ExplainScatterResponse:
    """What a request would do."""
    said = made.topology.pool
    found = api.ExplainScatterResponse(
        topology_version=made.topology.version,
        shards=[shard(member, now) for member in made.members],
        merge=topology_pb.Merge.ValueType(said.merging.kind),
        method=said.method,
        timeout_duration=duration(made.timeout_s),
        leaf_timeout_duration=duration(made.leaf_timeout_s),
        budget=made.budget,
    )
    if made.hedge_delay_s is not None:
        found.hedge_delay_duration.CopyFrom(duration(made.hedge_delay_s))
    return found


def recent(known: Recent) -> api.RecentScatter:
    """A past request."""
    chosen = _remembered(known.attempts)
    return api.RecentScatter(
        scatter_id=known.scatter_id,
        pool_id=known.pool_id,
        start_time=wire.to_timestamp(known.wall_ms),
        code=known.code,
        coverage=coverage(known.gathered.coverage),
        stats=stats(known.gathered.stats),
        trace_id=known.trace_id,
        parent_scatter_id=known.parent_scatter_id,
        attempts=[_attempt(attempt, known.begun_at) for attempt in chosen],
        omitted_attempts=len(known.attempts) - len(chosen),
    )


def _remembered(attempts: Sequence[Attempt]) -> Sequence[Attempt]:
    if len(attempts) <= _MAX_ATTEMPTS:
        return attempts
    telling = sorted(attempts, key=_how_telling)[:_MAX_ATTEMPTS]
    return sorted(telling, key=lambda attempt: attempt.started_at)


def _how_telling(attempt: Attempt) -> tuple[bool, bool, float]:
    """Failures, what is not a first call, and the slowest, in front."""
    plain = attempt.kind is Kind.PRIMARY and not attempt.part.hedges
    return attempt.end is not End.FAILED, plain, attempt.started_at - attempt.ended_at


def _attempt(attempt: Attempt, begun_at: float) -> api.RecentAttempt:
    return api.RecentAttempt(
        shard_id=attempt.part.members[0].shard.shard_id,
        address=attempt.replica.address,
        kind=coverage_pb.AttemptKind.ValueType(attempt.kind),
        outcome=coverage_pb.AttemptOutcome.ValueType(attempt.end or 0),
        code=attempt.code,
        start_duration=duration(attempt.started_at - begun_at),
        elapsed_duration=duration(attempt.ended_at - attempt.started_at),
        reply_bytes=attempt.reply_bytes,
        shards=len(attempt.part.members),
    )
