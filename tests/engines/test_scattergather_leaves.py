"""The exercise of the port Leaves: a call each, and one stream for all, to real leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinue.client import LeafServer, Query, Refusal
from retinue.scattergather.v1 import leaf_service_pb2 as pb
from retinue_server.runtime.errors import Code
from retinue_server.scattergather.core.topology import LEAF_METHOD
from retinue_server.scattergather.engine import Line, Target
from retinue_server.scattergather.engines.grpc import GrpcLeaves
from retinue_server.scattergather.engines.streaming import Answer, parse

LIMIT = 4096


class Ended(NamedTuple):
    """How a call did."""

    code: int
    message: str
    reply: bytes | None


class Leaf:
    """Says what it is asked to."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, float | None]] = []
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()

    async def __call__(self, query: Query) -> bytes:
        self.asked.append((query.payload, query.remaining))
        if query.payload.startswith(b"fail "):
            raise Refusal(grpc.StatusCode[query.payload[5:].decode()], "it was told to")
        if query.payload.startswith(b"size "):
            return b"x" * int(query.payload[5:])
        if query.payload == b"hang":
            self.entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        return query.shard_id.encode() + b":" + query.payload


@pytest.fixture
def leaf() -> Leaf:
    return Leaf()


@pytest.fixture
async def server(leaf: Leaf) -> AsyncIterator[LeafServer]:
    async with LeafServer(leaf) as made:
        yield made


@pytest.fixture
async def leaves() -> AsyncIterator[GrpcLeaves]:
    made = GrpcLeaves()
    await made.start()
    yield made
    await made.stop()


class Opened:
    """A line, and what it told."""

    def __init__(self, leaves: GrpcLeaves, address: str, *, stream: bool) -> None:
        self.changed = asyncio.Event()
        self.line: Line = leaves.open(Target(address, LEAF_METHOD, LIMIT, None, stream), self.changed.set)

    async def ask(self, payload: bytes, timeout_s: float = 30.0) -> Ended:
        ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        data = pb.QueryRequest(payload=payload, shard_id="s", attempt=1).SerializeToString()
        self.line.call(data, timeout_s, (), lambda *how: ended.set_result(Ended(*how)))
        assert not ended.done(), "never within the call"
        async with asyncio.timeout(60):
            return await ended

    async def until(self, *, connected: bool) -> None:
        async with asyncio.timeout(60):
            while self.line.connected is not connected:
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture(params=[False, True], ids=["unary", "stream"])
async def opened(request: pytest.FixtureRequest, leaves: GrpcLeaves, server: LeafServer) -> Opened:
    return Opened(leaves, server.address, stream=request.param)


def payload(ended: Ended) -> bytes:
    assert ended.code == 0, ended
    assert ended.reply is not None
    return pb.QueryResponse.FromString(ended.reply).payload


async def test_a_reply_comes_as_it_is(opened: Opened) -> None:
    assert payload(await opened.ask(b"hello")) == b"s:hello"
    assert payload(await opened.ask(b"")) == b"s:"


async def test_many_at_once_are_each_answered_their_own(opened: Opened) -> None:
    asked = [str(number).encode() for number in range(200)]
    found = await asyncio.gather(*(opened.ask(one) for one in asked))
    assert [payload(one) for one in found] == [b"s:" + one for one in asked]


async def test_an_error_has_its_code_and_its_words(opened: Opened) -> None:
    ended = await opened.ask(b"fail INVALID_ARGUMENT")
    assert (ended.code, ended.reply) == (Code.INVALID_ARGUMENT, None)
    assert "it was told to" in ended.message
    assert payload(await opened.ask(b"on")) == b"s:on"


async def test_too_large_a_reply_fails_alone(opened: Opened) -> None:
    large, small = await asyncio.gather(opened.ask(f"size {LIMIT * 2}".encode()), opened.ask(b"size 100"))
    assert large.code == Code.RESOURCE_EXHAUSTED
    assert len(payload(small)) == 100


async def test_the_leaf_is_told_how_long_it_is_waited_for(opened: Opened, leaf: Leaf) -> None:
    await opened.ask(b"x", 20.0)
    [(_, left)] = leaf.asked
    assert left is not None
    assert 0 < left <= 21, "gRPC rounds what goes over the wire up"


async def test_a_cancellation_reaches_the_leaf_and_nobody_else(opened: Opened, leaf: Leaf) -> None:
    told: list[Any] = []
    data = pb.QueryRequest(payload=b"hang", shard_id="s", attempt=1).SerializeToString()
    cancel = opened.line.call(data, 60.0, (), lambda *how: told.append(how))
    await asyncio.wait_for(leaf.entered.wait(), 60)
    cancel()
    await asyncio.wait_for(leaf.cancelled.wait(), 60)
    assert payload(await opened.ask(b"on")) == b"s:on"
    assert not [one for one in told if one[0] == 0]


async def test_what_was_not_sent_yet_is_never_asked(opened: Opened, leaf: Leaf) -> None:
    data = pb.QueryRequest(payload=b"never", shard_id="s", attempt=1).SerializeToString()
    opened.line.call(data, 60.0, (), lambda *_: None)()
    assert payload(await opened.ask(b"on")) == b"s:on"
    assert b"never" not in [asked for asked, _ in leaf.asked]


async def test_a_leaf_that_is_gone_is_unavailable_and_is_found_again(
    opened: Opened, server: LeafServer, leaf: Leaf
) -> None:
    await opened.ask(b"x")
    await opened.until(connected=True)
    waiting = asyncio.create_task(opened.ask(b"hang"))
    await asyncio.wait_for(leaf.entered.wait(), 60)
    await server.stop(0)
    assert (await waiting).code == Code.UNAVAILABLE
    await opened.until(connected=False)
    assert (await opened.ask(b"x")).code == Code.UNAVAILABLE
    async with LeafServer(leaf, listen=server.address):
        await opened.until(connected=True)
        assert payload(await opened.ask(b"again")) == b"s:again"


async def test_nobody_there_is_unavailable(leaves: GrpcLeaves) -> None:
    for stream in (False, True):
        assert (await Opened(leaves, "127.0.0.1:1", stream=stream).ask(b"x")).code == Code.UNAVAILABLE


async def test_closing_ends_what_is_under_way(opened: Opened, leaf: Leaf) -> None:
    waiting = asyncio.create_task(opened.ask(b"hang"))
    await asyncio.wait_for(leaf.entered.wait(), 60)
    opened.line.close()
    assert (await waiting).code != 0
    await asyncio.wait_for(leaf.cancelled.wait(), 60)


@given(st.integers(0, 2**64 - 1), st.binary(max_size=300), st.integers(0, 16), st.text(max_size=50))
def test_answers_are_read_as_protobuf_reads_them(query_id: int, said: bytes, code: int, message: str) -> None:
    written = pb.QueryStreamResponse(query_id=query_id, code=code, message=message)
    written.response.payload = said
    found = parse(written.SerializeToString())
    assert found == Answer(query_id, written.response.SerializeToString(), code, message)


@given(st.binary(max_size=100))
def test_whatever_a_leaf_sends_is_an_answer_or_none(data: bytes) -> None:
    try:
        parse(data)
    except ValueError:
        return
