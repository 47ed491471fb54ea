"""The ambassador on a machine that has no Envoy: what is served, what is refused, and in which words.

The server runs under an interpreter that has all packages of this one but Envoy's, and no `envoy` on its PATH.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from servers import ROOT, RunningServer, environment, start_server
from support.upstreams import LineServer, memcached, running, say

from retinue.ambassador.v1 import upstream_pb2 as pb
from retinue.client.ambassador import Ambassador, upstream
from retinue.client.errors import RetinueError

GUIDE = ROOT / "deploy/ambassador/README.md"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The interpreter, and its PYTHONPATH."""
    where = tmp_path_factory.mktemp("bare")
    venv.create(where / "venv")
    packages = where / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith("envoy"):
            (packages / path.name).symlink_to(path)
    return where / "venv/bin/python", f"{environment()['PYTHONPATH']}:{packages}"


@pytest.fixture
def server(python: tuple[Path, str], tmp_path: Path) -> Iterator[RunningServer]:
    program, packages = python
    env = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": packages,
        "RETINUE_AMBASSADOR__DATA_PLANE": "auto",
        "RETINUE_AMBASSADOR__ENDPOINTS__ALLOW": "127.0.0.1:1024-65535",
    }
    instead = ["sh", "-c", 'shift; exec "$0" "$@"', str(program)]  # of the interpreter that is named next
    started = start_server(tmp_path, "ambassador", env=env, before=instead)
    yield started
    assert started.stop() == 0


@pytest.fixture
async def operator(server: RunningServer) -> AsyncIterator[Ambassador]:
    async with Ambassador(server.control) as found:
        yield found


async def test_tcp_and_memcached_are_served_by_the_server_itself(operator: Ambassador) -> None:
    (plane,) = await operator.data_planes()
    assert plane.kind == pb.DATA_PLANE_KIND_NATIVE
    assert list(plane.protocols) == [pb.PROTOCOL_TCP, pb.PROTOCOL_MEMCACHED]
    line = LineServer("one")
    with memcached() as cache:
        async with running(line):
            db = await operator.declare(upstream("db", "TCP", [line.address]), wait=10)
            shards = await operator.declare(upstream("cache", "MEMCACHED", [cache]), wait=10)
            assert db.status.state == shards.status.state == pb.UPSTREAM_STATE_ACTIVE
            assert await say(port(db), "hello") == ["one hello"]
            reader, writer = await asyncio.open_connection("127.0.0.1", port(shards))
            writer.write(b"set a 0 0 1\r\nx\r\nget a\r\n")
            assert await reader.readuntil(b"END\r\n") == b"STORED\r\nVALUE a 0 1\r\nx\r\nEND\r\n"
            writer.close()
            await operator.remove("db", drain=0)
            await operator.remove("cache", drain=0)


@pytest.mark.parametrize("protocol", ["HTTP", "GRPC", "REDIS"])
async def test_the_others_are_unimplemented_in_the_words_of_the_guide(operator: Ambassador, protocol: str) -> None:
    with pytest.raises(RetinueError) as error:
        await operator.declare(upstream("web", protocol, ["127.0.0.1:9000"]))
    assert error.value.code.name == "UNIMPLEMENTED"
    assert error.value.reason == "CAPABILITY_MISSING"
    assert error.value.metadata == {"capability": protocol.lower(), "protocol": protocol}
    (quoted,) = (text for text in quotes() if text.startswith("cannot declare web:"))
    assert error.value.message == quoted.replace("http", protocol.lower()).replace("HTTP", protocol)
    assert [found async for found in operator.list()] == [], "nothing is declared"


async def test_a_policy_that_only_envoy_has_is_unimplemented_by_its_name(operator: Ambassador) -> None:
    wanted = upstream("db", "TCP", ["127.0.0.1:9000"])
    wanted.policy.health_check.SetInParent()
    with pytest.raises(RetinueError, match=r"policy\.health_check can't be done for TCP") as error:
        await operator.declare(wanted)
    assert error.value.metadata == {"capability": "policy.health_check", "protocol": "TCP"}


def test_a_server_that_must_have_envoy_does_not_start_in_the_words_of_the_guide(
    python: tuple[Path, str], tmp_path: Path
) -> None:
    done = ended(python, tmp_path, RETINUE_AMBASSADOR__DATA_PLANE="envoy")
    assert done.returncode == 2
    (quoted,) = (text for text in quotes() if text.startswith("cannot use data plane envoy:"))
    assert quoted in done.stderr


def test_a_file_with_what_only_envoy_can_do_keeps_the_server_from_starting(
    python: tuple[Path, str], tmp_path: Path
) -> None:
    file = tmp_path / "upstreams.yaml"
    file.write_text("upstreams: [{upstream_id: web, protocol: HTTP, dns: {hostname: localhost, port: 80}}]")
    done = ended(python, tmp_path, RETINUE_AMBASSADOR__UPSTREAMS=str(file))
    assert done.returncode == 1
    (quoted,) = (text for text in quotes() if text.startswith("cannot declare web:"))
    assert quoted in done.stderr


def ended(python: tuple[Path, str], where: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """A server that does not start."""
    program, packages = python
    env = environment(PATH="/usr/bin:/bin", PYTHONPATH=packages, **settings)
    command = [str(program), "-m", "retinue_server", "ambassador", "--data-dir", str(where / "data"), "--http", "none"]
    command += ["--listen", "127.0.0.1:0"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert "Traceback" not in done.stderr
    return done


def test_this_interpreter_has_what_the_other_lacks(python: tuple[Path, str]) -> None:
    """Or the tests above would prove nothing."""
    script = "import sys; from retinue_server.ambassador.engines.envoy.child import find; print(find(None))"
    program, packages = python
    for interpreter, env, found in (
        (sys.executable, environment(), True),
        (program, environment(PATH="/usr/bin:/bin", PYTHONPATH=packages), False),
    ):
        done = subprocess.run([interpreter, "-c", script], env=env, capture_output=True, text=True, check=True)
        assert (done.stdout != "None\n") == found


def quotes() -> list[str]:
    """What the guide quotes of the server, each as one line."""
    blocks = re.findall(r"(?:^> .*\n)+", GUIDE.read_text(), re.MULTILINE)
    return [" ".join(line.removeprefix("> ") for line in block.splitlines()) for block in blocks]


def port(found: pb.Upstream) -> int:
    """Where it listens."""
    return int(found.status.address.rpartition(":")[2])
