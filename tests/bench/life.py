"""What a server costs that has nothing to do, or that just came or comes back: start, idle, restart, backlog."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import grpc

from bench.brokers import await_port, free_port, fresh, retinue, retinue_command, retinue_environment
from bench.entrants import PATIENCE, Round
from bench.processes import LOAD_CORE, Adapter, Failure, Server, cpu_seconds, pinned, rss_mib, threads_cpu_seconds
from retinue.workqueue.v1 import workqueue_service_pb2 as api
from retinue.workqueue.v1 import workqueue_service_pb2_grpc as rpc

if TYPE_CHECKING:
    from pathlib import Path

    from bench.entrants import Entrant

_BACKLOG, _LEASES = 1_000_000, 10_000
_QUIET, _WATCHED = 3.0, 10.0
"""Seconds until a server has settled, and for which it is watched."""


def start(_: Entrant, count: int) -> Round:
    """From the process's start to `ready`, over `count` starts: the median; what it has in memory; its modules."""
    times, found = [], Round()
    for _number in range(count):
        where, began = fresh("start"), time.perf_counter()
        with retinue(where) as broker:
            times.append((time.perf_counter() - began) * 1e3)
            found.figures["start_cpu_ms"] = cpu_seconds(broker.server.pid) * 1e3
            time.sleep(0.3)  # what it does right after
            found.figures["rss_mib"] = rss_mib(broker.server.pid)
    found.figures["start_ms"] = sorted(times)[len(times) // 2]
    found.figures["import_cpu_ms"] = _import_cpu_ms()
    found.figures["modules"] = _modules(fresh("start"))
    return found


def _import_cpu_ms() -> float:
    """What gRPC alone takes at the same time: tells a slow machine from a slow server."""
    code = "import time, grpc.aio; print(time.process_time() * 1e3)"
    command = pinned(LOAD_CORE, [sys.executable, "-c", code])
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _modules(where: Path) -> float:
    """How many modules a server has imported when it is ready."""
    ready = where / "ready.json"
    command = [sys.executable, "-X", "importtime", *retinue_command(ready)[1:]]
    log = where / "imports"
    with log.open("wb") as file:
        environ = retinue_environment()
        server = subprocess.Popen(
            pinned(LOAD_CORE, command), cwd=where, env=environ, stdout=subprocess.DEVNULL, stderr=file
        )
    end = time.monotonic() + PATIENCE
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.05)
    server.terminate()
    server.wait(PATIENCE)
    return float(sum(line.startswith("import time:") for line in log.read_text().splitlines()) - 1)


def idle(entrant: Entrant, count: int) -> Round:
    """An idle server, then one with `count` workers that wait on streams, each over a connection of its own."""
    with retinue(fresh("idle")) as broker:
        found = Round({"idle_share": _share(broker.server)})
        environment = entrant.system.environment()
        command = [*entrant.system.command("idle"), broker.url, str(count)]
        workers = Adapter(command, entrant.where, **environment)
        try:
            workers.answer(PATIENCE)
            found.figures["workers_share"] = _share(broker.server)
            found.figures["workers_rss_mib"] = rss_mib(broker.server.pid)
        finally:
            workers.close()
    return found


def _share(server: Server) -> float:
    """The part of a core that a server takes while nothing is asked of it."""
    time.sleep(_QUIET)
    before, began = threads_cpu_seconds(server.pid), time.monotonic()
    time.sleep(_WATCHED)
    return (threads_cpu_seconds(server.pid) - before) / (time.monotonic() - began)


def backlog(entrant: Entrant, count: int) -> Round:
    """Leases `count` tasks, 100 a call, from a queue that has no more of them, and from one with a million."""
    deep = "bench-deep"
    if not entrant.notes:
        entrant.producer.ask(do="enqueue", queue=deep, first=0, count=_BACKLOG, mode="bulk")
        entrant.notes["filled"] = 1.0
    shallow = entrant.queue()
    entrant.producer.ask(do="enqueue", queue=shallow, first=0, count=count, mode="bulk")
    rates = {
        queue: count / float(entrant.producer.ask(do="lease", queue=queue, count=count)["seconds"])
        for queue in (shallow, deep)
    }
    figures = {"empty_rate": rates[shallow], "deep_rate": rates[deep]}
    return Round(figures | {"deep_share": rates[deep] / rates[shallow]})


def restart(entrant: Entrant, count: int) -> Round:
    """SIGKILL while tasks are enqueued, with `count` waiting and 10,000 leased: from the new process to its first
    lease. The first start after the kill recovers the WAL.
    """
    where, port = entrant.where / "restart", free_port()
    if not where.exists():
        where.mkdir()
        _fill(entrant, where, port, count)
    server = _serve(where, port)
    try:
        producer = _producer(entrant, port)
        producer.tell('{"do": "enqueue", "queue": "bench", "first": 0, "count": 1000000, "mode": "bulk"}')
        time.sleep(1.0)  # so that it dies amid writes
    finally:
        server.process.kill()
        server.process.wait()
    producer.close()
    return _first_lease(where, port)


def _serve(where: Path, port: int) -> Server:
    (where / "ready.json").unlink(missing_ok=True)
    command = retinue_command(where / "ready.json", f"127.0.0.1:{port}")
    server = Server(command, where, **retinue_environment())
    await_port(server, port)
    return server


def _producer(entrant: Entrant, port: int) -> Adapter:
    command = [*entrant.system.command("produce"), f"127.0.0.1:{port}"]
    producer = Adapter(command, entrant.where, **entrant.system.environment())
    producer.answer(PATIENCE)
    return producer


def _fill(entrant: Entrant, where: Path, port: int, count: int) -> None:
    server = _serve(where, port)
    producer = _producer(entrant, port)
    producer.ask(do="enqueue", queue="bench", first=0, count=count, mode="bulk")
    producer.ask(do="lease", queue="bench", count=_LEASES)
    producer.close()
    server.stop()


def _first_lease(where: Path, port: int) -> Round:
    """From the start of a server to the first lease it grants; it is ended by SIGKILL."""
    began = time.perf_counter()
    server = _serve(where, port)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = api.LeaseTasksRequest(queue_id="bench", worker_id="first", max_tasks=1)
            leases = rpc.WorkQueueServiceStub(channel).LeaseTasks(request, timeout=60, wait_for_ready=True).leases
        took = (time.perf_counter() - began) * 1e3
        used = cpu_seconds(server.pid) * 1e3
    finally:
        server.process.kill()
        server.process.wait()
    if len(leases) != 1:
        raise Failure("no task was leased after the restart")
    return Round({"restart_ms": took, "restart_cpu_ms": used})
