"""Servers of the adapter with settings of their own: files of targets and rule packs, the metrics listener, health."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from contract.client import ADAPTER, Client, Refused
from contract.conftest import Serve
from contract.line import seconds
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import RunningServer
from sources import Source, page
from workers import eventually

PREFIX = "RETINUE_ADAPTER__"


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as served:
        yield served


@contextmanager
def calls(server: RunningServer) -> Iterator[Client]:
    with Client(server.control, services=ADAPTER) as client:
        yield client


def entry(target_id: str, source: Source, **fields: Any) -> str:
    more = "".join(f", {key}: {value}" for key, value in fields.items())
    said = f"target_id: {target_id}, kind: PROMETHEUS, endpoint: '{source.endpoint}', interval_duration: 1s"
    return f"- {{{said}{more}}}\n"


def write(path: Path, *entries: str) -> None:
    put(path, "targets:\n" + "".join(entries))


def put(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)


def names(client: Client) -> list[str]:
    return [target.target_id for target in client.ListTargets().targets]


def metric(server: RunningServer, name: str) -> str:
    """The line of a figure without labels, but for its name."""
    text = page(server.ready["metrics"])[2]
    return next(line.split()[1] for line in text.splitlines() if line.startswith(f"retinue_adapter_{name} "))


def test_the_file_is_declared_at_the_start_and_again_when_it_changes(
    serve: Serve, source: Source, tmp_path: Path
) -> None:
    path = tmp_path / "targets.yaml"
    write(path, entry("a", source), entry("b", source))
    server = serve("adapter", "--metrics", "127.0.0.1:0", **{f"{PREFIX}TARGETS": str(path)})
    with calls(server) as client:
        assert names(client) == ["a", "b"]
        write(path, entry("b", source), entry("c", source))
        eventually(lambda: names(client) == ["b", "c"], "it is read again")
        put(path, "targets: [{target_id: A}]\n")
        eventually(lambda: metric(server, "target_file_ok") == "0.0", "the metric says that it is wrong")
        assert "what it does not change stays" in (server.data_dir.parent / "server.log").read_text()
        assert names(client) == ["b", "c"]
        write(path, entry("d", source))
        eventually(lambda: names(client) == ["d"], "it is right again")
        eventually(lambda: metric(server, "target_file_ok") == "1.0", "and the metric says so")


def test_what_the_file_declares_is_changed_there_alone(serve: Serve, source: Source, tmp_path: Path) -> None:
    path = tmp_path / "targets.yaml"
    write(path, entry("a", source))
    server = serve("adapter", **{f"{PREFIX}TARGETS": str(path)})
    target = {"target_id": "a", "kind": "TARGET_KIND_PROMETHEUS", "endpoint": source.endpoint}
    changes: dict[str, Any] = {
        "CreateTarget": {"target": target},
        "UpdateTarget": {"target": target},
        "DeleteTarget": {"target_id": "a"},
    }
    with calls(server) as client:
        for method, fields in changes.items():
            with pytest.raises(Refused) as error:
                getattr(client, method)(**fields)
            assert (error.value.code, error.value.reason) == ("FAILED_PRECONDITION", "TARGET_FROM_FILE"), method
        assert names(client) == ["a"]


def test_a_file_that_is_wrong_or_missing_at_the_start_is_refused(serve: Serve, source: Source, tmp_path: Path) -> None:
    path = tmp_path / "targets.yaml"
    with pytest.raises(AssertionError, match="No such file"):
        serve("adapter", **{f"{PREFIX}TARGETS": str(path)})
    put(path, "targets: [{target_id: a, kind: TELEX}]\n")
    with pytest.raises(AssertionError, match="TELEX"):
        serve("adapter", **{f"{PREFIX}TARGETS": str(path)})


def test_a_rule_pack_is_read_again_and_a_wrong_one_leaves_the_former(
    serve: Serve, source: Source, tmp_path: Path
) -> None:
    source.text = '{"jobs": {"done": 7, "waiting": 3}}'
    path = tmp_path / "mine.yaml"
    pack = "kind: json\nmetrics: [{{metric: jobs_{0}, path: /jobs/{0}}}]\n"
    put(path, pack.format("done"))
    server = serve("adapter", "--metrics", "127.0.0.1:0", **{f"{PREFIX}RULE_PACKS": str(tmp_path)})
    with calls(server) as client:
        target = {"target_id": "a", "kind": "TARGET_KIND_JSON", "endpoint": source.endpoint, "rule_pack": "mine"}
        client.CreateTarget(target={**target, "interval_duration": seconds(1)}, wait_duration=seconds(15))

        def found() -> dict[str, float]:
            return {one.name: one.series[0].number for one in client.GetMetrics().metrics}

        assert found() == {"jobs_done": 7.0}
        put(path, pack.format("waiting"))
        eventually(lambda: found() == {"jobs_waiting": 3.0}, "the new pack is used")
        put(path, "kind: json\nmetrics: [{metric: a}]\n")
        eventually(lambda: metric(server, "rule_packs_ok") == "0.0", "the metric says that it is wrong")
        assert found() == {"jobs_waiting": 3.0}
    server.stop()
    with pytest.raises(AssertionError, match="cannot use the rule packs"):
        server.restart()


def test_the_listener_shows_all_targets_or_one_as_the_reader_takes_it(serve: Serve, source: Source) -> None:
    server = serve("adapter", "--metrics", "127.0.0.1:0")
    address = server.ready["metrics"]
    with calls(server) as client:
        target = {"target_id": "a", "kind": "TARGET_KIND_PROMETHEUS", "endpoint": source.endpoint}
        client.CreateTarget(target=target, wait_duration=seconds(15))
    status, kind, text = page(address)
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert "retinue_adapter_up{" in text
    line = f'x{{instance="{source.endpoint}",kind="prometheus",service="a",target="a"}} 1.0\n'
    assert line in text
    assert page(address, "/metrics/a")[2] == f"# TYPE x untyped\n{line}"
    status, kind, text = page(address, "/metrics/a", accept="application/openmetrics-text;version=1.0.0")
    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert text == f"# TYPE x unknown\n{line}# EOF\n"
    assert page(address, "/metrics/none")[0] == 404


def test_health_is_that_of_each_target(serve: Serve, source: Source) -> None:
    server = serve("adapter")
    with calls(server) as client, grpc.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)

        def health(name: str) -> Any:
            return stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20).status

        for target_id, endpoint in (("a", source.endpoint), ("b", "http://127.0.0.1:1/")):
            target = {"target_id": target_id, "kind": "TARGET_KIND_PROMETHEUS", "endpoint": endpoint}
            client.CreateTarget(target=target, wait_duration=seconds(15))
        assert health("target/a") == health_pb2.HealthCheckResponse.SERVING
        assert health("target/b") == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as error:
            health("target/none")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
