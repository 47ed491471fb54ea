"""What users serve: leaves and merges, called over real connections as a root calls them."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.struct_pb2 import Struct
from servers import environment

from retinue.client import LeafServer, Merging, Partial, Query, Refusal, trace
from retinue.client.leaf import LeafService, _serving
from retinue.scattergather.v1 import leaf_service_pb2 as leaf_pb
from retinue.scattergather.v1 import leaf_service_pb2_grpc as leaf_rpc
from retinue.scattergather.v1 import merge_service_pb2 as merge_pb
from retinue.scattergather.v1 import merge_service_pb2_grpc as merge_rpc
from retinue.scattergather.v1.coverage_pb2 import Coverage

PATIENCE = 60.0
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@asynccontextmanager
async def served(handler: Any = None, **options: Any) -> AsyncIterator[Any]:
    """A server of that handler, and a channel to it."""
    async with LeafServer(handler, **options) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield channel


@asynccontextmanager
async def leaf(handler: Any, **options: Any) -> AsyncIterator[Any]:
    async with served(handler, **options) as channel:
        yield leaf_rpc.LeafServiceStub(channel)


@asynccontextmanager
async def merge(handler: Any) -> AsyncIterator[Any]:
    async with served(merge=handler) as channel:
        yield merge_rpc.MergeServiceStub(channel)


def question(content: Any = None, **fields: Any) -> leaf_pb.QueryRequest:
    known: dict[str, Any] = {"shard_id": "s", "attempt": 1}
    return leaf_pb.QueryRequest(payload=json.dumps(content).encode(), **(known | fields))


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details() or ""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


# One question


async def test_a_handler_sees_what_is_asked_and_how_long_it_has() -> None:
    seen: list[Query] = []

    async def handle(query: Query) -> list[int]:
        seen.append(query)
        return [len(query.json["text"])]

    async with leaf(handle) as stub:
        request = question({"text": "sea"}, attempt=2, parent=leaf_pb.ParentQuery(accept_partial=True))
        answer = await stub.Query(request, timeout=PATIENCE, metadata=(("tenant", "ada"),))
    [query] = seen
    assert answer == leaf_pb.QueryResponse(payload=b"[3]"), "complete: no coverage is sent"
    assert (query.shard_id, query.attempt, query.accepts_partial) == ("s", 2, True)
    assert query.inputs == {"s": b'{"text": "sea"}'}
    assert query.remaining is not None
    assert 0 < query.remaining < PATIENCE * 1.02, "gRPC rounds what it sends up"
    assert query.metadata["tenant"] == "ada"


async def test_without_a_deadline_there_is_no_time_left_to_tell() -> None:
    async with leaf(lambda query: query.remaining) as stub:
        assert (await stub.Query(question())).payload == b"null"


async def test_a_batch_has_its_shards_with_the_input_of_each() -> None:
    async with leaf(lambda query: {shard: text.decode() for shard, text in query.inputs.items()}) as stub:
        shards = [leaf_pb.ShardQuery(shard_id="a"), leaf_pb.ShardQuery(shard_id="b", payload=b"own")]
        answer = await stub.Query(leaf_pb.QueryRequest(payload=b"common", shards=shards))
    assert json.loads(answer.payload) == {"a": "common", "b": "own"}


@pytest.mark.parametrize(
    ("content", "payload"),
    [
        (b"\xff\x00", b"\xff\x00"),
        (bytearray(b"abc"), b"abc"),
        (Struct(), b""),
        ("text", b'"text"'),
        ({"ä": 1.5}, '{"ä": 1.5}'.encode()),
        (2**60, b"1152921504606846976"),
        (None, b"null"),
    ],
)
async def test_bytes_and_messages_go_as_they_are_and_all_else_as_json(content: Any, payload: bytes) -> None:
    async with leaf(lambda _: content) as stub:
        assert (await stub.Query(question())).payload == payload


async def test_a_part_says_how_much_it_stands_for() -> None:
    async with leaf(lambda query: Partial(b"x", *query.json)) as stub:
        part = (await stub.Query(question([1, 3]))).coverage
        whole = (await stub.Query(question([3, 3]))).coverage
    assert part == Coverage(answered=1, expected=3, complete=False)
    assert whole == Coverage(answered=3, expected=3, complete=True)


async def test_a_refusal_has_its_code_and_any_other_error_tells_the_caller_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def handle(query: Query) -> None:
        if query.json == "busy":
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much to do")
        raise KeyError("the secret")

    async with leaf(handle) as stub:
        assert await refused(stub.Query(question("busy"))) == ("RESOURCE_EXHAUSTED", "too much to do")
        code, told = await refused(stub.Query(question()))
    assert (code, told) == ("INTERNAL", "the handler failed with KeyError: see its log")
    assert "the secret" in caplog.text


async def test_a_reply_that_json_cannot_hold_is_a_defect_and_the_next_question_is_answered() -> None:
    async with leaf(lambda query: query.json / 1e-300 if query.json else 1) as stub:
        assert (await refused(stub.Query(question(1e300))))[0] == "INTERNAL"
        assert (await stub.Query(question(0))).payload == b"1"


async def test_a_question_that_is_no_json_is_the_callers_fault() -> None:
    async with leaf(lambda query: query.json) as stub:
        code, told = await refused(stub.Query(leaf_pb.QueryRequest(payload=b"{")))
    assert code == "INVALID_ARGUMENT"
    assert "no JSON" in told


async def test_a_coroutine_is_cancelled_when_nobody_waits_any_more() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def handle(_: Query) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with leaf(handle) as stub:
        call = stub.Query(question())
        await begun.wait()
        call.cancel()
        await asyncio.wait_for(ended.wait(), PATIENCE)
        ended.clear()
        begun.clear()
        for patience in (0.05, 1, 10):
            assert (await refused(stub.Query(question(), timeout=patience)))[0] == "DEADLINE_EXCEEDED"
            if begun.is_set():  # else it was over before the leaf was asked
                break
        await asyncio.wait_for(ended.wait(), PATIENCE)


async def test_a_plain_function_runs_beside_the_loop_and_is_told_when_nobody_waits_any_more() -> None:
    begun, told = threading.Event(), threading.Event()

    def handle(query: Query) -> None:
        begun.set()
        assert threading.current_thread() is not threading.main_thread()
        if query.stopping.wait(PATIENCE):
            told.set()

    async with leaf(handle) as stub:
        call = stub.Query(question())
        await until(begun.is_set)
        call.cancel()
        await until(told.is_set)


async def test_what_waits_for_a_thread_is_not_begun_when_nobody_waits_for_it_any_more() -> None:
    begun: list[str] = []
    go = threading.Event()

    def handle(query: Query) -> None:
        begun.append(query.json)
        go.wait(PATIENCE)

    service = LeafService(handle, threads=1)
    asked = [asyncio.create_task(service.answer(question(name), None, {})) for name in ("first", "late", "last")]
    await until(lambda: bool(begun))
    asked[1].cancel()
    await asyncio.wait({asked[1]})
    go.set()
    await asyncio.gather(asked[0], asked[2])
    assert begun == ["first", "last"]


async def test_what_a_leaf_calls_is_in_the_trace_of_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)  # other tests of this process may load it
    async with leaf(lambda _: trace.current()) as stub:
        answer = await stub.Query(question(), metadata=(("traceparent", TRACE),))
        without = await stub.Query(question())
    inside = json.loads(answer.payload).split("-")
    assert inside[1] == TRACE.split("-")[1]
    assert inside[2] != TRACE.split("-")[2], "a span of its own"
    assert json.loads(without.payload).split("-")[1] != inside[1]


WITH_OPENTELEMETRY = """
import asyncio
import grpc.aio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from retinue.client import LeafServer
from retinue.scattergather.v1 import leaf_service_pb2 as pb, leaf_service_pb2_grpc as rpc

async def main():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    async with LeafServer(lambda query: b"") as server, grpc.aio.insecure_channel(server.address) as channel:
        request = pb.QueryRequest(shard_id="s", attempt=2)
        await rpc.LeafServiceStub(channel).Query(request, metadata=(("traceparent", "TRACE"),))
    [span] = exporter.get_finished_spans()
    print(span.name, span.kind.name, f"{span.parent.span_id:016x}", *map(span.attributes.get, ("shard_id", "attempt")))

asyncio.run(main())
"""


def test_with_opentelemetry_an_answer_is_a_span_beneath_the_roots_call() -> None:
    command = [sys.executable, "-c", WITH_OPENTELEMETRY.replace("TRACE", TRACE)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.stdout == "retinue.scattergather.v1.LeafService/Query SERVER b7ad6b7169203331 s 2\n", done.stderr


# Many questions on one stream


def one(number: int, content: Any = None, seconds: float = PATIENCE) -> leaf_pb.QueryStreamRequest:
    return leaf_pb.QueryStreamRequest(query_id=number, query=question(content), timeout_micros=int(seconds * 1e6))


def gone(number: int) -> leaf_pb.QueryStreamRequest:
    return leaf_pb.QueryStreamRequest(query_id=number, cancel=True)


class Gates:
    """A handler whose answers come when they are let out."""

    def __init__(self) -> None:
        self.open: dict[int, asyncio.Event] = {}
        self.ended: list[int] = []
        self.remaining: float | None = None

    async def __call__(self, query: Query) -> int:
        number: int = query.json
        if number < 0:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "not now")
        gate = self.open[number] = asyncio.Event()
        self.remaining = query.remaining
        try:
            await gate.wait()
        finally:
            self.ended.append(number)
        return number


async def test_answers_on_a_stream_come_in_any_order_with_their_errors() -> None:
    gates = Gates()
    async with leaf(gates) as stub:
        call = stub.QueryStream()
        for request in (one(7, 1), one(8, 2), one(9, -1)):
            await call.write(request)
        failed = await call.read()
        assert (failed.query_id, failed.code, failed.message) == (9, 14, "not now")
        await until(lambda: len(gates.open) == 2)
        assert gates.remaining is not None
        assert 0 < gates.remaining <= PATIENCE
        for number, query_id in ((2, 8), (1, 7)):
            gates.open[number].set()
            answer = await call.read()
            assert (answer.query_id, answer.code, answer.response.payload) == (query_id, 0, str(number).encode())
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_on_a_stream_a_query_ends_when_it_is_cancelled_or_late_and_nothing_is_said() -> None:
    gates = Gates()
    async with leaf(gates) as stub:
        call = stub.QueryStream()
        await call.write(one(1, 1))
        await call.write(one(2, 2, seconds=0.05))
        await call.write(one(3, 3))
        await until(lambda: 1 in gates.open)
        await call.write(gone(1))
        await call.write(gone(99))
        await until(lambda: sorted(gates.ended) == [1, 2])
        gates.open[3].set()
        await call.done_writing()
        assert [answer.query_id async for answer in call] == [3]


async def test_a_stream_that_breaks_takes_its_queries_with_it() -> None:
    gates = Gates()
    async with leaf(gates) as stub:
        call = stub.QueryStream()
        await call.write(one(1, 1))
        await until(lambda: 1 in gates.open)
        call.cancel()
        await until(lambda: gates.ended == [1])


async def test_a_server_that_stops_answers_what_is_open_on_streams_and_ends_them() -> None:
    gates = Gates()
    server = LeafServer(gates)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = leaf_rpc.LeafServiceStub(channel).QueryStream()
        await call.write(one(1, 1))
        await until(lambda: 1 in gates.open)
        stopping = asyncio.create_task(server.stop(grace=PATIENCE))
        await asyncio.sleep(0)
        gates.open[1].set()
        assert [answer.response.payload async for answer in call] == [b"1"]
        await asyncio.wait_for(stopping, PATIENCE)
    await server.stop()


# Merges

REPLIES = [merge_pb.LeafReply(shard_id=name, payload=json.dumps(name).encode()) for name in ("a", "b")]


async def test_a_merge_has_all_replies_the_question_and_what_is_missing() -> None:
    def fuse(merging: Merging) -> dict[str, Any]:
        return {
            "pool": merging.pool_id,
            "asked": merging.json,
            "replies": {reply.shard_id: reply.json for reply in merging.replies},
            "coverage": str(merging.coverage),
            "complete": merging.coverage is not None and merging.coverage.complete,
        }

    part = Coverage(answered=2, expected=3)
    request = merge_pb.MergeRequest(replies=REPLIES, payload=b"[1]", pool_id="p", coverage=part)
    async with merge(fuse) as stub:
        answer = json.loads((await stub.Merge(request)).payload)
    replies = {"a": "a", "b": "b"}
    assert answer == {"pool": "p", "asked": [1], "replies": replies, "coverage": "2 of 3", "complete": False}


async def test_a_coroutine_merges_replies_as_they_come() -> None:
    come: asyncio.Queue[str] = asyncio.Queue()

    async def fuse(merging: Merging) -> str:
        async for reply in merging:
            come.put_nowait(reply.shard_id)
        return "".join(reply.shard_id for reply in merging.replies)

    async with merge(fuse) as stub:
        call = stub.MergeStream()
        await call.write(merge_pb.MergeStreamRequest(start=merge_pb.MergeStart(pool_id="p", payload=b"1")))
        for reply in REPLIES:
            await call.write(merge_pb.MergeStreamRequest(reply=reply))
            assert await asyncio.wait_for(come.get(), PATIENCE) == reply.shard_id
        await call.done_writing()
        assert (await call).payload == b'"ab"'
        request = merge_pb.MergeRequest(replies=REPLIES)
        assert (await stub.Merge(request)).payload == b'"ab"', "the same function merges what comes at once"


async def test_a_plain_function_has_all_replies_of_a_stream() -> None:
    async with merge(lambda merging: [reply.json for reply in merging.replies]) as stub:
        start = merge_pb.MergeStreamRequest(start=merge_pb.MergeStart(pool_id="p"))
        requests = [start, *(merge_pb.MergeStreamRequest(reply=reply) for reply in REPLIES)]
        assert (await stub.MergeStream(iter(requests))).payload == b'["a", "b"]'
        code, told = await refused(stub.MergeStream(iter(requests[1:])))
    assert code == "INVALID_ARGUMENT"
    assert "start" in told


async def test_a_merge_may_be_large() -> None:
    big = merge_pb.LeafReply(shard_id="a", payload=b"x" * (8 << 20))
    async with served(merge=lambda merging: merging.replies[0].payload) as channel:
        method = "/retinue.scattergather.v1.MergeService/Merge"
        call = channel.unary_unary(method, request_serializer=merge_pb.MergeRequest.SerializeToString)
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # our own channel takes 4 MiB
            await call(merge_pb.MergeRequest(replies=[big]))
    assert "4194304" in (caught.value.details() or ""), "the answer came: it is what was too large"


# The server


async def test_leaf_and_merge_are_served_together_on_a_socket(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/leaf.sock"
    async with served(lambda _: 1, merge=lambda _: 2, listen=listen) as channel:
        assert (await leaf_rpc.LeafServiceStub(channel).Query(question())).payload == b"1"
        assert (await merge_rpc.MergeServiceStub(channel).Merge(merge_pb.MergeRequest())).payload == b"2"


async def test_a_server_serves_until_it_is_stopped_even_if_nobody_refers_to_it(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/leaf.sock"
    await LeafServer(lambda _: 1, listen=listen).start()
    gc.collect()
    async with grpc.aio.insecure_channel(listen) as channel:
        assert (await leaf_rpc.LeafServiceStub(channel).Query(question())).payload == b"1"
    [left] = [server for server in _serving if server.address == listen]
    await left.stop(0)
    assert left not in _serving


async def test_a_port_that_is_taken_is_refused_with_its_name() -> None:
    async with LeafServer(lambda _: 1) as first:
        with pytest.raises(OSError, match=f"cannot listen on {first.address}"):
            await LeafServer(lambda _: 1, listen=first.address).start()


async def test_a_stop_lets_what_is_under_way_end(caplog: pytest.LogCaptureFixture) -> None:
    gates = Gates()
    server = LeafServer(gates)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = leaf_rpc.LeafServiceStub(channel).Query(question(1))
        await until(lambda: 1 in gates.open)
        stopping = asyncio.create_task(server.stop(grace=PATIENCE))
        await asyncio.sleep(0)
        gates.open[1].set()
        assert (await call).payload == b"1"
        await asyncio.wait_for(stopping, PATIENCE)
    assert not [record for record in caplog.records if record.name.startswith("retinue")]
