"""Real apps that an adapter collects in tests, each as its operators run it."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from retinue_server.adapter.core.spec import Kind
from support import upstreams
from support.postgres import Postgres, free_port

_HERE = Path(__file__).parent
_CACHE = _HERE.parents[2] / ".retinue"
JOLOKIA = "2.1.2"


class App(NamedTuple):
    """One that runs: how it is declared, and how it is made to do something."""

    kind: Kind
    endpoint: str
    use: Callable[[int], None]
    """So many requests, of which it serves each."""
    rule_pack: str = ""


def _fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        data: bytes = answer.read()
        return data


@contextlib.contextmanager
def redis(*more: str) -> Iterator[App]:
    """Redis."""
    with upstreams.redis(*more) as address:
        yield App(Kind.REDIS, address, lambda n: talk(address, b"PING\r\n", n, b"+PONG\r\n"))


@contextlib.contextmanager
def memcached() -> Iterator[App]:
    """memcached."""
    with upstreams.memcached() as address:
        yield App(Kind.MEMCACHED, address, lambda n: talk(address, b"get nothing\r\n", n, b"END\r\n"))


def talk(address: str, asked: bytes, times: int, answer: bytes) -> None:
    """Asks one thing so many times, and awaits each answer."""
    import socket  # noqa: PLC0415 - here alone

    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 20) as link, link.makefile("rwb") as file:
        for _ in range(times):
            file.write(asked)
            file.flush()
            found = file.read(len(answer))
            assert found == answer, found


_NGINX = """
daemon off; pid {where}/pid; error_log {where}/error.log; worker_processes 1; {user}
events {{ worker_connections 128; }}
http {{
  access_log off;
  client_body_temp_path {where}/a; proxy_temp_path {where}/b; fastcgi_temp_path {where}/c; uwsgi_temp_path {where}/d;
  scgi_temp_path {where}/e;
  server {{ listen 127.0.0.1:{port}; location = /status {{ stub_status; }} location / {{ return 200 "hello"; }} }}
}}
"""


@contextlib.contextmanager
def nginx() -> Iterator[App]:
    """nginx with its page of stub_status."""
    port = free_port()
    with tempfile.TemporaryDirectory() as where:
        conf = Path(where, "nginx.conf")
        conf.write_text(_NGINX.format(where=where, port=port, user="user root;"))
        with upstreams.program("nginx", "nginx-light", "-p", where, "-c", str(conf), port=port) as address:
            use = _times(lambda: _fetched(f"http://{address}/"))
            yield App(Kind.NGINX, f"http://{address}/status", use)


def _times(ask: Callable[[], object]) -> Callable[[int], None]:
    def use(count: int) -> None:
        for _ in range(count):
            ask()

    return use


@contextlib.contextmanager
def prometheus(form: str) -> Iterator[App]:
    """A page of prometheus_client's own server, which answers OpenMetrics or text as it is asked, or in text alone."""
    port = free_port()
    with upstreams.program(sys.executable, "python", str(_HERE / "page.py"), form, str(port), port=port) as address:
        yield App(Kind.PROMETHEUS, f"http://{address}/metrics", _times(lambda: _fetched(f"http://{address}/work")))


@contextlib.contextmanager
def expvar() -> Iterator[App]:
    """A Go program with expvar."""
    port = free_port()
    with tempfile.TemporaryDirectory() as where:
        built = Path(where, "app")
        command = ["go", "build", "-o", str(built), str(_HERE / "expvar.go")]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=where)
        assert done.returncode == 0, done.stderr
        with upstreams.program(str(built), "go", f"127.0.0.1:{port}", port=port) as address:
            yield App(Kind.JSON, f"http://{address}", _times(lambda: _fetched(f"http://{address}/")), "expvar")


@contextlib.contextmanager
def jolokia() -> Iterator[App]:
    """A JVM with the agent of Jolokia."""
    port = free_port()
    agent = f"-javaagent:{jolokia_agent()}=host=127.0.0.1,port={port},discoveryEnabled=false"
    args = [agent, "-Xmx64m", str(_HERE / "Idle.java")]
    with upstreams.program("java", "openjdk-17-jdk-headless", *args, port=port) as address:
        yield App(Kind.JSON, f"http://{address}/jolokia/", lambda _: None, "jolokia")


def jolokia_agent() -> Path:
    """The agent's archive, from Maven's repository."""
    found = _CACHE / f"jolokia-agent-jvm-{JOLOKIA}-javaagent.jar"
    _CACHE.mkdir(exist_ok=True)
    with (_CACHE / "jolokia.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            artifact = f"-Dartifact=org.jolokia:jolokia-agent-jvm:{JOLOKIA}:jar:javaagent"
            plugin = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy"
            with tempfile.TemporaryDirectory(dir=_CACHE) as beside:
                command = ["mvn", "-q", "-B", plugin, artifact, f"-DoutputDirectory={beside}"]
                done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=beside)
                assert done.returncode == 0, f"cannot get the agent of Jolokia: {done.stdout}{done.stderr}"
                shutil.move(str(Path(beside, found.name)), found)
    return found


def postgresql(server: Postgres) -> App:
    """PostgreSQL: the one of the run, which others use meanwhile."""
    return App(Kind.POSTGRESQL, server.url, lambda n: _commit(server, n))


def _commit(server: Postgres, times: int) -> None:
    import psycopg  # noqa: PLC0415 - here alone

    with psycopg.connect(server.url, autocommit=True) as connection:
        for _ in range(times):
            connection.execute("SELECT 1")
