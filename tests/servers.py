"""Real server processes for tests that know only the contract."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).parent.parent
_START, _STOP = 90.0, 60.0


@dataclass
class RunningServer:
    """A server process and where it listens."""

    address: str
    control: str
    http: str
    process: subprocess.Popen[str]
    data_dir: Path
    ready: dict[str, Any]
    args: tuple[str, ...] = ()
    env: Mapping[str, str] | None = None
    module: str = "retinue_server"

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self.process.kill()
        self.process.wait(_STOP)

    def stop(self) -> int:
        """SIGTERM, and its exit code. Safe to repeat."""
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(_STOP)
        self.kill()
        raise AssertionError("the server did not stop on SIGTERM")

    def restart(self, *args: str) -> RunningServer:
        """A new process on the same port and data, with the arguments of the first one unless others are given."""
        return start_server(
            self.data_dir.parent, *(args or self.args), listen=self.address, env=self.env, module=self.module
        )


def environment(**extra: str) -> dict[str, str]:
    """Ours without what would lead clients and servers astray, and with the code under test."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RETINUE_", "OTEL_", "TRACEPARENT"))}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT / "services"), str(ROOT / "clients/python")])} | extra


def start_server(
    where: Path,
    *args: str,
    listen: str = "127.0.0.1:0",
    env: Mapping[str, str] | None = None,
    module: str = "retinue_server",
    before: Sequence[str] = (),
) -> RunningServer:
    """Starts `retinue_server` with its data under `where` and waits until it is ready.

    Its log is where/server.log, its control socket where/control.sock: keep `where` short. The caller ends it with
    stop() or kill(). What stands `before` the command must become it (exec).
    """
    where = where.resolve()
    control = where / "control.sock"
    command = [*before, sys.executable, "-m", module, "--listen", listen, "--control", f"unix:{control}"]
    command += ["--http", "127.0.0.1:0", "--data-dir", str(where / "data"), *args]
    environ = environment(**{"RETINUE_AMBASSADOR__DATA_PLANE": "native", **(env or {})})  # Envoys are for those who ask
    with (where / "server.log").open("a") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environ, cwd=where)
    ready = _await_ready(process, where / "server.log")
    address = next(item for item in ready["listen"] if not item.startswith("unix:"))
    http = str(ready.get("http") or "")
    return RunningServer(address, f"unix:{control}", http, process, where / "data", ready, args, env, module)


def _await_ready(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    end = time.monotonic() + _START
    with process.stdout as lines:  # nothing is said there after that line
        while time.monotonic() < end and select.select([lines], [], [], end - time.monotonic())[0]:
            line = lines.readline()
            if not line:
                break
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and found.get("event") == "ready":
                    return found
    process.kill()
    process.wait(_STOP)
    raise AssertionError(f"the server is not ready; its log ends with:\n{log.read_text()[-4000:]}")
