"""Records what a client library says, where its calls leave for the wire."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
from support.history import Grant, Item, Op
from support.history.recorder import Recorder, boot_ns

from retinue.workqueue.v1 import task_pb2
from retinue.workqueue.v1 import workqueue_service_pb2 as wq


class Asked(NamedTuple):
    """One kind of thing in a request."""

    op: Op
    items: list[Item]
    tokens: list[bytes]


class Leases:
    """Which task and epoch a token stands for."""

    def __init__(self) -> None:
        self._known: dict[bytes, Item] = {}

    def learn(self, lease: task_pb2.Lease) -> None:
        """A lease that came."""
        self._known[lease.lease_token] = Item(lease.task_id, lease.lease_epoch)

    def item(self, token: bytes, **more: Any) -> Item:
        """What is asked of one."""
        known = self._known[token]
        return Item(known.task, known.epoch, **more)

    def asked(self, request: Any) -> list[Asked]:
        """What a message asks, kind by kind."""
        kinds: Sequence[tuple[Op, str, Callable[[Any], dict[str, Any]]]] = (
            (Op.COMPLETE, "completions", lambda one: {"follow_ups": len(one.follow_ups)}),
            (Op.FAIL, "failures", lambda one: {"final": one.final}),
            (Op.RELEASE, "releases", lambda _: {}),
            (Op.EXTEND, "extensions", lambda one: {"lasts_ms": one.lease_duration.ToMilliseconds()}),
        )
        found = []
        for op, field, more in kinds:
            if ones := getattr(request, field, ()):
                items = [self.item(one.lease_token, **more(one)) for one in ones]
                found.append(Asked(op, items, [one.lease_token for one in ones]))
        return found


class Tape(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Interceptors for a blocking channel of a worker."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._leases = recorder, Leases()

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        [asked] = self._leases.asked(request)
        n = self._recorder.call(asked.op, asked.items)
        outcome = continuation(details, request)
        if error := outcome.exception():
            self._recorder.unknown(n, _name(error))
        else:
            results = outcome.result().results
            self._recorder.ok(n, {i: r.status.reason for i, r in enumerate(results) if r.status.code})
        return outcome

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Iterator[Any]) -> Any:
        spoken = _Stream(self._recorder, self._leases)
        return _Recorded(continuation(details, spoken.sending(requests)), spoken)


class _Recorded:
    """The answers of a stream, with everything else that its call can do."""

    def __init__(self, call: Any, spoken: _Stream) -> None:
        self._call, self._spoken = call, spoken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __iter__(self) -> Iterator[Any]:
        try:
            for response in self._call:
                self._spoken.received(response)
                yield response
        except grpc.RpcError as error:
            self._spoken.broke(_name(error))
            raise
        self._spoken.ended()


class _Stream:
    """What was said on one stream."""

    def __init__(self, recorder: Recorder, leases: Leases) -> None:
        self._recorder, self._leases = recorder, leases
        self._lock = threading.Lock()
        self._lasts_ms = 0
        self._credit: deque[list[int]] = deque()
        self._pending: dict[int, list[tuple[int, Asked]]] = {}
        self._idle: dict[bytes, Item] = {}
        """Leases that came here and that no outcome was sent for."""
        self._n = recorder.call(Op.LEASE)

    def sending(self, requests: Iterable[wq.StreamTasksRequest]) -> Iterator[wq.StreamTasksRequest]:
        """Passes requests on, each after it was noted."""
        for request in requests:
            with self._lock:
                self._note(request)
            yield request

    def _note(self, request: wq.StreamTasksRequest) -> None:
        self._lasts_ms = request.open.lease_duration.ToMilliseconds() or self._lasts_ms
        if request.credit:
            self._credit.append([boot_ns(), request.credit])
        asked = self._leases.asked(request)
        for one in asked:
            for token in one.tokens:
                self._idle.pop(token, None)
        if request.extend_all and self._idle:
            items = [Item(item.task, item.epoch, lasts_ms=self._lasts_ms) for item in self._idle.values()]
            asked.append(Asked(Op.EXTEND, items, list(self._idle)))
        calls = [(self._recorder.call(one.op, one.items, self._n), one) for one in asked]
        self._pending.setdefault(request.sequence, []).extend(calls)

    def received(self, response: wq.StreamTasksResponse) -> None:
        """A message that came."""
        with self._lock:
            if leases := response.leases.leases:
                self._take(leases)
            if response.HasField("settled"):
                self._answer(response.settled)

    def _take(self, leases: Sequence[task_pb2.Lease]) -> None:
        grants = [Grant(x.task_id, x.lease_epoch, x.attempt, x.lease_duration.ToMilliseconds()) for x in leases]
        self._recorder.leased(self._n, self._credit[0][0], grants)
        for lease in leases:
            self._leases.learn(lease)
            self._idle[lease.lease_token] = self._leases.item(lease.lease_token)
            self._credit[0][1] -= 1
            if not self._credit[0][1]:
                self._credit.popleft()

    def _answer(self, settled: wq.StreamSettled) -> None:
        why = {error.lease_token: error.status.reason for error in settled.errors}
        for token in settled.lost_lease_tokens:
            why[token] = "LEASE_LOST"
            self._idle.pop(token, None)
        for n, asked in self._pending.pop(settled.sequence, ()):
            self._recorder.ok(n, {i: why[token] for i, token in enumerate(asked.tokens) if token in why})

    def broke(self, reason: str) -> None:
        """No more answers come."""
        with self._lock:
            for n, _ in [call for calls in self._pending.values() for call in calls]:
                self._recorder.unknown(n, reason)
            self._recorder.unknown(self._n, reason)

    def ended(self) -> None:
        """The server closed it in order."""
        with self._lock:
            self._recorder.ok(self._n)


def _name(error: Any) -> str:
    return str(error.code().name)
