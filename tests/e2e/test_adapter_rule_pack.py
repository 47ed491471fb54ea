"""The rule pack in deploy/adapter/examples, written from the guide alone, on the real program that it is for: uWSGI."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from http.client import RemoteDisconnected
from pathlib import Path

import grpc
import pytest
from e2e.pods import ROOT, await_true
from servers import RunningServer, start_server
from support.postgres import free_port

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import metric_pb2 as metrics
from retinue.adapter.v1 import target_pb2 as pb
from retinue.adapter.v1.adapter_service_pb2_grpc import AdapterServiceStub

APP = """
def application(environ, start):
    if environ["PATH_INFO"] == "/error":
        raise ValueError("asked for")
    environ["wsgi.input"].read()
    start("200 OK", [("content-type", "text/plain")])
    return [b"hello"]
"""
EXAMPLES = ROOT / "deploy/adapter/examples"


class Uwsgi:
    """One that answers two requests at a time."""

    def __init__(self, where: Path) -> None:
        program = shutil.which("uwsgi", path=str(Path(sys.executable).parent))
        assert program, "it comes with make setup-dev"
        self.port, self.stats = free_port(), free_port()
        (where / "app.py").write_text(APP)
        words = [program, "--http-socket", f"127.0.0.1:{self.port}", "--stats", f"127.0.0.1:{self.stats}"]
        words += ["--stats-http", "--master", "--processes", "2", "--wsgi-file", "app.py", "--need-app"]
        words += ["--die-on-term"]
        with (where / "uwsgi.log").open("w") as log:
            self.process = subprocess.Popen(words, cwd=where, stdout=log, stderr=log)
        await_true(self._answers, "uWSGI answers")

    def ask(self, path: str = "/") -> None:
        """One request, to its end."""
        urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10).read()

    def hold(self) -> socket.socket:
        """A request that lasts until the socket is closed: the app waits for the rest of it."""
        held = socket.create_connection(("127.0.0.1", self.port))
        held.sendall(b"POST / HTTP/1.0\r\ncontent-length: 1\r\n\r\n")
        return held

    def _answers(self) -> bool:
        try:
            self.ask()
        except OSError:
            return False
        return True


@pytest.fixture
def uwsgi(tmp_path: Path) -> Iterator[Uwsgi]:
    started = Uwsgi(tmp_path)
    yield started
    started.process.terminate()
    assert started.process.wait(30) == 0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    started = start_server(tmp_path, "adapter", env={"RETINUE_ADAPTER__RULE_PACKS": str(EXAMPLES)})
    yield started
    assert started.stop() == 0


@pytest.fixture
def adapter(server: RunningServer) -> Iterator[AdapterServiceStub]:
    with grpc.insecure_channel(server.control) as channel:
        yield AdapterServiceStub(channel)


def target(uwsgi: Uwsgi) -> pb.Target:
    return pb.Target(
        target_id="shop",
        kind=pb.TARGET_KIND_JSON,
        endpoint=f"http://127.0.0.1:{uwsgi.stats}/",
        rule_pack="uwsgi",
    )


def test_all_that_the_pack_names_is_there_and_nothing_is_refused(uwsgi: Uwsgi, adapter: AdapterServiceStub) -> None:
    tested = adapter.TestTarget(api.TestTargetRequest(target=target(uwsgi)), timeout=30)
    assert tested.failure == ""
    assert [point for point in tested.points if point.rejection] == []
    shown = {point.normalised.partition("{")[0] for point in tested.points if point.normalised}
    named = [line for line in (EXAMPLES / "uwsgi.yaml").read_text().splitlines() if line.startswith("- {metric: ")]
    assert len(shown) == len(named), shown
    assert any(one.startswith("uwsgi_average_response_time_seconds{") for one in _normalised(tested)), "of microseconds"
    assert any('socket="127.0.0.1:' in one for one in _normalised(tested))


def test_its_golden_signals_follow_what_is_asked_of_it(uwsgi: Uwsgi, adapter: AdapterServiceStub) -> None:
    for _ in range(3):
        uwsgi.ask()
    with pytest.raises(RemoteDisconnected):
        uwsgi.ask("/error")
    signals = _signals(uwsgi, adapter)
    assert signals["REQUESTS"].number >= 5, "the first that found it up among them"
    assert signals["ERRORS"].number == 1
    assert signals["SATURATION"].number == 0
    assert signals["DURATION"].absent_reason == "the stats have averages, which are no histogram"


def test_a_request_that_lasts_makes_it_half_full(uwsgi: Uwsgi, adapter: AdapterServiceStub) -> None:
    with uwsgi.hold():
        await_true(lambda: _signals(uwsgi, adapter)["SATURATION"].number == 0.5, "one of two cores is busy")
        assert _signals(uwsgi, adapter)["SATURATION"].source == "uwsgi_core_is_busy / uwsgi_core"
    await_true(lambda: _signals(uwsgi, adapter)["SATURATION"].number == 0, "it is free again")


def _normalised(tested: api.TestTargetResponse) -> list[str]:
    return [point.normalised for point in tested.points]


def _signals(uwsgi: Uwsgi, adapter: AdapterServiceStub) -> dict[str, metrics.Signal]:
    """By kind, without the prefix, as they are now."""
    tested = adapter.TestTarget(api.TestTargetRequest(target=target(uwsgi)), timeout=30)
    assert tested.failure == ""
    return {metrics.SignalKind.Name(one.kind).removeprefix("SIGNAL_KIND_"): one for one in tested.signals}
