"""Every documented error of scatter/gather, provoked by grpcurl alone over real leaves, with all details decoded."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from e2e.roots import TOOL, await_connected, started_root
from leaves import leaves, pool
from servers import RunningServer

PACKAGE = "retinue.scattergather.v1"
ROOT, TOPOLOGY, LEAF = (f"{PACKAGE}.{name}Service" for name in ("ScatterGather", "Topology", "Leaf"))
FAILURE = f"{PACKAGE}.ScatterFailure"
NO_HEDGES = {"enabled": False}
SMALL = {"max_reply_bytes": 60, "max_gathered_bytes": 60}
"""Less than two replies."""


class Said(NamedTuple):
    """What grpcurl prints of an error."""

    code: str
    message: str
    details: dict[str, dict[str, Any]]
    """By their type."""

    @property
    def reason(self) -> str:
        info = self.details["google.rpc.ErrorInfo"]
        assert info["domain"] == "retinue"
        return str(info["reason"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    where = tmp_path_factory.mktemp("root")
    pools = {
        "all": pool(where, "a", "b", "c", hedging=NO_HEDGES),
        "narrow": pool(where, "a", "b", hedging=NO_HEDGES, limits={"max_calls": 2}, timeout_seconds=60),
        "small": pool(where, "a", "b", hedging=NO_HEDGES, limits=SMALL),
        "quick": pool(where, "a", hedging=NO_HEDGES, timeout_seconds=0.3),
        "once": pool(where, "a", hedging=NO_HEDGES, idempotent=False),
        "unmerged": pool(where, "a", merge="service", merge_address=f"unix:{where}/nobody.sock"),
        "empty": {"shards": []},
    }
    with leaves(where, "a", "b", "c"):
        running = started_root(where, pools)
        for name, content in pools.items():
            await_connected(running, name, len(content["shards"]))
        yield running
        assert running.stop() == 0


def begun(server: RunningServer, method: str, request: dict[str, Any], *flags: str) -> subprocess.Popen[str]:
    """It runs; nobody waits for it yet."""
    command = [str(TOOL / "grpcurl"), "-plaintext", "-max-time", "60", *flags, "-d", json.dumps(request)]
    return subprocess.Popen(
        [*command, server.address, method], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(running: subprocess.Popen[str]) -> Said:
    """What it says of the error that it must end with."""
    out, err = running.communicate(timeout=90)
    assert running.returncode != 0, out
    head, _, rest = err.partition("Details:")
    found = re.search(r"Code: (\w+)\s+Message: (.*)", head)
    assert found, err
    return Said(found[1], found[2].strip(), dict(_details(rest)))


def _details(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    decoder = json.JSONDecoder()
    while at := re.search(r"\d+\)\s*", text):
        detail, length = decoder.raw_decode(text[at.end() :])
        text = text[at.end() + length :]
        assert detail.keys() != {"@type", "@value"}, f"it could not be decoded: {detail}"
        yield detail.pop("@type").rpartition("/")[2], detail


def said(server: RunningServer, method: str, request: dict[str, Any]) -> Said:
    return end(begun(server, method, request))


def scatter(server: RunningServer, pool_id: str, do: dict[str, Any] | None = None, **more: Any) -> Said:
    return said(server, f"{ROOT}/Scatter", {"pool_id": pool_id, "json": do or {}} | more)


def others(what: str) -> str:
    """A page token of another list."""
    return base64.urlsafe_b64encode(json.dumps([what, 1, "x"]).encode()).rstrip(b"=").decode()


NOBODY = {"pool_id": "nobody"}
DEEP = {"parent": {"pool_id": "all", "path": [f"root-{level}/pool" for level in range(8)]}}
PARTIAL = {"pool_id": "once", "policy": {"min_coverage": 0.5}}
BEFORE: list[tuple[str, str, str, dict[str, Any]]] = [
    ("NotFound", "POOL_NOT_FOUND", f"{ROOT}/Scatter", NOBODY),
    ("NotFound", "POOL_NOT_FOUND", f"{ROOT}/ScatterStream", {"request": NOBODY}),
    ("NotFound", "POOL_NOT_FOUND", f"{ROOT}/ExplainScatter", {"request": NOBODY}),
    ("NotFound", "POOL_NOT_FOUND", f"{TOPOLOGY}/GetTopology", NOBODY),
    ("NotFound", "POOL_NOT_FOUND", f"{TOPOLOGY}/WatchTopology", NOBODY),
    ("FailedPrecondition", "POOL_EMPTY", f"{ROOT}/Scatter", {"pool_id": "empty"}),
    ("FailedPrecondition", "POOL_EMPTY", f"{ROOT}/ExplainScatter", {"request": {"pool_id": "empty"}}),
    ("FailedPrecondition", "POOL_NOT_IDEMPOTENT", f"{ROOT}/Scatter", PARTIAL),
    ("FailedPrecondition", "POOL_NOT_IDEMPOTENT", f"{ROOT}/ExplainScatter", {"request": PARTIAL}),
    ("FailedPrecondition", "SCATTER_TOO_DEEP", f"{LEAF}/Query", DEEP),
    ("OutOfRange", "PAGE_TOKEN_EXPIRED", f"{TOPOLOGY}/ListPools", {"page_token": others("recent")}),
    ("OutOfRange", "PAGE_TOKEN_EXPIRED", f"{ROOT}/ListRecentScatters", {"page_token": others("pools")}),
]


@pytest.mark.parametrize(("code", "reason", "method", "asked"), BEFORE)
def test_an_error_before_any_leaf_is_asked_is_decoded(
    server: RunningServer, code: str, reason: str, method: str, asked: dict[str, Any]
) -> None:
    found = said(server, method, asked)
    assert (found.code, found.reason) == (code, reason)
    assert found.message.startswith("cannot ")
    assert FAILURE not in found.details


WRONG = {"pool_id": "all", "shard_ids": ["x"], "policy": {"min_coverage": 2, "first_k": -1}}
FIELDS: list[tuple[str, dict[str, Any], set[str]]] = [
    (f"{ROOT}/Scatter", {}, {"pool_id"}),
    (f"{ROOT}/Scatter", WRONG, {"shard_ids[0]", "policy.min_coverage", "policy.first_k"}),
    (f"{ROOT}/ScatterStream", {}, {"request.pool_id"}),
    (f"{ROOT}/ExplainScatter", {}, {"request.pool_id"}),
    (f"{ROOT}/ListRecentScatters", {"page_size": 101}, {"page_size"}),
    (f"{TOPOLOGY}/ListPools", {"page_size": -1}, {"page_size"}),
    (f"{TOPOLOGY}/GetTopology", {}, {"pool_id"}),
    (f"{TOPOLOGY}/WatchTopology", {}, {"pool_id"}),
]


@pytest.mark.parametrize(("method", "asked", "wrong"), FIELDS)
def test_every_wrong_field_is_readable(
    server: RunningServer, method: str, asked: dict[str, Any], wrong: set[str]
) -> None:
    found = said(server, method, asked)
    assert (found.code, found.reason) == ("InvalidArgument", "INVALID_FIELD")
    violations = found.details["google.rpc.BadRequest"]["field_violations"]
    assert {one["field"] for one in violations} == wrong
    assert all(one["description"] for one in violations)


GONE, FULL, BROKEN = ({"a": {"fail": code}} for code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "NOT_FOUND"))
NOT_MET = [
    ("all", GONE, "Unavailable", "UNAVAILABLE", 14),
    ("all", FULL, "ResourceExhausted", "RESOURCE_EXHAUSTED", 8),
    ("all", BROKEN, "Internal", "NOT_FOUND", 5),
    ("quick", {"a": {"hang": True}}, "DeadlineExceeded", "DEADLINE_EXCEEDED", 4),
]


@pytest.mark.parametrize(("pool_id", "do", "code", "of_leaf", "number"), NOT_MET)
def test_a_missing_shard_is_readable_in_the_scatter_failure(  # noqa: PLR0917 - a row of the table
    server: RunningServer, pool_id: str, do: dict[str, Any], code: str, of_leaf: str, number: int
) -> None:
    found = scatter(server, pool_id, do)
    assert (found.code, found.reason) == (code, "COVERAGE_NOT_MET")
    failure = found.details[FAILURE]
    first = failure["failures"][0]
    assert (first["shard_id"], first["code"]) == ("a", number)
    assert first["message"]
    assert failure["failed_by_code"][of_leaf] == 1
    assert int(failure["coverage"]["expected"]) == (1 if pool_id == "quick" else 3)
    assert not failure["coverage"].get("complete")
    assert failure["scatter_id"] == found.details["google.rpc.ErrorInfo"]["metadata"]["scatter_id"]


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED"])
def test_a_leafs_refusal_is_readable_and_names_the_leaf(server: RunningServer, code: str) -> None:
    found = scatter(server, "all", {"b": {"fail": code}})
    assert (found.code, found.reason) == (code.title().replace("_", ""), "LEAF_REFUSED")
    assert found.message == "b was told to fail"
    assert found.details["google.rpc.ErrorInfo"]["metadata"]["shard_id"] == "b"
    assert found.details[FAILURE]["failures"][0]["message"] == "b was told to fail"


@pytest.mark.parametrize(
    ("pool_id", "code", "reason", "answered"),
    [("small", "ResourceExhausted", "GATHER_TOO_LARGE", 1), ("unmerged", "Internal", "MERGE_FAILED", 1)],
)
def test_replies_that_no_answer_can_be_made_of_are_told_with_what_had_answered(
    server: RunningServer, pool_id: str, code: str, reason: str, answered: int
) -> None:
    found = scatter(server, pool_id)
    assert (found.code, found.reason) == (code, reason)
    assert int(found.details[FAILURE]["coverage"]["answered"]) == answered


def test_a_stream_ends_with_the_same_error(server: RunningServer) -> None:
    found = said(server, f"{ROOT}/ScatterStream", {"request": {"pool_id": "all", "json": GONE}})
    assert (found.code, found.reason) == ("Unavailable", "COVERAGE_NOT_MET")
    assert found.details[FAILURE]["failures"][0]["shard_id"] == "a"


def test_a_pool_that_is_full_says_when_to_try_again(server: RunningServer) -> None:
    hung = {"request": {"pool_id": "narrow", "json": {"a": {"hang": True}}}}
    running = begun(server, f"{ROOT}/ScatterStream", hung)
    assert running.stdout is not None
    try:
        assert running.stdout.readline() == "{\n", "shard b has answered, so shard a has been asked"
        found = scatter(server, "narrow")
        assert (found.code, found.reason) == ("ResourceExhausted", "SCATTER_LIMIT")
        assert found.details["google.rpc.RetryInfo"]["retry_delay"].endswith("s")
        assert FAILURE not in found.details
    finally:
        running.kill()
        running.communicate()


@pytest.fixture
def strait(tmp_path: Path) -> Iterator[RunningServer]:
    """A server that has room for one stream."""
    server = started_root(tmp_path, {"empty": {"shards": []}}, RETINUE_LIMITS__MAX_CONCURRENT_STREAMS="1")
    try:
        yield server
        assert server.process.wait(60) == 0, "a test has ended it"
    finally:
        server.kill()


def test_a_server_that_is_full_or_stops_says_so(strait: RunningServer, tmp_path: Path) -> None:
    watch = begun(strait, f"{TOPOLOGY}/WatchTopology", {"pool_id": "empty"}, *known(strait, tmp_path))
    assert watch.stdout is not None
    try:
        assert watch.stdout.readline() == "{\n"
        full = said(strait, f"{TOPOLOGY}/WatchTopology", {"pool_id": "empty"})
        strait.process.terminate()
        stopped = end(watch)
    finally:
        watch.kill()
    assert (full.code, full.reason) == ("ResourceExhausted", "CONCURRENCY_LIMIT")
    assert (stopped.code, stopped.reason) == ("Unavailable", "SHUTTING_DOWN")
    for found in (full, stopped):
        assert found.details["google.rpc.RetryInfo"]["retry_delay"].endswith("s")


def known(server: RunningServer, where: Path) -> Iterator[str]:
    """Flags by which grpcurl knows the types from the start: a server that stops is not asked for them any more."""
    for symbol in (TOPOLOGY, "google.rpc.ErrorInfo"):
        file = str(where / f"{symbol}.binpb")
        describe = [str(TOOL / "grpcurl"), "-plaintext", "-protoset-out", file, server.address, "describe", symbol]
        subprocess.run(describe, check=True, capture_output=True, timeout=60)
        yield from ("-protoset", file)
