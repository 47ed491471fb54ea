"""What a real OTLP endpoint receives of scatters over real leaves; and that without one nothing of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from collector import collecting
from e2e.roots import await_connected, grpcurl, started_root
from leaves import leaves, pool
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

NO_HEDGES = {"enabled": False}
HEDGES = {"min_samples": 0, "min_delay_seconds": 0.02, "max_hedges": 1}
SHOWN_IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}
"""Python writes into the server's log what it imports."""
SLOW = [f"s{number}" for number in range(2, 7)]
MANY = ["s0", "s1", *SLOW, *(f"s{number}" for number in range(7, 12))]
LAME = [f"s{number}" for number in range(8)]
HANGS = {"hang": True, "first": True}
QUESTIONS: dict[str, dict[str, Any]] = {
    "each": {},
    "retried": {"a": {"fail": "UNAVAILABLE", "first": True}},
    "hedged": {"a": HANGS},
    "quorum": {"a": {"hang": True}},
    "many": {"s0": HANGS, "s1": {"fail": "NOT_FOUND"}, **{name: {"sleep": 0.2} for name in SLOW}},
    "lame": {name: {"fail": "NOT_FOUND", "sleep": 0.5} for name in LAME},
    "tree": {},
}
POLICIES: dict[str, dict[str, Any]] = {
    "quorum": {"min_coverage": 0.5, "first_k": 2},
    "many": {"min_coverage": 0.5},
    "lame": {"min_coverage": 0},
}


class Traced(NamedTuple):
    """What was seen of the scatters, one of each pool."""

    spans: list[tuple[str, Any]]
    """With the names of the roots."""
    recent: Mapping[str, dict[str, Any]]
    """What the root above remembers, by the pool."""
    log: str

    def scatter(self, pool_id: str) -> Any:
        """The span of the request."""
        [span] = [span for _, span in self.spans if span.name == f"scatter {pool_id}"]
        return span

    def beneath(self, parent: Any) -> list[Any]:
        return [span for _, span in self.spans if span.parent_span_id == parent.span_id]

    def attempts(self, pool_id: str) -> dict[tuple[str, str], Any]:
        """The spans of the calls of a request, by shard and kind; there is one for each."""
        spans = self.beneath(self.scatter(pool_id))
        found = {(told(one)["shard"], told(one)["attempt"]): one for one in spans}
        assert len(found) == len(spans)
        return found


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes}


def told(span: Any) -> dict[str, Any]:
    """What is said in our own terms."""
    return {key.removeprefix("retinue.scatter."): value for key, value in attributes(span).items()}


def pools(where: Path, below: str) -> dict[str, Any]:
    many = pool(where, *MANY, hedging=HEDGES, max_traced_attempts=len(MANY) - 1)
    for place, shard in enumerate(many["shards"]):
        shard["endpoints"] = [f"unix:{where}/{name}.sock" for name in ("ab" if place == 0 else "abc"[place % 3])]
    lame = pool(where, *LAME, hedging=HEDGES, max_traced_attempts=0)
    for shard in lame["shards"]:
        shard["endpoints"] = [f"unix:{where}/{name}.sock" for name in "ab"]
    return {
        "each": pool(where, "a", "b", "c", hedging=NO_HEDGES, max_traced_attempts=3),
        "retried": pool(where, "a|b", "c", hedging=NO_HEDGES),
        "hedged": pool(where, "a|b", hedging=HEDGES),
        "quorum": pool(where, "a", "b", "c", hedging=NO_HEDGES),
        "many": many,
        "lame": lame,
        "tree": {"shards": [{"shard_id": "left", "endpoints": [below], "pool": "below"}], "hedging": NO_HEDGES},
    }


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Two roots, of which one is a leaf of the other, and a scatter over each pool; all has ended."""
    above, beneath = tmp_path_factory.mktemp("above"), tmp_path_factory.mktemp("below")
    with collecting() as (collector, endpoint), leaves(above, "a", "b", "c"):
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_METRICS_EXPORTER": "none", **SHOWN_IMPORTS}
        lower = started_root(beneath, {"below": pool(above, "a", "b")}, **env, OTEL_SERVICE_NAME="below")
        try:
            content = pools(above, lower.address)
            upper = started_root(above, content, **env, OTEL_SERVICE_NAME="above")
            try:
                await_connected(lower, "below", 2)
                for name in content:
                    await_connected(upper, name, len(content[name]["shards"]))
                for name, do in QUESTIONS.items():
                    grpcurl(upper, "Scatter", {"pool_id": name, "json": do, "policy": POLICIES.get(name, {})})
                [page] = grpcurl(upper, "ListRecentScatters", {})
            finally:
                assert upper.stop() == 0
        finally:
            assert lower.stop() == 0
    recent = {one["pool_id"]: one for one in page["scatters"]}
    return Traced(collector.spans, recent, (above / "server.log").read_text())


def is_error(span: Any) -> bool:
    return bool(span.status.code == Status.STATUS_CODE_ERROR)


def test_a_scatter_is_one_span_with_a_client_span_for_each_call(traced: Traced) -> None:
    scatter, attempts = traced.scatter("each"), traced.attempts("each")
    assert attempts.keys() == {(shard, "primary") for shard in "abc"}
    for span in attempts.values():
        assert span.kind == Span.SPAN_KIND_CLIENT
        assert span.trace_id == scatter.trace_id
        assert (told(span)["outcome"], is_error(span)) == ("won", False)
        assert scatter.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    assert not is_error(scatter)
    assert traced.recent["each"]["trace_id"] == scatter.trace_id.hex()
    assert told(scatter).items() >= {"pool": "each", "shards": 3, "expected": 3, "answered": 3, "attempts": 3}.items()


def test_a_retry_has_a_span_of_its_own_and_the_call_that_failed_is_an_error(traced: Traced) -> None:
    attempts = traced.attempts("retried")
    assert attempts.keys() == {("a", "primary"), ("a", "retry"), ("c", "primary")}
    failed, retry = attempts["a", "primary"], attempts["a", "retry"]
    assert (told(failed)["outcome"], attributes(failed)["error.type"], is_error(failed)) == (
        "failed",
        "UNAVAILABLE",
        True,
    )
    assert (told(retry)["outcome"], list(retry.links)) == ("won", [])


@pytest.mark.parametrize(("pool_id", "shard"), [("hedged", "a"), ("many", "s0")])
def test_a_hedge_is_linked_with_the_call_that_it_stands_beside(traced: Traced, pool_id: str, shard: str) -> None:
    attempts = traced.attempts(pool_id)
    slow, hedge = attempts[shard, "primary"], attempts[shard, "hedge"]
    [link] = hedge.links
    assert (link.trace_id, link.span_id) == (slow.trace_id, slow.span_id)
    assert told(hedge)["outcome"] == "won"
    assert (told(slow)["outcome"], is_error(slow)) == ("lost", False)


def test_a_hedge_is_linked_also_when_it_took_longer_than_what_it_stands_beside(traced: Traced) -> None:
    """All of them failed, each after about the same time."""
    attempts = traced.attempts("lame")
    hedges = {shard: span for (shard, kind), span in attempts.items() if kind == "hedge"}
    assert hedges
    for shard, hedge in hedges.items():
        assert [link.span_id for link in hedge.links] == [attempts[shard, "primary"].span_id]


def test_a_call_that_nobody_waits_for_any_more_is_no_error(traced: Traced) -> None:
    attempts = traced.attempts("quorum")
    lost = attempts["a", "primary"]
    assert (told(lost)["outcome"], is_error(lost)) == ("lost", False)
    assert not is_error(traced.scatter("quorum"))


def test_of_more_shards_than_have_spans_each_the_failed_the_hedged_and_the_slowest_have(traced: Traced) -> None:
    attempts = traced.attempts("many")
    all_of_them = traced.recent["many"]["attempts"]
    slowest = sorted(all_of_them, key=lambda one: -float(one["elapsed_duration"].removesuffix("s")))[:5]
    wanted = {(one["shard_id"], kind(one)) for one in slowest}
    assert attempts.keys() == wanted | {("s1", "primary"), ("s0", "primary"), ("s0", "hedge")}
    assert len(attempts) < len(all_of_them) == len(MANY) + 1
    assert is_error(attempts["s1", "primary"])


def kind(attempt: dict[str, Any]) -> str:
    return str(attempt["kind"]).removeprefix("ATTEMPT_KIND_").lower()


def test_the_span_of_a_large_request_has_the_sums(traced: Traced) -> None:
    sums = {"shards": 12, "expected": 12, "answered": 11, "complete": False, "attempts": 13, "retries": 0}
    hedges = {"hedges": 1, "hedges_won": 1, "failed.not_found": 1}
    found = told(traced.scatter("many"))
    assert found.items() >= (sums | hedges).items()
    assert found["bytes"] > 0
    assert found["slowest_shard"] == traced.recent["many"]["stats"]["slowest_shard_id"]


def test_a_tree_of_two_roots_is_one_trace_with_each_span_beneath_its_cause(traced: Traced) -> None:
    top = traced.scatter("tree")
    trace = [(root, span) for root, span in traced.spans if span.trace_id == top.trace_id]
    [asked] = [span for _, span in trace if not span.parent_span_id]
    assert (asked.name, asked.kind) == ("retinue.scattergather.v1.ScatterGatherService/Scatter", Span.SPAN_KIND_SERVER)
    assert top.parent_span_id == asked.span_id
    [call] = traced.beneath(top)
    [served] = traced.beneath(call)
    [scatter] = traced.beneath(served)
    assert (call.kind, served.kind, scatter.name) == (Span.SPAN_KIND_CLIENT, Span.SPAN_KIND_SERVER, "scatter below")
    assert {told(span)["shard"] for span in traced.beneath(scatter)} == {"a", "b"}
    assert [root for root, _ in trace].count("above") == 3
    assert [root for root, _ in trace].count("below") == 4


@pytest.fixture
def untraced(tmp_path: Path) -> str:
    """The log of a root that has answered without an endpoint for its traces."""
    with leaves(tmp_path, "a"):
        root = started_root(tmp_path, {"each": pool(tmp_path, "a")}, **SHOWN_IMPORTS)
        try:
            await_connected(root, "each", 1)
            grpcurl(root, "Scatter", {"pool_id": "each", "json": {}})
        finally:
            assert root.stop() == 0
    return (tmp_path / "server.log").read_text()


def test_without_an_endpoint_no_telemetry_is_loaded(untraced: str, traced: Traced) -> None:
    telemetry = ("opentelemetry", "retinue_server.runtime.telemetry_sdk")
    assert "retinue_server.scattergather.journal" in untraced
    assert [name for name in telemetry if name in untraced] == []
    assert [name for name in telemetry if name in traced.log] == list(telemetry), "it would be seen"
