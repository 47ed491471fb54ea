"""ScatterGatherService, TopologyService, and the LeafService of a root that is a leaf: translate, call the core."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from retinue.scattergather.v1 import leaf_service_pb2 as leaf
from retinue.scattergather.v1 import scattergather_service_pb2 as api
from retinue.scattergather.v1 import topology_pb2 as topology_pb
from retinue.scattergather.v1 import topology_service_pb2 as topology_api
from retinue_server.runtime import telemetry, wire
from retinue_server.runtime.errors import FailedPrecondition, Reason, RetinueError
from retinue_server.scattergather import framing, journal, translate
from retinue_server.scattergather.core import limits
from retinue_server.scattergather.core.requests import Ask, Policy
from retinue_server.scattergather.core.scatter import ScatterError, outcome
from retinue_server.scattergather.core.topology import GIVES_JSON

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retinue_server.runtime.dispatch import Call
    from retinue_server.scattergather.core.clock import Clock
    from retinue_server.scattergather.core.pool import Topology
    from retinue_server.scattergather.core.requests import Reply
    from retinue_server.scattergather.core.root import Root
    from retinue_server.scattergather.core.scatter import Attempt, Observer, Part, Scatter
    from retinue_server.scattergather.engine import Metadata

SCATTER = api.DESCRIPTOR.services_by_name["ScatterGatherService"]
TOPOLOGY = topology_api.DESCRIPTOR.services_by_name["TopologyService"]
LEAF = leaf.DESCRIPTOR.services_by_name["LeafService"]

_RECENT: wire.PageTokens[wire.Int64] = wire.PageTokens("scatters", 1, wire.Int64)
_POOLS: wire.PageTokens[str] = wire.PageTokens("pools", 1, str)
_VALUE = re.compile(r"[\x20-\x7e]*")


class _From(NamedTuple):
    """Where a request comes from."""

    path: tuple[str, ...] = ()
    parent_scatter_id: str = ""


class Requests:
    """Makes the core's request of what came."""

    def __init__(self, root: Root) -> None:
        self.root = root

    def ask(self, request: api.ScatterRequest, call: Call, read: translate.Reader, at: str = "") -> Ask:
        """Raises POOL_NOT_FOUND; what is wrong with the fields is in `read.violations`."""
        limits.check_pool_id(request.pool_id, read.violations, at + "pool_id")
        inputs, ids = read.inputs(request)
        policy = read.policy(request.policy)
        limits.check_policy(policy, read.violations)
        limits.refuse(read.violations)
        return self.made(request.pool_id, inputs, ids, policy, call, request.route_keys, request.shard_ids)

    def made(  # noqa: PLR0917 - what a request is made of
        self,
        pool_id: str,
        inputs: framing.Inputs,
        ids: tuple[str, ...] | None,
        policy: Policy,
        call: Call,
        route_keys: Sequence[str] = (),
        shard_ids: Sequence[str] = (),
        above: _From = _From(),  # noqa: B008 - immutable
    ) -> Ask:
        """The request with its question."""
        topology = self.root.topology(pool_id)
        pool = topology.pool
        scatter_id = self.root.new_id()
        forwarded = _forwarded(call, pool.forward_metadata)
        question: framing.LeafQuestion | framing.PlainQuestion
        if pool.is_retinue_leaf:
            path = (*above.path, f"{self.root.server_id}/{pool_id}")
            parent = framing.Parent(path, not policy.strict, scatter_id)
            question = framing.LeafQuestion(inputs, parent, forwarded, batch=pool.batch)
        else:
            question = framing.PlainQuestion(inputs, forwarded)
        context = telemetry.parse(telemetry.current())
        return Ask(
            pool_id=pool_id,
            scatter_id=scatter_id,
            topology=topology,
            question=question,
            route_keys=tuple(route_keys),
            shard_ids=tuple(shard_ids),
            input_ids=ids,
            policy=policy,
            timeout_s=call.time_remaining(),
            payload=inputs.payload,
            path=above.path,
            parent_scatter_id=above.parent_scatter_id,
            trace_id=context.trace_id if context else "",
        )


def _forwarded(call: Call, keys: Sequence[str]) -> Metadata:
    """What of the caller's metadata the pool lets through."""
    found = ((key, call.metadata.get(key)) for key in keys)
    return tuple((key, value) for key, value in found if value is not None and _VALUE.fullmatch(value))


def _trace(topology: Topology, shards: int) -> Observer | None:
    if not telemetry.tracer().on and not telemetry.current():
        return None
    return journal.Trace(topology, shards)


class ScatterGatherService:
    """For apps; see the contract."""

    def __init__(self, root: Root, clock: Clock) -> None:
        self._root, self._clock = root, clock
        self._requests = Requests(root)

    async def Scatter(self, request: api.ScatterRequest, call: Call) -> api.ScatterResponse:
        read = translate.Reader()
        ask = self._requests.ask(request, call, read)
        try:
            return translate.answer(await self._root.scatter(ask, read.violations, _trace))
        except ScatterError as error:
            raise translate.failure(error) from error.__cause__

    async def ScatterStream(self, request: api.ScatterStreamRequest, call: Call) -> None:
        read = translate.Reader("request.")
        ask = self._requests.ask(request.request, call, read, "request.")
        events = _Events(omit_payloads=request.omit_payloads)

        def observe(topology: Topology, shards: int) -> Observer:
            return events.over(topology, _trace(topology, shards))

        scattering = asyncio.create_task(self._root.scatter(ask, read.violations, observe))
        scattering.add_done_callback(lambda _: events.queue.put_nowait(None))
        try:
            while (event := await events.queue.get()) is not None:
                await call.write(event)
            await call.write(api.ScatterStreamResponse(answer=translate.answer(await scattering)))
        except ScatterError as error:
            raise translate.failure(error) from error.__cause__
        finally:
            scattering.cancel()
            await asyncio.wait({scattering})

    async def ExplainScatter(self, request: api.ExplainScatterRequest, call: Call) -> api.ExplainScatterResponse:
        read = translate.Reader("request.")
        ask = self._requests.ask(request.request, call, read, "request.")
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
        return api.ListRecentScattersResponse(
            scatters=[translate.recent(one) for one in found[:size]],
            next_page_token=_RECENT.encode(found[size - 1].number) if len(found) > size else "",
        )


class _Events:
    """What becomes of shards, as events of a stream; passes all on to another observer."""

    def __init__(self, *, omit_payloads: bool) -> None:
        self.queue: asyncio.Queue[api.ScatterStreamResponse | None] = asyncio.Queue()
        self._omit = omit_payloads
        self._next: Observer | None = None
        self._as_json = False

    def over(self, topology: Topology, following: Observer | None) -> _Events:
        """Once it is known what is asked."""
        merging = topology.pool.merging
        self._next, self._as_json = following, merging.kind in GIVES_JSON or merging.json_replies
        return self

    def asked(self, attempt: Attempt) -> Metadata:
        return self._next.asked(attempt) if self._next else ()

    def answered(self, part: Part, attempt: Attempt, reply: Reply) -> None:
        for index in range(len(part.members)):
            said = translate.reply(outcome(part, index), b"" if index else reply.payload, as_json=self._as_json)
            if self._omit:
                said.ClearField("output")
            event = api.ShardReply(
                reply=said,
                outcome=translate.outcome(outcome(part, index)),
                elapsed_duration=translate.duration(attempt.ended_at - part.begun_at),
                address=attempt.replica.address,
            )
            self.queue.put_nowait(api.ScatterStreamResponse(reply=event))

    def failed(self, part: Part) -> None:
        for index in range(len(part.members)):
            said = translate.outcome(outcome(part, index))
            self.queue.put_nowait(api.ScatterStreamResponse(failure=said))

    def ended(self, scatter: Scatter) -> None:
        if self._next:
            self._next.ended(scatter)


class LeafService:
    """A root that is a leaf of another: what is asked of it, it asks its own leaves."""

    def __init__(self, root: Root, leaf_pool: str) -> None:
        self._root, self._leaf_pool = root, leaf_pool
        self._requests = Requests(root)

    async def Query(self, request: leaf.QueryRequest, call: Call) -> leaf.QueryResponse:
        parent = request.parent
        ask = self._requests.made(
            self._pool_id(parent),
            framing.Inputs(request.payload),
            None,
            Policy(min_coverage=_ANY) if parent.accept_partial else Policy(),
            call,
            above=_From(tuple(parent.path), parent.scatter_id),
        )
        found = await self._root.scatter(ask, [], _trace)
        return leaf.QueryResponse(
            payload=translate.merged_bytes(found), coverage=translate.coverage(found.gathered.coverage)
        )

    def _pool_id(self, parent: leaf.ParentQuery) -> str:
        pool_id = parent.pool_id or self._leaf_pool
        if not pool_id:
            raise FailedPrecondition(
                "cannot answer as a leaf: say the shard's pool in the pool file above, or scattergather.leaf_pool here",
                reason=Reason.POOL_NOT_FOUND,
            )
        return pool_id

    async def QueryStream(self, call: Call) -> None:
        """Each query is a task; one that is cancelled, or whose time is over, is told nothing."""
        queries: dict[int, asyncio.Task[None]] = {}
        turn = asyncio.Lock()
        try:
            while (request := await call.read()) is not None:
                if request.cancel and (task := queries.pop(request.query_id, None)):
                    task.cancel()
                elif request.HasField("query"):
                    task = asyncio.create_task(self._answer(request, call, turn))
                    queries[request.query_id] = task
                    task.add_done_callback(partial(_forget, queries, request.query_id))
            if queries:  # nothing more is asked; what was is answered
                await asyncio.wait(list(queries.values()))
        finally:
            for task in list(queries.values()):
                task.cancel()

    async def _answer(self, request: leaf.QueryStreamRequest, call: Call, turn: asyncio.Lock) -> None:
        one = _OneOfMany(call, request.timeout_micros / 1_000_000)
        query_id = request.query_id
        try:
            answer = await self.Query(request.query, one)
            async with turn:  # a stream takes one message at a time
                await call.write(leaf.QueryStreamResponse(query_id=query_id, response=answer))
        except RetinueError as error:  # also of an answer that is too large
            failed = leaf.QueryStreamResponse(query_id=query_id, code=int(error.code), message=error.message)
            async with turn:
                await call.write(failed)


def _forget(queries: dict[int, asyncio.Task[None]], query_id: int, _: object) -> None:
    queries.pop(query_id, None)


_ANY = 1e-9
"""Something, however little."""


class _OneOfMany:
    """The call of one query on a stream."""

    def __init__(self, call: Call, timeout_s: float) -> None:
        self.role, self.metadata = call.role, call.metadata
        self._call, self._timeout_s = call, timeout_s

    def time_remaining(self) -> float | None:
        return self._timeout_s or None

    async def read(self) -> None:
        """There is one message, and it has been read."""

    async def write(self, response: object) -> None:
        await self._call.write(response)

    def set_trailing_metadata(self, key: str, value: str | bytes) -> None:
        """Streams have one trailer, at their end."""


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
        async for topology in self._root.watch(request.pool_id):
            await call.write(topology_api.WatchTopologyResponse(pool=self._pool(topology)))

    def _check(self, pool_id: str) -> None:
        read = translate.Reader()
        limits.check_pool_id(pool_id, read.violations)
        limits.refuse(read.violations, "show the pool")

    def _pool(self, topology: Topology) -> topology_pb.Pool:
        return translate.pool(topology, self._clock.now())
