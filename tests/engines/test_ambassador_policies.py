"""Policies by protocol, on real data planes: what the guide says that they can, and is shown nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from engines.test_ambassador_envoy import changed, command, eventually, port_of, stat
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.certificates import Authority
from support.upstreams import (
    HealthServer,
    LineServer,
    Tunnel,
    WebServer,
    assignment,
    check,
    envoy_or_skip,
    get,
    memcached,
    redis,
    running,
    say,
    spec,
)

from retinue_server.ambassador.config import EnvoySettings
from retinue_server.ambassador.core.spec import (
    Balancer,
    CircuitBreaker,
    Endpoint,
    HealthCheck,
    Listen,
    LoadBalancing,
    Mirror,
    OutlierDetection,
    Protocol,
    RateLimit,
    Retry,
    RetryCondition,
    Spec,
    Timeouts,
    Tls,
)
from retinue_server.ambassador.engine import DataPlane
from retinue_server.ambassador.engines.envoy.plane import EnvoyPlane, make
from retinue_server.ambassador.engines.native.plane import NativePlane

pytestmark = pytest.mark.timeout(120)

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[EnvoyPlane]:
    made = make(EnvoySettings(path=envoy_or_skip()), tmp_path)
    assert made is not None
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def native() -> AsyncIterator[NativePlane]:
    made = NativePlane()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture(params=["envoy", "native"])
async def either(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DataPlane]:
    made: DataPlane | None = NativePlane()
    if request.param == "envoy":
        made = make(EnvoySettings(path=envoy_or_skip()), tmp_path)
    assert made is not None
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def web() -> AsyncIterator[list[WebServer]]:
    made = [WebServer(name) for name in "ab"]
    async with running(*made):
        yield made


@pytest.fixture
async def lines() -> AsyncIterator[list[LineServer]]:
    made = [LineServer(name) for name in "ab"]
    async with running(*made):
        yield made


@pytest.fixture
async def rpc() -> AsyncIterator[list[HealthServer]]:
    made = [HealthServer(name) for name in "ab"]
    for one in made:
        await one.start()
    yield made
    for one in made:
        await one.stop()


@pytest.fixture
def shards() -> Iterator[list[str]]:
    with redis() as one, redis() as two:
        yield [one, two]


@contextlib.asynccontextmanager
async def dialled(wanted: Spec) -> AsyncIterator[aio.Channel]:
    async with aio.insecure_channel(f"127.0.0.1:{wanted.listen.port}") as channel:
        yield channel


async def fails(call: Awaitable[object]) -> grpc.StatusCode:
    """What it fails with."""
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return caught.value.code()


# Who is asked

SPREADING = [Balancer.ROUND_ROBIN, Balancer.LEAST_REQUEST, Balancer.RANDOM]


@pytest.mark.parametrize("balancer", SPREADING)
async def test_http_is_spread(plane: EnvoyPlane, web: list[WebServer], balancer: Balancer) -> None:
    wanted = spec(Protocol.HTTP, load_balancing=LoadBalancing(balancer))
    await plane.put(assignment(wanted, *web))
    told = Counter([(await get(wanted.listen.port)).text for _ in range(60)])
    assert min(told["a"], told["b"]) > 5


@pytest.mark.parametrize("balancer", SPREADING)
async def test_grpc_is_spread(plane: EnvoyPlane, rpc: list[HealthServer], balancer: Balancer) -> None:
    wanted = spec(Protocol.GRPC, load_balancing=LoadBalancing(balancer))
    await plane.put(assignment(wanted, *rpc))
    async with dialled(wanted) as channel:
        told = Counter([await check(channel) for _ in range(60)])
    assert min(told["a"], told["b"]) > 5, "calls are, though the connection is one"


@pytest.mark.parametrize("balancer", SPREADING)
async def test_connections_are_spread(either: DataPlane, lines: list[LineServer], balancer: Balancer) -> None:
    wanted = spec(Protocol.TCP, load_balancing=LoadBalancing(balancer))
    await either.put(assignment(wanted, *lines))
    told = Counter([(await say(wanted.listen.port))[0] for _ in range(60)])
    assert min(told["a x"], told["b x"]) > 5


@pytest.mark.parametrize("balancer", [Balancer.RING_HASH, Balancer.MAGLEV])
async def test_equal_headers_of_grpc_go_to_the_same_server(
    plane: EnvoyPlane, rpc: list[HealthServer], balancer: Balancer
) -> None:
    wanted = spec(Protocol.GRPC, load_balancing=LoadBalancing(balancer, header="user"))
    await plane.put(assignment(wanted, *rpc))
    async with dialled(wanted) as channel:
        first = [await check(channel, user=str(user)) for user in range(40)]
        assert [await check(channel, user=str(user)) for user in range(40)] == first
    assert set(first) == {"a", "b"}


@pytest.mark.parametrize("balancer", [Balancer.RING_HASH, Balancer.MAGLEV])
async def test_connections_of_one_app_go_to_the_same_server(
    plane: EnvoyPlane, lines: list[LineServer], balancer: Balancer
) -> None:
    """There is one address that apps have."""
    wanted = spec(Protocol.TCP, load_balancing=LoadBalancing(balancer, source_address=True))
    await plane.put(assignment(wanted, *lines))
    assert len({(await say(wanted.listen.port))[0] for _ in range(20)}) == 1


async def test_redis_keys_are_spread_on_a_ring(plane: EnvoyPlane, shards: list[str]) -> None:
    wanted = spec(Protocol.REDIS, load_balancing=LoadBalancing(Balancer.RING_HASH))
    await plane.put(assignment(wanted, *map(Endpoint, shards)))
    for number in range(60):
        assert await command(wanted.listen.port, "SET", f"k{number}", str(number)) == "+OK"
    assert [await command(wanted.listen.port, "GET", f"k{number}") for number in range(60)] == [*map(str, range(60))]
    assert min([int((await command(port_of(shard), "DBSIZE"))[1:]) for shard in shards]) > 5


async def test_a_mirror_gets_copies_of_grpc_calls(plane: EnvoyPlane, rpc: list[HealthServer]) -> None:
    await plane.put(assignment(spec(Protocol.GRPC, "shadow"), rpc[1]))
    wanted = spec(Protocol.GRPC, mirror=Mirror("shadow"))
    await plane.put(assignment(wanted, rpc[0]))
    async with dialled(wanted) as channel:
        assert [await check(channel) for _ in range(10)] == ["a"] * 10
        await eventually(lambda: rpc[1].calls == 10)


# gRPC: time, streams, limits


async def test_a_grpc_call_that_takes_too_long_is_unavailable(plane: EnvoyPlane, rpc: list[HealthServer]) -> None:
    """Not DEADLINE_EXCEEDED, as one would think."""
    rpc[0].delay_s = 30.0
    wanted = spec(Protocol.GRPC, timeouts=Timeouts(request_s=0.2))
    await plane.put(assignment(wanted, rpc[0]))
    async with dialled(wanted) as channel:
        assert await fails(check(channel)) is UNAVAILABLE
    assert (await plane.counts())["it"].timeouts == 1
    await eventually(lambda: rpc[0].cancelled == 1)


async def test_the_deadline_of_a_grpc_call_ends_it_at_the_server_too(
    plane: EnvoyPlane, rpc: list[HealthServer]
) -> None:
    rpc[0].delay_s = 30.0
    wanted = spec(Protocol.GRPC)
    await plane.put(assignment(wanted, rpc[0]))
    async with dialled(wanted) as channel:
        assert await fails(check(channel, deadline_s=1.0)) is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: rpc[0].cancelled == 1)


@pytest.mark.parametrize("hedge", [False, True])
async def test_a_grpc_try_that_takes_too_long_is_made_again(
    plane: EnvoyPlane, rpc: list[HealthServer], *, hedge: bool
) -> None:
    """Hedged, the first is not given up."""
    rpc[0].delay_s = 30.0
    conditions = (RetryCondition.GRPC_UNAVAILABLE, RetryCondition.GATEWAY_ERROR)
    wanted = spec(
        Protocol.GRPC,
        timeouts=Timeouts(request_s=25.0, per_try_s=0.1),
        retry=Retry(conditions, attempts=3),
        hedge=hedge,
    )
    await plane.put(assignment(wanted, *rpc))
    async with dialled(wanted) as channel:
        for _ in range(4):
            if rpc[0].calls and not hedge:
                break
            cancelled = rpc[0].cancelled
            assert await check(channel) == "b"
            if hedge:
                assert rpc[0].cancelled >= cancelled
    assert rpc[0].calls, "it was asked, too"


async def test_streams_of_grpc_go_on_while_endpoints_and_policies_change(
    plane: EnvoyPlane, rpc: list[HealthServer]
) -> None:
    wanted = spec(Protocol.GRPC)
    await plane.put(assignment(wanted, rpc[0]))
    async with dialled(wanted) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        stream = stub.Watch(health_pb2.HealthCheckRequest(service="s"), timeout=60)
        assert (await stream.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        await plane.put(assignment(wanted, rpc[1], generation=2))
        limited = changed(wanted, rate_limit=RateLimit(1, 3600.0, 100), timeouts=Timeouts(request_s=0.2))
        await plane.put(assignment(limited, rpc[1], generation=3))
        assert await check(channel) == "b"
        for status in (health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING):
            await rpc[0].set("s", status)
            assert (await stream.read()).status == status
        stream.cancel()


async def test_requests_beyond_the_circuit_breaker_are_refused_at_once(
    plane: EnvoyPlane, web: list[WebServer], rpc: list[HealthServer]
) -> None:
    web[0].delay_s = rpc[0].delay_s = 30.0
    breaker = CircuitBreaker(max_requests=1)
    http = spec(Protocol.HTTP, "http", circuit_breaker=breaker)
    calls = spec(Protocol.GRPC, "calls", circuit_breaker=breaker)
    await plane.put(assignment(http, web[0]))
    await plane.put(assignment(calls, rpc[0]))
    async with dialled(calls) as channel:
        held = [asyncio.create_task(get(http.listen.port)), asyncio.create_task(check(channel))]
        await eventually(lambda: web[0].requests and rpc[0].calls)
        assert (await get(http.listen.port)).status == 503
        assert await fails(check(channel)) is UNAVAILABLE
        counts = await plane.counts()
        for task in held:
            task.cancel()
        await asyncio.wait(held)
    for name in ("http", "calls"):
        assert (counts[name].requests, counts[name].errors, counts[name].overflows) == (2, 1, 1), name
    assert (len(web[0].requests), rpc[0].calls) == (1, 1)


@pytest.mark.parametrize("breaker", [CircuitBreaker(max_pending_requests=1), CircuitBreaker(max_connections=1)])
async def test_who_waits_for_a_grpc_connection_is_counted(
    plane: EnvoyPlane, tmp_path: Path, breaker: CircuitBreaker
) -> None:
    """The server accepts, and never says anything: no TLS, and so no connection to ask on."""
    silent = Silent("silent")
    async with running(silent):
        tls = Tls("localhost", ca_file=str(Authority(tmp_path).file))
        breaker = msgspec.structs.replace(breaker, max_pending_requests=1)
        wanted = spec(Protocol.GRPC, tls=tls, circuit_breaker=breaker)
        await plane.put(assignment(wanted, silent))
        async with dialled(wanted) as channel:
            held = asyncio.create_task(check(channel))
            await eventually(lambda: silent.connections)
            assert await fails(check(channel)) is UNAVAILABLE
            assert (await plane.counts())["it"].overflows >= 1
            assert silent.connections == 1
            held.cancel()


@pytest.mark.parametrize("protocol", [Protocol.HTTP, Protocol.GRPC])
async def test_idle_connections_to_endpoints_end(
    plane: EnvoyPlane, web: list[WebServer], rpc: list[HealthServer], protocol: Protocol
) -> None:
    wanted = spec(protocol, timeouts=Timeouts(idle_s=0.2))
    await plane.put(assignment(wanted, rpc[0] if protocol is Protocol.GRPC else web[0]))
    if protocol is Protocol.GRPC:
        async with dialled(wanted) as channel:
            assert await check(channel) == "a"
    else:
        assert (await get(wanted.listen.port)).text == "a"

    async def ended() -> bool:
        made = await stat(plane._admin, "cluster.it.upstream_cx_total")
        return made == await stat(plane._admin, "cluster.it.upstream_cx_idle_timeout") > 0

    await eventually(ended)


# Whom not to ask


async def test_of_grpc_who_fails_in_a_row_is_kept_off(plane: EnvoyPlane, rpc: list[HealthServer]) -> None:
    rpc[0].failing = 1_000_000
    wanted = spec(Protocol.GRPC, outlier_detection=OutlierDetection(2, 0.1, 60.0, 100))
    await plane.put(assignment(wanted, *rpc))
    async with dialled(wanted) as channel:

        async def kept_off() -> bool:
            with contextlib.suppress(aio.AioRpcError):
                await check(channel)
            return (await plane.counts())["it"].ejections > 0

        await eventually(kept_off)
        assert (await plane.counts())["it"].errors >= 2
        calls = rpc[0].calls
        assert [await check(channel) for _ in range(6)] == ["b"] * 6
        assert rpc[0].calls == calls


async def test_who_fails_right_after_a_change_is_kept_off_at_once(plane: EnvoyPlane, web: list[WebServer]) -> None:
    """As Envoy has it by default, an ejection after a change of endpoints would wait for a second."""
    wanted = spec(Protocol.HTTP, outlier_detection=OutlierDetection(1, 0.1, 60.0, 100))
    await plane.put(assignment(wanted, web[1]))
    web[0].status = 500
    await plane.put(assignment(wanted, *web, generation=2))
    told = [(await get(wanted.listen.port)).status for _ in range(30)]
    assert told.count(500) <= 2, "of one failure everybody has heard"


async def test_of_redis_a_dead_shard_is_kept_off_and_its_keys_go_elsewhere(plane: EnvoyPlane) -> None:
    with redis() as one:
        with redis() as dying:
            outliers = OutlierDetection(2, 0.1, 60.0, 100)
            wanted = spec(Protocol.REDIS, outlier_detection=outliers)
            await plane.put(assignment(wanted, Endpoint(one), Endpoint(dying)))
            assert await command(wanted.listen.port, "SET", "k", "v") == "+OK"

        async def all_stored() -> bool:
            return {await command(wanted.listen.port, "SET", f"k{number}", "v") for number in range(40)} == {"+OK"}

        await eventually(all_stored)
    assert (await plane.counts())["it"].ejections >= 1


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.GRPC, Protocol.REDIS])
async def test_who_fails_its_health_check_is_known(
    plane: EnvoyPlane, lines: list[LineServer], rpc: list[HealthServer], protocol: Protocol
) -> None:
    wanted = spec(protocol, health_check=HealthCheck(0.1, 5.0, 1, 1))

    async def seen() -> bool:
        await plane.counts()
        return [one.healthy for one in plane.health("it")] == [False, True]

    with contextlib.ExitStack() as stack:
        if protocol is Protocol.TCP:
            lines[0].stop()
            await plane.put(assignment(wanted, *lines))
        elif protocol is Protocol.GRPC:
            await rpc[0].set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            await plane.put(assignment(wanted, *rpc))
        else:
            with redis() as dead:
                pass
            await plane.put(assignment(wanted, Endpoint(dead), Endpoint(stack.enter_context(redis()))))
        await eventually(seen)
        if protocol is Protocol.TCP:
            assert [(await say(wanted.listen.port))[0] for _ in range(6)] == ["b x"] * 6
        elif protocol is Protocol.GRPC:
            async with dialled(wanted) as channel:
                assert [await check(channel) for _ in range(6)] == ["b"] * 6
        else:
            assert {await command(wanted.listen.port, "SET", f"k{n}", "v") for n in range(20)} == {"+OK"}


# Where apps dial


async def test_each_protocol_is_served_on_a_unix_socket(
    plane: EnvoyPlane, native: NativePlane, web: list[WebServer], rpc: list[HealthServer], tmp_path: Path
) -> None:
    def at(protocol: Protocol) -> Spec:
        return msgspec.structs.replace(spec(protocol, protocol.name.lower()), listen=Listen(path=path(protocol)))

    def path(protocol: Protocol) -> str:
        return str(tmp_path / f"{protocol.name}.sock")

    with redis() as shard, memcached() as cache:
        await plane.put(assignment(at(Protocol.HTTP), web[0]))
        await plane.put(assignment(at(Protocol.GRPC), rpc[0]))
        await plane.put(assignment(at(Protocol.REDIS), Endpoint(shard)))
        await native.put(assignment(at(Protocol.MEMCACHED), Endpoint(cache)))
        for protocol, asked, answered in (
            (Protocol.HTTP, b"GET / HTTP/1.1\r\nhost: it\r\n\r\n", b"HTTP/1.1 200 OK\r\n"),
            (Protocol.REDIS, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n", b"+OK\r\n"),
            (Protocol.MEMCACHED, b"set k 0 0 1\r\nv\r\n", b"STORED\r\n"),
        ):
            reader, writer = await asyncio.open_unix_connection(path(protocol))
            writer.write(asked)
            assert await reader.readline() == answered
            writer.close()
    named = (("grpc.default_authority", "it"),)
    async with aio.insecure_channel(f"unix:{path(Protocol.GRPC)}", options=named) as channel:
        assert await check(channel) == "a"


# TLS


def server_context(authority: Authority) -> ssl.SSLContext:
    pair = authority.issue("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert_file, pair.key_file)
    return context


async def test_grpc_is_spoken_by_tls_to_who_it_says(plane: EnvoyPlane, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    credentials = grpc.ssl_server_credentials([(pair.key_file.read_bytes(), pair.cert_file.read_bytes())])
    secure = HealthServer("secure", credentials)
    await secure.start()
    try:
        wanted = spec(Protocol.GRPC, tls=Tls("localhost", ca_file=str(authority.file)))
        await plane.put(assignment(wanted, secure))
        async with dialled(wanted) as channel:
            assert await check(channel) == "secure"
            await plane.put(assignment(named_otherwise(wanted), secure, generation=2))
            assert await fails(check(channel)) is UNAVAILABLE
        assert await stat(plane._admin, "cluster.it.ssl.fail_verify_san") >= 1
    finally:
        await secure.stop()


def named_otherwise(wanted: Spec) -> Spec:
    """Its servers must have a name that they have not."""
    assert wanted.tls is not None
    tls = msgspec.structs.replace(wanted.tls, subject_alt_names=("elsewhere.example",))
    return msgspec.structs.replace(wanted, tls=tls)


async def test_tcp_is_spoken_by_tls_to_who_it_says(plane: EnvoyPlane, tmp_path: Path) -> None:
    authority, secure = Authority(tmp_path), LineServer("secure")
    await secure.start(server_context(authority))
    try:
        tls = Tls("elsewhere.example", ca_file=str(authority.file), subject_alt_names=("other.example", "localhost"))
        wanted = spec(Protocol.TCP, tls=tls)
        await plane.put(assignment(wanted, secure))
        assert await say(wanted.listen.port) == ["secure x"]
        await plane.put(assignment(named_otherwise(wanted), secure, generation=2))
        with contextlib.suppress(ConnectionError):
            assert await say(wanted.listen.port) == [""]
        assert await stat(plane._admin, "cluster.it.ssl.fail_verify_san") >= 1
    finally:
        secure.stop()


async def test_redis_is_spoken_by_tls_to_who_it_says(plane: EnvoyPlane, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with redis() as shard:
        tunnel = Tunnel(shard)
        await tunnel.start(server_context(authority))
        try:
            wanted = spec(Protocol.REDIS, tls=Tls("localhost", ca_file=str(authority.file)))
            await plane.put(assignment(wanted, tunnel))
            assert await command(wanted.listen.port, "SET", "k", "v") == "+OK"
            await plane.put(assignment(named_otherwise(wanted), tunnel, generation=2))

            async def is_refused() -> bool:
                return (await command(wanted.listen.port, "GET", "k")).startswith("-")

            await eventually(is_refused)
            assert await stat(plane._admin, "cluster.it.ssl.fail_verify_san") >= 1
        finally:
            tunnel.stop()


async def test_memcached_is_spoken_by_tls_to_who_it_says(native: NativePlane, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with memcached() as shard:
        tunnel = Tunnel(shard)
        await tunnel.start(server_context(authority))
        try:
            ca = str(authority.file)
            right, wrong = (
                spec(Protocol.MEMCACHED, name, tls=Tls(server, ca_file=ca))
                for name, server in (("right", "localhost"), ("wrong", "elsewhere.example"))
            )
            for wanted in (right, wrong):
                await native.put(assignment(wanted, tunnel))
            assert await stored(right.listen.port) == b"STORED\r\n"
            assert (await stored(wrong.listen.port)).startswith(b"SERVER_ERROR")
        finally:
            tunnel.stop()


async def stored(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"set k 0 0 1\r\nv\r\n")
        return await reader.readline()
    finally:
        writer.close()


async def test_certificates_that_are_replaced_under_load_cost_no_connection(either: DataPlane, tmp_path: Path) -> None:
    """The server lets in only those that it knows, and sees the new one soon."""
    authority, secure = Authority(tmp_path), Known("secure")
    context = server_context(authority)
    context.load_verify_locations(authority.file)
    context.verify_mode = ssl.CERT_REQUIRED
    await secure.start(context)
    over = asyncio.Event()
    try:
        pair = authority.issue("client")
        wanted = spec(Protocol.TCP, tls=Tls("localhost", str(authority.file), str(pair.cert_file), str(pair.key_file)))
        await either.put(assignment(wanted, secure))

        async def load() -> int:
            count = 0
            while not over.is_set():
                assert await say(wanted.listen.port) == ["secure x"]
                count += 1
            return count

        loads = [asyncio.create_task(load()) for _ in range(2)]
        for turn in range(1, 3):
            await eventually(partial_len(secure.serials, turn))
            authority.issue("client")
        await eventually(partial_len(secure.serials, 3))
        over.set()
        assert min(await asyncio.gather(*loads)) > 0
    finally:
        over.set()
        secure.stop()


def partial_len(known: set[str], size: int) -> Callable[[], bool]:
    return lambda: len(known) >= size


class Known(LineServer):
    """Notes by which certificates clients came."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.serials: set[str] = set()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.serials.add(writer.get_extra_info("peercert")["serialNumber"])
        await super()._talk(reader, writer)


# Redis: what is taken, and what Envoy's proxy is not


async def test_redis_connections_beyond_the_rate_are_closed(plane: EnvoyPlane, shards: list[str]) -> None:
    wanted = spec(Protocol.REDIS, rate_limit=RateLimit(1, 3600.0, 2))
    await plane.put(assignment(wanted, Endpoint(shards[0])))
    told = []
    for _ in range(3):
        with contextlib.suppress(ConnectionError):
            told.append(await command(wanted.listen.port, "SET", "k", "v"))
    assert told[:2] == ["+OK"] * 2
    assert told[2:] in ([], [""])
    assert (await plane.counts())["it"].rate_limited == 1


async def test_a_redis_command_that_takes_too_long_is_an_error(plane: EnvoyPlane) -> None:
    silent = Silent("silent")
    async with running(silent):
        wanted = spec(Protocol.REDIS, timeouts=Timeouts(request_s=0.2))
        await plane.put(assignment(wanted, silent))
        assert (await command(wanted.listen.port, "GET", "k")).startswith("-")


class Silent(LineServer):
    """Takes all and says nothing."""

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while await reader.read(65536):
            pass


async def test_what_redis_clients_must_know_is_so(plane: EnvoyPlane, shards: list[str]) -> None:
    """As the guide says it; should Envoy learn it, the guide is to be changed."""
    wanted = spec(Protocol.REDIS)
    port = wanted.listen.port
    await plane.put(assignment(wanted, *map(Endpoint, shards)))
    assert (await command(port, "HELLO", "3")).startswith("-NOPROTO")
    for unknown in (["SUBSCRIBE", "c"], ["BLPOP", "k", "0"], ["DBSIZE"], ["COMMAND"]):
        assert (await command(port, *unknown)).startswith("-"), unknown
    assert await command(port, "PING") == "+PONG"


async def test_a_redis_transaction_across_shards_misplaces_keys(plane: EnvoyPlane, shards: list[str]) -> None:
    """A known defect of Envoy's proxy, of which the guide warns."""
    wanted = spec(Protocol.REDIS)
    await plane.put(assignment(wanted, *map(Endpoint, shards)))
    reader, writer = await asyncio.open_connection("127.0.0.1", wanted.listen.port)

    async def ask(*words: str) -> str:
        writer.write("".join((f"*{len(words)}\r\n", *(f"${len(word)}\r\n{word}\r\n" for word in words))).encode())
        return (await reader.readline()).decode().strip()

    assert await ask("MULTI") == "+OK"
    for number in range(20):
        assert await ask("SET", f"k{number}", "v") == "+QUEUED"
    assert await ask("EXEC") == "*20"
    assert [await reader.readline() for _ in range(20)] == [b"+OK\r\n"] * 20
    writer.close()
    found = [await command(wanted.listen.port, "GET", f"k{number}") for number in range(20)]
    assert 0 < found.count("v") < 20


async def test_idle_connections_to_memcached_end(native: NativePlane) -> None:
    with memcached() as shard:
        wanted = spec(Protocol.MEMCACHED, timeouts=Timeouts(request_s=1.0, idle_s=0.2))
        await native.put(assignment(wanted, Endpoint(shard)))
        reader, writer = await asyncio.open_connection("127.0.0.1", wanted.listen.port)
        writer.write(b"set k 0 0 1\r\nv\r\n")
        assert await reader.readline() == b"STORED\r\n"
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(30):
                assert await reader.read() == b""
        writer.close()
