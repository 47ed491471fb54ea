"""Each policy, as it is declared, does on a real Envoy what it says; and what was once a surprise stays mended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from grpc import aio
from support.certificates import Authority
from support.upstreams import (
    Browser,
    HealthServer,
    LineServer,
    WebServer,
    assignment,
    check,
    envoy_or_skip,
    get,
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
    Fault,
    HealthCheck,
    Listen,
    LoadBalancing,
    Mirror,
    OutlierDetection,
    Protocol,
    RateLimit,
    RedisAuth,
    Retry,
    RetryCondition,
    Spec,
    Split,
    Timeouts,
    Tls,
)
from retinue_server.ambassador.engine import Refused
from retinue_server.ambassador.engines.envoy.admin import Admin
from retinue_server.ambassador.engines.envoy.plane import EnvoyPlane, make
from retinue_server.ambassador.ports import HostPorts

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[EnvoyPlane]:
    made = make(EnvoySettings(path=envoy_or_skip()), tmp_path)
    assert made is not None
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def admin(plane: EnvoyPlane) -> Admin:
    return plane._admin


@pytest.fixture
async def web() -> AsyncIterator[list[WebServer]]:
    made = [WebServer(name) for name in "abc"]
    async with running(*made):
        yield made


def changed(before: Spec, **policy: Any) -> Spec:
    """With other policies."""
    return msgspec.structs.replace(before, policy=msgspec.structs.replace(before.policy, **policy))


async def eventually(holds: Callable[[], Any], seconds: float = 60.0) -> None:
    """Asks until it holds; what it gives may be awaited."""
    async with asyncio.timeout(seconds):
        while True:
            found = holds()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.02)


async def stat(admin: Admin, name: str) -> int:
    said = await admin.get(f"/stats?format=json&filter=^{name}$")
    return sum(one["value"] for one in said["stats"] if one.get("name") == name)


# HTTP: where requests go


async def test_a_fifth_of_the_requests_goes_elsewhere(plane: EnvoyPlane, web: list[WebServer]) -> None:
    await plane.put(assignment(spec(Protocol.HTTP, "other"), web[1]))
    wanted = spec(Protocol.HTTP, splits=(Split("other", 20.0),))
    await plane.put(assignment(wanted, web[0]))
    browser = Browser(wanted.listen.port)
    told = Counter([(await browser.get()).text for _ in range(500)])
    browser.close()
    assert set(told) == {"a", "b"}
    assert 60 <= told["b"] <= 145, "of 500, 100 on average and 9 of deviation"


async def test_requests_with_a_header_go_elsewhere(plane: EnvoyPlane, web: list[WebServer]) -> None:
    await plane.put(assignment(spec(Protocol.HTTP, "canary"), web[1]))
    await plane.put(assignment(spec(Protocol.HTTP, "any"), web[2]))
    splits = (
        Split("canary", header_name="x-canary", header_value="yes"),
        Split("any", header_name="x-any"),
    )
    wanted = spec(Protocol.HTTP, splits=splits)
    await plane.put(assignment(wanted, web[0]))
    asked: list[dict[str, str]] = [{}, {"x_canary": "yes"}, {"x_canary": "no"}, {"x_any": "1"}]
    assert [(await get(wanted.listen.port, **one)).text for one in asked] == ["a", "b", "a", "c"]


@pytest.mark.parametrize("balancer", [Balancer.RING_HASH, Balancer.MAGLEV])
async def test_equal_headers_go_to_the_same_server(plane: EnvoyPlane, web: list[WebServer], balancer: Balancer) -> None:
    wanted = spec(Protocol.HTTP, load_balancing=LoadBalancing(balancer, header="x-user"))
    await plane.put(assignment(wanted, *web))
    browser = Browser(wanted.listen.port)
    first = {str(user): (await browser.get(x_user=str(user))).text for user in range(60)}
    again = {str(user): (await browser.get(x_user=str(user))).text for user in range(60)}
    browser.close()
    assert first == again
    assert min(Counter(first.values()).values()) > 5, "each has a share"
    assert len(set(first.values())) == 3


async def test_a_mirror_gets_a_copy_whose_answer_nobody_sees(plane: EnvoyPlane, web: list[WebServer]) -> None:
    await plane.put(assignment(spec(Protocol.HTTP, "shadow"), web[1]))
    wanted = spec(Protocol.HTTP, mirror=Mirror("shadow"))
    await plane.put(assignment(wanted, web[0]))
    assert [(await get(wanted.listen.port, f"/{number}")).text for number in range(20)] == ["a"] * 20
    await eventually(lambda: len(web[1].requests) == 20)
    assert {path for path, _ in web[1].requests} == {f"/{number}" for number in range(20)}


# HTTP: what goes wrong


async def test_a_request_that_fails_is_tried_again_elsewhere(plane: EnvoyPlane, web: list[WebServer]) -> None:
    for server in web[:2]:
        server.failing["/x"] = 1
    plain = spec(Protocol.HTTP)
    await plane.put(assignment(plain, *web))
    told = [(await get(plain.listen.port, "/x")).status for _ in range(3)]
    assert sorted(told) == [200, 503, 503]
    for server in web[:2]:
        server.failing["/x"] = 1
    retrying = changed(plain, retry=Retry((RetryCondition.GATEWAY_ERROR,), attempts=2))
    await plane.put(assignment(retrying, *web, generation=2))
    assert [(await get(plain.listen.port, "/x")).status for _ in range(3)] == [200] * 3
    assert (await plane.counts())["it"].retries == 2


async def test_without_attempts_left_the_failure_is_passed_on(plane: EnvoyPlane, web: list[WebServer]) -> None:
    web[0].status = 503
    wanted = spec(Protocol.HTTP, retry=Retry((RetryCondition.SERVER_ERROR,), attempts=3, same_endpoint=True))
    await plane.put(assignment(wanted, web[0]))
    assert (await get(wanted.listen.port)).status == 503
    assert len(web[0].requests) == 4
    counts = (await plane.counts())["it"]
    assert (counts.requests, counts.errors, counts.retries) == (1, 1, 3)


async def test_a_request_that_takes_too_long_is_a_504(plane: EnvoyPlane, web: list[WebServer]) -> None:
    web[0].delay_s = 30.0
    wanted = spec(Protocol.HTTP, timeouts=Timeouts(request_s=0.2))
    await plane.put(assignment(wanted, web[0]))
    assert (await get(wanted.listen.port)).status == 504
    assert (await plane.counts())["it"].timeouts == 1


async def test_without_a_timeout_a_request_may_take_its_time(plane: EnvoyPlane, admin: Admin) -> None:
    """Envoy's own default is 15 s."""
    await plane.put(assignment(spec(Protocol.HTTP)))
    (host,) = (await dumped(admin, "Routes"))["it"]["virtual_hosts"]
    assert host["routes"][0]["route"]["timeout"] == "0s"


async def test_a_slow_try_is_hedged_by_another(plane: EnvoyPlane, web: list[WebServer]) -> None:
    """The first try is not given up: whichever answers first counts."""
    web[0].delay_s = 30.0
    wanted = spec(
        Protocol.HTTP,
        timeouts=Timeouts(request_s=25.0, per_try_s=0.1),
        retry=Retry((RetryCondition.GATEWAY_ERROR,), attempts=3),
        hedge=True,
    )
    await plane.put(assignment(wanted, web[0], web[1]))
    assert [(await get(wanted.listen.port)).text for _ in range(4)] == ["b"] * 4
    assert web[0].requests, "it was asked, too"


async def test_what_is_beyond_the_circuit_breaker_is_refused_at_once(plane: EnvoyPlane, web: list[WebServer]) -> None:
    web[0].delay_s = 30.0
    breaker = CircuitBreaker(max_connections=1, max_pending_requests=1)
    wanted = spec(Protocol.HTTP, circuit_breaker=breaker)
    await plane.put(assignment(wanted, web[0]))
    held = asyncio.create_task(get(wanted.listen.port, "/held"))
    await eventually(lambda: web[0].requests)
    pending = {asyncio.create_task(get(wanted.listen.port, "/pending")) for _ in range(2)}
    done, waiting = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    (answer,) = (one.result() for one in done)
    assert (answer.status, answer.headers.get("x-envoy-overloaded")) == (503, "true")
    assert (await plane.counts())["it"].overflows >= 1
    for task in (held, *waiting):
        task.cancel()
    await asyncio.wait({held, *waiting})


async def test_who_fails_in_a_row_is_kept_off_and_comes_back(plane: EnvoyPlane, web: list[WebServer]) -> None:
    web[0].status = 500
    wanted = spec(Protocol.HTTP, outlier_detection=OutlierDetection(2, 0.1, 0.1, 100))
    await plane.put(assignment(wanted, *web[:2]))
    browser = Browser(wanted.listen.port)

    async def kept_off() -> bool:
        await browser.get()
        await plane.counts()
        return (await plane.counts())["it"].ejections > 0

    await eventually(kept_off)
    web[0].status = 200

    async def is_back() -> bool:
        answer = await browser.get()
        return answer.text == "a" and answer.status == 200

    await eventually(is_back)
    browser.close()


async def test_who_fails_its_health_check_is_not_asked(plane: EnvoyPlane, web: list[WebServer]) -> None:
    web[0].status = 503
    wanted = spec(Protocol.HTTP, health_check=HealthCheck(0.1, 5.0, 1, 1, "/healthy"))
    await plane.put(assignment(wanted, *web[:2]))

    async def seen() -> bool:
        await plane.counts()
        return [one.healthy for one in plane.health("it")] == [False, True]

    await eventually(seen)
    assert [(await get(wanted.listen.port)).text for _ in range(6)] == ["b"] * 6
    assert "/healthy" in {path for path, _ in web[0].requests}
    web[0].status = 200

    async def is_back() -> bool:
        return (await get(wanted.listen.port)).text == "a"

    await eventually(is_back)


async def test_nobody_healthy_is_a_503(plane: EnvoyPlane, web: list[WebServer]) -> None:
    wanted = spec(Protocol.HTTP)
    await plane.put(assignment(wanted))
    assert (await get(wanted.listen.port)).status == 503


async def test_requests_beyond_the_rate_are_429(plane: EnvoyPlane, web: list[WebServer]) -> None:
    wanted = spec(Protocol.HTTP, rate_limit=RateLimit(1, 3600.0, 5))
    await plane.put(assignment(wanted, web[0]))
    assert [(await get(wanted.listen.port)).status for _ in range(7)] == [200] * 5 + [429] * 2
    assert (await plane.counts())["it"].rate_limited == 2


async def test_faults_are_injected_as_declared(plane: EnvoyPlane, web: list[WebServer]) -> None:
    wanted = spec(Protocol.HTTP, fault=Fault(abort_status=418, abort_percent=100.0))
    await plane.put(assignment(wanted, web[0]))
    assert (await get(wanted.listen.port)).status == 418
    assert not web[0].requests
    slow = changed(wanted, fault=Fault(delay_s=0.3, delay_percent=100.0))
    await plane.put(assignment(slow, web[0], generation=2))
    began = time.monotonic()
    assert (await get(wanted.listen.port)).text == "a"
    assert time.monotonic() - began >= 0.29  # its timers have milliseconds


async def test_http_is_spoken_by_tls_to_who_it_says(plane: EnvoyPlane, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    secure = WebServer("secure")
    await secure.start(server_context(authority))
    try:
        wanted = spec(Protocol.HTTP, tls=Tls("localhost", ca_file=str(authority.file)))
        await plane.put(assignment(wanted, secure))
        assert (await get(wanted.listen.port)).text == "secure"
        other = msgspec.structs.replace(
            wanted, tls=Tls("localhost", ca_file=str(authority.file), subject_alt_names=("elsewhere.example",))
        )
        await plane.put(assignment(other, secure, generation=2))
        assert (await get(wanted.listen.port)).status == 503
    finally:
        secure.stop()


def server_context(authority: Authority) -> ssl.SSLContext:
    pair = authority.issue("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert_file, pair.key_file)
    return context


def mutual(authority: Authority) -> ssl.SSLContext:
    """Lets in those whose certificate is of the authority."""
    context = server_context(authority)
    context.load_verify_locations(authority.file)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.mark.parametrize("curve", [ec.SECP224R1(), None], ids=["refused by Envoy", "that is none"])
async def test_with_a_certificate_that_is_bad_nothing_is_served_until_it_is_mended(
    plane: EnvoyPlane, tmp_path: Path, curve: ec.EllipticCurve | None
) -> None:
    """Python takes a key of this curve; Envoy says only when it has the cluster that it does not."""
    authority, secure = Authority(tmp_path), WebServer("secure")
    await secure.start(mutual(authority))
    try:
        pair = authority.issue("client", curve)
        if curve is None:
            pair.cert_file.write_text("none")
        wanted = spec(Protocol.HTTP, tls=Tls("localhost", str(authority.file), str(pair.cert_file), str(pair.key_file)))
        with pytest.raises(Refused):
            await plane.put(assignment(wanted, secure))
        assert await refuses(wanted.listen.port)
        authority.issue("client")
        await plane.put(assignment(wanted, secure))
        assert (await get(wanted.listen.port)).text == "secure"
    finally:
        secure.stop()


async def test_a_certificate_that_changes_to_a_bad_one_stops_nothing_else(plane: EnvoyPlane, tmp_path: Path) -> None:
    """Endpoints and policies go on changing, and an Envoy that starts anew gets the former certificate."""
    authority = Authority(tmp_path)
    secure = [WebServer("one"), WebServer("two")]
    for server in secure:
        await server.start(mutual(authority))
    try:
        pair = authority.issue("client")
        wanted = spec(Protocol.HTTP, tls=Tls("localhost", str(authority.file), str(pair.cert_file), str(pair.key_file)))
        await plane.put(assignment(wanted, secure[0]))
        authority.issue("client", ec.SECP224R1())
        await plane.put(assignment(wanted, secure[1], generation=2))
        assert (await get(wanted.listen.port)).text == "two"
        pair.cert_file.write_text("none")
        breaker = CircuitBreaker(max_connections=7)
        await plane.put(assignment(changed(wanted, circuit_breaker=breaker), secure[0], generation=3))
        assert (await get(wanted.listen.port)).text == "one"
        assert plane._child is not None
        os.kill(plane._child.pid, signal.SIGKILL)
        await eventually(lambda: answered_or_refused(wanted, "one"))
        assert "cannot use" in plane._complaints["it"]
    finally:
        for server in secure:
            server.stop()


async def test_latencies_are_in_the_histogram(plane: EnvoyPlane, web: list[WebServer]) -> None:
    wanted = spec(Protocol.HTTP)
    await plane.put(assignment(wanted, web[0]))
    for _ in range(3):
        await get(wanted.listen.port)

    async def all_seen() -> bool:
        counts = (await plane.counts())["it"]
        assert len(counts.buckets) == len(counts.bounds_s) + 1
        assert list(counts.bounds_s) == sorted(set(counts.bounds_s))
        return sum(counts.buckets) == 3 and counts.sum_s > 0

    await eventually(all_seen)


# gRPC


@pytest.fixture
async def rpc() -> AsyncIterator[list[HealthServer]]:
    made = [HealthServer(name) for name in "ab"]
    for one in made:
        await one.start()
    yield made
    for one in made:
        await one.stop()


async def test_grpc_calls_go_round(plane: EnvoyPlane, rpc: list[HealthServer]) -> None:
    wanted = spec(Protocol.GRPC)
    await plane.put(assignment(wanted, *rpc))
    async with aio.insecure_channel(f"127.0.0.1:{wanted.listen.port}") as channel:
        assert Counter([await check(channel) for _ in range(10)]) == {"a": 5, "b": 5}


async def test_grpc_calls_that_are_unavailable_are_tried_again(plane: EnvoyPlane, rpc: list[HealthServer]) -> None:
    rpc[0].failing = 1
    wanted = spec(Protocol.GRPC, retry=Retry((RetryCondition.GRPC_UNAVAILABLE,), attempts=2))
    await plane.put(assignment(wanted, rpc[0]))
    async with aio.insecure_channel(f"127.0.0.1:{wanted.listen.port}") as channel:
        assert await check(channel) == "a"
    assert rpc[0].calls == 2


async def test_the_deadline_of_a_grpc_call_reaches_the_server(plane: EnvoyPlane, rpc: list[HealthServer]) -> None:
    wanted = spec(Protocol.GRPC)
    await plane.put(assignment(wanted, rpc[0]))
    async with aio.insecure_channel(f"127.0.0.1:{wanted.listen.port}") as channel:
        await check(channel, 40.0)
    assert rpc[0].left_s is not None
    assert 0 < rpc[0].left_s <= 40


async def test_grpc_is_split_by_header_and_limited(plane: EnvoyPlane, rpc: list[HealthServer]) -> None:
    await plane.put(assignment(spec(Protocol.GRPC, "canary"), rpc[1]))
    splits = (Split("canary", header_name="canary"),)
    wanted = spec(Protocol.GRPC, splits=splits, rate_limit=RateLimit(1, 3600.0, 2))
    await plane.put(assignment(wanted, rpc[0]))
    async with aio.insecure_channel(f"127.0.0.1:{wanted.listen.port}") as channel:
        assert await check(channel, canary="1") == "b"
        assert await check(channel) == "a"
        with pytest.raises(aio.AioRpcError) as caught:
            await check(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_grpc_fault_is_unavailable(plane: EnvoyPlane, rpc: list[HealthServer]) -> None:
    wanted = spec(Protocol.GRPC, fault=Fault(abort_status=503, abort_percent=100.0))
    await plane.put(assignment(wanted, rpc[0]))
    async with aio.insecure_channel(f"127.0.0.1:{wanted.listen.port}") as channel:
        with pytest.raises(aio.AioRpcError) as caught:
            await check(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not rpc[0].calls


# Redis


async def command(port: int, *words: str) -> str:
    """The first line of the answer, and the second of one that has a value."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write("".join((f"*{len(words)}\r\n", *(f"${len(word)}\r\n{word}\r\n" for word in words))).encode())
        line = (await reader.readline()).decode().strip()
        return (await reader.readline()).decode().strip() if line.startswith("$") and line != "$-1" else line
    finally:
        writer.close()


async def test_redis_keys_are_spread_and_found_again(plane: EnvoyPlane) -> None:
    with redis() as one, redis() as two, redis() as three:
        shards = [one, two, three]
        wanted = spec(Protocol.REDIS)
        await plane.put(assignment(wanted, *(Endpoint(shard) for shard in shards)))
        for number in range(150):
            assert await command(wanted.listen.port, "SET", f"key{number}", str(number)) == "+OK"
        for number in range(150):
            assert await command(wanted.listen.port, "GET", f"key{number}") == str(number)
        sizes = [int((await command(port_of(shard), "DBSIZE"))[1:]) for shard in shards]
        assert sum(sizes) == 150
        assert min(sizes) > 15
        for number in range(20):
            await command(wanted.listen.port, "SET", f"{{tag}}{number}", "x")
        tagged = [int((await command(port_of(shard), "DBSIZE"))[1:]) for shard in shards]
        assert sorted(after - before for before, after in zip(sizes, tagged, strict=True)) == [0, 0, 20]


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


async def test_redis_is_told_the_password_of_a_file_that_may_change(plane: EnvoyPlane, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("wrong\n")
    with redis("--requirepass", "right") as shard:
        wanted = spec(Protocol.REDIS, redis_auth=RedisAuth(str(file)))
        await plane.put(assignment(wanted, Endpoint(shard)))
        assert (await command(wanted.listen.port, "SET", "k", "v")).startswith("-")
        file.write_text("right\n")

        async def is_stored() -> bool:
            return await command(wanted.listen.port, "SET", "k", "v") == "+OK"

        await eventually(is_stored)


# What Envoy has


async def dumped(admin: Admin, kind: str) -> dict[str, Any]:
    """The resources of a kind that Envoy has, by name."""
    found = {}
    for section in (await admin.get("/config_dump?include_eds"))["configs"]:
        if section["@type"].rpartition(".")[2] != f"{kind}ConfigDump":
            continue
        for one in [*section.get("dynamic_active_clusters", ()), *section.get("dynamic_route_configs", ())]:
            said = one.get("cluster") or one.get("route_config")
            found[said["name"]] = said
        for one in section.get("dynamic_listeners", ()):
            found[one["name"]] = one["active_state"]["listener"]
    return found


# What was once a surprise


async def test_a_policy_reaches_connections_that_are_open(plane: EnvoyPlane, web: list[WebServer]) -> None:
    wanted = spec(Protocol.HTTP)
    await plane.put(assignment(wanted, web[0]))
    browser = Browser(wanted.listen.port)
    assert (await browser.get()).status == 200
    await plane.put(assignment(changed(wanted, rate_limit=RateLimit(1, 3600.0, 2)), web[0], generation=2))
    assert [(await browser.get()).status for _ in range(4)] == [200, 200, 429, 429]
    browser.close()
    assert (await plane.counts())["it"].active_connections <= 1


async def test_a_second_envoy_does_not_share_the_port(plane: EnvoyPlane, web: list[WebServer], tmp_path: Path) -> None:
    wanted = spec(Protocol.HTTP)
    await plane.put(assignment(wanted, web[0]))
    second = make(EnvoySettings(path=envoy_or_skip()), tmp_path / "second")
    assert second is not None
    await second.start()
    try:
        with pytest.raises(Refused, match="Address already in use") as caught:
            await second.put(assignment(wanted, web[1]))
        assert str(caught.value) == str(caught.value).strip()
    finally:
        await second.stop()
    assert (await get(wanted.listen.port)).text == "a"


async def test_what_is_refused_leaves_the_others(plane: EnvoyPlane, web: list[WebServer]) -> None:
    good = [spec(Protocol.HTTP, f"good{number}") for number in range(3)]
    bad = [msgspec.structs.replace(spec(Protocol.TCP, f"bad{n}"), listen=good[n].listen) for n in range(2)]
    await asyncio.gather(*(plane.put(assignment(one, web[0])) for one in good))
    others = [spec(Protocol.HTTP, f"other{number}") for number in range(3)]
    done = await asyncio.gather(
        *(plane.put(assignment(one, web[1])) for one in [*bad, *others]), return_exceptions=True
    )
    assert [type(one) for one in done] == [Refused, Refused, type(None), type(None), type(None)]
    assert [(await get(one.listen.port)).text for one in [*good, *others]] == ["a"] * 3 + ["b"] * 3


async def test_a_cluster_that_changes_is_served_at_once(plane: EnvoyPlane, web: list[WebServer]) -> None:
    """Envoy wants the endpoints of a cluster that changed anew, else it waits for them for 15 s."""
    wanted = spec(Protocol.HTTP)
    await plane.put(assignment(wanted, web[0]))
    failed = 0
    for generation in range(2, 12):
        breaker = CircuitBreaker(max_connections=1000 + generation)
        await plane.put(
            assignment(changed(wanted, circuit_breaker=breaker), web[generation % 2], generation=generation)
        )
        answer = await get(wanted.listen.port)
        failed += answer.status != 200
        await eventually(partial(answered_by, wanted, web[generation % 2].name))
    assert not failed


async def answered_by(wanted: Spec, name: str) -> bool:
    return (await get(wanted.listen.port)).text == name


async def test_what_is_removed_and_declared_again_is_served_again(plane: EnvoyPlane, web: list[WebServer]) -> None:
    wanted = spec(Protocol.HTTP)
    for generation in range(1, 11):
        await plane.put(assignment(wanted, web[generation % 3], generation=generation))
        assert (await get(wanted.listen.port)).text == web[generation % 3].name
        await plane.remove("it")
    assert not await plane.counts()


async def test_an_envoy_that_was_killed_is_back_with_everything(plane: EnvoyPlane, web: list[WebServer]) -> None:
    known = [spec(Protocol.HTTP, f"it{number}") for number in range(5)]
    for one in known:
        await plane.put(assignment(one, web[0]))
    lines = LineServer("line")
    async with running(lines):
        tcp = spec(Protocol.TCP, "tcp")
        await plane.put(assignment(tcp, lines))
        assert plane._child is not None
        before = plane._child.pid
        os.kill(before, signal.SIGKILL)
        late = spec(Protocol.HTTP, "late")
        await plane.put(assignment(late, web[1]))
        assert plane._child.pid != before

        async def all_answer() -> bool:
            try:
                told = [(await get(one.listen.port)).text for one in [*known, late]]
                return told == ["a"] * 5 + ["b"] and await say(tcp.listen.port) == ["line x"]
            except OSError:
                return False

        await eventually(all_answer)


async def test_at_the_end_nobody_is_accepted_and_who_was_is_answered(web: list[WebServer], tmp_path: Path) -> None:
    plane = make(EnvoySettings(path=envoy_or_skip()), tmp_path)
    assert plane is not None
    await plane.start()
    wanted = spec(Protocol.HTTP)
    web[0].delay_s = 0.5
    await plane.put(assignment(wanted, web[0]))
    before = [asyncio.create_task(get(wanted.listen.port)) for _ in range(5)]
    await eventually(lambda: len(web[0].requests) == 5)
    stopping = asyncio.create_task(plane.stop())
    later: list[str] = []
    while not stopping.done():
        try:
            later.append((await get(wanted.listen.port)).text)
        except ConnectionError as error:
            later.append("refused" if error.errno else "cut")  # the kernel resets what is in a listener's queue
    await stopping
    assert {(await one).text for one in before} == {"a"}
    assert set(later) <= {"a", "refused"}, "none is cut"
    assert later[-1] == "refused"


async def test_what_is_put_while_envoy_is_away_is_served_when_it_is_back(
    plane: EnvoyPlane, web: list[WebServer]
) -> None:
    wanted = spec(Protocol.HTTP)
    await plane.put(assignment(wanted, web[0]))
    assert plane._child is not None
    os.kill(plane._child.pid, signal.SIGSTOP)
    putting = asyncio.create_task(plane.put(assignment(wanted, web[1], generation=2)))
    await asyncio.sleep(0)
    os.kill(plane._child.pid, signal.SIGKILL)
    await putting
    await eventually(lambda: answered_or_refused(wanted, "b"))


async def answered_or_refused(wanted: Spec, name: str) -> bool:
    with contextlib.suppress(OSError):
        return await answered_by(wanted, name)
    return False


async def test_removing_or_draining_ends_a_put_that_waits(web: list[WebServer], tmp_path: Path) -> None:
    plane = make(EnvoySettings(mode="attach"), tmp_path)
    assert plane is not None
    await plane.start()
    try:
        for end in (plane.drain, plane.remove):
            putting = asyncio.create_task(plane.put(assignment(spec(Protocol.HTTP), web[0])))
            while not plane._changing:
                await asyncio.sleep(0)
            await end("it")
            with pytest.raises(Refused, match="drained or removed"):
                await putting
        assert not plane._served
    finally:
        await plane.stop()


async def test_connections_are_known_as_soon_as_a_drain_has_begun(plane: EnvoyPlane) -> None:
    lines = LineServer("a")
    async with running(lines):
        wanted = spec(Protocol.TCP)
        await plane.put(assignment(wanted, lines))
        reader, writer = await asyncio.open_connection("127.0.0.1", wanted.listen.port)
        writer.write(b"1\n")
        assert await reader.readline() == b"a 1\n"
        await plane.drain("it")
        assert plane.connections("it") == 1
        writer.close()
        await eventually(lambda: plane.connections("it") == 0)


async def test_traffic_goes_on_without_this_server_and_the_next_one_changes_nothing(
    web: list[WebServer], tmp_path: Path
) -> None:
    """An Envoy beside us, as in a pod."""
    settings = EnvoySettings(mode="attach")
    first, second = make(settings, tmp_path), make(settings, tmp_path)
    assert first is not None
    assert second is not None
    known = [assignment(spec(Protocol.HTTP, f"it{number}"), web[number % 3]) for number in range(5)]
    config = tmp_path / "bootstrap.json"
    config.write_bytes(msgspec.json.encode(first._bootstrap))
    envoy = await asyncio.create_subprocess_exec(
        str(envoy_or_skip()), "-c", str(config), "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"
    )
    admin = Admin(tmp_path / "admin.sock")
    try:
        await first.start()
        for one in known:
            await first.put(one)
        names = [f"{kind}_manager.{kind}_{what}" for kind in ("listener", "cluster") for what in ("modified", "added")]
        before = [await stat(admin, name) for name in names]
        browser = Browser(known[0].spec.listen.port)
        assert (await browser.get()).text == "a"
        await first.stop()
        assert (await browser.get()).text == "a"
        await second.start()
        await eventually(lambda: second.state.live)
        await asyncio.gather(*(second.put(one) for one in known[:4]))
        assert (await get(known[4].spec.listen.port)).text == "b", "what nobody has declared yet goes on"
        assert [await stat(admin, name) for name in names] == before
        assert (await browser.get()).text == "a"
        await second.put(assignment(known[0].spec, web[1], generation=2))
        await eventually(lambda: answered_by(known[0].spec, "b"))
        browser.close()
        second._xds.sweep()  # as it does by itself after a while
        await eventually(lambda: refuses(known[4].spec.listen.port))
        assert (await get(known[1].spec.listen.port)).text == "b"
    finally:
        await second.stop()
        await first.stop()
        envoy.kill()
        await envoy.wait()


async def refuses(port: int) -> bool:
    try:
        await get(port)
    except ConnectionError:
        return True
    return False


async def test_two_hundred_upstreams_at_once_are_all_served(plane: EnvoyPlane, web: list[WebServer]) -> None:
    below = random.sample(range(15_000, 32_000), 1000)  # what the kernel gives to connections is taken too soon
    ports = [port for port in below if not HostPorts().objection(Listen(port))][:200]
    usual = spec(Protocol.HTTP)
    known = [
        msgspec.structs.replace(
            usual, upstream_id=f"it{number}", listen=msgspec.structs.replace(usual.listen, port=port)
        )
        for number, port in enumerate(ports)
    ]
    await asyncio.gather(*(plane.put(assignment(one, web[0])) for one in known))
    assert {(await get(one.listen.port)).text for one in known} == {"a"}
