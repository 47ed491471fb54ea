"""ScatterGatherService and TopologyService: translate, call the core."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

from retinue.scattergather.v1 import scattergather_service_pb2 as api
from retinue.scattergather.v1 import topology_pb2 as topology_pb
from retinue.scattergather.v1 import topology_service_pb2 as topology_api
from retinue_server.runtime import wire
from retinue_server.runtime.codec import MAX_REPLY_BYTES
from retinue_server.runtime.errors import InvalidArgument, Violation
from retinue_server.scattergather import translate
from retinue_server.scattergather.asking import Requests, trace
from retinue_server.scattergather.core import limits
from retinue_server.scattergather.core.scatter import ScatterError, outcome
from retinue_server.scattergather.core.topology import GIVES_JSON

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from retinue_server.runtime.dispatch import Call
    from retinue_server.scattergather.core.clock import Clock
    from retinue_server.scattergather.core.pool import Topology
    from retinue_server.scattergather.core.requests import Reply
    from retinue_server.scattergather.core.root import Recent, Root
    from retinue_server.scattergather.core.scatter import Attempt, Observer, Part, Scatter
    from retinue_server.scattergather.engine import Metadata

SCATTER = api.DESCRIPTOR.services_by_name["ScatterGatherService"]
TOPOLOGY = topology_api.DESCRIPTOR.services_by_name["TopologyService"]

_RECENT: wire.PageTokens[wire.Int64] = wire.PageTokens("scatters", 1, wire.Int64)
_POOLS: wire.PageTokens[str] = wire.PageTokens("pools", 1, str)
_PAGE_BYTES = MAX_REPLY_BYTES - 64 * 1024
"""Of requests in one page; room for a token, and for one request that is too many."""


class ScatterGatherService:
    """For apps; see the contract."""

    def __init__(self, root: Root, clock: Clock) -> None:
        self._root, self._clock = root, clock
        self._requests = Requests(root)

    async def Scatter(self, request: api.ScatterRequest, call: Call) -> api.ScatterResponse:
        if not (request.shard_ids or request.route_keys or request.WhichOneof("input") == "shard_inputs"):
            self._root.check_room(request.pool_id)
        read = translate.Reader()
        ask = self._requests.ask(request, call, read)
        try:
            return await self._root.scatter(ask, read.violations, translate.answer, trace)
        except ScatterError as error:
            translate.add_failure(error)
            raise

    async def ScatterStream(self, request: api.ScatterStreamRequest, call: Call) -> None:
        read = translate.Reader()
        with _within("request."):
            ask = self._requests.ask(request.request, call, read)
            events = _Events(ask.topology, omit_payloads=request.omit_payloads)
            make = translate.answer_without_output if request.omit_output else translate.answer
            scattering = asyncio.create_task(self._root.scatter(ask, read.violations, make, events.observe))
            scattering.add_done_callback(lambda _: events.end())
            try:
                async for event in events:
                    await call.write(event)
                await call.write(api.ScatterStreamResponse(answer=await scattering))
            except ScatterError as error:
                translate.add_failure(error)
                raise
            finally:
                scattering.cancel()
                await asyncio.gather(scattering, return_exceptions=True)

    async def ExplainScatter(self, request: api.ExplainScatterRequest, call: Call) -> api.ExplainScatterResponse:
        read = translate.Reader()
        with _within("request."):
            ask = self._requests.ask(request.request, call, read)
            return translate.plan(self._root.plan(ask, read.violations), self._clock.now())

    async def ListRecentScatters(
        self, request: api.ListRecentScattersRequest, call: Call
    ) -> api.ListRecentScattersResponse:
        read = translate.Reader()
        size = limits.page_size(request.page_size, limits.PAGE_SIZES, read.violations)
        if request.pool_id:
            limits.check_pool_id(request.pool_id, read.violations)
        limits.refuse(read.violations, "list requests")
        before = _RECENT.decode(request.page_token)
        found = [
            one
            for one in reversed(self._root.recent)
            if (before is None or one.number < before)
            and request.pool_id in ("", one.pool_id)
            and request.scatter_id in ("", one.scatter_id)
        ]
        page = _fitting(found[:size])
        return api.ListRecentScattersResponse(
            scatters=page, next_page_token=_RECENT.encode(found[len(page) - 1].number) if len(found) > len(page) else ""
        )


def _fitting(found: Sequence[Recent]) -> Sequence[api.RecentScatter]:
    """As many as a message holds; one in any case."""
    page: list[api.RecentScatter] = []
    room = _PAGE_BYTES
    for one in found:
        said = translate.recent(one)
        room -= said.ByteSize() + 8
        if page and room < 0:
            break
        page.append(said)
    return page


@contextmanager
def _within(at: str) -> Iterator[None]:
    """Names the fields of a request that stands in another by where they are."""
    try:
        yield
    except InvalidArgument as error:
        wrong = [Violation(at + one.field, one.description) for one in error.violations]
        limits.refuse(wrong)


class _Events:
    """What becomes of shards, as events of a stream; passes all on to another observer.

    Messages are made when they are sent: until then, a reply that waits is the one that the merge has, too.
    """

    def __init__(self, topology: Topology, *, omit_payloads: bool) -> None:
        merging = topology.pool.merging
        self._as_json = merging.kind in GIVES_JSON or merging.json_replies
        self._omit = omit_payloads
        self._queue: asyncio.Queue[tuple[Part, Attempt | None, Reply | None] | None] = asyncio.Queue()
        self._next: Observer | None = None

    def observe(self, topology: Topology, shards: int) -> Observer:
        """Once it is known what is asked."""
        self._next = trace(topology, shards)
        return self

    def asked(self, attempt: Attempt) -> Metadata:
        return self._next.asked(attempt) if self._next else ()

    def answered(self, part: Part, attempt: Attempt, reply: Reply) -> None:
        self._queue.put_nowait((part, attempt, None if self._omit else reply))

    def failed(self, part: Part) -> None:
        self._queue.put_nowait((part, None, None))

    def ended(self, scatter: Scatter) -> None:
        if self._next:
            self._next.ended(scatter)

    def end(self) -> None:
        """Nothing more comes."""
        self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[api.ScatterStreamResponse]:
        while (event := await self._queue.get()) is not None:
            part, attempt, reply = event
            for index in range(len(part.members)):
                if attempt is None:
                    yield api.ScatterStreamResponse(failure=translate.outcome(outcome(part, index)))
                else:
                    payload = reply.payload if reply and not index else None
                    said = translate.shard_reply(part, index, attempt, payload, as_json=self._as_json)
                    yield api.ScatterStreamResponse(reply=said)


class TopologyService:
    """Shows pools; see the contract."""

    def __init__(self, root: Root, clock: Clock) -> None:
        self._root, self._clock = root, clock

    async def ListPools(self, request: topology_api.ListPoolsRequest, call: Call) -> topology_api.ListPoolsResponse:
        read = translate.Reader()
        size = limits.page_size(request.page_size, limits.POOL_PAGE_SIZES, read.violations)
        limits.refuse(read.violations, "list pools")
        after = _POOLS.decode(request.page_token) or ""
        names = sorted(name for name in self._root.pools if name > after)
        return topology_api.ListPoolsResponse(
            pools=[translate.summary(self._root.topology(name)) for name in names[:size]],
            next_page_token=_POOLS.encode(names[size - 1]) if len(names) > size else "",
        )

    async def GetTopology(
        self, request: topology_api.GetTopologyRequest, call: Call
    ) -> topology_api.GetTopologyResponse:
        self._check(request.pool_id)
        return topology_api.GetTopologyResponse(pool=self._pool(self._root.topology(request.pool_id)))

    async def WatchTopology(self, request: topology_api.WatchTopologyRequest, call: Call) -> None:
        self._check(request.pool_id)
        async with aclosing(self._root.watch(request.pool_id)) as topologies:
            async for topology in topologies:
                await call.write(topology_api.WatchTopologyResponse(pool=self._pool(topology)))

    def _check(self, pool_id: str) -> None:
        read = translate.Reader()
        limits.check_pool_id(pool_id, read.violations)
        limits.refuse(read.violations, "show the pool")

    def _pool(self, topology: Topology) -> topology_pb.Pool:
        return translate.pool(topology, self._clock.now())
