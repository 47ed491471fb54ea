"""`retinue elect` and candidates as processes, for tests: what happens is awaited, never slept for."""

from __future__ import annotations

import itertools
import json
import queue as threadsafe
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from servers import RunningServer, environment
from workers import PATIENCE

ENGINES = ("sqlite", "memory")
"""Those that a server of one process can have."""

ALIVE = """
import os, sys, time
file = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
token = os.environ["RETINUE_ELECTION_TOKEN"]
while True:
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    os.write(file, f"{token} {os.getpid()} {now}\\n".encode())
    time.sleep(0.002)
"""
"""An ordinary command: it says every 2 ms that it is alive, and under which token."""


def alive(path: Path) -> list[str]:
    """The command that says in a file that it is alive."""
    return [sys.executable, "-S", "-c", ALIVE, str(path)]


class Life(NamedTuple):
    """One run of the command, by its own stamps on the boot clock, in nanoseconds."""

    token: int
    pid: int
    begin: int
    end: int


def lives(path: Path) -> list[Life]:
    """All runs, in the order of their tokens."""
    found: dict[tuple[int, int], Life] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        words = line.split()
        if len(words) == 3:  # the last line may be on its way
            token, pid, at = map(int, words)
            known = found.get((token, pid), Life(token, pid, at, at))
            found[token, pid] = known._replace(end=max(known.end, at))
    return sorted(found.values())


def check_lives(found: Sequence[Life]) -> None:
    """One at a time, each under a higher token than the one before."""
    for before, after in itertools.pairwise(found):
        assert before.token < after.token, (before, after)
        assert before.end < after.begin, (before, after)


def await_life(path: Path, above: int, patience: float = PATIENCE) -> Life:
    """The first run whose token is higher."""
    end = time.monotonic() + patience
    while True:
        if later := [life for life in lives(path) if life.token > above]:
            return later[0]
        assert time.monotonic() < end, f"nobody leads; there were {lives(path)}"
        time.sleep(0.01)


class Elect:
    """A running `retinue elect`, with the events it tells."""

    def __init__(self, server: RunningServer, election: str, *args: str, cwd: Path, **options: Any) -> None:
        command = [sys.executable, "-m", "retinue.cli", "elect", election, *args]
        env = environment(RETINUE_ADDRESS=server.address)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, env=env, cwd=cwd, **options)
        self.events: list[dict[str, Any]] = []
        self._incoming: threadsafe.Queue[dict[str, Any]] = threadsafe.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            told = json.loads(line) if line.startswith(b"{") else {"event": "said", "text": line.decode()}
            self._incoming.put(told)

    def until(self, event: str, patience: float = PATIENCE) -> dict[str, Any]:
        """The next event of that kind."""
        end = time.monotonic() + patience
        while True:
            try:
                found = self._incoming.get(timeout=max(end - time.monotonic(), 0.01))
            except threadsafe.Empty:
                raise AssertionError(f"no event {event}; there were {self.events}") from None
            self.events.append(found)
            if found["event"] == event:
                return found

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, patience: float = PATIENCE) -> int:
        """Its exit code, once it ended by itself."""
        return self.process.wait(patience)

    def close(self) -> None:
        """Ends it however it is; its command with it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()
