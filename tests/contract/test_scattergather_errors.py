"""Every reason that scatter/gather has, with its code and details; every field that can be wrong, by its name.

`PROVOKED` is what this file provokes; `ELSEWHERE` is provoked in other files of this suite.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contract.client import SCATTER, Client, Refused
from contract.plays import Fail, Play
from contract.pools import MERGER
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Value

ROOT = Path(__file__).parent.parent.parent


def scatter(client: Client, play: Play, pool_id: str = "collect", **fields: Any) -> Any:
    return client.Scatter(**{"pool_id": pool_id, "payload": play.payload} | fields)


def provoke_limit(client: Client, play: Play) -> None:
    play.says = {"*": play.gate()}
    asked = client.begin("Scatter", pool_id="narrow", payload=play.payload)
    play.await_calls(3)
    try:
        scatter(client, play, "narrow")
    finally:
        asked.cancel()
        play.await_end("CANCELLED", 3)


def provoke_too_large(client: Client, play: Play) -> None:
    play.says = {"*": bytes(590)}
    scatter(client, play, "tight")


def provoke_not_met(client: Client, play: Play) -> None:
    play.says = {"a": Fail("UNAVAILABLE", "gone")}
    scatter(client, play)


def provoke_refusal(client: Client, play: Play) -> None:
    play.says = {"a": Fail("PERMISSION_DENIED", "cannot show this to you")}
    scatter(client, play)


def provoke_merge(client: Client, play: Play) -> None:
    play.says = {MERGER: Fail("UNKNOWN", "no idea")}
    scatter(client, play, "service")


def provoke_expired(client: Client, _: Play) -> None:
    client.ListRecentScatters(page_token=client.ListPools(page_size=1).next_page_token)


def provoke_depth(client: Client, play: Play) -> None:
    client.Query(payload=play.payload, parent={"pool_id": "left", "path": [f"r{i}/p" for i in range(8)]})


PROVOKED: dict[str, tuple[str, Callable[[Client, Play], Any]]] = {
    "INVALID_FIELD": ("INVALID_ARGUMENT", lambda client, _: client.Scatter()),
    "PAGE_TOKEN_EXPIRED": ("OUT_OF_RANGE", provoke_expired),
    "POOL_NOT_FOUND": ("NOT_FOUND", lambda client, play: scatter(client, play, "nobody")),
    "POOL_EMPTY": ("FAILED_PRECONDITION", lambda client, play: scatter(client, play, "empty")),
    "POOL_NOT_IDEMPOTENT": (
        "FAILED_PRECONDITION",
        lambda client, play: scatter(client, play, "once", policy={"min_coverage": 0.5}),
    ),
    "SCATTER_TOO_DEEP": ("FAILED_PRECONDITION", provoke_depth),
    "SCATTER_LIMIT": ("RESOURCE_EXHAUSTED", provoke_limit),
    "GATHER_TOO_LARGE": ("RESOURCE_EXHAUSTED", provoke_too_large),
    "COVERAGE_NOT_MET": ("UNAVAILABLE", provoke_not_met),
    "LEAF_REFUSED": ("PERMISSION_DENIED", provoke_refusal),
    "MERGE_FAILED": ("INTERNAL", provoke_merge),
}
ELSEWHERE = {"SHUTTING_DOWN": "test_scattergather_servers.py", "CONCURRENCY_LIMIT": "test_scattergather_servers.py"}
METADATA: dict[str, dict[str, str]] = {
    "POOL_NOT_FOUND": {"pool_id": "nobody"},
    "POOL_EMPTY": {"pool_id": "empty"},
    "POOL_NOT_IDEMPOTENT": {"pool_id": "once"},
    "SCATTER_LIMIT": {"pool_id": "narrow"},
    "LEAF_REFUSED": {"shard_id": "a"},
}
OF_LEAVES = {"GATHER_TOO_LARGE", "COVERAGE_NOT_MET", "LEAF_REFUSED", "MERGE_FAILED"}
"""Leaves were asked before they came: a ScatterFailure says what had become of them."""


def reasons_that_the_contract_names() -> set[str]:
    import re  # noqa: PLC0415 - here alone

    text = "".join(path.read_text() for path in (ROOT / "protos/retinue/scattergather/v1").glob("*.proto"))
    named = re.findall(r"\(([A-Z_]+(?:,\s*(?://\s*)?[A-Z_]+)*)\)", text)
    words = {word for group in named for word in re.findall(r"[A-Z_]{6,}", group)}
    return words - {"CANCELLED"}


def test_every_reason_that_the_contract_names_is_provoked() -> None:
    assert reasons_that_the_contract_names() | {"INVALID_FIELD"} == {*PROVOKED, *ELSEWHERE}


@pytest.mark.parametrize("reason", PROVOKED)
def test_a_reason_comes_with_its_code_domain_message_and_details(scatterer: Client, play: Play, reason: str) -> None:
    code, provoke = PROVOKED[reason]
    with pytest.raises(Refused) as error:
        provoke(scatterer, play)
    found = error.value
    assert (found.code, found.reason, found.domain) == (code, reason, "retinue")
    assert "cannot" in found.message
    assert bool(found.violations) == (reason == "INVALID_FIELD")
    assert bool(found.retry_s) == (reason == "SCATTER_LIMIT")
    assert (found.scatter is not None) == (reason in OF_LEAVES)
    assert found.metadata is not None
    assert found.metadata.items() >= METADATA.get(reason, {}).items()


@pytest.mark.parametrize("reason", sorted(OF_LEAVES))
def test_what_failed_is_found_by_its_name(scatterer: Client, play: Play, reason: str) -> None:
    with pytest.raises(Refused) as error:
        PROVOKED[reason][1](scatterer, play)
    assert error.value.scatter
    [recent] = scatterer.ListRecentScatters(scatter_id=error.value.scatter.scatter_id).scatters
    assert recent.coverage == error.value.scatter.coverage
    assert recent.code != 0


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED"])
def test_a_leafs_refusal_is_the_answer_and_ends_the_rest(scatterer: Client, play: Play, code: str) -> None:
    refusal = play.gate(Fail(code, "cannot do that"))
    play.says = {"a": play.gate(), "b": refusal, "c": play.gate()}
    asked = scatterer.begin("Scatter", pool_id="collect", payload=play.payload, policy={"min_coverage": 0})
    play.await_calls(3)
    refusal.open()
    with pytest.raises(Refused) as error:
        asked.result()
    assert (error.value.code, error.value.reason, error.value.message) == (code, "LEAF_REFUSED", "cannot do that")
    assert error.value.scatter
    first = error.value.scatter.failures[0]
    assert (first.shard_id, first.message) == ("b", "cannot do that")
    play.await_end("CANCELLED", 2)


def test_a_leafs_long_message_is_cut_and_the_details_stay(scatterer: Client, play: Play) -> None:
    """Metadata has limits at every client: message and details together stay under 8 KiB."""
    for text in ("x" * 4000, "ä" * 1000, "\U0001f600" * 500, "\\" * 4000):
        for code, reason in (("PERMISSION_DENIED", "LEAF_REFUSED"), ("INTERNAL", "COVERAGE_NOT_MET")):
            play.says = {"*": Fail(code, text)}
            with pytest.raises(Refused) as error:
                scatter(scatterer, play)
            assert error.value.reason == reason
            assert len(error.value.message) <= 512
            assert error.value.scatter
            assert error.value.scatter.failures
            assert all(len(f.message.encode()) <= 256 for f in error.value.scatter.failures)


def test_a_message_that_no_status_holds_is_a_failure_of_its_shard(scatterer: Client, play: Play) -> None:
    """gRPC takes some KiB of them; what the leaf meant is lost with it."""
    play.says = {"a": Fail("PERMISSION_DENIED", "x" * 1_000_000)}
    with pytest.raises(Refused) as error:
        scatter(scatterer, play)
    assert error.value.reason == "COVERAGE_NOT_MET"
    assert error.value.scatter
    assert error.value.scatter.failures[0].shard_id == "a"


# Fields


def duration(seconds: int, nanos: int = 0) -> Duration:
    return Duration(seconds=seconds, nanos=nanos)


NAN = Value(number_value=float("nan"))
LARGE = bytes(3 * 1024 * 1024 + 1)
FIELDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "no pool": ({"pool_id": ""}, {"pool_id"}),
    "no name of a pool": ({"pool_id": "-x"}, {"pool_id"}),
    "a name that is too long": ({"pool_id": "x" * 129}, {"pool_id"}),
    "too little": ({"policy": {"min_coverage": -0.1}}, {"policy.min_coverage"}),
    "too much": ({"policy": {"min_coverage": 1.1}}, {"policy.min_coverage"}),
    "no number": ({"policy": {"min_coverage": float("nan")}}, {"policy.min_coverage"}),
    "less than none": ({"policy": {"min_shards": -1, "first_k": -1}}, {"policy.min_shards", "policy.first_k"}),
    "more than there are": ({"policy": {"min_shards": 4, "first_k": 4}}, {"policy.min_shards", "policy.first_k"}),
    "before the beginning": (
        {"policy": {"soft_deadline_duration": duration(-1)}},
        {"policy.soft_deadline_duration"},
    ),
    "no duration": ({"policy": {"soft_deadline_duration": duration(1, -1)}}, {"policy.soft_deadline_duration"}),
    "both selectors": ({"shard_ids": ["a"], "route_keys": ["k"]}, {"shard_ids"}),
    "an unknown shard": ({"shard_ids": ["a", "x", "a"]}, {"shard_ids[1]", "shard_ids[2]"}),
    "more shards than there are": ({"shard_ids": ["a"] * 100_000}, {"shard_ids"}),
    "too many keys": ({"route_keys": ["k"] * 1001}, {"route_keys"}),
    "an input for nobody": (
        {"shard_inputs": {"inputs": [{"shard_id": "x"}, {}]}},
        {"shard_inputs.inputs[0].shard_id", "shard_inputs.inputs[1].shard_id"},
    ),
    "two inputs for one": (
        {"shard_inputs": {"inputs": [{"shard_id": "a"}, {"shard_id": "a"}]}},
        {"shard_inputs.inputs[1].shard_id"},
    ),
    "no inputs": ({"shard_inputs": {}}, {"shard_inputs.inputs"}),
    "inputs for others than those selected": (
        {"shard_inputs": {"inputs": [{"shard_id": "a"}]}, "shard_ids": ["a", "b"]},
        {"shard_inputs.inputs"},
    ),
    "too large": ({"payload": LARGE}, {"payload"}),
    "too large for one": (
        {"shard_inputs": {"inputs": [{"shard_id": "a", "payload": LARGE}]}},
        {"shard_inputs.inputs[0].payload"},
    ),
    "no JSON": ({"json": NAN}, {"json"}),
    "no JSON for one": (
        {"shard_inputs": {"inputs": [{"shard_id": "a"}, {"shard_id": "b", "json": NAN}]}},
        {"shard_inputs.inputs[1].json"},
    ),
    "everything": (
        {"shard_ids": ["x"], "policy": {"min_coverage": 2, "first_k": -1}, "json": NAN},
        {"shard_ids[0]", "policy.min_coverage", "policy.first_k", "json"},
    ),
}


@pytest.mark.parametrize("what", FIELDS)
def test_every_wrong_field_is_named_and_nobody_is_asked(scatterer: Client, play: Play, what: str) -> None:
    fields, wrong = FIELDS[what]
    request = {"pool_id": "collect"} | fields
    ways: list[tuple[Callable[[], Any], str]] = [
        (lambda: scatterer.Scatter(**request), ""),
        (lambda: scatterer.stream("ScatterStream", request=request).read(), "request."),
        (lambda: scatterer.ExplainScatter(request=request), "request."),
    ]
    for ask, at in ways:
        with pytest.raises(Refused) as error:
            ask()
        assert (error.value.code, error.value.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        assert error.value.fields == {at + field for field in wrong}
        assert error.value.message.startswith(f"cannot scatter: {at}")
    assert play.calls == []


def test_wrong_fields_are_named_where_there_is_no_pool_to_go_on_with(scatterer: Client) -> None:
    with pytest.raises(Refused) as error:
        scatterer.Scatter(pool_id="nobody", policy={"min_coverage": 2})
    assert (error.value.reason, error.value.fields) == ("INVALID_FIELD", {"policy.min_coverage"})


LISTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "too many pools": ("ListPools", {"page_size": 1001}, "page_size"),
    "fewer than none": ("ListPools", {"page_size": -1}, "page_size"),
    "no token": ("ListPools", {"page_token": "?"}, "page_token"),
    "too many requests": ("ListRecentScatters", {"page_size": 101}, "page_size"),
    "of no pool": ("ListRecentScatters", {"pool_id": "no such name"}, "pool_id"),
    "no token of theirs": ("ListRecentScatters", {"page_token": "?"}, "page_token"),
    "no pool to show": ("GetTopology", {}, "pool_id"),
}


@pytest.mark.parametrize("what", LISTS)
def test_every_wrong_field_of_lists_is_named(scatterer: Client, what: str) -> None:
    rpc, fields, wrong = LISTS[what]
    with pytest.raises(Refused) as error:
        getattr(scatterer, rpc)(**fields)
    assert (error.value.code, error.value.fields) == ("INVALID_ARGUMENT", {wrong})


def test_a_watch_of_no_pool_is_refused(scatterer: Client) -> None:
    with pytest.raises(Refused) as error:
        scatterer.stream("WatchTopology").read()
    assert error.value.fields == {"pool_id"}


def test_every_method_of_the_contract_is_there(scatterer: Client) -> None:
    for name, method in {m.name: m for service in SCATTER for m in service.methods}.items():
        if not method.client_streaming and not method.server_streaming:
            try:
                getattr(scatterer, name)()
            except Refused as error:
                assert error.code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION"), name  # noqa: PT017 - or an answer
