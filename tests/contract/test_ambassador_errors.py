"""The ambassador's reasons, each provoked with its code, metadata and advice."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import pytest
from behind import PATIENCE, Web, dial
from contract.client import AMBASSADOR, Client, Refused
from contract.conftest import Serve
from contract.line import seconds

from retinue.error.v1 import error_reason_pb2

pytestmark = pytest.mark.engines("sqlite")

FIRST, LAST = 100, 115
REASONS = {
    name.removeprefix("ERROR_REASON_")
    for name, number in error_reason_pb2.ErrorReason.items()
    if FIRST <= number <= LAST
}


class World:
    """An upstream's name, and what is needed to provoke."""

    def __init__(self, operator: Client, web: Web) -> None:
        self.operator, self.web, self.id = operator, web, f"u-{uuid.uuid4().hex[:20]}"
        self.other = f"{self.id}-other"

    def declare(self, upstream_id: str = "", protocol: str = "PROTOCOL_HTTP", **fields: Any) -> Any:
        if not {"pushed", "static", "file"} & fields.keys():
            fields["static"] = {"endpoints": [{"address": self.web.address}]}
        etag = fields.pop("etag", "")
        upstream = {"upstream_id": upstream_id or self.id, "protocol": protocol, **fields}
        return self.operator.DeclareUpstream(upstream=upstream, etag=etag, wait_duration=seconds(15)).upstream

    def invoke(self, path: str = "/", **fields: Any) -> Any:
        return self.operator.Invoke(upstream_id=self.id, path=path, **fields)

    def close(self) -> None:
        self.web.release.set()
        for upstream_id in (self.id, self.other):
            self.operator.RemoveUpstream(upstream_id=upstream_id, drain_duration=seconds(0))


@pytest.fixture
def world(ambassador_operator: Client) -> Iterator[World]:
    with Web("web") as web:
        found = World(ambassador_operator, web)
        yield found
        found.close()


def provoke_address_taken(world: World) -> None:
    port = int(world.declare(world.other).status.address.rpartition(":")[2])
    world.declare(listen={"port": port})


def provoke_port_in_use(world: World) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as somebody:
        world.declare(listen={"port": somebody.getsockname()[1]})


def provoke_listen_immutable(world: World) -> None:
    world.declare()
    world.declare(protocol="PROTOCOL_TCP")


def provoke_reference(world: World) -> None:
    world.declare(policy={"splits": [{"upstream_id": world.other, "percent": 20}]})


def provoke_stale_etag(world: World) -> None:
    world.declare()
    world.declare(etag="of-yesterday")


def provoke_not_pushed(world: World) -> None:
    world.declare()
    world.operator.SetEndpoints(upstream_id=world.id)


def provoke_not_http(world: World) -> None:
    world.declare(protocol="PROTOCOL_TCP")
    world.invoke()


def provoke_not_active(world: World) -> None:
    world.declare()
    world.operator.DrainUpstream(upstream_id=world.id)
    world.invoke()


def provoke_overflow(world: World) -> None:
    """One request is under way, and no more may be."""
    world.declare(policy={"circuit_breaker": {"max_requests": 1}})
    held = world.operator.begin("Invoke", upstream_id=world.id, path="/held")
    try:
        assert world.web.held.wait(PATIENCE)
        world.invoke()
    finally:
        world.web.release.set()
        held.result()


def provoke_unhealthy(world: World) -> None:
    world.declare(pushed={})
    world.invoke()


def provoke_timeout(world: World) -> None:
    world.declare(policy={"timeouts": {"request_duration": seconds(0.1)}})
    world.invoke("/held")


def provoke_too_large(world: World) -> None:
    world.declare()
    world.invoke(f"/size/{3 * 2**20 + 1}")


class Provoked(NamedTuple):
    """How, and what comes of it."""

    code: str
    provoke: Callable[[World], Any]
    metadata: Callable[[World], dict[str, str] | None] = lambda _: None
    """None = not looked at."""
    retry: bool = False


def of_id(world: World) -> dict[str, str]:
    return {"upstream_id": world.id}


def of_other(world: World) -> dict[str, str]:
    return {"upstream_id": world.other}


PROVOKED = {
    "UPSTREAM_NOT_FOUND": Provoked("NOT_FOUND", lambda w: w.operator.GetUpstream(upstream_id=w.id), of_id),
    "ADDRESS_TAKEN": Provoked("ALREADY_EXISTS", provoke_address_taken, of_other),
    "PORT_IN_USE": Provoked("FAILED_PRECONDITION", provoke_port_in_use),
    "LISTEN_IMMUTABLE": Provoked("FAILED_PRECONDITION", provoke_listen_immutable),
    "UPSTREAM_REFERENCE": Provoked("FAILED_PRECONDITION", provoke_reference, of_other),
    "CAPABILITY_MISSING": Provoked(
        "UNIMPLEMENTED",
        lambda w: w.declare(protocol="PROTOCOL_MEMCACHED", policy={"load_balancing": {"balancer": 5}}),
        lambda _: {"capability": "policy.load_balancing.balancer=MAGLEV", "protocol": "MEMCACHED"},
    ),
    "ENDPOINT_FORBIDDEN": Provoked(
        "PERMISSION_DENIED",
        lambda w: w.declare(static={"endpoints": [{"address": "169.254.169.254:80"}]}),
        lambda _: {"address": "169.254.169.254:80"},
    ),
    "STALE_ETAG": Provoked("ABORTED", provoke_stale_etag),
    "UPSTREAM_NOT_PUSHED": Provoked("FAILED_PRECONDITION", provoke_not_pushed),
    "UPSTREAM_NOT_HTTP": Provoked("FAILED_PRECONDITION", provoke_not_http),
    "UPSTREAM_NOT_ACTIVE": Provoked("FAILED_PRECONDITION", provoke_not_active),
    "UPSTREAM_OVERFLOW": Provoked("RESOURCE_EXHAUSTED", provoke_overflow, of_id, retry=True),
    "UPSTREAM_UNHEALTHY": Provoked("UNAVAILABLE", provoke_unhealthy, of_id, retry=True),
    "UPSTREAM_TIMEOUT": Provoked("DEADLINE_EXCEEDED", provoke_timeout, of_id),
    "MESSAGE_TOO_LARGE": Provoked("RESOURCE_EXHAUSTED", provoke_too_large),
}
ELSEWHERE = {
    "UPSTREAM_LIMIT": "below, with a server of its own",
    "UPSTREAM_FROM_FILE": "test_ambassador_file.py",
}


def test_every_reason_of_the_ambassador_is_provoked() -> None:
    assert {*PROVOKED, *ELSEWHERE} - {"MESSAGE_TOO_LARGE"} == REASONS


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


def test_a_refused_change_leaves_what_is_served(world: World) -> None:
    first = world.declare()
    for change in ({"protocol": "PROTOCOL_TCP"}, {"policy": {"mirror": {"upstream_id": world.other}}}):
        with pytest.raises(Refused):
            world.declare(**change)
    assert world.declare() == first
    assert world.invoke().status == 200


def test_who_is_named_by_another_is_not_removed(world: World) -> None:
    world.declare(world.other)
    world.declare(policy={"mirror": {"upstream_id": world.other}})
    with pytest.raises(Refused) as error:
        world.operator.RemoveUpstream(upstream_id=world.other)
    assert (error.value.reason, error.value.metadata) == ("UPSTREAM_REFERENCE", of_id(world))


def test_what_is_refused_by_the_rate_limit_is_an_overflow(world: World) -> None:
    world.declare(policy={"rate_limit": {"requests": 1, "per_duration": seconds(3600)}})
    assert world.invoke().status == 200
    with pytest.raises(Refused, match="UPSTREAM_OVERFLOW"):
        world.invoke()


def test_an_upstream_that_breaks_off_is_unhealthy(world: World) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as rude:

        def hang_up() -> None:
            rude.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        world.declare(static={"endpoints": [{"address": f"127.0.0.1:{rude.getsockname()[1]}"}]})
        with pytest.raises(Refused, match="UPSTREAM_UNHEALTHY"):
            world.invoke()


def test_a_server_keeps_no_more_upstreams_than_it_may(serve: Serve) -> None:
    server = serve("ambassador", RETINUE_AMBASSADOR__MAX_UPSTREAMS="2", RETINUE_AMBASSADOR__DATA_PLANE="native")
    with Client(server.control, services=AMBASSADOR) as operator:

        def declare(upstream_id: str) -> Any:
            return operator.DeclareUpstream(
                upstream={"upstream_id": upstream_id, "protocol": "PROTOCOL_TCP", "pushed": {}},
                wait_duration=seconds(15),
            ).upstream

        kept = [declare(upstream_id) for upstream_id in ("a", "b")]
        with pytest.raises(Refused) as error:
            declare("c")
        assert (error.value.code, error.value.reason) == ("RESOURCE_EXHAUSTED", "UPSTREAM_LIMIT")
        assert [declare(upstream_id) for upstream_id in ("a", "b")] == kept, "those that are there may change"
        dial(kept[0].status.address).close()
