"""What plays: leaves and a load generator in Go, and roots: ours, the bare loop, one on Node."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import grpc
import yaml
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from bench.brokers import free_port, fresh, retinue_environment
from bench.figures import percentile
from bench.install import ensure
from bench.processes import HOME, ROOT, SERVER_CORE, Adapter, Failure, clean_environment, started, threads_cpu_seconds
from retinue.scattergather.v1 import leaf_service_pb2 as leaf_pb
from retinue.scattergather.v1 import scattergather_service_pb2 as api
from retinue.scattergather.v1.scattergather_service_pb2_grpc import ScatterGatherServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Figures: TypeAlias = dict[str, float]

METHOD = "/retinue.scattergather.v1.ScatterGatherService/Scatter"
POOL = "bench"
PAYLOAD = bytes(100)
TIMEOUT_S = 10.0
_PATIENCE = 60.0
_PROBE_S = 0.02
_PROGRAMS = HOME / "go-scatter"


class Leaves:
    """A process that serves so many endpoints."""

    def __init__(self, endpoints: int) -> None:
        ensure("go-scatter")
        self.process = Adapter([str(_PROGRAMS / "leaf"), f"-ports={endpoints}"], fresh("scatter-leaves"))
        self.addresses: list[str] = self.process.answer(_PATIENCE)["addresses"]

    def queries(self) -> int:
        """That have come so far."""
        return int(self.process.ask(_PATIENCE)["queries"])

    def cpu(self) -> float:
        return threads_cpu_seconds(self.process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close()


class Load:
    """A load generator."""

    def __init__(self) -> None:
        ensure("go-scatter")
        self.process = Adapter([str(_PROGRAMS / "load")], fresh("scatter-load"))
        self.process.answer(_PATIENCE)

    def play(self, root: Root | Sequence[Root], **command: Any) -> Mapping[str, Figures]:
        """One run, see `load/main.go`; figures by the name of the code that calls ended with."""
        roots = [root] if isinstance(root, Root) else root
        request = base64.b64encode(command.pop("request", roots[0].request())).decode()
        asked = {"addresses": [one.address for one in roots], "method": METHOD, "timeout": TIMEOUT_S + 5}
        found: Mapping[str, Figures] = self.process.ask(_PATIENCE * 5, **asked | command, request=request)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close()


@dataclass
class Root:
    """A root that serves, and how a request to it looks."""

    address: str
    process: subprocess.Popen[bytes]
    metrics_port: int = 0

    def request(self, payload: bytes = PAYLOAD) -> bytes:
        if self.metrics_port:
            return api.ScatterRequest(pool_id=POOL, payload=payload).SerializeToString()
        return leaf_pb.QueryRequest(payload=payload).SerializeToString()

    def cpu(self) -> float:
        return threads_cpu_seconds(self.process.pid)

    def hedge_delay_ms(self) -> float:
        """After which a call gets company now; 0 if none does."""
        with grpc.insecure_channel(self.address) as channel:
            asked = api.ExplainScatterRequest(request=api.ScatterRequest(pool_id=POOL))
            plan = ScatterGatherServiceStub(channel).ExplainScatter(asked, timeout=_PATIENCE)
        found: float = plan.hedge_delay_duration.ToMicroseconds() / 1000
        return found

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=_PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(f"retinue_scattergather_{name}") and all(text in line for text in wanted)
        )


class Probe:
    """Asks for a root's health again and again, from a thread of its own."""

    def __init__(self, root: Root) -> None:
        self._address, self._over = root.address, threading.Event()
        self._took: list[float] = []
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        with grpc.insecure_channel(self._address) as channel:
            stub: Any = HealthStub(channel)
            stub.Check(HealthCheckRequest(), timeout=_PATIENCE)
            while not self._over.wait(_PROBE_S):
                began = time.perf_counter()
                stub.Check(HealthCheckRequest(), timeout=_PATIENCE)
                self._took.append(time.perf_counter() - began)

    def p99_ms(self) -> float:
        return percentile(self._took, 0.99) * 1000


def pool(shards: Sequence[Sequence[str]], **settings: Any) -> dict[str, Any]:
    """A pool whose shards have these endpoints each."""
    listed = [{"shard_id": f"s{number}", "endpoints": list(each)} for number, each in enumerate(shards)]
    return {"merge": "concat", "timeout_seconds": TIMEOUT_S, "shards": listed} | settings


@contextmanager
def ours(pools: Mapping[str, Any], core: str = SERVER_CORE, name: str = "root", **environment: str) -> Iterator[Root]:
    """`retinue-server scattergather` with these pools; ready when every shard can be reached."""
    where = fresh(f"scatter-{name}")
    (where / "pools.yaml").write_text(yaml.safe_dump({"pools": dict(pools)}))
    ready, port = where / "ready.json", free_port()
    command = [sys.executable, "-m", "retinue_server", "scattergather", "--listen", "127.0.0.1:0", "--data-dir", "data"]
    command += ["--ready-file", str(ready), "--metrics", f"127.0.0.1:{port}"]
    settings = {"RETINUE_SCATTERGATHER__POOLS": str(where / "pools.yaml")} | environment
    with started(command, where, core, retinue_environment(**settings)) as process:
        root = Root(_address(process, ready, where), process, port)
        _await_shards(root, sum(len(each["shards"]) for each in pools.values()))
        yield root


def _await_shards(root: Root, count: int) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if root.metric("reachable_shards") >= count:
            return
        time.sleep(0.05)
    raise Failure("the root does not reach its leaves")


@contextmanager
def bare(addresses: Sequence[str]) -> Iterator[Root]:
    """The loop that does nothing else."""
    paths = os.pathsep.join(str(ROOT / tree) for tree in ("tests", "services", "clients/python"))
    environment = clean_environment() | {"PYTHONPATH": paths}
    with _printing([sys.executable, "-m", "bench.scatter.bare", *addresses], "bare", environment) as root:
        yield root


@contextmanager
def on_node(addresses: Sequence[str]) -> Iterator[Root]:
    """The same on Node."""
    ensure("node-scatter")
    modules = HOME / "node-scatter"
    environment = clean_environment() | {"BENCH_NODE_MODULES": str(modules / "node_modules")}
    with _printing(["node", str(Path(__file__).with_name("root.mjs")), *addresses], "node", environment) as root:
        yield root


@contextmanager
def _printing(command: Sequence[str], name: str, environment: Mapping[str, str]) -> Iterator[Root]:
    """A root that prints where it listens."""
    where = fresh(f"scatter-{name}")
    with (where / "out").open("wb") as out, started(command, where, SERVER_CORE, environment, out) as process:
        yield Root(_address(process, where / "out", where), process)


def _address(process: subprocess.Popen[bytes], ready: Path, where: Path) -> str:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if ready.exists() and (text := ready.read_text()).endswith("\n"):
            return str(json.loads(text)["listen"][0])
        time.sleep(0.005)
    raise Failure(f"the root is not ready; its log ends: {(where / 'log').read_text()[-300:]}")
