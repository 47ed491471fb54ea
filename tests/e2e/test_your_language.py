"""A language without a folder in clients/: what README.md and clients/README.md say is done as it is written there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.languages import CLIENTS, GUIDE, blocks, need, run, running_server
from servers import RunningServer

README = (CLIENTS.parent / "README.md").read_text()
PACKAGES = "build-essential pkg-config protobuf-compiler protobuf-compiler-grpc libgrpc++-dev"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    yield from running_server(tmp_path_factory)


@pytest.mark.timeout(300)  # two cores take half a minute to compile the stubs
def test_a_cpp_program_works_after_the_two_commands_of_the_readme(server: RunningServer, tmp_path: Path) -> None:
    need("protoc", "grpc_cpp_plugin", "g++", "pkg-config", install=f"apt-get install -y {PACKAGES}")
    assert f"apt-get install -y {PACKAGES}" in README
    generate, build = blocks(README, "sh")
    [program] = blocks(GUIDE, "cpp")
    shutil.copytree(CLIENTS.parent / "protos", tmp_path / "protos")
    (tmp_path / "main.cc").write_text(program)
    run("sh", "-c", generate, cwd=tmp_path)
    run("sh", "-c", build, cwd=tmp_path)
    assert run("./worker", cwd=tmp_path, server=server) == "leased: hello from C++\ncompleted: OK\n"


def test_the_line_for_curl_works_as_it_is_written(server: RunningServer, tmp_path: Path) -> None:
    need("curl", install="apt-get install -y curl")
    line = blocks(GUIDE, "sh")[0].replace("127.0.0.1:7080", server.http)
    assert '"taskId"' in run("sh", "-c", line, cwd=tmp_path)
