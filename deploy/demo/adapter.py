"""`make demo DEMO=adapter`: apps that tell of themselves in different ways, a little load on each, and one table.

Connections fill a Redis, a command that does not exist makes errors, one app is stopped and comes back while the
others go on. Each line of the table is as the adapter told it by WatchSignals, which asks no app.
"""

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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, Self

import grpc
from rich.console import Console
from rich.table import Table

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import metric_pb2 as metrics
from retinue.adapter.v1 import target_pb2 as pb
from retinue.adapter.v1.adapter_service_pb2_grpc import AdapterServiceStub

PATIENCE_S = 150.0
CLIENTS = 40
"""The most that the Redis takes."""
STEP_S = 0.05
"""Between two requests of the load."""

console = Console(highlight=False)


def main() -> int:
    """Runs the demo; 0 if all signals changed as they had to."""
    root = Path(os.environ.get("DEMO_STATE", ".retinue/demo-adapter")).absolute()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    apps: list[App] = [app for app in (Redis(), Nginx(root), Memcached(), Queue(root)) if shutil.which(app.program)]
    missing = {"redis-server", "nginx", "memcached"} - {app.program for app in apps}
    if missing:
        console.print(f"left out, since they are not here: {', '.join(sorted(missing))}")
    with Adapter(root) as adapter:
        return 0 if Story(adapter, apps).told() else 1


# The processes


def free_port() -> int:
    """A port of loopback that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


def await_true(claim: Callable[[], bool], what: str) -> None:
    """Asks until it holds."""
    end = time.monotonic() + PATIENCE_S
    while not claim():
        if time.monotonic() > end:
            raise SystemExit(f"cannot see that {what}")
        time.sleep(0.05)


def accepts(port: int) -> bool:
    """Whether somebody does."""
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


class Processes:
    """What ends with us."""

    def __init__(self, log: Path) -> None:
        self._log, self._stack = log, ExitStack()

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Its errors go to the log."""
        with self._log.open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        self._stack.callback(end, process)
        return process

    def close(self) -> None:
        """Ends them, the last one first."""
        self._stack.close()


def end(process: subprocess.Popen[str]) -> None:
    """By SIGTERM, and waits for it; one that has ended stays so."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.wait()


class Adapter:
    """The server, and what its operator does."""

    def __init__(self, root: Path) -> None:
        self.processes, self._stack = Processes(root / "server.log"), ExitStack()
        self._stack.callback(self.processes.close)
        words = ["adapter", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--data-dir", str(root / "data")]
        server = self.processes.start([sys.executable, "-m", "retinue_server", *words])
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline() or "null")
        if ready is None:
            raise SystemExit(f"cannot start the adapter: look into {root / 'server.log'}")
        self.metrics = f"http://{ready['metrics']}/metrics"
        self.stub = AdapterServiceStub(self._stack.enter_context(grpc.insecure_channel(ready["control"])))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def create(self, app: App) -> None:
        """Begins to collect it, every second."""
        target = pb.Target(target_id=app.name, kind=app.kind, endpoint=app.endpoint, service="demo")
        target.interval_duration.seconds = 1
        self.stub.CreateTarget(api.CreateTargetRequest(target=target), timeout=PATIENCE_S)

    def state(self, app: App) -> str:
        """As it is now."""
        found = self.stub.GetTarget(api.GetTargetRequest(target_id=app.name), timeout=PATIENCE_S)
        return pb.TargetState.Name(found.target.status.state).removeprefix("TARGET_STATE_")

    def page(self) -> list[str]:
        """What Prometheus would read."""
        with urllib.request.urlopen(self.metrics, timeout=PATIENCE_S) as answer:  # noqa: S310 - ours
            text: str = answer.read().decode()
        return text.splitlines()


class App(Protocol):
    """What apps differ in."""

    name: str
    program: str
    kind: pb.TargetKind
    port: int

    @property
    def endpoint(self) -> str:
        """For the adapter."""

    def command(self) -> list[str]:
        """That starts it."""

    def request(self) -> bytes:
        """One of the load, which it answers at once."""

    def error(self) -> bytes:
        """One that fails; empty if it has no such."""


class Redis:
    """By INFO."""

    name, program, kind = "redis", "redis-server", pb.TARGET_KIND_REDIS

    def __init__(self) -> None:
        self.port = free_port()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        words = ["--port", str(self.port), "--bind", "127.0.0.1", "--maxclients", str(CLIENTS)]
        return [self.program, *words, "--save", "", "--appendonly", "no"]

    def request(self) -> bytes:
        return b"INCR hits\r\n"

    def error(self) -> bytes:
        return b"NOSUCHCOMMAND\r\n"


class Nginx:
    """By the page of stub_status."""

    name, program, kind = "nginx", "nginx", pb.TARGET_KIND_NGINX

    def __init__(self, root: Path) -> None:
        self.port, self._root = free_port(), root / "nginx"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/status"

    def command(self) -> list[str]:
        self._root.mkdir(exist_ok=True)
        names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{name}_temp_path {self._root};" for name in names)
        server = f"server {{ listen 127.0.0.1:{self.port}; location /status {{ stub_status; }} }}"
        text = f"daemon off; pid {self._root}/pid; events {{}} http {{ access_log off; {paths} {server} }}"
        (self._root / "nginx.conf").write_text(text)
        return [self.program, "-e", str(self._root / "error.log"), "-c", str(self._root / "nginx.conf")]

    def request(self) -> bytes:
        return b"GET /status HTTP/1.1\r\nhost: here\r\n\r\n"

    def error(self) -> bytes:
        return b""


class Memcached:
    """By stats."""

    name, program, kind = "memcached", "memcached", pb.TARGET_KIND_MEMCACHED

    def __init__(self) -> None:
        self.port = free_port()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return [self.program, "-l", "127.0.0.1", "-p", str(self.port), "-U", "0", "-u", "nobody", "-t", "1"]

    def request(self) -> bytes:
        return b"get hits\r\n"

    def error(self) -> bytes:
        return b""


class Queue:
    """Prometheus' text: another server of ours, so that there is always one app, and one with all four signals."""

    name, program, kind = "queue", sys.executable, pb.TARGET_KIND_PROMETHEUS

    def __init__(self, root: Path) -> None:
        self.port, self._http, self._root = free_port(), free_port(), root / "queue"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/metrics"

    def command(self) -> list[str]:
        words = ["workqueue", "--listen", "127.0.0.1:0", "--http", f"127.0.0.1:{self._http}"]
        words += ["--metrics", f"127.0.0.1:{self.port}", "--data-dir", str(self._root)]
        return [self.program, "-m", "retinue_server", *words]

    def request(self) -> bytes:
        return b""

    def error(self) -> bytes:
        return b""

    def call(self) -> None:
        """Its load: a method that asks for nothing."""
        url = f"http://127.0.0.1:{self._http}/retinue.workqueue.v1.WorkQueueAdminService/GetQueueStats"
        asked = urllib.request.Request(url, b"{}", {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:  # noqa: S310 - as above
            answer.read()


class Load(threading.Thread):
    """A request now and then, as long as the app is there."""

    def __init__(self, app: App) -> None:
        super().__init__(daemon=True)
        self._app, self.fails = app, threading.Event()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(STEP_S):
            try:
                self._some()
            except OSError:
                continue  # it is stopped, and comes back

    def end(self) -> None:
        """After the request that is under way."""
        self._over.set()
        self.join()

    def _some(self) -> None:
        if isinstance(self._app, Queue):
            self._app.call()
            return
        with socket.create_connection(("127.0.0.1", self._app.port), timeout=5) as link:
            while not self._over.wait(STEP_S):
                link.sendall(self._app.error() if self.fails.is_set() else self._app.request())
                if not link.recv(65536):
                    return


# What is seen


class Watched(threading.Thread):
    """The latest of each target, as WatchSignals tells it."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(daemon=True)
        self._stream = adapter.stub.WatchSignals(api.WatchSignalsRequest())
        self.latest: dict[str, dict[int, metrics.Signal]] = {}

    def run(self) -> None:
        try:
            for told in self._stream:
                self.latest[told.signals.target_id] = {one.kind: one for one in told.signals.signals}
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                raise

    def end(self) -> None:
        """Ends the stream."""
        self._stream.cancel()
        self.join()

    def of(self, app: App, kind: int) -> metrics.Signal:
        """An empty one if nothing was told yet."""
        return self.latest.get(app.name, {}).get(kind, metrics.Signal())


class Story:
    """From the first collection to the pages."""

    def __init__(self, adapter: Adapter, apps: Sequence[App]) -> None:
        self._adapter, self._apps = adapter, apps
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._watched = Watched(adapter)
        self._loads = {app.name: Load(app) for app in apps}

    def told(self) -> bool:
        """Whether it ended well; what does not come is told and ends it."""
        for app in self._apps:
            self._start(app)
            self._adapter.create(app)
        self._watched.start()
        for load in self._loads.values():
            load.start()
        await_true(lambda: all(self._rate(app) > 0 for app in self._apps), "every app has requests")
        self.show("a little load on each")
        self._fill()
        self._fail()
        self._stop()
        for load in self._loads.values():
            load.end()
        self._watched.end()
        return self._pages()

    def show(self, title: str, first: str = "") -> None:
        """The table as it is now; the state of the first app is the one that was waited for."""
        table = Table(title=title, title_justify="left")
        for column in ("target", "state", "requests/s", "errors/s", "duration", "saturation"):
            table.add_column(column, justify="left" if column in ("target", "state") else "right")
        for app in self._apps:
            state = (first if app is self._apps[0] else "") or self._adapter.state(app)
            color = "green" if state == "UP" else "red"
            table.add_row(app.name, f"[{color}]{state}[/]", *(self._cell(app, kind) for kind in range(1, 5)))
        console.print(table)

    def _start(self, app: App) -> None:
        self._processes[app.name] = self._adapter.processes.start(app.command())
        await_true(lambda: accepts(app.port), f"{app.name} accepts")

    def _fill(self) -> None:
        """Connections until it is three quarters full."""
        app = self._first(Redis)
        if app is None:
            return
        before = self._watched.of(app, metrics.SIGNAL_KIND_SATURATION).number
        with ExitStack() as held:
            for _ in range(CLIENTS * 3 // 4):
                held.enter_context(socket.create_connection(("127.0.0.1", app.port)))
            full = 0.75
            await_true(lambda: self._watched.of(app, metrics.SIGNAL_KIND_SATURATION).number > full, "it fills")
            self.show(f"{CLIENTS * 3 // 4} connections to redis, which takes {CLIENTS}")
        await_true(lambda: self._watched.of(app, metrics.SIGNAL_KIND_SATURATION).number <= before + 0.1, "it empties")

    def _fail(self) -> None:
        """Errors for a while."""
        app = self._first(Redis)
        if app is None:
            return
        load = self._loads[app.name]
        load.fails.set()
        await_true(lambda: self._watched.of(app, metrics.SIGNAL_KIND_ERRORS).rate > 1, "there are errors")
        self.show("commands that redis does not know")
        load.fails.clear()

    def _stop(self) -> None:
        """One goes, the others go on; it comes back."""
        app, *others = self._apps
        went_on = {other.name for other in others}

        def is_in(state: str) -> bool:
            went_on.difference_update(other.name for other in others if self._adapter.state(other) != "UP")
            return self._adapter.state(app) == state

        end(self._processes[app.name])
        await_true(lambda: is_in("STALE"), f"{app.name} is stale")
        self.show(f"{app.name} is stopped: STALE, what it said last stands", "STALE")
        await_true(lambda: is_in("DOWN") and self._is_absent(app), f"{app.name} is down")
        self.show(f"{app.name} is stopped: DOWN, nothing of it is shown", "DOWN")
        if went_on:
            console.print(f"[green]UP all the while: {', '.join(sorted(went_on))}[/]")
        self._start(app)
        await_true(lambda: is_in("UP") and self._rate(app) > 0, f"{app.name} is back")
        self.show(f"{app.name} is back, and counts anew", "UP")

    def _pages(self) -> bool:
        """The end: what Prometheus reads."""
        lines = [line for line in self._adapter.page() if line.startswith("app_") and "_bucket" not in line]
        console.print(f"$ curl {self._adapter.metrics} | grep ^app_", markup=False, soft_wrap=True)
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)
        told = {app.name for app in self._apps if any(f'target="{app.name}"' in line for line in lines)}
        if len(self._apps) > 1:
            console.print(f"{len(self._apps)} apps, as many ways to tell, one set of names")
        return told == {app.name for app in self._apps}

    def _first(self, kind: type[Redis]) -> Redis | None:
        return next((app for app in self._apps if isinstance(app, kind)), None)

    def _is_absent(self, app: App) -> bool:
        return bool(self._watched.of(app, metrics.SIGNAL_KIND_REQUESTS).absent_reason)

    def _rate(self, app: App) -> float:
        return self._watched.of(app, metrics.SIGNAL_KIND_REQUESTS).rate

    def _cell(self, app: App, kind: int) -> str:
        """A signal, or that it is absent."""
        one = self._watched.of(app, kind)
        if one.absent_reason:
            return "absent"
        if kind == metrics.SIGNAL_KIND_SATURATION:
            return f"{one.number:.0%}"
        if kind == metrics.SIGNAL_KIND_DURATION:
            return f"{1000 * one.histogram.sum / max(one.histogram.count, 1):.1f} ms"
        return f"{one.rate:.1f}" if one.HasField("rate") else "-"


if __name__ == "__main__":
    sys.exit(main())
