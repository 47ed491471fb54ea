"""The exercise of the port DataPlane: every data plane that speaks TCP runs it, on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from support.certificates import Authority
from support.upstreams import LineServer, assignment, envoy_or_skip, running, say, spec

from retinue_server.ambassador.config import EnvoySettings
from retinue_server.ambassador.core.spec import (
    CircuitBreaker,
    Endpoint,
    Listen,
    OutlierDetection,
    Protocol,
    RateLimit,
    Timeouts,
    Tls,
)
from retinue_server.ambassador.engine import DataPlane, Refused
from retinue_server.ambassador.engines.envoy.plane import make
from retinue_server.ambassador.engines.native.plane import NativePlane

PLANES = ("native", "envoy")


@pytest.fixture(params=PLANES)
async def plane(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DataPlane]:
    found: DataPlane | None = NativePlane()
    if request.param == "envoy":
        found = make(EnvoySettings(path=envoy_or_skip()), tmp_path)
    assert found is not None
    await found.start()
    yield found
    await found.stop()


@pytest.fixture
async def servers() -> AsyncIterator[list[LineServer]]:
    made = [LineServer(name) for name in "abc"]
    async with running(*made):
        yield made


async def until(plane: DataPlane, upstream_id: str, connections: int) -> None:
    async with asyncio.timeout(30):
        while plane.connections(upstream_id) != connections:
            await asyncio.sleep(0.05)


async def test_when_put_returns_the_listener_accepts(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP)
    await plane.put(assignment(wanted, servers[0]))
    assert await say(wanted.listen.port, "hello") == ["a hello"]


async def test_a_unix_socket_has_its_mode(plane: DataPlane, servers: list[LineServer], tmp_path: Path) -> None:
    path = tmp_path / "it.sock"
    wanted = msgspec.structs.replace(spec(Protocol.TCP), listen=Listen(path=str(path), mode=0o600))
    await plane.put(assignment(wanted, servers[0]))
    assert path.stat().st_mode & 0o777 == 0o600
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"x\n")
    assert await reader.readline() == b"a x\n"
    writer.close()


async def test_connections_go_round_by_weight(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP)
    await plane.put(assignment(wanted, Endpoint(servers[0].address, 3), Endpoint(servers[1].address, 1)))
    told = Counter([(await say(wanted.listen.port))[0][0] for _ in range(40)])
    assert told == {"a": 30, "b": 10}


async def test_endpoints_that_flip_under_load_cost_no_connection(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP)
    await plane.put(assignment(wanted, servers[0]))
    told: Counter[str] = Counter()
    flipped = asyncio.Event()

    async def load() -> None:
        while not flipped.is_set():
            told[(await say(wanted.listen.port))[0]] += 1

    callers = [asyncio.create_task(load()) for _ in range(4)]
    for generation in range(2, 22):
        await plane.put(assignment(wanted, servers[generation % 3], generation=generation))
        before = told.total()
        while told.total() < before + 4:
            await asyncio.sleep(0.001)
            assert not any(caller.done() for caller in callers)
    flipped.set()
    await asyncio.gather(*callers)
    assert set(told) == {"a x", "b x", "c x"}


async def test_an_open_connection_stays_where_it_is(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP)
    await plane.put(assignment(wanted, servers[0]))
    reader, writer = await asyncio.open_connection("127.0.0.1", wanted.listen.port)
    writer.write(b"1\n")
    assert await reader.readline() == b"a 1\n"
    longer = msgspec.structs.replace(
        wanted, policy=msgspec.structs.replace(wanted.policy, timeouts=Timeouts(idle_s=600.0))
    )
    await plane.put(assignment(longer, servers[0], servers[1], generation=2))
    writer.write(b"2\n")
    assert await reader.readline() == b"a 2\n"
    writer.close()


async def test_a_refusal_leaves_what_was_served(plane: DataPlane, servers: list[LineServer]) -> None:
    first, second = spec(Protocol.TCP, "first"), spec(Protocol.TCP, "second")
    await plane.put(assignment(first, servers[0]))
    taken = msgspec.structs.replace(second, listen=first.listen)
    with pytest.raises(Refused):
        await plane.put(assignment(taken, servers[1]))
    assert await say(first.listen.port) == ["a x"]
    await plane.put(assignment(second, servers[1]))
    assert await say(second.listen.port) == ["b x"]


async def test_what_cannot_be_read_is_refused(plane: DataPlane, servers: list[LineServer], tmp_path: Path) -> None:
    wanted = spec(Protocol.TCP, tls=Tls("localhost", ca_file=str(tmp_path / "none")))
    with pytest.raises(Refused, match="none"):
        await plane.put(assignment(wanted, servers[0]))
    with pytest.raises(ConnectionRefusedError):
        await say(wanted.listen.port)


async def test_draining_takes_no_new_connections_and_keeps_the_open_ones(
    plane: DataPlane, servers: list[LineServer]
) -> None:
    wanted = spec(Protocol.TCP)
    await plane.put(assignment(wanted, servers[0]))
    reader, writer = await asyncio.open_connection("127.0.0.1", wanted.listen.port)
    writer.write(b"1\n")
    assert await reader.readline() == b"a 1\n"
    await plane.drain("it")
    await _refused(wanted.listen.port)
    writer.write(b"2\n")
    assert await reader.readline() == b"a 2\n"
    await until(plane, "it", 1)
    await plane.put(assignment(wanted, servers[1], generation=2))
    assert await say(wanted.listen.port) == ["b x"]
    writer.write(b"3\n")
    assert await reader.readline() == b"a 3\n"
    writer.close()


async def test_removing_cuts_what_is_open(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP)
    await plane.put(assignment(wanted, servers[0]))
    reader, writer = await asyncio.open_connection("127.0.0.1", wanted.listen.port)
    writer.write(b"1\n")
    assert await reader.readline() == b"a 1\n"
    await plane.remove("it")
    with contextlib.suppress(ConnectionError):
        assert await reader.readline() == b""
    await _refused(wanted.listen.port)
    await plane.remove("it")
    writer.close()


async def _refused(port: int) -> None:
    """Soon nobody accepts."""
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.sleep(0.02)


async def test_without_endpoints_connections_are_closed(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP)
    await plane.put(assignment(wanted))
    with contextlib.suppress(ConnectionError):
        assert await say(wanted.listen.port) == [""]
    await plane.put(assignment(wanted, servers[0], generation=2))
    assert await say(wanted.listen.port) == ["a x"]


async def test_what_fails_is_kept_off(plane: DataPlane, servers: list[LineServer]) -> None:
    servers[0].stop()
    outliers = OutlierDetection(2, 0.1, 60.0, 100)
    wanted = spec(Protocol.TCP, outlier_detection=outliers)
    await plane.put(assignment(wanted, servers[0], servers[1]))
    async with asyncio.timeout(30):
        while all(one.healthy for one in plane.health("it")):
            with contextlib.suppress(ConnectionError):
                await say(wanted.listen.port)
            await plane.counts()
    assert {one.address: one.healthy for one in plane.health("it")} == {
        servers[0].address: False,
        servers[1].address: True,
    }
    assert [(await say(wanted.listen.port))[0] for _ in range(6)] == ["b x"] * 6
    assert (await plane.counts())["it"].ejections == 1


async def test_the_rate_limit_closes_what_is_beyond(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP, rate_limit=RateLimit(1, 3600.0, 3))
    await plane.put(assignment(wanted, servers[0]))
    told = []
    for _ in range(5):
        try:
            told += await say(wanted.listen.port)
        except ConnectionError:
            told.append("")
    assert told == ["a x"] * 3 + [""] * 2
    assert (await plane.counts())["it"].rate_limited == 2


async def test_the_circuit_breaker_bounds_connections(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP, circuit_breaker=CircuitBreaker(max_connections=1))
    await plane.put(assignment(wanted, servers[0]))
    reader, writer = await asyncio.open_connection("127.0.0.1", wanted.listen.port)
    writer.write(b"1\n")
    assert await reader.readline() == b"a 1\n"
    with contextlib.suppress(ConnectionError):
        assert await say(wanted.listen.port) == [""]
    assert (await plane.counts())["it"].overflows >= 1
    writer.close()


async def test_idle_connections_end(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP, timeouts=Timeouts(idle_s=0.2))
    await plane.put(assignment(wanted, servers[0]))
    reader, writer = await asyncio.open_connection("127.0.0.1", wanted.listen.port)
    writer.write(b"1\n")
    assert await reader.readline() == b"a 1\n"
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(30):
            assert await reader.read() == b""
    writer.close()


async def test_a_half_closed_connection_is_answered(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP)
    await plane.put(assignment(wanted, servers[0]))
    reader, writer = await asyncio.open_connection("127.0.0.1", wanted.listen.port)
    writer.write(b"1\n2\n3\n")
    writer.write_eof()
    assert await reader.read() == b"a 1\na 2\na 3\n"
    writer.close()


async def test_what_is_sent_before_the_endpoint_is_there_arrives_whole(
    plane: DataPlane, servers: list[LineServer]
) -> None:
    wanted = spec(Protocol.TCP)
    await plane.put(assignment(wanted, servers[0]))
    lines = [str(number) * 50 for number in range(10_000)]
    reader, writer = await asyncio.open_connection("127.0.0.1", wanted.listen.port)
    writing = asyncio.create_task(_write(writer, lines))
    told = (await reader.read()).decode().splitlines()
    await writing
    writer.close()
    assert told == [f"a {line}" for line in lines]


async def _write(writer: asyncio.StreamWriter, lines: list[str]) -> None:
    writer.write("".join(f"{line}\n" for line in lines).encode())
    await writer.drain()
    writer.write_eof()


async def test_counts_are_of_connections_and_bytes(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP)
    await plane.put(assignment(wanted, servers[0]))
    for _ in range(3):
        await say(wanted.listen.port, "12345")

    async with asyncio.timeout(30):
        while (counts := (await plane.counts())["it"]).active_connections or sum(counts.buckets) < 3:
            await asyncio.sleep(0.05)
    assert (counts.requests, counts.received_bytes, counts.sent_bytes) == (3, 18, 24)
    assert counts.endpoints[servers[0].address].requests == 3
    assert sum(counts.buckets) == 3
    assert len(counts.buckets) == len(counts.bounds_s) + 1


async def test_endpoints_are_spoken_to_by_tls_and_must_be_who_they_say(plane: DataPlane, tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    secure, wrong = LineServer("secure"), LineServer("wrong")
    await secure.start(_server_context(authority, "one"))
    await wrong.start(_server_context(other, "two"))
    try:
        wanted = spec(Protocol.TCP, tls=Tls("localhost", ca_file=str(authority.file)))
        await plane.put(assignment(wanted, secure))
        assert await say(wanted.listen.port) == ["secure x"]
        await plane.put(assignment(wanted, wrong, generation=2))
        with contextlib.suppress(ConnectionError):
            assert await say(wanted.listen.port) == [""]
        named = msgspec.structs.replace(wanted, tls=Tls("elsewhere.example", ca_file=str(authority.file)))
        await plane.put(assignment(named, secure, generation=3))
        with contextlib.suppress(ConnectionError):
            assert await say(wanted.listen.port) == [""]
        assert wrong.lines == 0
    finally:
        secure.stop()
        wrong.stop()


def _server_context(authority: Authority, name: str) -> ssl.SSLContext:
    pair = authority.issue(name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert_file, pair.key_file)
    return context


async def test_an_authority_that_changes_is_taken_without_another_declaration(plane: DataPlane, tmp_path: Path) -> None:
    first, second = Authority(tmp_path, "first"), Authority(tmp_path, "second")
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(first.file.read_bytes())
    secure = LineServer("secure")
    await secure.start(_server_context(second, "two"))
    try:
        wanted = spec(Protocol.TCP, tls=Tls("localhost", ca_file=str(trusted)))
        await plane.put(assignment(wanted, secure))
        with contextlib.suppress(ConnectionError):
            assert await say(wanted.listen.port) == [""]
        beside = tmp_path / "new.pem"
        beside.write_bytes(second.file.read_bytes())
        beside.replace(trusted)
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(ConnectionError):
                    if await say(wanted.listen.port) == ["secure x"]:
                        break
    finally:
        secure.stop()


async def test_validation_serves_nothing(plane: DataPlane, servers: list[LineServer]) -> None:
    wanted = spec(Protocol.TCP)
    await plane.validate(assignment(wanted, servers[0]))
    with pytest.raises(ConnectionRefusedError):
        await say(wanted.listen.port)
