"""The servers, each at the durability tier that is asked for: what is acknowledged in D2 has been fsynced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.processes import HOME, ROOT, Failure, Server, Usage, clean_environment, peak_rss_mib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PATIENCE = 30.0


@dataclass(frozen=True)
class Broker:
    """A running server and where its clients dial."""

    server: Server
    url: str
    store: Server | None = None
    """Where the server keeps its tasks, if that is another one; it counts with it."""

    def usage(self) -> Usage:
        used = self.server.usage()
        return used + self.store.usage() if self.store else used

    def peak_rss_mib(self) -> float:
        return sum(peak_rss_mib(server.pid) for server in (self.server, self.store) if server)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fresh(name: str) -> Path:
    """An empty directory; what an earlier run left there is gone. BENCH_DATA puts it elsewhere, say in memory."""
    where = Path(os.environ.get("BENCH_DATA", HOME / "run")) / name
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    return where


def await_port(server: Server, port: int) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and server.process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise Failure(f"the server does not listen; its log ends: {server.log.read_text()[-300:]}")


def retinue_command(ready: Path, listen: str = "127.0.0.1:0", *arguments: str) -> list[str]:
    """The server with its data in its working directory: a relative path, since a socket's name is short."""
    command = [sys.executable, "-m", "retinue_server", "workqueue", "--listen", listen]
    return [*command, "--data-dir", "data", "--ready-file", str(ready), *arguments]


def retinue_environment(**more: str) -> dict[str, str]:
    """The code of this tree."""
    paths = os.pathsep.join(str(ROOT / tree) for tree in ("services", "clients/python"))
    return clean_environment() | {"PYTHONPATH": paths} | more


@contextmanager
def retinue(where: Path, *arguments: str, **environment: str) -> Iterator[Broker]:
    """SQLite, WAL, synchronous=FULL: every acknowledgement is fsynced (D2)."""
    ready = where / "ready.json"
    command = retinue_command(ready, "127.0.0.1:0", *arguments)
    server = Server(command, where, **retinue_environment(**environment))
    try:
        yield Broker(server, _retinue_address(server, ready))
    finally:
        server.stop()


def _retinue_address(server: Server, ready: Path) -> str:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and server.process.poll() is None:
        if ready.exists() and (line := ready.read_text()).endswith("\n"):
            return str(json.loads(line)["listen"][0])
        time.sleep(0.005)
    raise Failure(f"the server is not ready; its log ends: {server.log.read_text()[-300:]}")


@contextmanager
def retinue_with_metrics(where: Path) -> Iterator[Broker]:
    """With a listener for metrics that is read every second, fifteen times as often as is usual."""
    port = free_port()
    with retinue(where, "--metrics", f"127.0.0.1:{port}") as broker, _read_often(f"http://127.0.0.1:{port}/metrics"):
        yield broker


@contextmanager
def retinue_on_postgres(where: Path) -> Iterator[Broker]:
    """The coordinator over a PostgreSQL of its own, which fsyncs every commit (D2); both on the server's core."""
    (where / "postgres").mkdir()
    with postgres(where / "postgres") as store:
        environment = {"RETINUE_WORKQUEUE__ENGINE": "postgres", "RETINUE_WORKQUEUE__POSTGRES__URL": store.url}
        with retinue(where, **environment) as broker:
            yield Broker(broker.server, broker.url, store.server)


@contextmanager
def faktory(where: Path) -> Iterator[Broker]:
    """Faktory starts a redis of its own, with snapshots only; it is told to fsync its file at every write (D2)."""
    port, data = free_port(), where / "data"
    command = [str(HOME / "go" / "faktory"), "-b", f"127.0.0.1:{port}", "-w", f"127.0.0.1:{free_port()}"]
    server = Server([*command, "-l", "error", "-d", str(data), "-c", str(where / "config")], where)
    try:
        await_port(server, port)
        for setting in (("appendonly", "yes"), ("appendfsync", "always"), ("save", "")):
            told = ["redis-cli", "-s", str(data / "redis.sock"), "config", "set", *setting]
            subprocess.run(told, check=True, capture_output=True)
        yield Broker(server, f"tcp://127.0.0.1:{port}")
    finally:
        server.stop()


@contextmanager
def _read_often(url: str) -> Iterator[None]:
    stop = threading.Event()

    def read() -> None:
        while not stop.wait(1):
            urllib.request.urlopen(url).read()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


@contextmanager
def retinue_with_tracing(where: Path) -> Iterator[Broker]:
    """The SDK loaded and an endpoint set, nothing sampled: nothing is ever sent there."""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_METRICS_EXPORTER": "none"}
    with retinue(where, OTEL_TRACES_SAMPLER="always_off", **environment) as broker:
        yield broker


@contextmanager
def redis(where: Path) -> Iterator[Broker]:
    """The append-only file is fsynced before every reply (D2); snapshots are off, since the file is enough."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(where), "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "always", "--no-appendfsync-on-rewrite", "no"]
    server = Server([*command, "--maxmemory-policy", "noeviction"], where)
    try:
        await_port(server, port)
        yield Broker(server, f"redis://127.0.0.1:{port}/0")
    finally:
        server.stop()


@contextmanager
def beanstalkd(where: Path) -> Iterator[Broker]:
    """A binlog, fsynced at every write (`-f0`, D2)."""
    port = free_port()
    (where / "binlog").mkdir()
    command = ["beanstalkd", "-l", "127.0.0.1", "-p", str(port), "-b", str(where / "binlog"), "-f0"]
    server = Server(command, where)
    try:
        await_port(server, port)
        yield Broker(server, f"127.0.0.1:{port}")
    finally:
        server.stop()


POSTGRES_OPTIONS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "max_connections": "200",
    "autovacuum_naptime": "10s",
    "jit": "off",
}
"""Durable, with memory and WAL as the manual advises for a machine of this size."""


@contextmanager
def postgres(where: Path) -> Iterator[Broker]:
    """PostgreSQL with fsync and synchronous_commit on (D2); it refuses to run as root, so `nobody` or we run it."""
    port, data = free_port(), where / "db"
    user = "nobody" if os.geteuid() == 0 else None
    if user:
        shutil.chown(where, user)
    programs = _postgres_programs()
    initdb = [
        str(programs / "initdb"),
        "-D",
        str(data),
        "-U",
        "bench",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--no-instructions",
    ]
    made = subprocess.run([*initdb, "--locale=C"], cwd=where, user=user, capture_output=True, text=True, check=False)
    if made.returncode:
        raise Failure(f"cannot make a database: {made.stderr[-300:]}")
    options = [word for key, value in POSTGRES_OPTIONS.items() for word in ("-c", f"{key}={value}")]
    command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    server = Server([*command, "-c", f"unix_socket_directories={where}", *options], where, user=user)
    try:
        await_port(server, port)
        _make_database(programs, port, server)
        yield Broker(server, f"postgresql://bench@127.0.0.1:{port}/bench")
    finally:
        server.stop(signal.SIGINT)


def _postgres_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if found:
        return found[-1].parent
    if which := shutil.which("postgres"):
        return Path(which).parent
    raise Failure("PostgreSQL is not here: apt-get install postgresql")


def _make_database(programs: Path, port: int, server: Server) -> None:
    end = time.monotonic() + _PATIENCE
    command = [str(programs / "psql"), "-h", "127.0.0.1", "-p", str(port), "-U", "bench", "postgres"]
    while True:
        made = subprocess.run([*command, "-c", "create database bench"], capture_output=True, text=True, check=False)
        if made.returncode == 0:
            return
        if time.monotonic() > end or server.process.poll() is not None:
            raise Failure(f"PostgreSQL does not start: {made.stderr[-300:]}")
        time.sleep(0.05)


BROKERS: dict[str, Callable[[Path], AbstractContextManager[Broker]]] = {
    "retinue": retinue,
    "retinue-metrics": retinue_with_metrics,
    "retinue-tracing": retinue_with_tracing,
    "retinue-postgres": retinue_on_postgres,
    "faktory": faktory,
    "redis": redis,
    "beanstalkd": beanstalkd,
    "postgres": postgres,
}
