"""The adapter's reasons, each provoked with its code, metadata and advice."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import pytest
from contract.client import ADAPTER, METHODS, Client, Refused
from contract.conftest import Serve
from contract.line import seconds
from contract.test_workqueue_fuzz import ALLOWED, PLAIN, messages
from hypothesis import given, settings
from sources import Source

from retinue.error.v1 import error_reason_pb2

pytestmark = pytest.mark.engines("sqlite")

FIRST, LAST = 120, 139
REASONS = {
    name.removeprefix("ERROR_REASON_")
    for name, number in error_reason_pb2.ErrorReason.items()
    if FIRST <= number <= LAST
}
FORBIDDEN = "169.254.169.254:80"


class World:
    """A target's name, and what is needed to provoke."""

    def __init__(self, operator: Client, source: Source) -> None:
        self.operator, self.source, self.id = operator, source, f"t-{uuid.uuid4().hex[:20]}"

    def target(self, **fields: Any) -> dict[str, Any]:
        kind = {"kind": "TARGET_KIND_PROMETHEUS", "endpoint": self.source.endpoint}
        return {"target_id": self.id, **kind, **fields}

    def create(self, **fields: Any) -> Any:
        return self.operator.CreateTarget(target=self.target(**fields), wait_duration=seconds(15)).target

    def update(self, **fields: Any) -> Any:
        etag = fields.pop("etag", "")
        return self.operator.UpdateTarget(target=self.target(**fields), etag=etag).target

    def close(self) -> None:
        self.operator.DeleteTarget(target_id=self.id)


@pytest.fixture
def world(adapter_operator: Client) -> Iterator[World]:
    with Source() as source:
        found = World(adapter_operator, source)
        yield found
        found.close()


def provoke_exists(world: World) -> None:
    world.create()
    world.create(service="other")


def provoke_immutable(world: World) -> None:
    world.create()
    world.update(kind="TARGET_KIND_NGINX")


def provoke_not_report(world: World) -> None:
    world.create()
    world.operator.ReportMetrics(target_id=world.id)


def provoke_too_old(world: World) -> None:
    world.create()
    matches = [{"target_ids": [world.id]}]
    assert world.operator.GetMetrics(matches=matches, max_age_duration=seconds(3600)).metrics
    world.operator.GetMetrics(matches=matches, max_age_duration=seconds(0))


def provoke_stale_etag(world: World) -> None:
    world.create()
    world.update(service="other", etag="of-yesterday")


def provoke_port_in_use(world: World) -> None:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as somebody:
        somebody.bind(("127.0.0.1", 0))
        world.create(kind="TARGET_KIND_STATSD", endpoint=f"udp:127.0.0.1:{somebody.getsockname()[1]}")


def provoke_too_large(world: World) -> None:
    world.source.text = "".join(f'x{{n="{n:05}",long="{"v" * 300}"}} 1\n' for n in range(9_000))
    world.create()
    world.operator.GetMetrics(matches=[{"target_ids": [world.id]}])


class Provoked(NamedTuple):
    """How, and what comes of it."""

    code: str
    provoke: Callable[[World], Any]
    metadata: Callable[[World], dict[str, str] | None] = lambda _: None
    """None = not looked at."""
    retry: bool = False


def of_id(world: World) -> dict[str, str]:
    return {"target_id": world.id}


PROVOKED = {
    "TARGET_NOT_FOUND": Provoked("NOT_FOUND", lambda w: w.operator.GetTarget(target_id=w.id), of_id),
    "TARGET_EXISTS": Provoked("ALREADY_EXISTS", provoke_exists, of_id),
    "TARGET_IMMUTABLE": Provoked("FAILED_PRECONDITION", provoke_immutable),
    "TARGET_NOT_REPORT": Provoked("FAILED_PRECONDITION", provoke_not_report),
    "RULE_PACK_NOT_FOUND": Provoked(
        "FAILED_PRECONDITION", lambda w: w.create(rule_pack="none"), lambda _: {"rule_pack": "none"}
    ),
    "METRICS_TOO_OLD": Provoked("UNAVAILABLE", provoke_too_old, of_id, retry=True),
    "STALE_ETAG": Provoked("ABORTED", provoke_stale_etag),
    "ENDPOINT_FORBIDDEN": Provoked(
        "PERMISSION_DENIED", lambda w: w.create(endpoint=f"http://{FORBIDDEN}/"), lambda _: {"address": FORBIDDEN}
    ),
    "PORT_IN_USE": Provoked("FAILED_PRECONDITION", provoke_port_in_use),
    "CAPABILITY_MISSING": Provoked(
        "UNIMPLEMENTED",
        lambda w: w.operator.TestTarget(target=w.target(kind="TARGET_KIND_REPORT", endpoint="")),
        lambda _: {"capability": "TestTarget"},
    ),
    "MESSAGE_TOO_LARGE": Provoked("RESOURCE_EXHAUSTED", provoke_too_large),
}
OTHERS = {"STALE_ETAG", "ENDPOINT_FORBIDDEN", "PORT_IN_USE", "CAPABILITY_MISSING", "MESSAGE_TOO_LARGE"}
"""Of all patterns."""
ELSEWHERE = {
    "TARGET_LIMIT": "below, with a server of its own",
    "WATCHER_LIMIT": "below, with a server of its own",
    "TARGET_FROM_FILE": "test_adapter_file.py",
}


def test_every_reason_of_the_adapter_is_provoked() -> None:
    assert {*PROVOKED, *ELSEWHERE} - OTHERS == REASONS


@pytest.mark.parametrize("reason", PROVOKED)
def test_a_reason_comes_with_its_code_and_details(world: World, reason: str) -> None:
    code, provoke, metadata, retry = PROVOKED[reason]
    with pytest.raises(Refused) as error:
        provoke(world)
    found = error.value
    assert (found.code, found.reason, found.domain) == (code, reason, "retinue"), found.message
    assert found.message.startswith("cannot ")
    assert bool(found.retry_s) == retry
    if (wanted := metadata(world)) is not None:
        assert found.metadata == wanted


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("GetTarget", lambda w: {"target_id": w.id}),
        ("UpdateTarget", lambda w: {"target": w.target()}),
        ("GetSignals", lambda w: {"target_ids": [w.id]}),
        ("ReportMetrics", lambda w: {"target_id": w.id}),
    ],
)
def test_a_target_that_is_not_there_is_not_found_by_any_call(world: World, method: str, fields: Any) -> None:
    with pytest.raises(Refused) as error:
        getattr(world.operator, method)(**fields(world))
    assert (error.value.reason, error.value.metadata) == ("TARGET_NOT_FOUND", of_id(world))
    with world.operator.stream("WatchSignals", target_ids=[world.id]) as stream, pytest.raises(Refused) as error:
        stream.read()
    assert error.value.reason == "TARGET_NOT_FOUND"


def test_a_refused_change_leaves_what_is_collected(world: World) -> None:
    first = world.create()
    for change in (
        {"kind": "TARGET_KIND_NGINX"},
        {"endpoint": f"http://{FORBIDDEN}/"},
        {"rule_pack": "none"},
        {"endpoint": "nowhere"},
    ):
        with pytest.raises(Refused):
            world.update(**change)
    found = world.operator.GetTarget(target_id=world.id).target
    assert (found.etag, found.endpoint) == (first.etag, first.endpoint)


def test_a_listener_whose_new_port_is_taken_keeps_its_own(world: World) -> None:
    kind = {"kind": "TARGET_KIND_STATSD"}
    first = world.create(endpoint="udp:127.0.0.1:0", interval_duration=seconds(1), **kind)
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as somebody:
        somebody.bind(("127.0.0.1", 0))
        with pytest.raises(Refused, match="PORT_IN_USE"):
            world.update(endpoint=f"udp:127.0.0.1:{somebody.getsockname()[1]}", **kind)
    found = world.operator.GetTarget(target_id=world.id).target
    assert (found.etag, found.endpoint) == (first.etag, first.endpoint)
    assert found.status.address.startswith("udp:127.0.0.1:")


def test_a_server_keeps_no_more_targets_and_watchers_than_it_may(serve: Serve) -> None:
    server = serve("adapter", RETINUE_ADAPTER__MAX_TARGETS="2", RETINUE_ADAPTER__MAX_WATCHERS="2")
    with Client(server.control, services=ADAPTER) as operator:

        def create(target_id: str) -> Any:
            return operator.CreateTarget(target={"target_id": target_id, "kind": "TARGET_KIND_REPORT"}).target

        kept = [create(target_id).etag for target_id in ("a", "b")]
        with pytest.raises(Refused) as error:
            create("c")
        assert (error.value.code, error.value.reason) == ("RESOURCE_EXHAUSTED", "TARGET_LIMIT")
        assert [create(target_id).etag for target_id in ("a", "b")] == kept
        operator.DeleteTarget(target_id="a")
        assert create("c")
        with operator.stream("WatchMetrics") as one, operator.stream("WatchSignals") as other:
            assert one.read().synced
            assert other.read()
            for method in ("WatchMetrics", "WatchSignals"):
                with operator.stream(method) as third, pytest.raises(Refused) as error:
                    third.read()
                found = error.value
                assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "WATCHER_LIMIT")
                assert found.retry_s


# Anything


ADAPTER_METHODS = {method.name: method for service in ADAPTER for method in service.methods}
ANSWERS = {*ALLOWED, "UNAVAILABLE", "ABORTED", "UNIMPLEMENTED", "PERMISSION_DENIED"}


def test_no_name_of_a_call_is_that_of_another_pattern() -> None:
    assert not ADAPTER_METHODS.keys() & METHODS.keys()


@pytest.mark.parametrize("rpc", sorted(ADAPTER_METHODS))
def test_any_well_typed_request_is_answered_by_the_contract(world: World, rpc: str) -> None:
    method = ADAPTER_METHODS[rpc]
    world.create()  # a watch of signals tells of what is there

    @settings(max_examples=25, **PLAIN)
    @given(messages(method.input_type))
    def ask(fields: dict[str, Any]) -> None:
        try:
            if method.server_streaming:
                with world.operator.stream(rpc, **fields) as stream:
                    assert stream.read() is not None
            else:
                getattr(world.operator, rpc)(**fields)
        except Refused as error:
            assert error.code in ANSWERS, error  # noqa: PT017 - one of many answers
            assert error.reason != ""  # noqa: PT017 - one of many answers

    ask()
    for target_id in ("fuzz-a", "fuzz-b"):
        world.operator.DeleteTarget(target_id=target_id)
    assert world.create().status.series == 1


def test_any_report_is_answered_by_the_contract_and_leaves_what_is_shown_valid(world: World) -> None:
    world.create(kind="TARGET_KIND_REPORT", endpoint="", interval_duration=seconds(1))

    @settings(max_examples=50, **PLAIN)
    @given(messages(ADAPTER_METHODS["ReportMetrics"].input_type))
    def report(fields: dict[str, Any]) -> None:
        try:
            world.operator.ReportMetrics(**fields | {"target_id": world.id})
        except Refused as error:
            assert error.code == "INVALID_ARGUMENT", error  # noqa: PT017 - one of two answers

    report()
    good = {"name": "good", "type": "METRIC_TYPE_GAUGE", "series": [{"number": 1.0}]}
    with world.operator.stream("WatchMetrics", matches=[{"target_ids": [world.id], "name": "good"}]) as stream:
        world.operator.ReportMetrics(target_id=world.id, metrics=[good])
        assert any(metric.name == "good" for response in stream for metric in response.metrics)
