"""A candidate's line to the server: one session that outlives its streams, and the deadline that it has.

Heartbeats are sent from the event loop on which the app works, so that a loop that hangs stops them. The listener hears
what the server says; when leadership is over it knows from `deadline`, whatever it hears or does not hear.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

import grpc.aio

from retinue.client import errors
from retinue.client.channel import backoff, is_transient
from retinue.client.deadline import Deadline
from retinue.leaderelection.v1 import election_pb2 as pb
from retinue.leaderelection.v1 import leaderelection_service_pb2 as api
from retinue.leaderelection.v1 import leaderelection_service_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from retinue.client.channel import Connection

log = logging.getLogger(__name__)

APP_LEASE = 2.0
"""What the contract gives those who ask for none, in seconds."""
_BEATS = 4
"""How many heartbeats fit into an app's lease."""
_GUARD = 0.9
"""What may be used of a lease, by the contract's guarantee."""
_SHORTEST, _LONGEST = 0.1, 300.0
"""Of the app's lease."""
_LEAST_SILENCE = 1.0
"""A stream that is silent for longer, and for a whole lease, is given up."""

_REFUSALS = (
    errors.InvalidArgument,
    errors.NotFound,
    errors.AlreadyExists,
    errors.FailedPrecondition,
    errors.OutOfRange,
    errors.Aborted,  # another process has resumed our session
    errors.Unimplemented,
    errors.PermissionDenied,
    errors.Unauthenticated,
)


class Listener(Protocol):
    """What is heard of; none of these blocks."""

    def connected(self) -> None: ...

    def disconnected(self, error: errors.RetinueError) -> None: ...

    def standby(self, leader: pb.Leader) -> None: ...

    def granted(self) -> None:
        """The deadline has moved, or another term has begun."""

    def at_risk(self, seconds: float) -> None: ...

    def asked_to_end(self, reason: str) -> None:
        """STEP_DOWN_REQUESTED or DRAINING: stop the work, then resign."""

    def lost(self, reason: str) -> None:
        """The server's early word on what the deadline would say anyway."""


class Silence(Exception):
    """The server answers no heartbeats."""


class Candidate:
    """Stands for an election until it is cancelled: `run()` is a task's work."""

    def __init__(
        self,
        connection: Connection,
        start: api.CampaignStart,
        listener: Listener,
        *,
        healthy: Callable[[], bool] = lambda: True,
        alive: Callable[[], bool] = lambda: True,
        prepare: Callable[[], Awaitable[None]] | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        """`prepare` is awaited before each stream; it may complete `start`, and raise RetinueError as a stream does."""
        self.start = start
        self.deadline = deadline or Deadline()
        self.token: pb.FencingToken | None = None
        """Of the term that the session leads; None = it has not been told to lead."""
        self._connection, self._listener = connection, listener
        self._healthy, self._alive = healthy, alive
        self._prepare = prepare
        asked = start.app_lease_duration.ToTimedelta().total_seconds()
        self._asked_lease = asked or None
        self.app_lease = asked or APP_LEASE
        """In seconds; what was asked for, or what the server's answers tell."""
        self._heard_at = 0.0
        self._answered = False
        self._first_refused: float | None = None

    @property
    def session_id(self) -> str:
        """The session, to resume it; empty before the first answer."""
        return self.start.session_id

    async def run(self) -> None:
        """Opens a stream, and another one after each that is lost. Raises what the server will always say."""
        waits = backoff()
        while True:
            await self._until_healthy()
            self._answered = False
            try:
                if self._prepare is not None:
                    await self._prepare()
                await self._converse()
                error: errors.RetinueError = errors.Cancelled(grpc.StatusCode.CANCELLED, "the server ended the stream")
            except Silence:
                error = errors.Unavailable(grpc.StatusCode.UNAVAILABLE, "the server does not answer heartbeats")
            except grpc.aio.AioRpcError as raw:
                error = errors.from_rpc_error(raw)
            except errors.RetinueError as refused:
                error = refused
            if not self._goes_on(error):
                raise error
            self._listener.disconnected(error)
            waits = backoff() if self._answered else waits
            await asyncio.sleep(min(next(waits), self.interval))

    @property
    def interval(self) -> float:
        """Seconds between heartbeats."""
        return self.app_lease / _BEATS

    async def _until_healthy(self) -> None:
        """`start` would count as the word of a healthy app."""
        while not self._healthy():  # noqa: ASYNC110 - a question, not an event
            await asyncio.sleep(self.interval)

    def _goes_on(self, error: errors.RetinueError) -> bool:
        """Whether another stream may fare better."""
        if error.reason == "CANDIDATE_EXISTS":
            return self._may_be_our_own_past()
        return is_transient(error) or not isinstance(error, _REFUSALS)

    def _may_be_our_own_past(self) -> bool:
        """A process that was killed is a live candidate until its lease is over; its successor waits for that."""
        now = self.deadline.now()
        self._first_refused = now if self._first_refused is None else self._first_refused
        return now - self._first_refused < 2 * self.app_lease

    # One stream

    async def _converse(self) -> None:
        call: Any = rpc.LeaderElectionServiceStub(self._connection.channel).Campaign(
            metadata=self._connection.metadata()
        )
        self._heard_at = self.deadline.now()
        tasks = [asyncio.create_task(self._talk(call)), asyncio.create_task(self._listen(call))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            call.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()  # it was raised above, or the stream's end came first

    async def _talk(self, call: Any) -> None:
        """`start`, then heartbeats: each is stamped before it is written."""
        self.deadline.start()
        with contextlib.suppress(asyncio.InvalidStateError):  # the stream has ended: the listening task knows how
            await call.write(api.CampaignRequest(start=self.start))
            while True:
                if self._alive():
                    beat = api.CampaignHeartbeat(sequence=self.deadline.beat(), unhealthy=not self._healthy())
                    await call.write(api.CampaignRequest(heartbeat=beat))
                await asyncio.sleep(self.interval)
                if self.deadline.now() - self._heard_at > max(self.app_lease, _LEAST_SILENCE) and self._alive():
                    raise Silence
        await asyncio.Event().wait()

    async def _listen(self, call: Any) -> None:
        async for response in call:
            self._heard_at = self.deadline.now()
            if not self._answered:
                self._answered, self._first_refused = True, None
                self._listener.connected()
            self._hear(response)

    def _hear(self, response: api.CampaignResponse) -> None:
        match response.WhichOneof("event"):
            case "heartbeat_ack":
                self._acknowledged(response.heartbeat_ack)
            case "elected":
                self._elected(response.elected)
            case "standby":
                self.start.session_id = response.standby.session_id
                self._listener.standby(response.standby.leader)
            case "at_risk":
                self._listener.at_risk(response.at_risk.remaining_duration.ToTimedelta().total_seconds())
            case "step_down_requested":
                self._listener.asked_to_end("STEP_DOWN_REQUESTED")
            case "draining":
                self._listener.asked_to_end("DRAINING")
            case "lost":
                self._listener.lost(_reason(response.lost.reason))

    def _elected(self, leadership: pb.Leadership) -> None:
        self.start.session_id = leadership.session_id
        if self.token is None or self.token != leadership.token:
            self.token = leadership.token
            self.deadline.reset()
        self._grant(leadership.sequence, leadership.valid_duration.ToTimedelta().total_seconds())

    def _acknowledged(self, ack: api.CampaignHeartbeatAck) -> None:
        if ack.HasField("valid_duration") and self.token is not None:
            self._grant(ack.sequence, ack.valid_duration.ToTimedelta().total_seconds())

    def _grant(self, sequence: int, seconds: float) -> None:
        self.deadline.grant(sequence, seconds)
        if self._asked_lease is None:
            self.app_lease = min(max(seconds / _GUARD, _SHORTEST), _LONGEST)
        self._listener.granted()


def _reason(number: pb.EndReason.ValueType) -> str:
    return pb.EndReason.Name(number).removeprefix("END_REASON_") if number else "UNKNOWN"
