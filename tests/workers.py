"""`retinue work` and other commands as processes, for tests: events are awaited, never slept for."""

from __future__ import annotations

import json
import queue as threadsafe
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from servers import RunningServer, environment

PATIENCE = 90.0


def retinue(server: RunningServer, *args: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    """Runs one command to its end."""
    command = [sys.executable, "-m", "retinue.cli", *args]
    return subprocess.run(
        command, input=stdin, capture_output=True, env=_env(server, env), timeout=PATIENCE, check=False
    )


def rows(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, Any]]:
    """The JSON lines of a command that succeeded."""
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


def _env(server: RunningServer, extra: dict[str, str]) -> dict[str, str]:
    return environment(RETINUE_ADDRESS=server.address, RETINUE_CONTROL_ADDRESS=server.control, **extra)


class Work:
    """A running `retinue work`, with the events it prints."""

    def __init__(self, server: RunningServer, tmp_path: Path, queue_id: str, *args: str, **env: str) -> None:
        self.work_dir = tmp_path / "work"
        command = [sys.executable, "-m", "retinue.cli", "work", queue_id, "--work-dir", str(self.work_dir), *args]
        self._log = tmp_path / "work.log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=_env(server, env), cwd=tmp_path
            )
        self.events: list[dict[str, Any]] = []
        self._incoming: threadsafe.Queue[dict[str, Any]] = threadsafe.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._incoming.put(json.loads(line))

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, *kinds: str, patience: float = PATIENCE) -> dict[str, Any]:
        """The next event of one of these kinds."""
        end = time.monotonic() + patience
        while True:
            try:
                found = self._incoming.get(timeout=max(end - time.monotonic(), 0.01))
            except threadsafe.Empty:
                raise AssertionError(f"no event {kinds}; there were {self.events}; log:\n{self.log[-3000:]}") from None
            self.events.append(found)
            if found["event"] in kinds:
                return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, patience: float = PATIENCE) -> int:
        """Its exit code, once it ended by itself."""
        code = self.process.wait(patience)
        self._reader.join(PATIENCE)
        while not self._incoming.empty():
            self.events.append(self._incoming.get())
        return code

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


def eventually(condition: Any, what: str, patience: float = PATIENCE) -> None:
    """Waits for a fact outside the reach of events."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def pids_in(path: Path) -> list[int]:
    """The process ids that commands under test have written to a file, one a line."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []
