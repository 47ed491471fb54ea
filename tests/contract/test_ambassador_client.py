"""`retinue.client.Ambassador` and `retinue ambassador` against real servers."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from behind import Lines, Web, say
from servers import RunningServer, environment, start_server
from workers import eventually, retinue, rows

from retinue.ambassador.v1 import upstream_pb2 as pb
from retinue.client import Ambassador, NotActive, NotFound, Unavailable, sync
from retinue.client.ambassador import upstream

if TYPE_CHECKING:
    from conftest import Target

NOT_ACTIVE, USAGE, UNREACHABLE, REFUSED = 1, 2, 3, 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    settings = {"RETINUE_AMBASSADOR__ENDPOINTS__ALLOW": "127.0.0.1", "RETINUE_AMBASSADOR__DATA_PLANE": "native"}
    running = start_server(tmp_path_factory.mktemp("server"), "ambassador", env=settings)
    yield running
    assert running.stop() == 0


@pytest.fixture
def operator(server: RunningServer) -> Iterator[sync.Ambassador]:
    with sync.Ambassador(server.control) as ambassador:
        yield ambassador


@pytest.fixture
def line() -> Iterator[Lines]:
    with Lines("one") as running:
        yield running


@pytest.fixture
def name() -> str:
    """An upstream that no other test uses."""
    return f"u-{uuid.uuid4().hex[:20]}"


def unserved(name: str) -> pb.Upstream:
    """An upstream of which nobody is known."""
    return pb.Upstream(upstream_id=name, protocol=pb.PROTOCOL_TCP, file=pb.FileDiscovery(path="/nonexistent"))


# The client


def test_what_is_declared_is_found_listed_and_counted(operator: sync.Ambassador, line: Lines, name: str) -> None:
    declared = operator.declare(upstream(name, "TCP", [line.address]), wait=10)
    assert declared.status.state == pb.UPSTREAM_STATE_ACTIVE
    assert operator.get(name) == declared
    assert name in [found.upstream_id for found in operator.list()]
    assert say(declared.status.address) == "one x"
    for [stats] in operator.stats(name, interval=0.1):
        if stats.requests:
            break
    assert [plane.kind for plane in operator.data_planes()] == [pb.DATA_PLANE_KIND_NATIVE]


def test_to_remove_tells_whether_there_was_one(operator: sync.Ambassador, line: Lines, name: str) -> None:
    operator.declare(upstream(name, "TCP", [line.address]), wait=10)
    assert operator.drain(name, drain=1).status.state == pb.UPSTREAM_STATE_DRAINING
    assert operator.remove(name, drain=0)
    changes = operator.watch(name)
    if next(changes).upstream is not None:
        assert any(change.removed == name for change in changes)
    with pytest.raises(NotFound):
        operator.get(name)


async def test_to_wait_is_over_when_all_are_active(server: RunningServer, line: Lines, name: str) -> None:
    async with Ambassador(server.address) as app, Ambassador(server.control) as operator:
        watching = app.watch(name)
        assert (await anext(watching)).upstream is None, "it is not declared yet"
        await operator.declare(unserved(name))
        await anext(watching)
        await operator.declare(upstream(name, "TCP", [line.address]))
        await app.wait(name, timeout=30)
        await watching.aclose()


async def test_to_wait_says_of_each_why_it_is_not_active(server: RunningServer, name: str) -> None:
    async with Ambassador(server.address) as app, Ambassador(server.control) as operator:
        await operator.declare(unserved(name))
        with pytest.raises(NotActive) as error:
            await app.wait(name, "nowhere", timeout=3)
    assert error.value.reasons == {name: "it is pending, and nobody serves it yet", "nowhere": "it is not declared"}


async def test_to_wait_for_a_server_that_is_not_there_ends_in_time() -> None:
    async with Ambassador("127.0.0.1:1") as app:
        with pytest.raises(NotActive, match=r"db: 127\.0\.0\.1:1 can't be reached"):
            await app.wait("db", timeout=0.5)


@pytest.mark.engines("sqlite")
@pytest.mark.usefixtures("ambassador_operator")
async def test_an_invoked_request_is_answered_or_refused_once(target: Target, name: str) -> None:
    async with Ambassador(target.address) as app, Ambassador(target.control) as operator:
        with Web("web") as web:
            await operator.declare(upstream(name, "HTTP", [web.address]), wait=15)
            answer = await app.invoke(name, "/a?b", method="POST", headers={"x-one": "1"}, body=b"body")
            said = json.loads(answer.body)
            assert (answer.status, said["method"], said["path"], said["body"]) == (200, "POST", "/a?b", "body")
            assert said["headers"]["x-one"] == "1"
            assert (await app.invoke(name, "/status/503")).status == 503
        nobody = pb.Upstream(upstream_id=name, protocol=pb.PROTOCOL_HTTP, pushed=pb.PushedEndpoints())
        await operator.declare(nobody, wait=15)
        with pytest.raises(Unavailable) as error:
            await app.invoke(name)
        assert error.value.reason == "UPSTREAM_UNHEALTHY"
        [stats] = await anext(app.stats(name))
        assert stats.requests == 3, "it is not repeated"
        assert await operator.remove(name, drain=0)


async def test_a_watch_goes_on_when_the_server_comes_back(tmp_path: Path, line: Lines) -> None:
    (tmp_path / "data/ambassador").mkdir(parents=True)
    file = {
        "upstreams": [{"upstream_id": "a", "protocol": "TCP", "static": {"endpoints": [{"address": line.address}]}}]
    }
    (tmp_path / "data/ambassador/upstreams.yaml").write_text(json.dumps(file))
    settings = {"RETINUE_AMBASSADOR__ENDPOINTS__ALLOW": "127.0.0.1", "RETINUE_AMBASSADOR__DATA_PLANE": "native"}
    first = start_server(tmp_path, "ambassador", env=settings)
    async with Ambassador(first.address) as app:
        watching = app.watch("a")
        assert (await anext(watching)).upstream is not None
        first.kill()
        second = first.restart()
        while (change := await anext(watching)).upstream is None or not change.upstream.status.address:
            pass
        await watching.aclose()
    assert second.stop() == 0


# The command


def declare(server: RunningServer, *entries: dict[str, Any], code: int = 0, args: Any = ()) -> Any:
    text = json.dumps({"upstreams": entries})
    done = retinue(server, "ambassador", "declare", "-f", "-", *args, stdin=text.encode())
    assert done.returncode == code, done.stderr.decode()
    return done


def entry(name: str, address: str) -> dict[str, Any]:
    return {"upstream_id": name, "protocol": "TCP", "static": {"endpoints": [{"address": address}]}}


def test_a_file_is_declared_shown_and_removed(server: RunningServer, line: Lines, name: str) -> None:
    [row] = rows(declare(server, entry(name, line.address)))
    assert (row["upstream_id"], row["state"], row["endpoints"], row["healthy"]) == (name, "active", 1, 1)
    assert say(row["address"]) == "one x"
    assert row in [found | {"connections": 0} for found in rows(retinue(server, "ambassador", "ls"))]
    [shown] = rows(retinue(server, "ambassador", "show", name))
    assert shown["static"]["endpoints"][0]["address"] == line.address
    assert shown["status"]["generation"] == 1
    [drained] = rows(retinue(server, "ambassador", "drain", name, "--wait", "10s"))
    assert drained["state"] == "draining"
    assert rows(retinue(server, "ambassador", "rm", name)) == [{"upstream_id": name, "removed": True}]
    assert retinue(server, "ambassador", "rm", "nowhere").returncode == NOT_ACTIVE


def test_a_file_that_is_only_checked_declares_nothing(server: RunningServer, line: Lines, name: str) -> None:
    assert declare(server, entry(name, line.address), args=["--check"]).stdout == b""
    assert retinue(server, "ambassador", "show", name).returncode == REFUSED


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("upstreams: [", USAGE, "is no YAML"),
        ("[]", USAGE, "the one key `upstreams`"),
        ("upstreams: [{statik: {}}]", USAGE, "upstreams[0]"),
        ("upstreams: [{upstream_id: A, protocol: TCP, pushed: {}}]", REFUSED, "upstream.upstream_id"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(server: RunningServer, text: str, code: int, said: str) -> None:
    done = retinue(server, "ambassador", "declare", "-f", "-", stdin=text.encode())
    assert done.returncode == code
    assert said in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_to_wait_ends_with_0_or_at_the_timeout_with_1_and_why(
    server: RunningServer, operator: sync.Ambassador, line: Lines, name: str
) -> None:
    done = retinue(server, "ambassador", "wait", name, "--timeout", "2s")
    assert (done.returncode, done.stdout) == (NOT_ACTIVE, b"")
    assert done.stderr.decode() == f"not active: {name}: it is not declared\n"
    later = threading.Thread(target=operator.declare, args=[upstream(name, "TCP", [line.address])])
    later.start()
    done = retinue(server, "ambassador", "wait", name, "--timeout", "30s")
    later.join()
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_counts_are_json_lines_when_piped(
    server: RunningServer, operator: sync.Ambassador, line: Lines, name: str
) -> None:
    say(operator.declare(upstream(name, "TCP", [line.address]), wait=10).status.address)

    def counted() -> bool:
        [row] = rows(retinue(server, "ambassador", "stats", name, "--once"))
        [endpoint] = row["endpoints"]
        return bool(row["requests"] == endpoint["requests"] == 1)

    eventually(counted, "the connection is counted")


def test_on_a_terminal_the_counts_are_a_table(
    server: RunningServer, operator: sync.Ambassador, line: Lines, name: str
) -> None:
    operator.declare(upstream(name, "TCP", [line.address]), wait=10)
    shown = on_terminal(server, "ambassador", "stats", name, "--once")
    for word in ("UPSTREAM", "PER SECOND", "P99", name, line.address):
        assert word in shown


def test_on_a_terminal_upstreams_are_a_table(
    server: RunningServer, operator: sync.Ambassador, line: Lines, name: str
) -> None:
    operator.declare(upstream(name, "TCP", [line.address]), wait=10)
    shown = on_terminal(server, "ambassador", "show", name)
    for word in ("UPSTREAM ID", "active", "healthy", line.address):
        assert word in shown


def on_terminal(server: RunningServer, *args: str) -> str:
    """What a command shows on a wide terminal, without colours."""
    ours, theirs = pty.openpty()
    env = environment(RETINUE_ADDRESS=server.address, TERM="xterm", COLUMNS="160", LINES="40")
    command = [sys.executable, "-m", "retinue.cli", *args]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # the other end is closed
            pass
        os.close(ours)
        assert process.wait() == 0, shown
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
