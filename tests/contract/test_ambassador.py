"""AmbassadorService as its contract says, to callers that know nothing else."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from behind import Lines, Web, dial, is_refused, port, say
from contract.client import Client, Refused
from contract.line import seconds
from workers import eventually

from retinue.ambassador.v1 import upstream_pb2 as pb

pytestmark = pytest.mark.engines("sqlite")

Declare = Callable[..., Any]


@pytest.fixture
def name() -> str:
    """An upstream that no other test uses."""
    return f"u-{uuid.uuid4().hex}"


@pytest.fixture
def declare(ambassador_operator: Client) -> Iterator[Declare]:
    """Declares upstreams, waits until it is known what became of them, and removes them after the test."""
    declared: dict[str, None] = {}

    def make(upstream_id: str, *servers: Any, protocol: str = "PROTOCOL_TCP", **fields: Any) -> Any:
        call = {key: fields.pop(key) for key in ("etag", "validate_only", "wait_duration") if key in fields}
        if servers:
            fields["static"] = {"endpoints": [{"address": server.address} for server in servers]}
        upstream = {"upstream_id": upstream_id, "protocol": protocol, **fields}
        found = ambassador_operator.DeclareUpstream(upstream=upstream, **({"wait_duration": seconds(15)} | call))
        declared[upstream_id] = None
        return found.upstream

    yield make
    for upstream_id in reversed(declared):
        ambassador_operator.RemoveUpstream(upstream_id=upstream_id, drain_duration=seconds(0))


@pytest.fixture
def servers() -> Iterator[tuple[Lines, Lines]]:
    with Lines("one") as one, Lines("two") as two:
        yield one, two


@pytest.fixture
def web() -> Iterator[Web]:
    with Web("web") as server:
        yield server


def until(stream: Any, accept: Callable[[Any], bool]) -> Any:
    """The next event that is accepted."""
    for event in stream:
        if accept(event):
            return event
    raise AssertionError("the stream ended before")


# Declaring


def test_a_declared_upstream_is_active_and_answers_at_its_address(declare: Declare, servers: Any, name: str) -> None:
    upstream = declare(name, *servers)
    assert upstream.status.state == pb.UPSTREAM_STATE_ACTIVE
    assert upstream.status.active_generation == upstream.status.generation > 0
    assert upstream.status.address.startswith("127.0.0.1:")
    assert upstream.status.endpoints_resolved
    assert upstream.etag
    assert {say(upstream.status.address).split()[0] for _ in range(4)} == {"one", "two"}


def test_what_was_left_out_is_answered_with_its_default(declare: Declare, servers: Any, name: str) -> None:
    policy = declare(name, *servers).policy
    assert policy.timeouts.connect_duration.seconds == 5
    assert policy.circuit_breaker.max_connections == 1024
    assert policy.load_balancing.balancer == 1, "ROUND_ROBIN"


def test_without_wait_duration_it_is_answered_at_once_and_served_soon(
    declare: Declare, ambassador: Client, servers: Any, name: str
) -> None:
    upstream = declare(name, *servers, wait_duration=seconds(0))
    with ambassador.stream("WatchUpstreams", upstream_ids=[name]) as stream:
        until(stream, lambda event: event.upstream.status.state == pb.UPSTREAM_STATE_ACTIVE)
    assert say(upstream.status.address)


def test_wait_duration_ends_while_nobody_is_known(declare: Declare, name: str) -> None:
    nowhere = {"path": f"/nonexistent/{name}.yaml"}
    upstream = declare(name, file=nowhere, wait_duration=seconds(0.2))
    assert upstream.status.state == pb.UPSTREAM_STATE_PENDING
    assert not upstream.status.endpoints_resolved


def test_the_same_declaration_changes_nothing(declare: Declare, servers: Any, name: str) -> None:
    first, again = declare(name, *servers), declare(name, *servers)
    assert again.etag == first.etag
    assert again.status.generation == first.status.generation


def test_another_declaration_changes_who_serves_at_the_same_address(declare: Declare, servers: Any, name: str) -> None:
    one, two = servers
    first = declare(name, one)
    with dial(first.status.address) as connection, connection.makefile() as answers:
        connection.sendall(b"a\n")
        assert answers.readline() == "one a\n"
        second = declare(name, two)
        assert say(second.status.address) == "two x"
        connection.sendall(b"b\n")
        assert answers.readline() == "one b\n", "an open connection stays"
    assert second.status.address == first.status.address
    assert second.status.generation > first.status.generation
    assert second.etag != first.etag


def test_an_etag_lets_only_those_through_who_know_the_latest(declare: Declare, servers: Any, name: str) -> None:
    one, two = servers
    first = declare(name, one, etag="none")
    second = declare(name, two, etag=first.etag)
    for stale in (first.etag, "none"):
        with pytest.raises(Refused) as error:
            declare(name, one, etag=stale)
        assert error.value.metadata == {"etag": second.etag}
    assert say(second.status.address) == "two x"


def test_validate_only_serves_nothing(declare: Declare, ambassador: Client, servers: Any, name: str) -> None:
    upstream = declare(name, *servers, validate_only=True)
    assert upstream.policy.timeouts.connect_duration.seconds == 5
    assert not upstream.HasField("status")
    with pytest.raises(Refused, match="UPSTREAM_NOT_FOUND"):
        ambassador.GetUpstream(upstream_id=name)


def test_validate_only_leaves_what_is_served(declare: Declare, ambassador: Client, servers: Any, name: str) -> None:
    one, two = servers
    first = declare(name, one)
    declare(name, two, validate_only=True)
    assert ambassador.GetUpstream(upstream_id=name).upstream == first
    assert say(first.status.address) == "one x"


def test_every_field_that_is_wrong_is_named_at_once(declare: Declare, name: str) -> None:
    with pytest.raises(Refused) as error:
        declare(
            "Not A Name",
            listen={"port": 70_000},
            static={"endpoints": [{"address": "example.com:80"}, {"address": "10.0.0.1:80", "weight": -1}]},
            policy={"retry": {"on": [1]}, "timeouts": {"connect_duration": seconds(0)}},
            wait_duration=seconds(61),
        )
    assert error.value.code == "INVALID_ARGUMENT"
    assert error.value.fields >= {
        "wait_duration",
        "upstream.upstream_id",
        "upstream.listen.port",
        "upstream.static.endpoints[0].address",
        "upstream.static.endpoints[1].weight",
        "upstream.policy.retry",
        "upstream.policy.timeouts.connect_duration",
    }


def test_output_fields_must_be_unset(ambassador_operator: Client, name: str) -> None:
    with pytest.raises(Refused) as error:
        ambassador_operator.DeclareUpstream(
            upstream={
                "upstream_id": name,
                "protocol": "PROTOCOL_TCP",
                "pushed": {},
                "status": {"state": 2},
                "etag": "x",
            }
        )
    assert error.value.fields == {"upstream.status", "upstream.etag"}


def test_a_unix_socket_is_a_listener_with_its_mode(declare: Declare, servers: Any, name: str, tmp_path: Any) -> None:
    path = tmp_path / "s"
    upstream = declare(name, *servers, listen={"unix_socket": {"path": str(path), "mode": 0o600}})
    assert upstream.status.address == f"unix:{path}"
    assert path.stat().st_mode & 0o777 == 0o600
    assert say(upstream.status.address).endswith(" x")


# Who serves


def test_pushed_endpoints_serve_once_they_are_set(
    declare: Declare, ambassador_operator: Client, servers: Any, name: str
) -> None:
    one, two = servers
    upstream = declare(name, pushed={})
    assert (upstream.status.state, upstream.status.endpoints_resolved) == (pb.UPSTREAM_STATE_ACTIVE, False)
    assert say(upstream.status.address) == "", "nobody serves it yet"
    for server in (one, two):
        endpoints = [{"address": server.address, "weight": 7}]
        pushed = ambassador_operator.SetEndpoints(upstream_id=name, endpoints=endpoints, etag=upstream.etag).upstream
        assert [(e.address, e.weight) for e in pushed.status.endpoints] == [(server.address, 7)]
        assert pushed.etag != upstream.etag
        upstream = declare(name, pushed={})
        assert say(upstream.status.address) == f"{server.name} x", "to declare it again leaves them"


def test_a_name_is_looked_up_and_its_addresses_are_checked(declare: Declare, servers: Any, name: str) -> None:
    one, _ = servers
    dns = {"hostname": "localhost", "port": port(one.address)}
    upstream = declare(name, dns=dns)
    assert [endpoint.address for endpoint in upstream.status.endpoints] == [one.address], "not ::1, which is forbidden"
    assert say(upstream.status.address) == "one x"


def test_a_file_of_endpoints_is_read_again_when_it_changes(
    declare: Declare, ambassador: Client, servers: Any, name: str, tmp_path: Any
) -> None:
    one, two = servers
    path = tmp_path / "endpoints.yaml"
    path.write_text(f"- address: {one.address}\n")
    upstream = declare(name, file={"path": str(path)})
    assert say(upstream.status.address) == "one x"
    with ambassador.stream("WatchUpstreams", upstream_ids=[name]) as stream:
        path.write_text(f"- address: {two.address}\n  weight: 3\n")
        until(stream, lambda e: [(n.address, n.weight) for n in e.upstream.status.endpoints] == [(two.address, 3)])


# Looking


def test_upstreams_are_listed_by_name_in_pages(declare: Declare, ambassador: Client, servers: Any, name: str) -> None:
    wanted = [f"{name[:40]}-{letter}" for letter in "abc"]
    for upstream_id in reversed(wanted):
        declare(upstream_id, *servers, wait_duration=seconds(0))
    found, token = [], ""
    while True:
        page = ambassador.ListUpstreams(page_size=2, page_token=token)
        assert len(page.upstreams) <= 2
        found += [upstream.upstream_id for upstream in page.upstreams]
        if not (token := page.next_page_token):
            break
    assert [upstream_id for upstream_id in found if upstream_id in wanted] == wanted
    assert found == sorted(found)


def test_a_watch_gives_a_snapshot_then_synced_then_changes(
    declare: Declare, ambassador: Client, ambassador_operator: Client, servers: Any, name: str
) -> None:
    one, two = servers
    first = declare(name, one)
    with ambassador.stream("WatchUpstreams", upstream_ids=[name]) as stream:
        assert stream.read().upstream == first
        assert stream.read().HasField("synced")
        second = declare(name, two)
        until(stream, lambda event: event.upstream == second)
        ambassador_operator.RemoveUpstream(upstream_id=name, drain_duration=seconds(0))
        until(stream, lambda event: event.removed_upstream_id == name)


def test_a_watch_of_all_hears_of_new_ones(declare: Declare, ambassador: Client, servers: Any, name: str) -> None:
    with ambassador.stream("WatchUpstreams") as stream:
        until(stream, lambda event: event.HasField("synced"))
        declare(name, *servers)
        until(stream, lambda event: event.upstream.upstream_id == name)


def test_counts_grow_with_each_connection_and_say_who_got_it(
    declare: Declare, ambassador: Client, servers: Any, name: str
) -> None:
    upstream = declare(name, *servers)
    for _ in range(4):
        say(upstream.status.address)
    with ambassador.stream("WatchUpstreamStats", upstream_ids=[name], interval_duration=seconds(0.1)) as stream:
        event = until(stream, lambda event: event.stats and event.stats[0].requests >= 4)
    (stats,) = event.stats
    assert (stats.upstream_id, stats.requests, stats.errors) == (name, 4, 0)
    assert {one.address: one.requests for one in stats.endpoints} == {server.address: 2 for server in servers}
    assert stats.start_time.seconds > 0
    assert stats.received_bytes > 0


def test_counts_of_one_that_is_removed_end_with_not_found(
    declare: Declare, ambassador: Client, ambassador_operator: Client, servers: Any, name: str
) -> None:
    declare(name, *servers)
    with ambassador.stream("WatchUpstreamStats", upstream_ids=[name], interval_duration=seconds(0.1)) as stream:
        stream.read()
        ambassador_operator.RemoveUpstream(upstream_id=name, drain_duration=seconds(0))
        with pytest.raises(Refused, match="UPSTREAM_NOT_FOUND"):
            until(stream, lambda _: False)


def test_the_data_planes_tell_what_they_can(ambassador: Client) -> None:
    planes = ambassador.GetDataPlane().data_planes
    native = next(plane for plane in planes if plane.kind == pb.DATA_PLANE_KIND_NATIVE)
    can = {(one.protocol, one.name) for one in native.capabilities}
    assert native.live
    assert set(native.protocols) == {pb.PROTOCOL_TCP, pb.PROTOCOL_MEMCACHED}
    assert can >= {(pb.PROTOCOL_TCP, "tcp"), (pb.PROTOCOL_MEMCACHED, "policy.load_balancing.balancer=KETAMA")}


# Leaving


def test_a_drained_upstream_refuses_new_connections_and_lets_open_ones_end(
    declare: Declare, ambassador_operator: Client, servers: Any, name: str
) -> None:
    upstream = declare(name, *servers)
    with dial(upstream.status.address) as connection, connection.makefile() as answers:
        connection.sendall(b"a\n")
        assert answers.readline()
        drained = ambassador_operator.DrainUpstream(upstream_id=name).upstream
        assert drained.status.state == pb.UPSTREAM_STATE_DRAINING
        eventually(lambda: is_refused(upstream.status.address), "nobody accepts")
        connection.sendall(b"b\n")
        assert answers.readline().endswith(" b\n")
    waited = ambassador_operator.DrainUpstream(upstream_id=name, wait_duration=seconds(15)).upstream
    assert waited.status.active_connections == 0


def test_to_declare_it_anew_ends_a_drain(
    declare: Declare, ambassador_operator: Client, servers: Any, name: str
) -> None:
    upstream = declare(name, *servers)
    ambassador_operator.DrainUpstream(upstream_id=name)
    again = declare(name, *servers)
    assert again.status.state == pb.UPSTREAM_STATE_ACTIVE
    assert again.status.address == upstream.status.address
    assert say(again.status.address)


def test_a_removed_upstream_is_gone_and_to_remove_it_again_is_no_error(
    declare: Declare, ambassador: Client, ambassador_operator: Client, servers: Any, name: str
) -> None:
    upstream = declare(name, *servers)
    with ambassador.stream("WatchUpstreams", upstream_ids=[name]) as stream:
        assert ambassador_operator.RemoveUpstream(upstream_id=name, drain_duration=seconds(0)).removed
        until(stream, lambda event: event.removed_upstream_id == name)
    assert not ambassador_operator.RemoveUpstream(upstream_id=name).removed
    eventually(lambda: is_refused(upstream.status.address), "nobody accepts")


# Invoking


def test_an_invoked_request_arrives_as_it_was_and_its_answer_comes_back(
    declare: Declare, ambassador: Client, web: Web, name: str
) -> None:
    declare(name, web, protocol="PROTOCOL_HTTP")
    answer = ambassador.Invoke(
        upstream_id=name,
        method="POST",
        path="/a?b=%20c",
        headers=[{"name": "X-One", "value": "1"}, {"name": "host", "value": "example.com"}],
        body=b"body",
    )
    said = json.loads(answer.body)
    assert (answer.status, said["method"], said["path"], said["body"]) == (200, "POST", "/a?b=%20c", "body")
    assert (said["headers"]["x-one"], said["headers"]["host"]) == ("1", "example.com")
    assert ("content-length", str(len(answer.body))) in [(one.name, one.value) for one in answer.headers]


def test_an_answer_of_the_upstream_is_an_answer_whatever_its_status(
    declare: Declare, ambassador: Client, web: Web, name: str
) -> None:
    declare(name, web, protocol="PROTOCOL_HTTP")
    for status in (404, 429, 500, 503, 504):
        assert ambassador.Invoke(upstream_id=name, path=f"/status/{status}").status == status


def test_an_invocation_is_part_of_the_callers_trace(declare: Declare, ambassador: Client, web: Web, name: str) -> None:
    declare(name, web, protocol="PROTOCOL_HTTP")
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    call = ambassador.begin("Invoke", upstream_id=name, metadata=[("traceparent", f"00-{trace}-00f067aa0ba902b7-01")])
    assert json.loads(call.result().body)["headers"]["traceparent"].split("-")[1] == trace


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"method": "get"}, "method"),
        ({"method": "CONNECT"}, "method"),
        ({"path": "no-slash"}, "path"),
        ({"path": "/a\r\nx: y"}, "path"),
        ({"headers": [{"name": "transfer-encoding", "value": "chunked"}]}, "headers[0].name"),
        ({"headers": [{"name": "a", "value": "x\r\ny: z"}]}, "headers[0].value"),
        ({"headers": [{"name": "host", "value": "a"}, {"name": "Host", "value": "b"}]}, "headers[1].name"),
        ({"body": b"x" * (3 * 2**20 + 1)}, "body"),
    ],
)
def test_a_request_that_is_none_is_refused(ambassador: Client, name: str, fields: Any, wrong: str) -> None:
    with pytest.raises(Refused) as error:
        ambassador.Invoke(upstream_id=name, **fields)
    assert (error.value.code, error.value.fields) == ("INVALID_ARGUMENT", {wrong})


def test_the_callers_deadline_ends_an_invocation(declare: Declare, ambassador: Client, web: Web, name: str) -> None:
    declare(name, web, protocol="PROTOCOL_HTTP")
    call = ambassador.begin("Invoke", upstream_id=name, path="/held", timeout=2)
    with pytest.raises(Refused, match="DEADLINE_EXCEEDED"):
        call.result()
    web.release.set()
    assert ambassador.Invoke(upstream_id=name).status == 200


# Who may


@pytest.mark.parametrize("method", ["DeclareUpstream", "SetEndpoints", "DrainUpstream", "RemoveUpstream"])
def test_apps_change_nothing(ambassador: Client, method: str) -> None:
    with pytest.raises(Refused) as error:
        getattr(ambassador, method)()
    assert (error.value.code, error.value.reason) == ("PERMISSION_DENIED", "ROLE_REQUIRED")


# What may be dialled

FORBIDDEN = [
    "169.254.169.254:80",
    "[fe80::1]:80",
    "[fd00:ec2::254]:80",
    "[::1]:8080",
    "127.0.0.2:8080",
    "127.0.0.1:80",
    "[::ffff:127.0.0.1]:80",
    "[::ffff:169.254.169.254]:80",
    "[2002:7f00:1::]:80",
    "[64:ff9b::169.254.169.254]:80",
    "0.0.0.0:80",
    "255.255.255.255:80",
    "224.0.0.1:80",
    "unix:/run/retinue/control.sock",
]


@pytest.mark.parametrize("address", FORBIDDEN)
def test_a_forbidden_address_is_refused_and_nothing_is_declared(
    declare: Declare, ambassador: Client, ambassador_operator: Client, name: str, address: str
) -> None:
    with pytest.raises(Refused) as error:
        declare(name, static={"endpoints": [{"address": address}]})
    assert (error.value.code, error.value.reason) == ("PERMISSION_DENIED", "ENDPOINT_FORBIDDEN")
    assert error.value.metadata == {"address": address}
    with pytest.raises(Refused, match="UPSTREAM_NOT_FOUND"):
        ambassador.GetUpstream(upstream_id=name)
    declare(name, pushed={})
    with pytest.raises(Refused, match="ENDPOINT_FORBIDDEN"):
        ambassador_operator.SetEndpoints(upstream_id=name, endpoints=[{"address": address}])


@pytest.mark.parametrize(
    "address", ["2130706433:80", "0x7f.1:80", "127.1:80", "localhost:80", "[::1%lo]:80", "017700000001:80"]
)
def test_no_other_spelling_gets_past_it(declare: Declare, name: str, address: str) -> None:
    with pytest.raises(Refused, match="INVALID_ARGUMENT"):
        declare(name, static={"endpoints": [{"address": address}]})


def test_a_name_that_resolves_to_a_forbidden_address_has_no_endpoints(declare: Declare, name: str) -> None:
    upstream = declare(name, dns={"hostname": "localhost", "port": 80})
    assert not upstream.status.endpoints_resolved
    assert not upstream.status.endpoints
    assert say(upstream.status.address) == ""


def test_a_file_that_names_a_forbidden_address_has_no_endpoints(declare: Declare, name: str, tmp_path: Any) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text("- address: 169.254.169.254:80\n")
    assert not declare(name, file={"path": str(path)}).status.endpoints
