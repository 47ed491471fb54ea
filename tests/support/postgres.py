"""A private PostgreSQL for tests: one server for all workers of a run, fsync on, a schema of its own for each test.

The first who needs it starts it in a directory of the run's own; the last who is through with it stops it. It listens
on a free port of loopback and trusts everybody there. As root it runs as `nobody`, since PostgreSQL refuses root.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pwd
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

_START = 90.0
_numbers = itertools.count()
_chance = random.SystemRandom()
"""Tests that run beside each other seed the common one alike."""


def binary(name: str) -> str:
    """A program of the newest PostgreSQL that is installed; Debian keeps them off the PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    found = str(places[-1]) if places else shutil.which(name)
    assert found, f"{name} is missing: apt-get install postgresql"
    return found


def as_nobody() -> list[str]:
    """What stands before a command that refuses to run as root."""
    return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []


def free_port() -> int:
    """A port of loopback that was free just now, and is none of those that the system gives to whoever asks for any."""
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = _chance.randrange(given // 2, given)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


class Postgres:
    """A server in a directory of its own."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory, self.port = directory, port

    @property
    def url(self) -> str:
        """What engines take."""
        return f"postgresql://retinue@127.0.0.1:{self.port}/postgres"

    @classmethod
    def create(cls, directory: Path, *settings: str) -> Postgres:
        """Makes a cluster and starts it; settings are lines of postgresql.conf."""
        made = cls(directory, free_port())
        directory.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(directory, nobody.pw_uid, nobody.pw_gid)
        made._run("initdb", "--auth=trust", "--username=retinue", "--encoding=UTF8", "--locale=C", "--no-sync")
        lines = [
            "listen_addresses = '127.0.0.1'",
            f"port = {made.port}",
            "unix_socket_directories = ''",
            "max_connections = 200",
            *settings,
        ]
        with (made.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
        made.start()
        return made

    @property
    def data(self) -> Path:
        """The cluster's directory."""
        return self.directory / "data"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self._run("pg_ctl", "start", "--wait", f"--timeout={_START:.0f}", f"--log={self.directory / 'log'}", "--silent")

    def stop(self, mode: str = "fast") -> None:
        """Stops it; connections are cut."""
        self._run("pg_ctl", "stop", "--wait", f"--mode={mode}", "--silent")

    def _run(self, program: str, *args: str) -> None:
        command = [*as_nobody(), binary(program), f"--pgdata={self.data}", *args]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    def schema(self) -> str:
        """A name for a schema that nobody has."""
        return f"t_{os.getpid()}_{next(_numbers)}_{secrets.token_hex(3)}"

    def run(self, sql: str) -> list[tuple[object, ...]]:
        """Runs SQL on a connection of its own."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def empty(self, schema: str) -> None:
        """Takes a schema back to where it was when it was made, if it is there."""
        if not self.run(f"SELECT 1 FROM pg_namespace WHERE nspname = '{schema}'"):
            return
        tables = "task", "body", "history", "queue", "request", "blob", "upload", "piece"
        deletes = [f"DELETE FROM {schema}.{table}" for table in tables]
        self.run("; ".join([*deletes, f"ALTER SEQUENCE {schema}.task_seq RESTART"]))

    def drop(self, schema: str) -> None:
        """Removes a schema."""
        self.run(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


@contextlib.contextmanager
def shared(run_id: str) -> Iterator[Postgres]:
    """The server of this run (the workers of pytest-xdist have one id)."""
    home = Path(tempfile.gettempdir()) / f"retinue-postgres-{run_id}"
    home.mkdir(mode=0o755, exist_ok=True)
    users = home / "users"
    users.mkdir(exist_ok=True)
    mine = users / str(os.getpid())
    with locked(home):
        mine.touch()
        port = home / "port"
        if not port.exists():
            port.write_text(str(Postgres.create(home / "server").port))
        server = Postgres(home / "server", int(port.read_text()))
    try:
        yield server
    finally:
        with locked(home):
            mine.unlink()
            last = not any(users.iterdir())
            if last:
                server.stop("immediate")
        if last:
            shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Nobody else of this run is inside meanwhile."""
    with (home / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
