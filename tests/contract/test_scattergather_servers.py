"""Scatter/gather by servers of the tests' own: other faces, a relay, pools that change, limits, what operators see."""

from __future__ import annotations

import base64
import json
import struct
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from contract import pools
from contract.client import SCATTER, Client, Pending, Refused
from contract.plays import Fail, Leaves, Play
from servers import RunningServer, start_server

from retinue.scattergather.v1 import leaf_service_pb2 as leaf

SERVICE = "/retinue.scattergather.v1.ScatterGatherService"


class Rooted:
    """A root with a pool file of its own."""

    def __init__(self, where: Path, leaves: Leaves, args: tuple[str, ...], env: dict[str, str]) -> None:
        self.file = where / "pools.yaml"
        self.pools = pools.pools(leaves.at, f"unix:{where}/control.sock")
        for pool in self.pools["pools"].values():
            pool.setdefault("timeout_seconds", 60)
        self.write()
        settings = {"RETINUE_SCATTERGATHER__POOLS": str(self.file)} | env
        self.server = start_server(where, "scattergather", *args, env=settings)

    def write(self) -> None:
        self.file.write_text(json.dumps(self.pools))


Start = Callable[..., Rooted]


@pytest.fixture
def start(request: pytest.FixtureRequest, leaves: Leaves) -> Iterator[Start]:
    """Starts roots; they are killed after the test."""
    if request.config.getoption("--target"):
        pytest.skip("starts and ends servers of its own: run without --target")
    with tempfile.TemporaryDirectory(prefix="retinue-", ignore_cleanup_errors=True) as where, ExitStack() as stack:

        def start(*args: str, **env: str) -> Rooted:
            rooted = Rooted(Path(where), leaves, args, env)
            stack.callback(rooted.server.kill)
            return rooted

        yield start


def dial(server: RunningServer) -> Client:
    return Client(server.address, services=SCATTER)


# By HTTP


@pytest.fixture(scope="module")
def web(request: pytest.FixtureRequest, leaves: Leaves) -> Iterator[str]:
    """The HTTP face of a root."""
    if request.config.getoption("--target"):
        pytest.skip("starts a server of its own: run without --target")
    with tempfile.TemporaryDirectory(prefix="retinue-", ignore_cleanup_errors=True) as where:
        rooted = Rooted(Path(where), leaves, (), {})
        yield f"http://{rooted.server.http}"
        assert rooted.server.stop() == 0


def post(url: str, body: bytes, content_type: str = "application/json") -> tuple[int, bytes]:
    request = urllib.request.Request(url, data=body, headers={"content-type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_a_scatter_is_json_over_http(web: str, play: Play) -> None:
    play.says = {"*": b"2.5"}
    asked = {"poolId": "sum", "json": {"name": play.name}}
    status, body = post(f"{web}{SERVICE}/Scatter", json.dumps(asked).encode())
    answer = json.loads(body)
    assert (status, answer["json"], answer["coverage"]) == (
        200,
        7.5,
        {"expected": "3", "answered": "3", "complete": True},
    )


def test_what_is_missing_is_readable_over_http(web: str, play: Play) -> None:
    play.says = {"a": Fail("UNAVAILABLE", "gone")}
    asked = {"poolId": "collect", "payload": base64.b64encode(play.payload).decode()}
    status, body = post(f"{web}{SERVICE}/Scatter", json.dumps(asked).encode())
    error = json.loads(body)
    assert (status, error["code"]) == (503, "unavailable")
    details = {detail["type"]: detail["debug"] for detail in error["details"]}
    assert details["google.rpc.ErrorInfo"]["reason"] == "COVERAGE_NOT_MET"
    failure = details["retinue.scattergather.v1.ScatterFailure"]
    assert failure["failures"][0] == {"shardId": "a", "code": 14, "message": "gone", "attempts": 1}


def envelope(message: Any) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack(">BI", 0, len(data)) + data


def envelopes(body: bytes) -> list[tuple[int, Any]]:
    found = []
    while body:
        flags, length = struct.unpack_from(">BI", body)
        found.append((flags, json.loads(body[5 : 5 + length])))
        body = body[5 + length :]
    return found


def test_a_stream_is_envelopes_over_http(web: str, play: Play) -> None:
    play.says = {"*": b"2", "c": Fail("INTERNAL", "broken")}
    asked = {"request": {"poolId": "sum", "json": play.name, "policy": {"minCoverage": 0.5}}}
    status, body = post(f"{web}{SERVICE}/ScatterStream", envelope(asked), "application/connect+json")
    *told, (flags, end) = envelopes(body)
    assert (status, flags, end) == (200, 2, {})
    assert sorted(next(iter(event)) for _, event in told) == ["answer", "failure", "reply", "reply"]
    assert told[-1][1]["answer"]["json"] == 4
    strict = {"request": {"poolId": "sum", "json": play.name}}
    _, body = post(f"{web}{SERVICE}/ScatterStream", envelope(strict), "application/connect+json")
    flags, end = envelopes(body)[-1]
    assert (flags, end["error"]["code"]) == (2, "internal")
    assert {"retinue.scattergather.v1.ScatterFailure"} <= {detail["type"] for detail in end["error"]["details"]}


def test_json_that_is_too_deep_is_refused_over_http(web: str, play: Play) -> None:
    for depth in (60, 200, 5_000):
        for one, other in ((b"[", b"]"), (b'{"a":', b"}")):
            text = one * depth + b"1" + other * depth
            status, said = post(f"{web}{SERVICE}/Scatter", b'{"poolId": "sum", "json": ' + text + b"}")
            assert (status, json.loads(said)["code"]) == (400, "invalid_argument")
    asked = b'{"poolId": "collect", "json": ' + b"[" * 30 + b'"' + play.payload + b'"' + b"]" * 30 + b"}"
    assert post(f"{web}{SERVICE}/Scatter", asked)[0] == 200


# By a relay


@pytest.fixture
def relayed(start: Start) -> Iterator[Client]:
    """A client of a relay that asks a root."""
    upstream = start().server.address
    with tempfile.TemporaryDirectory(prefix="retinue-", ignore_cleanup_errors=True) as where:
        relay = start_server(Path(where), "scattergather", "--upstream", upstream)
        try:
            with dial(relay) as client:
                yield client
        finally:
            relay.kill()


def test_a_relay_passes_everything_on(relayed: Client, play: Play) -> None:
    late = play.gate(b"1")
    play.says = {"a": late, "b": b"2", "c": b"4"}
    request = {"pool_id": "sum", "payload": play.payload}
    with relayed.stream("ScatterStream", request=request) as stream:
        assert {stream.read().reply.reply.shard_id, stream.read().reply.reply.shard_id} == {"b", "c"}
        late.open()
        *_, last = list(stream)
        assert last.answer.json.number_value == 7
    assert relayed.Scatter(**request).json.number_value == 7
    assert relayed.GetTopology(pool_id="sum").pool.shards[0].shard_id == "a"
    with relayed.stream("WatchTopology", pool_id="sum") as watch:
        assert watch.read().pool.pool_id == "sum"
    with relayed.stream("QueryStream") as stream:
        query = leaf.QueryRequest(payload=play.payload, parent=leaf.ParentQuery(pool_id="sum"))
        stream.send(query_id=3, query=query)
        assert (answered := stream.read()).query_id == 3
        assert answered.response.payload == b"7"


def test_a_relay_passes_errors_on_with_their_details(relayed: Client, play: Play) -> None:
    play.says = {"a": Fail("UNAVAILABLE", "gone")}
    with pytest.raises(Refused) as error:
        relayed.Scatter(pool_id="collect", payload=play.payload)
    assert (error.value.code, error.value.reason) == ("UNAVAILABLE", "COVERAGE_NOT_MET")
    assert error.value.scatter
    assert error.value.scatter.failures[0].shard_id == "a"


def test_cancellation_goes_through_a_relay(relayed: Client, play: Play) -> None:
    play.says = {"*": play.gate()}
    asked = relayed.begin("Scatter", pool_id="sum", payload=play.payload)
    play.await_calls(3)
    asked.cancel()
    play.await_end("CANCELLED", 3)


# Pools that change, and the end


def test_a_request_ends_well_whose_pool_has_gone(start: Start, play: Play) -> None:
    rooted, gate = start(), play.gate(b"late")
    play.says = {"a": gate}
    with dial(rooted.server) as client, client.stream("WatchTopology", timeout=60, pool_id="collect") as watch:
        watch.read()
        asked = client.begin("Scatter", timeout=60, pool_id="collect", payload=play.payload)
        play.await_calls(3)
        del rooted.pools["pools"]["collect"]
        rooted.write()
        with pytest.raises(Refused) as gone:
            list(watch)
        assert (gone.value.code, gone.value.reason) == ("NOT_FOUND", "POOL_NOT_FOUND")
        with pytest.raises(Refused) as unknown:
            client.Scatter(pool_id="collect", payload=play.payload)
        assert unknown.value.reason == "POOL_NOT_FOUND"
        gate.open()
        assert asked.result().coverage.complete


def test_a_watch_sees_a_changed_pool_and_a_broken_file_changes_nothing(start: Start, play: Play) -> None:
    rooted = start()
    with dial(rooted.server) as client, client.stream("WatchTopology", timeout=60, pool_id="weighted") as watch:
        first = watch.read().pool
        rooted.file.write_text("pools: [")
        rooted.pools["pools"]["weighted"]["shards"][0]["weight"] = 7
        while not _said(rooted, "the pools stay as they were"):
            assert client.Scatter(pool_id="weighted", payload=play.payload).coverage.expected == 4
        rooted.write()
        changed = next(m.pool for m in watch if m.pool.topology_version > first.topology_version)
        assert [shard.weight for shard in changed.shards] == [7, 1]
        assert client.Scatter(pool_id="weighted", payload=play.payload).coverage.expected == 8


def _said(rooted: Rooted, text: str) -> bool:
    return text in (rooted.file.parent / "server.log").read_text()


def test_a_server_that_stops_ends_watches_and_lets_requests_end(start: Start, play: Play) -> None:
    rooted, gate = start(), play.gate()
    play.says = {"a": gate}
    with dial(rooted.server) as client, client.stream("WatchTopology", timeout=60, pool_id="collect") as watch:
        watch.read()
        asked = client.begin("Scatter", timeout=60, pool_id="collect", payload=play.payload)
        play.await_calls(3)
        rooted.server.process.terminate()
        with pytest.raises(Refused) as stopped:
            list(watch)
        assert (stopped.value.code, stopped.value.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
        assert stopped.value.retry_s
        gate.open()
        assert asked.result().coverage.complete
    assert rooted.server.process.wait(60) == 0


def test_too_many_calls_at_once_are_refused(start: Start, play: Play) -> None:
    gate = play.gate()
    play.says = {"*": gate}
    rooted = start(RETINUE_LIMITS__MAX_CONCURRENT_CALLS="2")
    with dial(rooted.server) as client:
        asked = [client.begin("Scatter", pool_id="collect", payload=play.payload) for _ in range(3)]
        _await(lambda: any(call.done() for call in asked))
        [refused] = [error for error in map(_error, asked) if error is not None]
        assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "CONCURRENCY_LIMIT")
        assert refused.retry_s
        gate.open()


def _error(call: Pending) -> Refused | None:
    """Of one that has failed while the others wait."""
    if call.done():
        try:
            call.result()
        except Refused as error:
            return error
    return None


def test_a_leaf_that_names_no_pool_is_answered_from_that_of_the_settings(start: Start, play: Play) -> None:
    play.says = {"*": b"2"}
    with dial(start(RETINUE_SCATTERGATHER__LEAF_POOL="sum").server) as client:
        assert client.Query(payload=play.payload, shard_id="s").payload == b"6"


# What operators see

METRICS = {
    "requests_total": '{end="partial",pool="sum"} 1.0',
    "attempts_total": '{attempt="primary",outcome="won",pool="sum"} 5.0',
    "denied_total": '{pool="sum"} 0.0',
    "expected_leaves_total": '{pool="sum"} 6.0',
    "answered_leaves_total": '{pool="sum"} 5.0',
    "reply_seconds": '{pool="sum",quantile="0.99"}',
    "endpoint_seconds": '{endpoint="',
    "running": '{pool="sum"} 0.0',
    "open_calls": '{pool="sum"} 0.0',
    "unsent_calls": '{pool="sum"} 0.0',
    "budget": '{pool="sum"} 50.0',
    "shards": '{pool="sum"} 3.0',
    "reachable_shards": '{pool="sum"} 3.0',
    "topology_version": '{pool="sum"} 1.0',
    "measured_total": '{pool="sum"} 2.0',
    "overhead_seconds_total": '{pool="sum"}',
    "straggler_seconds_total": '{pool="sum"}',
    "pool_file_ok": " 1.0",
}


def test_what_is_counted_is_shown(start: Start, play: Play) -> None:
    rooted = start("--metrics", "127.0.0.1:0")
    with dial(rooted.server) as client:
        play.says = {"*": b"1"}
        client.Scatter(pool_id="sum", payload=play.payload)
        play.says["c"] = Fail("NOT_FOUND")
        client.Scatter(pool_id="sum", payload=play.payload, policy={"min_coverage": 0.5})
    address = rooted.server.ready["metrics"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    mine = [
        line.removeprefix("retinue_scattergather_") for line in lines if "scattergather_" in line and line[0] != "#"
    ]
    for name, sample in METRICS.items():
        assert any(line.startswith(name + sample) for line in mine), (name, sample, mine)
    assert {line.split("{")[0].split(" ")[0] for line in mine} == set(METRICS)


def test_a_slow_request_is_logged_with_its_shards_and_without_payloads(start: Start, play: Play) -> None:
    rooted = start()
    rooted.pools["pools"]["sum"]["slow_log_seconds"] = 0.05
    rooted.write()
    late = play.gate(b"41")
    play.says = {"a": late, "*": b"1"}
    with dial(rooted.server) as client:
        _await(lambda: client.GetTopology(pool_id="sum").pool.topology_version > 1)
        asked = client.begin("Scatter", pool_id="sum", payload=play.payload)
        play.await_end("OK", 2)
        time.sleep(0.05)  # what it takes to be slow
        late.open()
        scatter_id = asked.result().scatter_id
        _await(lambda: _said(rooted, scatter_id))
    log = (rooted.file.parent / "server.log").read_text()
    assert "3 of 3 leaves answered" in log
    assert "primary" in log
    assert play.name not in log


def _await(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)
