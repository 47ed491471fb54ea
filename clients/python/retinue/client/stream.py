"""A worker's line to the server, on threads of its own, so that no handler can hold up a renewal.

One thread keeps a StreamTasks call open and settles again by unary calls what a broken one left unanswered;
another renews and watches the clock. A lease counts as lost when the server says so, or when its whole
duration passed since the last confirmed renewal was *sent*. Leases of an earlier stream are renewed by
ExtendLeases. Events go to the listener's event loop, in order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import grpc

from retinue.client import errors
from retinue.client.channel import backoff, is_transient
from retinue.client.coalesce import MAX_ITEMS, blocks
from retinue.client.queue import duration
from retinue.workqueue.v1 import task_pb2 as pb
from retinue.workqueue.v1 import workqueue_service_pb2 as api
from retinue.workqueue.v1 import workqueue_service_pb2_grpc as rpc

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from retinue.client.channel import Connection
    from retinue.client.queue import Seconds

log = logging.getLogger(__name__)

Outcome: TypeAlias = api.Completion | api.TaskFailure | api.Release
Answer: TypeAlias = tuple[Outcome, pb.ItemStatus | None]
"""An outcome and why it was refused; None = it is durable."""

HEARTBEAT = 10.0
"""The longest time between renewals: what a cancellation takes to arrive, and a dead connection to show."""
_CALL_TIMEOUT = 10.0
_HALF_CLOSED = 2.0
_GONE = {"LEASE_LOST", "ALREADY_FINALIZED"}


class Listener(Protocol):
    """What the stream tells; every method runs on the listener's event loop."""

    def leased(self, leases: Sequence[pb.Lease], received: float) -> None: ...

    def settled(self, answers: Sequence[Answer]) -> None:
        """The server's word on outcomes. Unless its reason says that the lease is gone, it is held."""

    def cancel_requested(self, token: bytes) -> None: ...

    def lost(self, token: bytes, *, told: bool) -> None:
        """The lease is over; `told` = by the server, otherwise by our clock."""

    def connected(self) -> None: ...

    def disconnected(self, error: errors.RetinueError) -> None: ...

    def refused(self, error: errors.RetinueError) -> None:
        """The server will never take this worker; there are no more events."""


@dataclass(slots=True)
class _Held:
    lease: pb.Lease
    stream: int
    valid_until: float
    seconds: float
    ending: bool = False


@dataclass
class _Sent:
    at: float
    outcomes: list[Outcome]
    renewal: bool


class TaskStream:
    """Leases as many tasks as there is credit, keeps them alive, and settles each outcome until the server
    answered.
    """

    def __init__(
        self,
        connection: Connection,
        listener: Listener,
        loop: asyncio.AbstractEventLoop,
        *,
        queue_id: str,
        worker_id: str,
        lease_duration: Seconds | None = None,
    ) -> None:
        self._connection = connection
        self._open = api.StreamOpen(queue_id=queue_id, worker_id=worker_id, lease_duration=duration(lease_duration))
        self._listener = listener
        self._loop = loop
        lock = threading.RLock()
        self._to_send = threading.Condition(lock)
        self._clock = threading.Condition(lock)
        self._held: dict[bytes, _Held] = {}
        self._outbox: deque[Outcome] = deque()
        self._sent: dict[int, _Sent] = {}
        self._credit = 0  # not granted yet
        self._granted = 0  # granted on this stream and not used up
        self._stream = 0
        self._drained = -1
        self._sequence = 0
        self._renew_at = 0.0
        self._wakes_at = 0.0  # how long the renewer sleeps
        self._renew = False
        self._call: Any = None
        self._live = False
        self._welcomed = False
        self._leasing = True
        self._half_closed_at = float("inf")
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name="retinue-stream", daemon=True),
            threading.Thread(target=self._keep, name="retinue-renew", daemon=True),
        ]

    # For the listener's loop; none of these blocks.

    def start(self) -> None:
        self._renew_at = time.monotonic() + HEARTBEAT
        self._channel = self._connection.sync_channel()
        self._stub = rpc.WorkQueueServiceStub(self._channel)
        for thread in self._threads:
            thread.start()

    def grant(self, credit: int) -> None:
        """Takes that many more leases."""
        with self._to_send:
            self._credit += credit
            self._to_send.notify_all()

    def settle(self, outcomes: Sequence[Outcome], credit: int = 0) -> None:
        """Sends outcomes now, and again after every reconnection until they are answered; with them takes more
        leases.
        """
        with self._to_send:
            self._credit += credit
            for outcome in outcomes:
                if held := self._held.get(outcome.lease_token):
                    held.ending = True
            self._outbox.extend(outcomes)
            self._to_send.notify_all()

    def stop_leasing(self) -> None:
        """Takes no more leases; held ones are renewed and settled as before. Safe to repeat."""
        with self._to_send:
            if self._leasing:
                self._leasing = False
                self._half_closed_at = time.monotonic()
            self._to_send.notify_all()
            self._clock.notify_all()

    def close(self) -> None:
        """Ends the threads; what is not settled is left to the server. Safe to repeat."""
        with self._to_send:
            self._closed = True
            self._leasing = False
            self._to_send.notify_all()
            self._clock.notify_all()
            call = self._call
        if call is not None:
            call.cancel()
        self._channel.close()

    def join(self) -> None:
        """Waits for the threads to end, after close()."""
        for thread in self._threads:
            thread.join(timeout=_HALF_CLOSED)

    # The stream's thread

    def _run(self) -> None:
        waits = backoff()
        while not self._closed:
            try:
                self._settle_by_calls()
                if self._leasing:
                    self._converse()
                    waits = backoff() if self._live else waits
                    self._broken()
                    self._pause(next(waits) if self._leasing else 0)
                else:
                    self._await_outcomes()
            except grpc.RpcError as raw:
                if not self._goes_on(errors.from_rpc_error(raw)):
                    return
                waits = backoff() if self._live else waits
                self._broken()
                self._pause(next(waits))
            except ValueError:  # grpc's word for a channel that was closed meanwhile
                if not self._closed:
                    raise

    def _goes_on(self, error: errors.RetinueError) -> bool:
        if self._closed:
            return False
        cut_by_us = isinstance(error, errors.Cancelled | errors.DeadlineExceeded)
        if not (self._welcomed or cut_by_us or is_transient(error)):
            self._tell(self._listener.refused, error)
            return False
        if self._leasing or not cut_by_us:
            self._tell(self._listener.disconnected, error)
        return True

    def _pause(self, seconds: float) -> None:
        with self._to_send:
            self._to_send.wait_for(lambda: self._closed, seconds)

    def _await_outcomes(self) -> None:
        with self._to_send:
            self._to_send.wait_for(lambda: self._closed or self._outbox)

    def _broken(self) -> None:
        """What the ended stream left unanswered is to be settled again, and its unused credit to be granted
        again.
        """
        with self._to_send:
            again = [outcome for sent in self._sent.values() for outcome in sent.outcomes]
            self._outbox.extendleft(reversed(again))
            self._sent.clear()
            self._credit, self._granted = self._credit + self._granted, 0
            self._live, self._call = False, None
            self._stream += 1
            self._renew_at = time.monotonic()
            self._to_send.notify_all()
            self._clock.notify_all()

    def _converse(self) -> None:
        with self._to_send:
            stream = self._stream
        call = self._stub.StreamTasks(self._requests(stream), metadata=self._connection.metadata())
        with self._to_send:
            self._call = call
        if self._closed:
            call.cancel()
        for response in call:
            self._take(response)

    def _requests(self, stream: int) -> Iterator[api.StreamTasksRequest]:
        # The first one asks for an answer, so that we know when the stream stands.
        opening: api.StreamTasksRequest | None = api.StreamTasksRequest(open=self._open, extend_all=True)
        while request := self._next_request(stream, opening):
            yield request
            opening = None

    def _next_request(self, stream: int, opening: api.StreamTasksRequest | None) -> api.StreamTasksRequest | None:
        """The next message when there is something to say; None when the stream is over or takes no more
        leases.
        """
        with self._to_send:
            self._to_send.wait_for(lambda: opening or self._over(stream) or self._has_news())
            if self._over(stream):
                return None
            return self._request(opening or api.StreamTasksRequest(extend_all=self._renew))

    def _over(self, stream: int) -> bool:
        return self._stream != stream or self._drained == stream or not self._leasing

    def _has_news(self) -> bool:
        return bool(self._outbox) or self._renew or self._credit > 0

    def _request(self, request: api.StreamTasksRequest) -> api.StreamTasksRequest:
        """Adds the credit and the outcomes that wait, as many as fit."""
        with self._to_send:
            outcomes = next(blocks(self._outbox, _size), [])
            for _ in outcomes:
                self._outbox.popleft()
            _put(request, outcomes)
            self._sequence += 1
            request.sequence, request.credit = self._sequence, min(self._credit, 10_000)
            self._credit -= request.credit
            self._granted += request.credit
            if request.extend_all:
                self._renew = False
            if outcomes or request.extend_all:
                self._sent[self._sequence] = sent = _Sent(time.monotonic(), outcomes, request.extend_all)
                self._wake_renewer(sent.at + HEARTBEAT)
        return request

    def _take(self, response: api.StreamTasksResponse) -> None:
        match response.WhichOneof("event"):
            case "leases":
                self._take_leases(response.leases.leases)
            case "settled":
                self._take_settled(response.settled)
            case "draining":
                self._leave()

    def _leave(self) -> None:
        """The server is stopping: ends this stream, so that it can, and goes on with the next."""
        with self._to_send:
            self._drained = self._stream
            self._to_send.notify_all()

    def _take_leases(self, leases: Sequence[pb.Lease]) -> None:
        now = time.monotonic()
        with self._to_send:
            self._granted -= len(leases)
            for lease in leases:
                lasts = lease.lease_duration
                seconds = lasts.seconds + lasts.nanos / 1e9
                self._held[lease.lease_token] = _Held(lease, self._stream, now + seconds, seconds)
                self._renew_at = min(self._renew_at, now + seconds / 3)
            self._wake_renewer(self._renew_at)
        self._tell(self._listener.leased, leases, now)

    def _take_settled(self, settled: api.StreamSettled) -> None:
        with self._to_send:
            sent = self._sent.pop(settled.sequence, None)
            first, self._live = not self._live, True
            self._welcomed = True
        if first:
            self._tell(self._listener.connected)
        if sent is None:
            return
        refused = {error.lease_token: error.status for error in settled.errors}
        self._answered([(outcome, refused.get(outcome.lease_token)) for outcome in sent.outcomes])
        if sent.renewal:
            self._renewed(sent.at, settled)

    def _renewed(self, at: float, settled: api.StreamSettled) -> None:
        with self._to_send:
            mine = [held for held in self._held.values() if held.stream == self._stream]
        lost, asked = set(settled.lost_lease_tokens), set(settled.cancel_requested_task_ids)
        for held in mine:
            if held.lease.lease_token in lost:
                self._drop(held, told=True)
            else:
                held.valid_until = max(held.valid_until, at + held.seconds)
            if held.lease.task_id in asked:
                self._tell(self._listener.cancel_requested, held.lease.lease_token)

    def _answered(self, answers: Sequence[Answer]) -> None:
        with self._to_send:
            for outcome, status in answers:
                if status is None or status.reason in _GONE:
                    self._held.pop(outcome.lease_token, None)
                elif held := self._held.get(outcome.lease_token):
                    held.ending = False
        if answers:
            self._tell(self._listener.settled, answers)

    # Outcomes by unary calls: after a reconnection, and while no more is leased

    def _settle_by_calls(self) -> None:
        while not self._closed:
            with self._to_send:
                block = next(blocks(self._outbox, _size), [])
            if not block:
                return
            kind = type(block[0])
            self._settle_block([outcome for outcome in block if type(outcome) is kind])

    def _settle_block(self, outcomes: list[Any]) -> None:
        try:
            statuses = self._settle_call(outcomes)
        except grpc.RpcError as raw:
            error = errors.from_rpc_error(raw)
            if not isinstance(error, errors.InvalidArgument):
                raise
            if len(outcomes) > 1:  # one of them is malformed: find it
                for outcome in outcomes:
                    self._settle_block([outcome])
                return
            statuses = [pb.ItemStatus(code=3, reason=error.reason, message=str(error))]
        with self._to_send:
            for outcome in outcomes:
                self._outbox.remove(outcome)
        self._answered([(o, s if s.code else None) for o, s in zip(outcomes, statuses, strict=True)])

    def _settle_call(self, outcomes: list[Any]) -> list[pb.ItemStatus]:
        results: Any
        match outcomes[0]:
            case api.Completion():
                results = self._unary(self._stub.CompleteTasks, api.CompleteTasksRequest(completions=outcomes))
            case api.TaskFailure():
                results = self._unary(self._stub.FailTasks, api.FailTasksRequest(failures=outcomes))
            case _:
                results = self._unary(self._stub.ReleaseTasks, api.ReleaseTasksRequest(releases=outcomes))
        return [result.status for result in results.results]

    def _unary(self, method: Any, request: Any, timeout: float = _CALL_TIMEOUT) -> Any:
        return method(request, timeout=timeout, metadata=self._connection.metadata())

    # The renewer's thread

    def _keep(self) -> None:
        while not self._closed:
            with self._clock:
                self._wakes_at = self._next_due()
                self._clock.wait(max(self._wakes_at - time.monotonic(), 0.01))
            if not self._closed:
                self._keep_once(time.monotonic())

    def _wake_renewer(self, due: float) -> None:
        """Unless it wakes by itself in time."""
        with self._clock:
            if due < self._wakes_at:
                self._clock.notify_all()

    def _next_due(self) -> float:
        running = (held.valid_until for held in self._held.values() if not held.ending)
        answers = (sent.at + HEARTBEAT for sent in self._sent.values())
        half_closed = self._half_closed_at + _HALF_CLOSED if self._call is not None else float("inf")
        return min(
            self._renew_at,
            half_closed,
            min(running, default=float("inf")),
            min(answers, default=float("inf")),
        )

    def _keep_once(self, now: float) -> None:
        for held in self._overdue(now):
            self._drop(held, told=False)
        self._cut_a_dead_stream(now)
        if now < self._renew_at:
            return
        with self._to_send:
            seconds = min((held.seconds for held in self._held.values()), default=float("inf"))
            self._renew_at = now + min(seconds / 3, HEARTBEAT)
            self._renew = self._call is not None
            self._to_send.notify_all()
        self._extend_by_calls()

    def _overdue(self, now: float) -> list[_Held]:
        with self._to_send:
            return [held for held in self._held.values() if not held.ending and held.valid_until <= now]

    def _cut_a_dead_stream(self, now: float) -> None:
        with self._to_send:
            silent = any(sent.at + HEARTBEAT <= now for sent in self._sent.values())
            lingers = self._half_closed_at + _HALF_CLOSED <= now
            call, self._half_closed_at = self._call, float("inf") if lingers else self._half_closed_at
        if call is not None and (silent or lingers):
            call.cancel()

    def _extend_by_calls(self) -> None:
        """Renews what the stream of the moment doesn't: leases of an earlier one, and all once there is
        none.
        """
        with self._to_send:
            orphans = [held for held in self._held.values() if not held.ending and not self._covered(held)]
        for start in range(0, len(orphans), MAX_ITEMS):
            try:
                self._extend(orphans[start : start + MAX_ITEMS])
            except (grpc.RpcError, ValueError) as error:  # ValueError: the channel is closed
                log.debug("cannot renew %d leases now: %s", len(orphans), error)

    def _covered(self, held: _Held) -> bool:
        return held.stream == self._stream and self._call is not None and not self._over(self._stream)

    def _extend(self, held: list[_Held]) -> None:
        at = time.monotonic()
        timeout = min(min(item.seconds for item in held) / 3, _CALL_TIMEOUT)
        items = [
            api.Extension(lease_token=item.lease.lease_token, lease_duration=item.lease.lease_duration) for item in held
        ]
        response = self._unary(self._stub.ExtendLeases, api.ExtendLeasesRequest(extensions=items), timeout)
        for item, result in zip(held, response.results, strict=True):
            if result.status.code:
                self._drop(item, told=True)
            else:
                item.valid_until = max(item.valid_until, at + item.seconds)
            if result.cancel_requested:
                self._tell(self._listener.cancel_requested, item.lease.lease_token)

    def _drop(self, held: _Held, *, told: bool) -> None:
        with self._to_send:
            if held.ending or self._held.pop(held.lease.lease_token, None) is None:
                return  # its outcome is under way: the server's answer to that counts
        self._tell(lambda token: self._listener.lost(token, told=told), held.lease.lease_token)

    def _tell(self, method: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(method, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("nobody is left to tell")


def _size(outcome: Outcome) -> int:
    return outcome.ByteSize()


def _put(request: api.StreamTasksRequest, outcomes: Sequence[Outcome]) -> None:
    request.completions.extend([o for o in outcomes if isinstance(o, api.Completion)])
    request.failures.extend([o for o in outcomes if isinstance(o, api.TaskFailure)])
    request.releases.extend([o for o in outcomes if isinstance(o, api.Release)])
