"""Between the contract's messages and the core's records. What is malformed is named in `violations`, never guessed."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from retinue.leaderelection.v1 import election_pb2 as pb
from retinue.leaderelection.v1 import leaderelection_service_pb2 as api
from retinue_server.leaderelection.core import limits
from retinue_server.leaderelection.core.requests import (
    Ack,
    AtRisk,
    Draining,
    Elected,
    Leadership,
    Liveness,
    Lost,
    OnDisconnect,
    Standby,
    Standing,
    StepDownRequested,
    Token,
    View,
)
from retinue_server.runtime import wire
from retinue_server.runtime.errors import InvalidArgument, Violation

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from retinue_server.leaderelection.core.requests import Event
    from retinue_server.leaderelection.engine import Record, Term

T = TypeVar("T")


class Reader:
    """Reads the fields of one request and gathers what is wrong with them."""

    def __init__(self, lease_ms: int, app_lease_ms: int) -> None:
        self.violations: list[Violation] = []
        self._lease_ms, self._app_lease_ms = lease_ms, app_lease_ms

    def start(self, start: api.CampaignStart) -> Standing:
        """Who campaigns."""
        self.violations += limits.enum(start.liveness, pb.Liveness.values(), "start.liveness")
        self.violations += limits.enum(start.on_disconnect, pb.OnDisconnect.values(), "start.on_disconnect")
        stream = start.liveness == pb.LIVENESS_STREAM
        release = start.on_disconnect == pb.ON_DISCONNECT_RELEASE
        return self._standing(
            start,
            "start.",
            liveness=Liveness.STREAM if stream else Liveness.MESSAGE,
            on_disconnect=OnDisconnect.RELEASE if release else OnDisconnect.KEEP,
            proof_file=start.proof_file,
        )

    def acquire(self, request: api.TryAcquireRequest) -> Standing:
        """Who tries to lead."""
        return self._standing(request, "")

    def _standing(
        self,
        message: api.CampaignStart | api.TryAcquireRequest,
        at: str,
        *,
        liveness: Liveness = Liveness.MESSAGE,
        on_disconnect: OnDisconnect = OnDisconnect.KEEP,
        proof_file: str = "",
    ) -> Standing:
        lease_ms = self._duration(message, "lease_duration", at, self._lease_ms)
        longest = max(lease_ms // 2, limits.MIN_APP_LEASE_MS)
        return Standing(
            election_id=message.election_id,
            candidate_id=message.candidate_id,
            session_id=message.session_id,
            value=message.value,
            lease_ms=lease_ms,
            app_lease_ms=self._duration(message, "app_lease_duration", at, min(self._app_lease_ms, longest)),
            release_delay_ms=self._duration(message, "release_delay_duration", at, 0),
            liveness=liveness,
            on_disconnect=on_disconnect,
            proof_file=proof_file,
        )

    def _duration(self, message: Message, field: str, at: str, unset: int) -> int:
        if not message.HasField(field):
            return unset
        return wire.duration_ms(getattr(message, field), f"{at}{field}", self.violations)

    def token(self, message: Message, field: str = "token") -> Token | None:
        """A fencing token; None if unset."""
        if not message.HasField(field):
            return None
        given = getattr(message, field)
        return Token(given.domain, given.value)

    def page(self, tokens: wire.PageTokens[T], token: str) -> T | None:
        """The position in a token; None for the first page."""
        try:
            return tokens.decode(token)
        except InvalidArgument as error:
            self.violations += error.violations
            return None


def event(happened: Event) -> api.CampaignResponse:  # noqa: PLR0911 - one for each event
    """What a candidate is told."""
    match happened:
        case Ack():
            valid_ms = happened.valid_ms
            valid = None if valid_ms is None else _duration(valid_ms)
            ack = api.CampaignHeartbeatAck(sequence=happened.sequence, valid_duration=valid)
            return api.CampaignResponse(heartbeat_ack=ack)
        case Elected():
            return api.CampaignResponse(elected=leadership(happened.leadership))
        case Standby():
            told = api.CampaignStandby(session_id=happened.session_id, leader=leader(happened.view))
            return api.CampaignResponse(standby=told)
        case Lost():
            return api.CampaignResponse(lost=api.CampaignLost(reason=pb.EndReason.ValueType(happened.reason)))
        case AtRisk():
            left = wire.to_duration(happened.left_ms)
            return api.CampaignResponse(at_risk=api.CampaignAtRisk(remaining_duration=left))
        case Draining():
            grace = wire.to_duration(happened.grace_ms)
            return api.CampaignResponse(draining=api.CampaignDraining(grace_duration=grace))
        case StepDownRequested():
            return api.CampaignResponse(step_down_requested=api.CampaignStepDownRequested())


_duration = lru_cache(1024)(wire.to_duration)
"""A leader is told the same again and again. For copying only: all who ask get the same message."""


def leadership(held: Leadership) -> pb.Leadership:
    """What a leader holds."""
    return pb.Leadership(
        election_id=held.election_id,
        candidate_id=held.candidate_id,
        session_id=held.session_id,
        token=token(held.token),
        valid_duration=wire.to_duration(held.valid_ms),
        sequence=held.sequence,
    )


def token(given: Token) -> pb.FencingToken:
    """A fencing token."""
    return pb.FencingToken(domain=given.domain, value=given.value)


def leader(view: View) -> pb.Leader:
    """What others see."""
    record = view.record
    if record is None:
        return pb.Leader(election_id=view.election_id)
    found = pb.Leader(election_id=view.election_id, token=_token(record))
    if view.led:
        found.candidate_id, found.value = record.candidate_id, record.value
        found.acquire_time.CopyFrom(wire.to_timestamp(record.acquire_ms))
        found.lease_duration.CopyFrom(wire.to_duration(record.lease_ms))
        found.step_down_requested = record.step_down
    return found


def _token(record: Record) -> pb.FencingToken:
    return pb.FencingToken(domain=record.domain, value=record.epoch)


def term(known: Term) -> pb.Term:
    """A term."""
    found = pb.Term(
        token=pb.FencingToken(domain=known.domain, value=known.epoch),
        candidate_id=known.candidate_id,
        acquire_time=wire.to_timestamp(known.acquire_ms),
        end_reason=pb.EndReason.ValueType(known.reason),
    )
    if known.end_ms is not None:
        found.end_time.CopyFrom(wire.to_timestamp(known.end_ms))
    return found
