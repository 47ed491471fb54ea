"""What the README shows in Python is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from servers import RunningServer, environment, start_server

from retinue.client import sync
from retinue.client.adapter import target
from retinue.client.ambassador import upstream

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("readme", "result"), [("README.md", "MAKE IT LOUD\n"), ("clients/README.md", "leading under token 1\n")]
)
def test_the_python_program_of_a_readme_prints_its_result(tmp_path: Path, readme: str, result: str) -> None:
    program, *_ = blocks(readme, "python")
    server = start_server(tmp_path)
    try:
        done = run(program, server)
    finally:
        assert server.stop() == 0
    assert done.stdout == result, done.stderr


def test_the_leaf_of_the_readme_answers_its_question(tmp_path: Path) -> None:
    _, leaf, question, *_ = blocks("clients/README.md", "python")
    pools, *_ = blocks("clients/README.md", "yaml")
    port, socket = "127.0.0.1:9000", f"unix:{tmp_path}/leaf.sock"
    assert port in leaf
    assert port in pools
    file = tmp_path / "data/scattergather/pools.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(pools.replace(port, socket))
    with subprocess.Popen([sys.executable, "-c", leaf.replace(port, socket)], env=environment()) as serving:
        server = start_server(tmp_path, "scattergather")
        try:
            with sync.Pool("library", address=server.address) as pool:
                next(known for known in pool.watch() if known.shards[0].endpoints[0].connected)
            done = run(question, server)
        finally:
            serving.kill()
            assert server.stop() == 0
    assert done.stdout == "1 of 1 answered: ['Moby Dick', 'Treasure Island']\n", done.stderr


def test_the_app_of_the_readme_waits_for_its_upstream(tmp_path: Path) -> None:
    [program] = [text for text in blocks("clients/README.md", "python") if "upstream_address" in text]
    server = start_server(tmp_path, "ambassador")
    try:
        with sync.Ambassador(server.control) as operator:
            declared = operator.declare(upstream("db", "TCP", ["10.0.0.1:5432"]))
        done = run(program, server)
    finally:
        assert server.stop() == 0
    assert done.stdout == f"dial {declared.status.address}\n", done.stderr


def test_what_the_report_of_the_readme_tells_is_watched(tmp_path: Path) -> None:
    [program] = [text for text in blocks("clients/README.md", "python") if "adapter.report" in text]
    server = start_server(tmp_path, "adapter")
    try:
        with sync.Adapter(server.control) as operator:
            operator.create(target("shop", "REPORT", interval=1))
        done = run(program, server)
    finally:
        assert server.stop() == 0
    assert done.stdout == "2 points taken\ncart_age_seconds is 2.5\norders is 17.0\n", done.stderr


def blocks(readme: str, language: str) -> list[str]:
    """What it shows in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)


def run(program: str, server: RunningServer) -> subprocess.CompletedProcess[str]:
    """To its end."""
    env = environment(RETINUE_ADDRESS=server.address)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=90, check=False)
