"""AmbassadorService: translate, call the core."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from retinue.ambassador.v1 import ambassador_service_pb2 as api
from retinue_server.ambassador import translate
from retinue_server.ambassador.core import limits
from retinue_server.ambassador.core.spec import Protocol as Speaks
from retinue_server.ambassador.core.upstream import State
from retinue_server.runtime import telemetry, wire
from retinue_server.runtime.dispatch import Role
from retinue_server.runtime.errors import DeadlineExceeded, FailedPrecondition, Reason, ResourceExhausted, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from retinue_server.ambassador.core.upstream import Upstream
    from retinue_server.ambassador.core.upstreams import Upstreams
    from retinue_server.ambassador.invoke import Answer
    from retinue_server.runtime.dispatch import Call

DESCRIPTOR = api.DESCRIPTOR.services_by_name["AmbassadorService"]
ROLES = dict.fromkeys(("DeclareUpstream", "SetEndpoints", "DrainUpstream", "RemoveUpstream"), Role.OPERATOR)

_PAGES: wire.PageTokens[str] = wire.PageTokens("upstreams", 1, str)
_METHOD = re.compile(r"[A-Z]{1,32}")
_PATH = re.compile(r"/[\x21-\x7e]*")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_OVERLOADED, _PASSED_ON = "x-envoy-overloaded", "x-envoy-upstream-service-time"
_TOO_MANY, _UNAVAILABLE, _GATEWAY_TIMEOUT = 429, 503, 504
_OWN = frozenset({_TOO_MANY, _UNAVAILABLE, _GATEWAY_TIMEOUT})


class AmbassadorService:
    """For apps and operators; see the contract."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    async def DeclareUpstream(self, request: api.DeclareUpstreamRequest, call: Call) -> api.DeclareUpstreamResponse:
        read = translate.Reader("")
        wait_s = read.wait_s(request.wait_duration, call.time_remaining())
        spec = translate.Reader("upstream.", read.violations).upstream(request.upstream)
        kept = await self._upstreams.declare(spec, etag=request.etag, validate_only=request.validate_only)
        found = translate.upstream(kept.view())
        if request.validate_only:
            found = translate.declared(spec)
        elif wait_s:
            await kept.settled(wait_s)
            found = translate.upstream(kept.view())
        return api.DeclareUpstreamResponse(upstream=found)

    async def SetEndpoints(self, request: api.SetEndpointsRequest, call: Call) -> api.SetEndpointsResponse:
        read = self._named(request.upstream_id)
        endpoints = translate.endpoints(request.endpoints)
        limits.check_endpoints(endpoints, read.violations, "endpoints")
        limits.refuse(read.violations, "set the endpoints")
        kept = await self._upstreams.set_endpoints(request.upstream_id, endpoints, etag=request.etag)
        return api.SetEndpointsResponse(upstream=translate.upstream(kept.view()))

    async def GetUpstream(self, request: api.GetUpstreamRequest, call: Call) -> api.GetUpstreamResponse:
        return api.GetUpstreamResponse(upstream=translate.upstream(self._get(request.upstream_id).view()))

    async def ListUpstreams(self, request: api.ListUpstreamsRequest, call: Call) -> api.ListUpstreamsResponse:
        read = translate.Reader("")
        size = read.page_size(request.page_size, limits.PAGE_SIZES)
        limits.refuse(read.violations, "list upstreams")
        names = self._upstreams.names(_PAGES.decode(request.page_token) or "")
        return api.ListUpstreamsResponse(
            upstreams=[translate.upstream(self._upstreams.get(name).view()) for name in names[:size]],
            next_page_token=_PAGES.encode(names[size - 1]) if len(names) > size else "",
        )

    async def WatchUpstreams(self, request: api.WatchUpstreamsRequest, call: Call) -> None:
        limits.refuse(self._each_named(request.upstream_ids).violations, "watch upstreams")
        async for event in self._upstreams.watch(request.upstream_ids):
            if event is None:
                await call.write(api.WatchUpstreamsResponse(synced=api.Synced()))
            elif event.view is not None:
                await call.write(api.WatchUpstreamsResponse(upstream=translate.upstream(event.view)))
            else:
                await call.write(api.WatchUpstreamsResponse(removed_upstream_id=event.removed))

    async def WatchUpstreamStats(self, request: api.WatchUpstreamStatsRequest, call: Call) -> None:
        read = self._each_named(request.upstream_ids)
        interval = read.interval_s(request)
        limits.refuse(read.violations, "watch the counts")
        while not self._upstreams.stopping:
            counts = await self._upstreams.counts(request.upstream_ids)
            said = [translate.stats(name, known) for name, known in counts.items()]
            await call.write(api.WatchUpstreamStatsResponse(stats=said))
            await self._upstreams.pause(interval)
        raise Unavailable("cannot go on: the server is stopping", reason=Reason.SHUTTING_DOWN, retry_ms=1000)

    async def DrainUpstream(self, request: api.DrainUpstreamRequest, call: Call) -> api.DrainUpstreamResponse:
        read = self._named(request.upstream_id)
        drain_s, wait_s = read.drain_s(request), read.wait_s(request.wait_duration, call.time_remaining())
        limits.refuse(read.violations, "drain the upstream")
        kept = await self._upstreams.drain(request.upstream_id, drain_s)
        await kept.emptied(wait_s)
        return api.DrainUpstreamResponse(upstream=translate.upstream(kept.view()))

    async def RemoveUpstream(self, request: api.RemoveUpstreamRequest, call: Call) -> api.RemoveUpstreamResponse:
        read = self._named(request.upstream_id)
        drain_s = read.drain_s(request)
        limits.refuse(read.violations, "remove the upstream")
        removed = await self._upstreams.remove(request.upstream_id, drain_s, etag=request.etag)
        return api.RemoveUpstreamResponse(removed=removed)

    async def GetDataPlane(self, request: api.GetDataPlaneRequest, call: Call) -> api.GetDataPlaneResponse:
        return api.GetDataPlaneResponse(data_planes=[translate.data_plane(one) for one in self._upstreams.planes])

    async def Invoke(self, request: api.InvokeRequest, call: Call) -> api.InvokeResponse:
        from retinue_server.ambassador import invoke  # noqa: PLC0415 - few apps call it, and it loads an HTTP library

        self._check_request(request)
        kept = self._get(request.upstream_id)
        _check_invocable(kept)
        headers = [(one.name, one.value) for one in request.headers]
        if telemetry.current() and not any(name.lower() == "traceparent" for name, _ in headers):
            headers.append(("traceparent", telemetry.current()))
        asked = invoke.Asked(request.method or "GET", request.path or "/", headers, request.body)
        answer = await invoke.invoke(kept.address, kept.upstream_id, asked)
        _check_answer(answer, kept.upstream_id)
        return api.InvokeResponse(
            status=answer.status,
            headers=[api.Header(name=name, value=value) for name, value in answer.headers],
            body=answer.body,
        )

    def _check_request(self, request: api.InvokeRequest) -> None:
        from retinue_server.ambassador import invoke  # noqa: PLC0415 - as above

        read = self._named(request.upstream_id)
        if request.method and (not _METHOD.fullmatch(request.method) or request.method == "CONNECT"):
            read.wrong("method", "must be capitals, up to 32, and not CONNECT")
        if request.path and not _PATH.fullmatch(request.path):
            read.wrong("path", "must begin with / and be escaped")
        for index, header in enumerate(request.headers):
            if not _NAME.fullmatch(header.name) or invoke.is_ours(header.name):
                read.wrong(f"headers[{index}].name", "must be the name of a header that does not govern a connection")
            if not _VALUE.fullmatch(header.value):
                read.wrong(f"headers[{index}].value", "must be one line of latin-1")
        hosts = [index for index, header in enumerate(request.headers) if header.name.lower() == "host"]
        for index in hosts[1:]:
            read.wrong(f"headers[{index}].name", "must not be a second host")
        if len(request.body) > invoke.MAX_BODY_BYTES:
            read.wrong("body", f"must be at most {invoke.MAX_BODY_BYTES} bytes; dial its listener")
        limits.refuse(read.violations, "invoke the upstream")

    def _get(self, upstream_id: str) -> Upstream:
        limits.refuse(self._named(upstream_id).violations, "find the upstream")
        return self._upstreams.get(upstream_id)

    def _named(self, upstream_id: str) -> translate.Reader:
        read = translate.Reader("")
        limits.check_upstream_id(upstream_id, read.violations)
        return read

    def _each_named(self, names: Iterable[str]) -> translate.Reader:
        read = translate.Reader("")
        for index, name in enumerate(names):
            limits.check_upstream_id(name, read.violations, f"upstream_ids[{index}]")
        return read


def _check_invocable(kept: Upstream) -> None:
    if kept.declared.protocol is not Speaks.HTTP:
        raise FailedPrecondition(
            f"cannot invoke {kept.upstream_id}: it speaks {kept.declared.protocol.name}, not HTTP",
            reason=Reason.UPSTREAM_NOT_HTTP,
        )
    if kept.state is not State.ACTIVE:
        raise FailedPrecondition(
            f"cannot invoke {kept.upstream_id}: it is {kept.state.name}", reason=Reason.UPSTREAM_NOT_ACTIVE
        )


def _check_answer(answer: Answer, upstream_id: str) -> None:
    """What the data plane answered by itself is an error. What the upstream did is an answer; it has Envoy's mark."""
    if any(name == _PASSED_ON for name, _ in answer.headers) or answer.status not in _OWN:
        return
    if answer.status == _GATEWAY_TIMEOUT:
        raise DeadlineExceeded(
            f"cannot invoke {upstream_id}: its policy's timeout was over before it answered",
            reason=Reason.UPSTREAM_TIMEOUT,
            upstream_id=upstream_id,
        )
    if answer.status == _TOO_MANY or any(name == _OVERLOADED for name, _ in answer.headers):
        raise ResourceExhausted(
            f"cannot invoke {upstream_id}: its circuit breaker or rate limit refused the request",
            reason=Reason.UPSTREAM_OVERFLOW,
            retry_ms=1000,
            upstream_id=upstream_id,
        )
    raise Unavailable(
        f"cannot invoke {upstream_id}: none of its endpoints could be reached",
        reason=Reason.UPSTREAM_UNHEALTHY,
        retry_ms=500,
        upstream_id=upstream_id,
    )
