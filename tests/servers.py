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
from typing import Any

ROOT = Path(__file__).parent.parent
_START, _STOP = 30.0, 20.0


@dataclass
class RunningServer:
    """A server process and where it listens."""

    address: str
    control: str
    http: str
    process: subprocess.Popen[str]
    data_dir: Path
    ready: dict[str, Any]

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self.process.kill()
        self.process.wait(_STOP)
        self._close()

    def _close(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self) -> int:
        """SIGTERM, and its exit code. Safe to repeat."""
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(_STOP)
            self._close()
            return code
        self.kill()
        raise AssertionError("the server did not stop on SIGTERM")

    def restart(self, *args: str) -> RunningServer:
        """A new process on the same port and data."""
        return start_server(self.data_dir.parent, *args, listen=self.address)


def environment(**extra: str) -> dict[str, str]:
    """Ours without what would lead clients and servers astray, and with the code under test."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RETINUE_", "OTEL_", "TRACEPARENT"))}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT / "services"), str(ROOT / "clients/python")])} | extra


def start_server(tmp_path: Path, *args: str, listen: str = "127.0.0.1:0") -> RunningServer:
    """Starts `retinue_server` with its data under tmp_path and waits until it is ready.

    Its log is tmp_path/server.log. The caller ends it with stop() or kill().
    """
    control = tmp_path / "control.sock"
    command = [sys.executable, "-m", "retinue_server", "--listen", listen, "--control", f"unix:{control}"]
    command += ["--http", "127.0.0.1:0", "--data-dir", str(tmp_path / "data"), *args]
    with (tmp_path / "server.log").open("a") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(), cwd=tmp_path)
    ready = _await_ready(process, tmp_path / "server.log")
    address = next(item for item in ready["listen"] if not item.startswith("unix:"))
    return RunningServer(address, f"unix:{control}", str(ready.get("http") or ""), process, tmp_path / "data", ready)


def _await_ready(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    end = time.monotonic() + _START
    while time.monotonic() < end and select.select([process.stdout], [], [], end - time.monotonic())[0]:
        line = process.stdout.readline()
        if not line:
            break
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and found.get("event") == "ready":
                return found
    process.kill()
    raise AssertionError(f"the server is not ready; its log ends with:\n{log.read_text()[-4000:]}")
