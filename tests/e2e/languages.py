"""What the tests of the languages share: a server, and commands that need a toolchain."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from servers import RunningServer, environment, start_server

CLIENTS = Path(__file__).parents[2] / "clients"
GUIDE = (CLIENTS / "README.md").read_text()
TOOLS = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
"""Where toolchains are looked for: PATH, then beside this Python, where wheels put theirs."""


LANGUAGES = ("python", "go", "node")
_POOLS = """
  {name}:
    merge: top_k
    top_k: 3
    shards: &{name}
      - {{shard_id: a, endpoints: ["unix:{where}/{name}-a.sock"]}}
      - {{shard_id: b, endpoints: ["unix:{where}/{name}-b.sock"]}}
      - {{shard_id: c, endpoints: ["unix:{where}/{name}-c.sock"]}}
  {name}-merged:
    merge: service
    merge_address: unix:{where}/{name}-a.sock
    shards: *{name}
"""


def running_server(
    tmp_path_factory: pytest.TempPathFactory, env: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """A server for one module of tests. Each language has pools of its own, named after it; see test_languages.py."""
    where = tmp_path_factory.mktemp("server")
    file = where / "data/scattergather/pools.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("pools:" + "".join(_POOLS.format(name=name, where=where.resolve()) for name in LANGUAGES))
    server = start_server(where, env=env)
    yield server
    server.stop()


def blocks(text: str, language: str) -> list[str]:
    """What a text in Markdown shows in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def need(*tools: str, install: str) -> None:
    """Skips with the install command unless all of the tools are there."""
    if missing := [tool for tool in tools if shutil.which(tool, path=TOOLS) is None]:
        pytest.skip(f"needs {' and '.join(missing)}: {install}")


def run(*command: str | Path, cwd: Path, server: RunningServer | None = None) -> str:
    """Runs a command that must succeed and gives its stdout; a server's addresses are in its environment."""
    addresses = {"PATH": TOOLS}
    if server is not None:
        addresses |= {
            "RETINUE_ADDRESS": server.address,
            "RETINUE_CONTROL_ADDRESS": server.control,
            "RETINUE_HTTP_ADDRESS": server.http,
        }
    done = subprocess.run(
        command, cwd=cwd, env=environment(**addresses), check=False, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
