"""The ambassador: what stands behind localhost, declared, looked at, and waited for.

    async with Ambassador() as ambassador:
        await ambassador.wait("db", "cache", timeout=30)            # before the app dials them

    async with Ambassador("unix:/run/retinue/control.sock") as operator:
        await operator.declare(upstream("db", "TCP", ["10.0.0.1:5432"]), wait=10)

What changes something is for operators: it needs the address of the control socket. Times are seconds or `timedelta`.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from retinue.ambassador.v1 import ambassador_service_pb2 as api
from retinue.ambassador.v1 import ambassador_service_pb2_grpc as rpc
from retinue.ambassador.v1 import upstream_pb2 as pb
from retinue.client import errors
from retinue.client.channel import DEFAULT_TIMEOUT, Connection, backoff, is_transient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence

    from retinue.ambassador.v1 import stats_pb2

Seconds: TypeAlias = float | timedelta

PATTERN = "ambassador"
_MOST_WAIT = 60.0
"""What the contract lets a call wait, in seconds."""


class NotActive(Exception):
    """Upstreams were not ACTIVE in time; `reasons` says of each why not."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(f"{upstream_id}: {why}" for upstream_id, why in reasons.items()))
        self.reasons = reasons


class Change(NamedTuple):
    """Of a watch: an upstream as it is now, or the name of one that is gone, or neither: all there are were told."""

    upstream: pb.Upstream | None = None
    removed: str = ""


def upstream(upstream_id: str, protocol: str, endpoints: Iterable[str], *, port: int = 0) -> pb.Upstream:
    """A plain declaration: `protocol` such as TCP or HTTP, `IP:PORT` endpoints, and the local port (0 = a free one)."""
    static = pb.StaticEndpoints(endpoints=[pb.Endpoint(address=address) for address in endpoints])
    spoken = pb.Protocol.Value(f"PROTOCOL_{protocol}")
    return pb.Upstream(upstream_id=upstream_id, protocol=spoken, listen=pb.Listen(port=port), static=static)


def state_name(found: pb.Upstream) -> str:
    """Its state as people say it: pending, active, rejected, draining."""
    return pb.UpstreamState.Name(found.status.state).removeprefix("UPSTREAM_STATE_").lower()


def why_not_active(found: pb.Upstream) -> str:
    """Empty if the latest of it is served."""
    status = found.status
    if status.HasField("rejection"):
        return f"it is refused: {status.rejection.message}"
    if status.state != pb.UPSTREAM_STATE_ACTIVE:
        return f"it is {state_name(found)}" + ("" if status.endpoints_resolved else ", and nobody serves it yet")
    return ""


class Ambassador:
    """The ambassador at an address; cheap, a given connection is shared. Methods raise RetinueError."""

    def __init__(
        self,
        address: str | None = None,
        *,
        connection: Connection | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        patient: bool = True,
    ) -> None:
        self.timeout = timeout
        self._owned = connection is None
        self.connection = connection or Connection(address, pattern=PATTERN, patient=patient)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection if it was opened here. Safe to repeat."""
        if self._owned:
            await self.connection.close()

    # Changing

    async def declare(
        self, wanted: pb.Upstream, *, etag: str = "", validate_only: bool = False, wait: Seconds = 0
    ) -> pb.Upstream:
        """Makes it so, and waits until it is served or refused, up to 60 s; what it answers says which."""
        request = api.DeclareUpstreamRequest(upstream=wanted, etag=etag, validate_only=validate_only)
        request.wait_duration.CopyFrom(_duration(wait))
        return (await self._call("DeclareUpstream", request, wait)).upstream  # type: ignore[no-any-return] # by the contract

    async def set_endpoints(self, upstream_id: str, endpoints: Iterable[pb.Endpoint], *, etag: str = "") -> pb.Upstream:
        """Says who serves an upstream whose discovery is `pushed`."""
        request = api.SetEndpointsRequest(upstream_id=upstream_id, endpoints=endpoints, etag=etag)
        return (await self._call("SetEndpoints", request)).upstream  # type: ignore[no-any-return] # by the contract

    async def drain(self, upstream_id: str, *, drain: Seconds | None = None, wait: Seconds = 0) -> pb.Upstream:
        """No new connections; open ones are cut after `drain` (30 s). Waits for the last, up to 60 s."""
        request = api.DrainUpstreamRequest(upstream_id=upstream_id, wait_duration=_duration(wait))
        if drain is not None:
            request.drain_duration.CopyFrom(_duration(drain))
        return (await self._call("DrainUpstream", request, wait)).upstream  # type: ignore[no-any-return] # by the contract

    async def remove(self, upstream_id: str, *, drain: Seconds | None = None, etag: str = "") -> bool:
        """Drains and forgets it; whether there was one."""
        request = api.RemoveUpstreamRequest(upstream_id=upstream_id, etag=etag)
        if drain is not None:
            request.drain_duration.CopyFrom(_duration(drain))
        return (await self._call("RemoveUpstream", request)).removed  # type: ignore[no-any-return] # by the contract

    # Looking

    async def get(self, upstream_id: str) -> pb.Upstream:
        """As it is now. Raises NotFound."""
        return (await self._call("GetUpstream", api.GetUpstreamRequest(upstream_id=upstream_id))).upstream  # type: ignore[no-any-return] # by the contract

    async def list(self) -> AsyncGenerator[pb.Upstream]:
        """All, by name."""
        request = api.ListUpstreamsRequest()
        while True:
            page = await self._call("ListUpstreams", request)
            for found in page.upstreams:
                yield found
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def data_planes(self) -> Sequence[api.DataPlane]:
        """What carries the bytes, and what it can do."""
        return (await self._call("GetDataPlane", api.GetDataPlaneRequest())).data_planes  # type: ignore[no-any-return] # by the contract

    async def watch(self, *upstream_ids: str) -> AsyncGenerator[Change]:
        """These or all as they are, an empty Change, then each change. Begins anew when a connection is lost."""
        request = api.WatchUpstreamsRequest(upstream_ids=upstream_ids)
        async for event in self._stream("WatchUpstreams", request):
            match event.WhichOneof("event"):
                case "upstream":
                    yield Change(event.upstream)
                case "removed_upstream_id":
                    yield Change(None, event.removed_upstream_id)
                case _:
                    yield Change()

    async def stats(
        self, *upstream_ids: str, interval: Seconds = 1
    ) -> AsyncGenerator[Sequence[stats_pb2.UpstreamStats]]:
        """The counts of these or all, at once and then at an interval. Goes on over lost connections."""
        request = api.WatchUpstreamStatsRequest(upstream_ids=upstream_ids, interval_duration=_duration(interval))
        async for response in self._stream("WatchUpstreamStats", request):
            yield response.stats

    async def wait(self, *upstream_ids: str, timeout: float | None = None) -> None:  # noqa: ASYNC109 - NotActive says more
        """Returns when all of these are ACTIVE; one that is not declared yet is waited for. Raises NotActive."""
        left = dict.fromkeys(upstream_ids, f"{self.connection.address} can't be reached")
        try:
            async with asyncio.timeout(self.timeout if timeout is None else timeout):
                while left:
                    await self._until_active(upstream_ids, left)
        except TimeoutError:
            raise NotActive(left) from None

    async def _until_active(self, upstream_ids: Sequence[str], left: dict[str, str]) -> None:
        """Keeps `left` true until it is empty."""
        told: set[str] = set()
        async for change in self.watch(*upstream_ids):
            if change.upstream is not None:
                name, why = change.upstream.upstream_id, why_not_active(change.upstream)
                told.add(name)
                left.pop(name, None)
                if why:
                    left[name] = why
            elif change.removed:
                left[change.removed] = "it is not declared"
            else:
                left.update(dict.fromkeys(set(upstream_ids) - told, "it is not declared"))
            if not left:
                return

    # Calling

    async def invoke(
        self,
        upstream_id: str,
        path: str = "/",
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> api.InvokeResponse:
        """One HTTP request by the upstream's own listener; any status is an answer. It is not repeated."""
        request = api.InvokeRequest(upstream_id=upstream_id, method=method, path=path, body=body)
        for name, value in (headers or {}).items():
            request.headers.add(name=name, value=value)
        return await self._call("Invoke", request, repeatable=False)  # type: ignore[no-any-return] # by the contract

    async def _call(self, method: str, request: Any, wait: Seconds = 0, *, repeatable: bool = True) -> Any:
        stub = rpc.AmbassadorServiceStub(self.connection.channel)
        seconds = self.timeout + min(_seconds(wait), _MOST_WAIT)
        return await self.connection.call(getattr(stub, method), request, timeout=seconds, repeatable=repeatable)

    async def _stream(self, method: str, request: Any) -> AsyncGenerator[Any]:
        begun, waits = False, backoff()
        while True:
            stub: Any = rpc.AmbassadorServiceStub(self.connection.channel)
            call = getattr(stub, method)(request, metadata=self.connection.metadata())
            try:
                async for response in call:
                    begun, waits = True, backoff()
                    yield response
            except grpc.aio.AioRpcError as raw:
                error = errors.from_rpc_error(raw)
                hopeful = begun or self.connection.patient or error.reason
                if not (is_transient(error) and hopeful):
                    raise error from raw
            finally:
                call.cancel()
            await asyncio.sleep(next(waits))


def _seconds(value: Seconds) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else value


def _duration(value: Seconds) -> Duration:
    found = Duration()
    found.FromTimedelta(timedelta(seconds=_seconds(value)))
    return found
