"""A language without a folder in clients/: what README.md and clients/README.md say is done as it is written there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.languages import CLIENTS, GUIDE, blocks, need, run, running_server
from e2e.roots import await_connected, grpcurl, pool, started_root
from servers import RunningServer

README = (CLIENTS.parent / "README.md").read_text()
PACKAGES = "build-essential pkg-config protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libgrpc++-dev"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    yield from running_server(tmp_path_factory)


@pytest.mark.timeout(900)  # two cores take half a minute to compile the stubs
def test_a_cpp_program_works_after_the_two_commands_of_the_readme(server: RunningServer, tmp_path: Path) -> None:
    program, _ = blocks(GUIDE, "cpp")
    generate, build = blocks(README, "sh")
    built(tmp_path, program, generate, build)
    assert run("./worker", cwd=tmp_path, server=server) == "leased: hello from C++\ncompleted: OK\n"


@pytest.mark.timeout(900)
def test_a_cpp_leaf_answers_after_two_commands(tmp_path: Path) -> None:
    _, program = blocks(GUIDE, "cpp")
    [generate] = [line for line in blocks(GUIDE, "sh") if "protoc" in line]
    built(tmp_path, program, generate, blocks(README, "sh")[1])
    text = tmp_path / "tide.txt"
    text.write_text("the sea, the sea")
    server = started_root(tmp_path, {"words": pool(tmp_path, ["tide"], merge="group_sum")})
    with subprocess.Popen([tmp_path / "worker", f"unix:{tmp_path}/tide", text]) as leaf:
        try:
            await_connected(server, "words", 1)
            answers = [grpcurl(server, "Scatter", {"pool_id": "words", "json": word}) for word in ("sea", "ship")]
        finally:
            leaf.kill()
            server.stop()
    assert [answer["json"] for [answer] in answers] == [{"tide.txt": 2}, {"tide.txt": 0}]


def built(where: Path, program: str, *commands: str) -> None:
    """Runs what is written to be run beside a copy of protos/ and the program."""
    need("protoc", "grpc_cpp_plugin", "g++", "pkg-config", install=f"apt-get install -y {PACKAGES}")
    assert f"apt-get install -y {PACKAGES}" in README
    shutil.copytree(CLIENTS.parent / "protos", where / "protos")
    (where / "main.cc").write_text(program)
    for command in commands:
        run("sh", "-c", command, cwd=where)


def test_the_line_for_curl_works_as_it_is_written(server: RunningServer, tmp_path: Path) -> None:
    need("curl", install="apt-get install -y curl")
    [line] = [text for text in blocks(GUIDE, "sh") if text.startswith("curl")]
    assert '"taskId"' in run("sh", "-c", line.replace("127.0.0.1:7080", server.http), cwd=tmp_path)
