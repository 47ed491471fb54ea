"""HTTP and Redis through our Envoy, raw TCP through our own relay, each beside who else does that."""

from __future__ import annotations

import csv
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING

from bench.ambassador.players import (
    DIRECT,
    HAPROXY,
    NUTCRACKER,
    OURS,
    PLAIN,
    Figures,
    Load,
    Proxy,
    backend,
    haproxy,
    in_turns,
    nutcracker,
    ours,
    plain_cluster,
    plain_envoy,
    plain_filter,
    redises,
    upstream,
)
from bench.install import program
from bench.processes import LOAD_CORE, Failure, pinned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.ambassador.players import Json
    from bench.turns import Play

_SECONDS = 1.5
_BYTES = 100
_SHARDS = 3
_COMMANDS = 40_000
_KEYS = 100_000
_WARM = 5_000


def http(clients: int) -> Play:
    """GET of 100 bytes over connections that stay."""

    def play(_: str, turns: int) -> Mapping[str, Figures]:
        with ExitStack() as stack:
            load, web = stack.enter_context(Load()), stack.enter_context(backend())["web"]
            proxies = {
                OURS: stack.enter_context(ours("envoy")).declare(upstream("web", "HTTP", web.address)),
                PLAIN: stack.enter_context(plain_envoy(_plain_http(), plain_cluster([web.address]))),
                HAPROXY: stack.enter_context(haproxy("http", web.address)),
                DIRECT: web,
            }
            asked = {"kind": "http", "clients": clients, "bytes": _BYTES}
            for proxy in proxies.values():
                load.play(proxy, seconds=0.3, **asked)
            return in_turns(list(proxies), lambda name: load.measure(proxies[name], seconds=_SECONDS, **asked), turns)

    return play


def _plain_http() -> Json:
    route = {"match": {"prefix": "/"}, "route": {"cluster": "it"}}
    router = {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
    return plain_filter(
        "envoy.filters.network.http_connection_manager",
        "network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="it",
        http_filters=[{"name": "envoy.filters.http.router", "typed_config": router}],
        route_config={"virtual_hosts": [{"name": "it", "domains": ["*"], "routes": [route]}]},
    )


def tcp(clients: int) -> Play:
    """100 bytes there and back, over connections that stay, by the native data plane."""

    def play(_: str, turns: int) -> Mapping[str, Figures]:
        with ExitStack() as stack:
            load, echo = stack.enter_context(Load()), stack.enter_context(backend())["echo"]
            proxies = {
                OURS: stack.enter_context(ours("native")).declare(upstream("echo", "TCP", echo.address)),
                HAPROXY: stack.enter_context(haproxy("tcp", echo.address)),
                DIRECT: echo,
            }
            asked = {"kind": "echo", "clients": clients, "bytes": _BYTES}
            for proxy in proxies.values():
                load.play(proxy, seconds=0.3, **asked)
            return in_turns(list(proxies), lambda name: load.measure(proxies[name], seconds=_SECONDS, **asked), turns)

    return play


def redis(command: str, clients: int) -> Play:
    """`get` or `set` of 100 bytes over three servers."""

    def play(_: str, turns: int) -> Mapping[str, Figures]:
        with ExitStack() as stack:
            servers = redises(stack, _SHARDS)
            proxies = {
                OURS: stack.enter_context(ours("envoy")).declare(upstream("cache", "REDIS", *servers)),
                PLAIN: stack.enter_context(plain_envoy(_plain_redis(), plain_cluster(servers, lb_policy="MAGLEV"))),
                NUTCRACKER: stack.enter_context(nutcracker(servers, redis=True)),
                DIRECT: Proxy(int(servers[0].rpartition(":")[2])),
            }
            for proxy in proxies.values():
                _redis_benchmark(proxy, "set", clients, _WARM)
            return in_turns(
                list(proxies), lambda name: _redis_benchmark(proxies[name], command, clients, _COMMANDS), turns
            )

    return play


def _plain_redis() -> Json:
    return plain_filter(
        "envoy.filters.network.redis_proxy",
        "network.redis_proxy.v3.RedisProxy",
        stat_prefix="it",
        settings={"op_timeout": "1s", "enable_hashtagging": True},
        prefix_routes={"catch_all_route": {"cluster": "it"}},
    )


def _redis_benchmark(proxy: Proxy, command: str, clients: int, count: int) -> Figures:
    asked = [program("redis-benchmark"), "-p", str(proxy.port), "-t", command, "-c", str(clients), "-n", str(count)]
    cpu = proxy.cpu()
    done = subprocess.run(
        pinned(LOAD_CORE, [*asked, "-r", str(_KEYS), "-d", str(_BYTES), "--csv"]),
        capture_output=True,
        text=True,
        check=False,
    )
    cpu = proxy.cpu() - cpu
    rows = [row for row in csv.DictReader(done.stdout.splitlines()) if row["test"] == command.upper()]
    if done.returncode or len(rows) != 1:
        raise Failure(f"redis-benchmark ended with {(done.stderr or done.stdout).strip()[-200:]}")
    (row,) = rows
    found = {
        "rate": float(row["rps"]),
        "p50_us": float(row["p50_latency_ms"]) * 1000,
        "p99_us": float(row["p99_latency_ms"]) * 1000,
    }
    return found | ({"cpu_us": cpu / count * 1e6} if proxy.process else {})
