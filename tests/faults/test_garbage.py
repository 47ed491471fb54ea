"""Garbage at every door of a server: bytes that are no messages, frames that are no frames, requests that are no HTTP.

Whatever comes, the answer is a canonical code that says what was wrong (never UNKNOWN or INTERNAL), or the connection
is closed; the server lives, tasks that are there stay as they were, and memory stays flat.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import hpack
import pytest
from behind import Lines, say
from contract import pools
from contract.client import ADAPTER, AMBASSADOR, SCATTER, SERVICES, Client, Refused, refused
from contract.conftest import new_line
from contract.line import Line, seconds
from contract.plays import Call, Fail, Leaves, Play, Raw
from contract.test_workqueue_fuzz import ALLOWED, messages
from faults.tables import LONG, PATIENT, Row
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import RunningServer, start_server

from retinue.scattergather.v1 import leaf_service_pb2 as leaf

pytestmark = PATIENT
MIB = 1024 * 1024
EXAMPLES = 300 if LONG else 12
ROUNDS = 10 if LONG else 3
WARM_UP = 3
"""Rounds after which memory has seen its peaks: what is open at once, and what the allocator keeps."""
FLAT_MIB = 32
"""By how much it may differ after as much garbage again; a round sends as much."""
SETTINGS: Any = {
    "deadline": None,
    "database": None,
    "derandomize": not LONG,
    "suppress_health_check": list(HealthCheck),
}
METHODS = {method.name: method for service in SERVICES | SCATTER | AMBASSADOR | ADAPTER for method in service.methods}
"""All doors."""
ANSWERS = {
    "retinue.workqueue.v1": {"OK", *ALLOWED},
    "retinue.scattergather.v1": {"OK", *ALLOWED, "UNAVAILABLE", "DEADLINE_EXCEEDED", "DATA_LOSS", "INTERNAL"},
    "retinue.ambassador.v1": {
        "OK",
        *ALLOWED,
        "UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "ABORTED",
        "UNIMPLEMENTED",
        "PERMISSION_DENIED",
    },
    "retinue.adapter.v1": {"OK", *ALLOWED, "UNAVAILABLE", "ABORTED", "UNIMPLEMENTED", "PERMISSION_DENIED"},
}
"""How calls may end, by package."""
OPERATORS = {
    "DeclareUpstream", "SetEndpoints", "DrainUpstream", "RemoveUpstream",
    "CreateTarget", "UpdateTarget", "DeleteTarget", "TestTarget",
}  # fmt: skip
OF_REPLIES = {"COVERAGE_NOT_MET", "MERGE_FAILED"}
"""What the contract of scatter/gather calls INTERNAL: the leaves' fault."""
GARBLED_REPLIES: list[Any] = [b"", b"1", b"[]", b"{}", b"\xff", Raw(b"\xff"), Raw(b"\x12\x02\x08\x01"), Fail("ABORTED")]
ENDED = {*ALLOWED, "CANCELLED", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "UNAVAILABLE"}
"""What grpc itself says, too, when a frame or a call is broken."""


@dataclass
class Attacked:
    """A server with tasks, leaves and an upstream that must stay as they are."""

    server: RunningServer
    app: Client
    operator: Client
    line: Line
    before: list[Any]
    scatterer: Client
    ambassador: Client
    leaves: Leaves
    play: Play

    def check_alive(self) -> None:
        """It serves, and what was there is as it was."""
        assert self.server.process.poll() is None
        assert self.line.tasks() == self.before
        task_id = new_line(self.app).put()
        assert self.app.GetTask(task_id=task_id).task.task_id == task_id
        assert self.scatterer.Scatter(pool_id="collect", payload=self.play.payload).coverage.complete
        assert say(self.ambassador.GetUpstream(upstream_id="kept").upstream.status.address) == "web x"

    def log(self) -> str:
        return (self.server.data_dir.parent / "server.log").read_text(errors="replace")  # grpc's core logs what it got

    def memory_mib(self) -> float:
        """What the process has in memory."""
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) / 1024


def attacked(where: Path) -> Iterator[Attacked]:
    with ExitStack() as stack:
        leaves, web = stack.enter_context(Leaves()), stack.enter_context(Lines("web"))
        file = where / "pools.yaml"
        file.write_text(json.dumps(pools.pools(leaves.at, f"unix:{where}/control.sock")))
        allowed = {"RETINUE_AMBASSADOR__ENDPOINTS__ALLOW": "127.0.0.1"}
        server = start_server(where, env=allowed | {"RETINUE_SCATTERGATHER__POOLS": str(file)})
        stack.callback(server.kill)
        yield from _attacked(server, leaves, web)


def _attacked(server: RunningServer, leaves: Leaves, web: Lines) -> Iterator[Attacked]:
    with (
        Client(server.address) as app,
        Client(server.control) as operator,
        Client(server.address, services=SCATTER) as scatterer,
        Client(server.control, services=AMBASSADOR) as ambassador,
        Client(server.control, services=ADAPTER) as adapter,
    ):
        line = new_line(app)
        line.put(priority=-5, labels={"a": "b"}, idempotency_key="k")
        line.complete(line.lend())
        line.put(priority=5)
        line.take_one(lease_duration=seconds(3600))
        kept = {"upstream_id": "kept", "protocol": "PROTOCOL_TCP", "static": {"endpoints": [{"address": web.address}]}}
        ambassador.DeclareUpstream(upstream=kept, wait_duration=seconds(15))
        adapter.CreateTarget(target={"target_id": "kept", "kind": "TARGET_KIND_REPORT"})
        leaves.nobodys.says["*"] = garbled_reply
        made = Attacked(server, app, operator, line, line.tasks(), scatterer, ambassador, leaves, leaves.play())
        yield made
        made.check_alive()
    assert "failed unexpectedly" not in made.log()
    assert "Traceback" not in made.log()
    assert server.stop() == 0


def garbled_reply(call: Call) -> Any:
    """What leaves say to garbage: garbage."""
    return GARBLED_REPLIES[zlib.crc32(call.data + call.shard.encode()) % len(GARBLED_REPLIES)]


@pytest.fixture(scope="module")
def it() -> Iterator[Attacked]:
    """One server for all attacks."""
    with tempfile.TemporaryDirectory(prefix="retinue-", ignore_cleanup_errors=True) as where:
        yield from attacked(Path(where))


# Bytes that are no messages


def _dry_run(rpc: str) -> bytes:
    """Bulk work only counts: what tasks are hit by chance is not the claim here."""
    field = METHODS[rpc].input_type.fields_by_name.get("dry_run")
    return b"" if field is None else bytes([field.number << 3, 1])


def garbled(rpc: str, descriptor: Any = None) -> st.SearchStrategy[bytes]:
    """A serialised request, or another message, and what becomes of it on a bad day."""
    of = descriptor or METHODS[rpc].input_type
    kind = GetMessageClass(of)
    whole = messages(of).map(lambda fields: kind(**fields).SerializeToString())
    unknown = st.builds(_field, st.integers(1, 1 << 20), st.binary(max_size=50))
    safe = (
        whole | st.builds(bytes.__add__, whole, unknown) | st.builds(lambda w, n: w * n, whole, st.integers(2, 3_000))
    )
    if not _dry_run(rpc):
        safe |= st.binary(max_size=300)
        safe |= st.builds(lambda w, cut: w[: cut % (len(w) + 1)], whole, st.integers(0, 10_000))
        safe |= st.builds(_flipped, whole, st.integers(0, 10_000), st.integers(1, 255))
        safe |= st.builds(lambda n, w: _field(1, w) * (n % 50) + _nested(n), st.integers(0, 3_000), whole)
    return safe.map(lambda data: (data if len(data) < 3 * MIB else data[:0]) + _dry_run(rpc))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _flipped(data: bytes, at: int, mask: int) -> bytes:
    if not data:
        return data
    at %= len(data)
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def _nested(depth: int) -> bytes:
    """A message in a message in a message, as deep as that."""
    data = b""
    for _ in range(min(depth, 500)):
        data = _field(1, data)
    return data


def call(channel: grpc.Channel, rpc: str, pieces: list[bytes]) -> str:
    """The code with which a call of raw bytes ends, whatever kind of RPC it is."""
    method = METHODS[rpc]
    path = f"/{method.containing_service.full_name}/{rpc}"
    kinds = {False: "unary", True: "stream"}
    made = getattr(channel, f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}")(path)
    sent: Any = iter(pieces) if method.client_streaming else pieces[0]
    try:
        reply = made(sent, timeout=10)
        if method.server_streaming:
            for _ in range(5 if rpc in {"DownloadBlob", "ScatterStream"} else 1):  # a watch has no end
                next(reply, None)
            if not method.client_streaming:
                reply.cancel()
                return "OK"
            for _ in reply:  # the worker has half-closed, so that it ends
                pass
    except grpc.RpcError as error:
        found = refused(error)
        assert found.reason or found.code in ENDED - ALLOWED or "larger than max" in found.message, found
        assert found.code != "INTERNAL" or found.reason in OF_REPLIES, found
        return found.code
    return "OK"


@pytest.mark.parametrize("rpc", sorted(METHODS))
def test_any_bytes_are_answered_by_the_contract(it: Attacked, rpc: str) -> None:
    @settings(max_examples=EXAMPLES, **SETTINGS)
    @given(st.lists(garbled(rpc), min_size=1, max_size=4))
    def ask(pieces: list[bytes]) -> None:
        assert call(it.operator.channel, rpc, pieces) in ANSWERS[METHODS[rpc].containing_service.file.package]

    ask()
    it.check_alive()


@pytest.mark.parametrize("rpc", sorted(OPERATORS))
def test_no_bytes_make_an_app_an_operator(it: Attacked, rpc: str) -> None:
    @settings(max_examples=EXAMPLES, **SETTINGS)
    @given(garbled(rpc))
    def ask(data: bytes) -> None:
        assert call(it.app.channel, rpc, [data]) in {"PERMISSION_DENIED", "INVALID_ARGUMENT"}

    ask()
    it.check_alive()


TOO_LARGE = (
    "EnqueueTasks", "StreamTasks", "UploadBlob", "Scatter", "ScatterStream", "GetTopology", "Query", "QueryStream",
    "Invoke", "WatchUpstreams", "ReportMetrics", "WatchMetrics",
)  # fmt: skip


@pytest.mark.parametrize("rpc", TOO_LARGE)
def test_a_message_that_is_too_large_is_refused(it: Attacked, rpc: str) -> None:
    assert call(it.app.channel, rpc, [bytes(5 * MIB)]) == "RESOURCE_EXHAUSTED"


# Streams of queries, and what leaves say to them

QUERIES = st.lists(
    st.fixed_dictionaries(
        {"query_id": st.integers(0, 3)},
        optional={
            "cancel": st.booleans(),
            "timeout_micros": st.sampled_from([0, 1, 1_000, -1]),
            "query": messages(METHODS["Query"].input_type),
        },
    ),
    max_size=8,
)


def test_any_sequence_of_queries_is_answered_by_the_contract(it: Attacked) -> None:
    @settings(max_examples=2 * EXAMPLES, **SETTINGS)
    @given(QUERIES)
    def play(sent: list[dict[str, Any]]) -> None:
        with it.scatterer.stream("QueryStream") as stream:
            for fields in sent:
                stream.send(**fields)
            stream.half_close()
            try:
                said = list(stream)
            except Refused as error:
                assert error.fields <= {"query", "query_id", "timeout_micros"}, error  # noqa: PT017 - one of many
                assert error.code == "INVALID_ARGUMENT", error  # noqa: PT017 - one of many answers
            else:
                assert {one.query_id for one in said} <= {fields["query_id"] for fields in sent}
                assert not [one for one in said if one.code in {1, 2}], "CANCELLED is not told, UNKNOWN never"
                assert not [one for one in said if "error id" in one.message]

    play()
    it.check_alive()


MERGING = (
    "collect", "json", "concat", "first", "top_k", *pools.JSON_MERGES, "service", "service_streamed", "streamed",
    "batched", "foreign", "tree", "hedged",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "score", "counts", "x"]), inner),
    max_leaves=8,
)
REPLIES = (
    garbled("Query", leaf.QueryResponse.DESCRIPTOR).map(Raw)
    | st.binary(max_size=50)
    | JSON.map(lambda value: json.dumps(value).encode())
)


@pytest.mark.parametrize("pool_id", MERGING)
def test_any_reply_is_merged_or_its_shard_named_as_lost(it: Attacked, pool_id: str) -> None:
    play = it.leaves.play()

    @settings(max_examples=EXAMPLES // 3, **SETTINGS)
    @given(st.lists(REPLIES, min_size=4, max_size=4), st.sampled_from([None, 0.1]))
    def ask(replies: list[Any], min_coverage: float | None) -> None:
        play.says = dict(zip("abcd", replies, strict=True))
        policy = {} if min_coverage is None else {"min_coverage": min_coverage}
        try:
            answer = it.scatterer.Scatter(pool_id=pool_id, payload=play.payload, policy=policy)
        except Refused as error:
            assert error.reason in OF_REPLIES, error  # noqa: PT017 - one of many answers
            assert error.scatter is not None, error  # noqa: PT017 - one of many answers
            lost = error.scatter.failed_by_code
        else:
            lost = answer.failed_by_code
        assert not lost.keys() & {"UNKNOWN", "OK"}, lost

    ask()
    it.check_alive()


# Frames that are no frames

DATA, HEADERS, RST_STREAM, SETTINGS_FRAME, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GET_TASK = "/retinue.workqueue.v1.WorkQueueService/GetTask"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


GREETING = PREFACE + frame(SETTINGS_FRAME, 0, 0)


PATHS = (
    "/retinue.scattergather.v1.ScatterGatherService/Scatter",
    "/retinue.scattergather.v1.ScatterGatherService/ScatterStream",
    "/retinue.scattergather.v1.LeafService/Query",
    "/retinue.scattergather.v1.LeafService/QueryStream",
    "/retinue.ambassador.v1.AmbassadorService/WatchUpstreams",
    "/retinue.adapter.v1.AdapterService/WatchMetrics",
)
"""As many kinds of RPC as there are behind other doors."""


def head(*more: tuple[str, str], stream: int = 1, flags: int = END_HEADERS, **replaced: str | None) -> bytes:
    """The headers of a call of GetTask, with some replaced or left out."""
    usual: dict[str, str | None] = {
        ":method": "POST", ":scheme": "http", ":path": GET_TASK, ":authority": "localhost",
        "content-type": "application/grpc", "te": "trailers",
    }  # fmt: skip
    usual |= {name.replace("__", ":").replace("_", "-"): value for name, value in replaced.items()}
    pairs = [*((name, value) for name, value in usual.items() if value is not None), *more]
    return frame(HEADERS, flags, stream, hpack.Encoder().encode(pairs))


def body(data: bytes, flags: int = END_STREAM) -> bytes:
    return frame(DATA, flags, 1, data)


def message(data: bytes, flag: int = 0, length: int | None = None) -> bytes:
    return struct.pack(">BI", flag, len(data) if length is None else length) + data


ASK = message(_field(1, b"none"))


def broken_calls(path: str) -> dict[str, bytes]:
    """Calls of an RPC that something is wrong with."""
    return {
        "a call as it should be": head(__path=path) + body(ASK),
        "a length beyond the data": head(__path=path) + body(message(b"abc", length=100)),
        "a length of 4 GiB": head(__path=path) + body(message(b"abc", length=0xFFFFFFFF)),
        "a length of 5 MiB": head(__path=path) + body(message(b"abc", length=5 * MIB)),
        "half a prefix": head(__path=path) + body(b"\0\0\0"),
        "an unknown prefix flag": head(__path=path) + body(message(b"abc", flag=0xFF)),
        "a compressed flag without an encoding": head(__path=path) + body(message(b"abc", flag=1)),
        "a compressed flag and no gzip": head(("grpc-encoding", "gzip"), __path=path) + body(message(b"abc", flag=1)),
        "an unknown encoding": head(("grpc-encoding", "zebra"), __path=path) + body(message(b"abc", flag=1)),
        "two messages for one": head(__path=path) + body(ASK + ASK),
        "no message": head(__path=path) + body(b""),
        "a wrong content type": head(content_type="text/html", __path=path) + body(ASK),
        "no content type": head(content_type=None, __path=path) + body(ASK),
        "GET": head(__method="GET", __path=path) + body(ASK),
        "no path": head(__path=None) + body(ASK),
        "a path of nonsense": head(__path="/\x01/..//") + body(ASK),
        "a bad timeout": head(("grpc-timeout", "99999999999999X"), __path=path) + body(ASK),
        "a timeout that passed": head(("grpc-timeout", "0n"), __path=path) + body(ASK),
        "a thousand headers": head(*((f"x-{i}", "y") for i in range(1000)), __path=path) + body(ASK),
        "a header of 60 KiB": frame(HEADERS, 0, 1, b"\0" * 16_000)
        + frame(CONTINUATION, END_HEADERS, 1, b"\0" * 16_000),
        "a bad authorization": head(("authorization", "Bearer \x7f"), __path=path) + body(ASK),
        "a traceparent of nonsense": head(("traceparent", "00-" + "z" * 5_000), __path=path) + body(ASK),
    }


FRAMES: dict[str, bytes] = {
    **broken_calls(GET_TASK),
    "headers that are no HPACK": frame(HEADERS, END_HEADERS, 1, b"\xff" * 50),
    "data on a stream that is not open": frame(DATA, END_STREAM, 7, ASK),
    "an even stream": head(stream=2),
    "a window beyond its limit": frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 2,
    "a frame over the limit": frame(DATA, 0, 1, bytes(100_000)),
    "an unknown frame": frame(0xEE, 0xFF, 3, b"?" * 100) + head() + body(ASK),
    "a goaway from the client": frame(GOAWAY, 0, 0, bytes(8)) + head() + body(ASK),
    "ten thousand pings": frame(PING, 0, 0, bytes(8)) * 10_000,
    "ten thousand settings": frame(SETTINGS_FRAME, 0, 0) * 10_000,
    "a thousand calls that are taken back": b"".join(
        head(stream=2 * i + 1) + frame(RST_STREAM, 0, 2 * i + 1, bytes(4)) for i in range(1_000)
    ),
}
GRPCS_OWN = {
    "a compressed flag without an encoding",
    "a compressed flag and no gzip",
    "an unknown encoding",
    "headers that are no HPACK",
}
"""Here grpc's own core says INTERNAL before a call gets to us, as its specification has it for most of them."""


def exchange(address: str, sent: bytes, patience: float = 0.3) -> str:
    """Sends bytes as they are; the code of the first call, or how else the server reacted."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as wire:
        with contextlib.suppress(OSError):  # the server may have closed in the middle
            wire.sendall(sent)
        return _reaction(wire, patience)


def _reaction(wire: socket.socket, patience: float) -> str:
    wire.settimeout(patience)
    decoder, data, found = hpack.Decoder(), b"", "nothing"
    while True:
        try:
            more = wire.recv(65536)
        except TimeoutError:
            return found
        except OSError:
            return "closed"
        if not more:
            return "closed" if found == "nothing" else found
        data += more
        while len(data) >= 9 and len(data) >= 9 + (size := int.from_bytes(data[:3], "big")):
            kind, payload, data = data[3], data[9 : 9 + size], data[9 + size :]
            if kind == HEADERS:
                pairs = {
                    bytes(k).decode("latin-1"): bytes(v).decode("latin-1") for k, v in decoder.decode(payload, raw=True)
                }
                if "grpc-status" in pairs:
                    return grpc_code(pairs["grpc-status"])
                found = f"HTTP {pairs.get(':status')}"
            elif kind == RST_STREAM:
                found = f"stream reset {int.from_bytes(payload, 'big')}"
            elif kind == GOAWAY and found == "nothing":
                found = "goaway"


def grpc_code(number: str) -> str:
    return next(code.name for code in grpc.StatusCode if code.value[0] == int(number))


@pytest.mark.parametrize("what", FRAMES)
def test_a_broken_frame_is_answered_or_its_connection_closed(it: Attacked, row: Row, what: str) -> None:
    reaction = exchange(it.server.address, GREETING + FRAMES[what])
    row("garbage, frames", sent=what, reaction=reaction)
    assert reaction != "UNKNOWN"
    assert reaction != "INTERNAL" or what in GRPCS_OWN
    it.check_alive()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.rpartition("/")[2])
def test_a_broken_call_is_answered_whatever_it_calls(it: Attacked, path: str) -> None:
    for what, sent in broken_calls(path).items():
        reaction = exchange(it.server.address, GREETING + sent, patience=0.05)
        assert reaction != "UNKNOWN", what
        assert reaction != "INTERNAL" or what in GRPCS_OWN, what
    it.check_alive()


def test_random_bytes_and_random_frames_do_no_harm(it: Attacked) -> None:
    for seed in range(40 * ROUNDS):
        exchange(it.server.address, noise(random.Random(seed)), patience=0.02)
    it.check_alive()


def noise(chance: random.Random) -> bytes:
    """Bytes, frames of any kind, or a good exchange with a byte that is wrong or with its end cut off."""
    good = GREETING + head() + body(ASK)
    shape = chance.randrange(5)
    if shape == 0:
        return chance.randbytes(chance.randrange(1, 5_000))
    if shape == 1:
        return PREFACE + chance.randbytes(chance.randrange(1, 5_000))
    if shape == 2:
        return GREETING + b"".join(_any_frame(chance) for _ in range(chance.randrange(1, 20)))
    if shape == 3:
        return good[: chance.randrange(1, len(good))]
    return _flipped(good, chance.randrange(len(PREFACE), len(good)), chance.randrange(1, 256))


def _any_frame(chance: random.Random) -> bytes:
    return frame(
        chance.randrange(12),
        chance.randrange(256),
        chance.choice([0, 1, 3, 2, 1 << 30]),
        chance.randbytes(chance.randrange(200)),
    )


# Requests that are no HTTP

BASE = "/retinue.workqueue.v1.WorkQueueService"


def post(it: Attacked, path: str, data: bytes, **headers: str) -> tuple[int, str]:
    """Status and Connect code of a POST; headers with underscores for dashes."""
    named = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://{it.server.http}{path}", data=data, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, "ok"
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["code"]
    except (urllib.error.URLError, ConnectionError) as error:  # it had not the patience to take all of a giant
        if isinstance(getattr(error, "reason", error), ConnectionError):
            return 0, "closed"
        raise


BODIES: dict[str, bytes] = {
    "nothing that is JSON": b"{",
    "no object": b"[1]",
    "bytes": bytes(range(256)),
    "UTF-16": '{"taskId":"a"}'.encode("utf-16"),
    "bad UTF-8": b'{"taskId":"\xff"}',
    "half a surrogate pair": b'{"taskId":"\\ud800"}',
    "half a surrogate pair in a name": b'{"\\ud800":1}',
    "a key twice": b'{"taskId":"a","taskId":"b"}',
    "an unknown field": b'{"nope":1}',
    "a wrong type": b'{"taskId":{"a":1}}',
    "very deep": b'{"taskId":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a very long number": b'{"taskId":' + b"9" * 100_000 + b"}",
    "too large": b'{"taskId":"' + b"a" * 5 * MIB + b'"}',
}


@pytest.mark.parametrize("what", BODIES)
def test_a_bad_body_is_refused_over_http(it: Attacked, row: Row, what: str) -> None:
    status, code = post(it, f"{BASE}/GetTask", BODIES[what])
    row("garbage, HTTP", sent=what, reaction=f"{status} {code}")
    too_large = {(429, "resource_exhausted"), (0, "closed")}
    assert (status, code) in (too_large if what == "too large" else {(400, "invalid_argument")})
    it.check_alive()


@settings(max_examples=20 * ROUNDS, deadline=None, database=None, derandomize=not LONG)
@given(
    rpc=st.sampled_from(sorted(METHODS)),
    data=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    ),
)
def json_garbage(it: Attacked, rpc: str, data: Any) -> None:
    status, code = post(it, f"/{METHODS[rpc].containing_service.full_name}/{rpc}", json.dumps(data).encode())
    assert code not in {"internal", "unknown"}, (status, code)


def test_any_json_is_answered_by_the_contract(it: Attacked) -> None:
    json_garbage(it)
    it.check_alive()


def test_a_wrong_content_type_a_wrong_host_and_a_wrong_verb_are_refused(it: Attacked) -> None:
    path = f"{BASE}/GetTask"
    assert post(it, path, b"{}", content_type="text/plain")[0] == 415
    assert post(it, path, b"{}", content_type="application/json; charset=latin-1")[0] == 415
    assert post(it, path, b"{}", host="evil.example")[0] == 403
    assert post(it, path, b"{}", content_encoding="gzip") == (501, "unimplemented")
    assert post(it, path, b"{}", connect_timeout_ms="x")[0] == 400
    assert post(it, f"{BASE}/Nope", b"{}") == (404, "unimplemented")


SLOW = b"POST " + f"{BASE}/GetTask".encode() + b" HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
RAW_HTTP: dict[str, bytes] = {
    "no HTTP": b"\0\1\2\3" * 100 + b"\r\n\r\n",
    "HTTP/2 on HTTP/1": GREETING,
    "a line without an end": b"GET /" + b"a" * 200_000,
    "a header without an end": SLOW + b"x: " + b"y" * 200_000,
    "two lengths": SLOW + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a negative length": SLOW + b"content-length: -2\r\n\r\n{}",
    "a chunk that is none": SLOW + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "length and chunks": SLOW + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("what", RAW_HTTP)
def test_a_request_that_is_no_http_is_refused_or_closed(it: Attacked, row: Row, what: str) -> None:
    host, _, port = it.server.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=1) as wire:
        with contextlib.suppress(OSError):
            wire.sendall(RAW_HTTP[what])
            wire.shutdown(socket.SHUT_WR)
        try:
            reply = wire.recv(4096)
        except OSError:
            reply = b""
    reaction = reply.split(b"\r\n")[0].decode(errors="replace") or "closed"
    row("garbage, HTTP", sent=what, reaction=reaction)
    assert "500" not in reaction
    it.check_alive()


def test_slow_bodies_hold_up_nobody_and_end_with_their_callers(it: Attacked) -> None:
    host, _, port = it.server.http.rpartition(":")
    wires = [socket.create_connection((host, int(port)), timeout=60) for _ in range(100)]
    for wire in wires:
        wire.sendall(SLOW + b"content-length: 1000\r\n\r\n{")
    assert post(it, "/retinue.workqueue.v1.WorkQueueAdminService/GetCapabilities", b"{}") == (200, "ok")
    it.check_alive()
    for wire in wires:
        wire.close()


# Memory


def test_memory_is_flat_under_garbage(row: Row) -> None:
    """After the first rounds the process does not grow any more."""
    with tempfile.TemporaryDirectory(prefix="retinue-", ignore_cleanup_errors=True) as where:
        for it in attacked(Path(where)):
            sizes = []
            for seed in range(WARM_UP + ROUNDS):
                throw_everything(it, random.Random(seed))
                it.check_alive()
                sizes.append(it.memory_mib())
            warm = sizes[WARM_UP - 1]
            grown = min(sizes[-2:]) - warm  # what the allocator happens to keep goes up and down, what leaks stays
            row("garbage, memory", rounds=ROUNDS, warm_mib=round(warm), grown_mib=round(grown, 1), allowed_mib=FLAT_MIB)
            assert grown < FLAT_MIB, sizes


def throw_everything(it: Attacked, chance: random.Random) -> None:
    """A round of all kinds."""
    for _ in range(60):
        exchange(it.server.address, noise(chance), patience=0.005)
    for sent in FRAMES.values():
        exchange(it.server.address, GREETING + sent, patience=0.005)
    it.check_alive()  # a thousand calls at once take a while
    for data in BODIES.values():
        post(it, f"{BASE}/GetTask", data)
    for rpc in sorted(METHODS):
        for size in (10, 1_000, 100_000):
            call(it.operator.channel, rpc, [chance.randbytes(size)])
    for pool_id in MERGING:
        answer_garbage(it, pool_id, chance)
    for _ in range(4):
        call(it.app.channel, "Scatter", [bytes(5 * MIB)])
        call(it.app.channel, "UploadBlob", [bytes(5 * MIB)])
        call(it.app.channel, "UploadBlob", [_field(1, chance.randbytes(MIB)), b"\xff"])


def answer_garbage(it: Attacked, pool_id: str, chance: random.Random) -> None:
    """Small and large replies that are none."""
    for size in (100, 5 * MIB if pool_id in {"collect", "streamed"} else 10_000):
        play = it.leaves.play()
        play.says = {"*": Raw(chance.randbytes(size))}
        with contextlib.suppress(Refused):
            it.scatterer.Scatter(pool_id=pool_id, payload=play.payload)
