"""What plays: apps, our server, and scrapers."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import grpc

from bench.adapter.apps import LINES
from bench.brokers import free_port, fresh, retinue_environment
from bench.figures import percentile
from bench.processes import (
    LOAD_CORE,
    SERVER_CORE,
    Adapter,
    Failure,
    clean_environment,
    pinned,
    rss_mib,
    threads_cpu_seconds,
    tree,
)
from bench.processes import ROOT as _ROOT
from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import target_pb2 as pb
from retinue.adapter.v1.adapter_service_pb2_grpc import AdapterServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

Figures: TypeAlias = dict[str, float]

GOOD = 5
PATIENCE = 30.0
_PACE_S = 0.02


class Apps:
    """So many that answer, and so many that never do."""

    def __init__(self, good: int = GOOD, hung: int = 0) -> None:
        self.process = Adapter(
            [sys.executable, "-m", "bench.adapter.apps", str(good), str(hung)],
            fresh("adapter-apps"),
            PYTHONPATH=str(_ROOT / "tests"),
        )
        said = self.process.answer(PATIENCE)
        self.good = [target(f"app-{number}", port) for number, port in enumerate(said["good"])]
        self.hung = [target(f"hung-{number}", port) for number, port in enumerate(said["hung"])]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close()


def target(name: str, port: int) -> pb.Target:
    """Collected once a second."""
    found = pb.Target(target_id=name, kind=pb.TARGET_KIND_PROMETHEUS, endpoint=f"http://127.0.0.1:{port}/metrics")
    found.interval_duration.FromSeconds(1)
    found.timeout_duration.FromSeconds(1)
    return found


@dataclass
class Ours:
    """The adapter with its worker."""

    process: subprocess.Popen[bytes]
    address: str
    metrics_port: int
    stub: AdapterServiceStub = field(repr=False)
    """Of its control socket."""
    start_ms: float = 0.0

    def declare(self, targets: Sequence[pb.Target], *, wait: bool = True) -> None:
        """Returns when each has been collected."""
        for one in targets:
            asked = api.CreateTargetRequest(target=one)
            if wait:
                asked.wait_duration.FromSeconds(int(PATIENCE))
            found = self.stub.CreateTarget(asked, timeout=PATIENCE * 2).target
            if wait and found.status.state != pb.TARGET_STATE_UP:
                raise Failure(f"{one.target_id} is not up: {found.status.message}")

    def remove(self, targets: Sequence[pb.Target]) -> None:
        for one in targets:
            self.stub.DeleteTarget(api.DeleteTargetRequest(target_id=one.target_id), timeout=PATIENCE)

    def cpu(self) -> float:
        return sum(map(threads_cpu_seconds, tree(self.process.pid)))

    def memory(self) -> Figures:
        """In MiB."""
        worker = sum(map(rss_mib, tree(self.process.pid)[1:]))
        return {"server_mib": rss_mib(self.process.pid) - worker, **({"worker_mib": worker} if worker else {})}

    def page(self) -> bytes:
        """`/metrics`, to the last byte."""
        return page(self.metrics_port)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = self.page().decode().splitlines()
        found = [line for line in lines if line.partition("{")[0].partition(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in found if all(text in line for text in wanted))

    def collections(self) -> float:
        """That succeeded so far."""
        return self.metric("retinue_adapter_collections_total", outcome="succeeded")

    def scrapes(self, seconds: float, every_s: float = 0.0, beside: int = 0) -> tuple[list[float], list[float]]:
        """How long each took, in milliseconds; at random times, or so often. Each must have all of all good apps. After
        each one comes one to the port `beside`, whose times are the second list."""
        dice, took, theirs = random.Random(1), list[float](), list[float]()
        began = due = time.perf_counter()
        while due < began + seconds:
            time.sleep(max(due - time.perf_counter(), 0))
            took.append(_timed(self.metrics_port, whole=True))
            due = due + every_s if every_s else time.perf_counter() + _PACE_S * dice.uniform(0.5, 1.5)
            if beside:
                time.sleep(_PACE_S * dice.uniform(0.5, 1.5))
                theirs.append(_timed(beside))
        return took, theirs


def _timed(port: int, *, whole: bool = False) -> float:
    asked = time.perf_counter()
    text = page(port)
    took = (time.perf_counter() - asked) * 1000
    lines = text.count(b"\nshop_")
    if whole and lines < GOOD * LINES:
        raise Failure(f"/metrics has {lines} lines of {GOOD * LINES}")
    return took


def page(port: int) -> bytes:
    """`/metrics` of whoever listens there, to the last byte."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as link:
        link.sendall(b"GET /metrics HTTP/1.1\r\nhost: bench\r\naccept: text/plain\r\n\r\n")
        parts = []
        while some := link.recv(1 << 16):
            parts.append(some)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise Failure(f"/metrics answers {head[:100]!r}")
    return body


def times(took: Sequence[float]) -> Figures:
    """Of scrapes."""
    return {"count": float(len(took)), **{f"p{q}_ms": percentile(took, q / 100) for q in (50, 99)}}


@contextmanager
def ours(name: str = "server") -> Iterator[Ours]:
    """`retinue-server adapter` on the server's core."""
    where = fresh(f"adapter-{name}")
    ready, port = where / "ready.json", free_port()
    command = [sys.executable, "-m", "retinue_server", "adapter", "--listen", "127.0.0.1:0", "--data-dir", "data"]
    command += ["--ready-file", str(ready), "--metrics", f"127.0.0.1:{port}"]
    began = time.perf_counter()
    with (where / "log").open("wb") as log:
        process = subprocess.Popen(
            pinned(SERVER_CORE, command), cwd=where, env=retinue_environment(), stdout=subprocess.DEVNULL, stderr=log
        )
    try:
        address = _address(process, ready, where)
        took = (time.perf_counter() - began) * 1000
        with grpc.insecure_channel(f"unix:{_short(where / 'data' / 'control.sock')}") as channel:
            yield Ours(process, address, port, AdapterServiceStub(channel), took)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _short(path: Path) -> str:
    """A socket's name is short."""
    return os.path.relpath(path)


def _address(process: subprocess.Popen[bytes], ready: Path, where: Path) -> str:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if ready.exists() and (text := ready.read_text()).endswith("\n"):
            return str(json.loads(text)["listen"][0])
        time.sleep(0.005)
    raise Failure(f"the adapter is not ready; its log ends: {(where / 'log').read_text()[-300:]}")


@contextmanager
def program(module: str, *arguments: str, core: str = LOAD_CORE) -> Iterator[tuple[Adapter, Mapping[str, Any]]]:
    """A program of this bench that speaks JSON lines, and what it said first."""
    paths = retinue_environment()["PYTHONPATH"] + f":{_ROOT / 'tests'}"
    command: list[Any] = [sys.executable, "-m", f"bench.adapter.{module}", *arguments]
    process = Adapter(command, fresh(f"adapter-{module}"), core, **clean_environment({}) | {"PYTHONPATH": paths})
    try:
        yield process, process.answer(PATIENCE)
    finally:
        process.close()
