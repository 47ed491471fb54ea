"""Calls to etcd: to one endpoint at a time, to the next when that one does not answer, each with a deadline."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
from grpc import aio

from retinue_server.leaderelection.engines.etcd import rpc_pb2
from retinue_server.leaderelection.engines.etcd.rpc_pb2_grpc import KVStub, LeaseStub, MaintenanceStub, WatchStub
from retinue_server.runtime.errors import Reason, Unavailable

T = TypeVar("T")

_log = logging.getLogger(__name__)

WITH_LEADER = (("hasleader", "true"),)
"""Asks a member that has lost its leader to say so, rather than to wait for another."""
RETRY_MS = 500
_ELSEWHERE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
)
"""What another member may do better."""
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # engines of one process fail one by one
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 10_000),  # finds a dead member under an idle watch; etcd allows one every 5 s
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class Endpoint:
    """A member, and how to call it."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        self.address = address
        if credentials is None:
            self.channel = aio.insecure_channel(address, options=_OPTIONS)
        else:
            self.channel = aio.secure_channel(address, credentials, options=_OPTIONS)
        self.kv, self.lease = KVStub(self.channel), LeaseStub(self.channel)
        self.watch, self.maintenance = WatchStub(self.channel), MaintenanceStub(self.channel)


class Client:
    """The cluster. Everything raises Unavailable when no endpoint answers."""

    def __init__(self, endpoints: Sequence[str], credentials: grpc.ChannelCredentials | None, timeout_s: float) -> None:
        self._addresses, self._credentials = list(endpoints), credentials
        self.timeout_s = timeout_s
        self._endpoints: list[Endpoint] = []
        self._at = 0
        self._failing = False
        self.moved: Callable[[], None] = lambda: None
        """Called when another endpoint has become the one to call."""

    def open(self) -> None:
        """On the loop that calls."""
        self._endpoints = [Endpoint(address, self._credentials) for address in self._addresses]

    async def close(self) -> None:
        """Ends all calls."""
        endpoints, self._endpoints = self._endpoints, []
        for endpoint in endpoints:
            await endpoint.channel.close()

    def endpoint(self) -> Endpoint:
        """The one to call."""
        if not self._endpoints:
            raise Unavailable("cannot go on: the engine is stopped", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=500)
        return self._endpoints[self._at]

    def leave(self, endpoint: Endpoint) -> None:
        """It does not answer: the next one is called from now on."""
        if len(self._endpoints) > 1 and self._endpoints[self._at] is endpoint:
            self._at = (self._at + 1) % len(self._endpoints)
            _log.info("etcd at %s does not answer; going on at %s", endpoint.address, self.endpoint().address)
            self.moved()

    async def txn(self, request: rpc_pb2.TxnRequest) -> rpc_pb2.TxnResponse:
        """A transaction; it may be sent twice, so what it does must bear that."""
        return await self._call(lambda at: at.kv.Txn(request, timeout=self.timeout_s, metadata=WITH_LEADER))

    async def grant(self, ttl_s: int) -> tuple[int, int]:
        """A new lease; its id and its length in seconds, which is longer than asked for if etcd wants that."""
        request = rpc_pb2.LeaseGrantRequest(TTL=ttl_s)
        granted = await self._call(
            lambda at: at.lease.LeaseGrant(request, timeout=self.timeout_s, metadata=WITH_LEADER)
        )
        return granted.ID, granted.TTL

    async def keep_alive(self, lease_id: int) -> int:
        """Begins a lease again; its length in seconds, 0 = it is gone."""
        return await self._call(lambda at: self._keep_alive(at, lease_id))

    async def _keep_alive(self, at: Endpoint, lease_id: int) -> int:
        call = at.lease.LeaseKeepAlive(timeout=self.timeout_s, metadata=WITH_LEADER)
        try:
            await call.write(rpc_pb2.LeaseKeepAliveRequest(ID=lease_id))
            answer: Any = await call.read()
            if answer is aio.EOF:
                raise Unavailable(
                    "cannot go on: etcd ended a call", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=RETRY_MS
                )
            return int(answer.TTL)
        finally:
            call.cancel()

    async def version(self) -> str:
        """Of the member that is called."""
        request = rpc_pb2.StatusRequest()
        status = await self._call(lambda at: at.maintenance.Status(request, timeout=self.timeout_s))
        return status.version

    async def _call(self, rpc: Callable[[Endpoint], Awaitable[T]]) -> T:
        failed: aio.AioRpcError | None = None
        for _ in range(len(self._addresses)):
            endpoint = self.endpoint()
            try:
                answer = await rpc(endpoint)
            except aio.AioRpcError as error:
                failed = error
                if error.code() not in _ELSEWHERE:
                    break
                self.leave(endpoint)
            else:
                self._note(None)
                return answer
        self._note(failed)
        raise Unavailable(
            "cannot go on: the engine does not answer; see the server's log",
            reason=Reason.ENGINE_UNAVAILABLE,
            retry_ms=RETRY_MS,
        ) from failed

    def _note(self, error: aio.AioRpcError | None) -> None:
        """Says once that it fails, and once that it does no more."""
        if error is not None and not self._failing:
            _log.warning("etcd does not do what it is asked: %s: %s", error.code().name, error.details())
        elif error is None and self._failing:
            _log.info("etcd answers again")
        self._failing = error is not None
