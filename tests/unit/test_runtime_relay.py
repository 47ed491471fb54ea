"""Claims about the relay: whatever passes through it stays as it was."""

from __future__ import annotations

import asyncio
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from grpc import aio
from support import echo
from support.certificates import Authority
from support.echo import Echo
from support.serving import Client, details, dial, running, serving, settings

from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.config import Tls, Upstream, UpstreamTls
from retinue_server.runtime.dispatch import Pattern, Role, Service
from retinue_server.runtime.relay import RelayServicer, UpstreamChannel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from retinue_server.runtime.lifecycle import Process

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@asynccontextmanager
async def relaying(tmp_path: Path, upstream: Upstream, **more: Any) -> AsyncIterator[Process]:
    channel = UpstreamChannel(upstream)
    service = Service(echo.DESCRIPTOR, RelayServicer(echo.DESCRIPTOR, channel), roles={"Operate": Role.OPERATOR})
    relay = Pattern(name="relay", services=[service], parts=[channel], health=channel)
    async with serving(settings(tmp_path / "relay", **more), [relay]) as process:
        yield process


@pytest.fixture
def servicer() -> echo.EchoServicer:
    return echo.EchoServicer()


@pytest.fixture
async def process(tmp_path: Path, servicer: echo.EchoServicer) -> AsyncIterator[Process]:
    async with running(settings(tmp_path), servicer) as upstream:
        to = Upstream(address=upstream.addresses["listen"][0])
        async with relaying(tmp_path, to, http="127.0.0.1:0") as relay:
            yield relay


@pytest.fixture
async def client(process: Process) -> AsyncIterator[Client]:
    async with dial(process.addresses["listen"][0]) as client:
        yield client


async def test_each_kind_of_method_goes_through(client: Client) -> None:
    say = client.Say(Echo(text="hi"))
    assert (await say).text == "hi"
    assert dict(await say.trailing_metadata())["role"] == "app"
    assert [r.text async for r in client.Repeat(Echo(text="r", repeat_count=3))] == ["r"] * 3
    assert (await client.Join(iter([Echo(text="a"), Echo(text="b")]))).text == "a b"
    chat = client.Chat()
    for text in ("x", "y"):
        await chat.write(Echo(text=text))
        assert (await chat.read()).text == text
    await chat.done_writing()
    assert await chat.read() is aio.EOF
    assert dict(await chat.trailing_metadata())["mood"] == "good"


async def test_a_status_with_its_details_passes_unchanged(client: Client) -> None:
    calls = [client.Fail(Echo(text="lease")), client.Chat(iter([Echo(text="lease")]))]
    for call in calls:
        assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert await call.details() == "cannot complete: the lease is lost"
    with pytest.raises(aio.AioRpcError) as caught:
        await calls[0]
    assert details(caught.value)[1]["ErrorInfo"].metadata == {"task_id": "t1"}
    assert dict(await calls[1].trailing_metadata())["mood"] == "good"
    with pytest.raises(aio.AioRpcError) as caught:
        await client.Fail(Echo(text="busy"))
    assert details(caught.value)[1]["ErrorInfo"].reason == "ENGINE_UNAVAILABLE"


async def test_deadline_and_metadata_pass_and_authority_stays(client: Client, servicer: echo.EchoServicer) -> None:
    sent = (("traceparent", TRACEPARENT), ("x-colour", "blue"), ("authorization", "Bearer mine"))
    await client.Say(Echo(), timeout=60, metadata=sent)
    assert servicer.metadata["traceparent"] == TRACEPARENT
    assert servicer.metadata["x-colour"] == "blue"
    assert "authorization" not in servicer.metadata
    assert servicer.remaining is not None
    assert 30 < servicer.remaining <= 60.6  # gRPC may round a timeout up by 1 % on the wire


async def test_cancellation_reaches_the_upstream(client: Client, servicer: echo.EchoServicer) -> None:
    waits = asyncio.ensure_future(client.Wait(Echo()))
    await expect(servicer, "waits")
    waits.cancel()
    await expect(servicer, "wait cancelled")
    join = client.Join()
    await join.write(Echo(text="half"))
    await expect(servicer, "join read")
    join.cancel()
    await expect(servicer, "join cancelled")
    chat = client.Chat()
    await chat.write(Echo(text="x"))
    await chat.read()
    chat.cancel()
    await expect(servicer, "chat cancelled")
    repeat = client.Repeat(Echo(text="wait"))
    await expect(servicer, "repeat waits")
    repeat.cancel()
    await expect(servicer, "repeat cancelled")


async def expect(servicer: echo.EchoServicer, event: str) -> None:
    async with asyncio.timeout(60):
        assert await servicer.events.get() == event


async def test_a_slow_reader_holds_the_upstream_back(client: Client, servicer: echo.EchoServicer) -> None:
    call = client.Repeat(Echo(data=bytes(100_000), repeat_count=1000))
    await call.read()
    seen = -1
    while servicer.written != seen:  # until it writes no more
        seen = servicer.written
        await asyncio.sleep(0.2)
    assert 0 < seen < 900
    call.cancel()
    await expect(servicer, "repeat cancelled")


async def test_the_relay_keeps_the_roles(process: Process, client: Client) -> None:
    assert await client.Operate(Echo()).code() is grpc.StatusCode.PERMISSION_DENIED
    async with dial(process.addresses["control"][0]) as control:  # the upstream sees the relay's role: app
        assert await control.Operate(Echo()).code() is grpc.StatusCode.PERMISSION_DENIED


async def test_the_connect_protocol_goes_through_a_relay(process: Process) -> None:
    base = f"http://{process.addresses['http'][0]}/{echo.SERVICE}"
    async with httpx.AsyncClient() as web:
        assert (await web.post(f"{base}/Say", json={"text": "json"})).json() == {"text": "json"}
        reply = await web.post(f"{base}/Fail", json={"text": "lease"})
        assert reply.json()["details"][0]["debug"]["reason"] == "LEASE_LOST"
        assert (await web.post(f"{base}/Say", json={"txt": ""})).json()["code"] == "invalid_argument"
        body = b'{"text":"s","repeatCount":1}'
        stream = await web.post(
            f"{base}/Repeat",
            content=struct.pack(">BI", 0, len(body)) + body,
            headers={"content-type": "application/connect+json"},
        )
        assert b'"s"' in stream.content


async def test_an_upstream_that_is_down_is_unavailable_until_it_comes(
    tmp_path: Path, servicer: echo.EchoServicer
) -> None:
    address = f"unix:{tmp_path}/up.sock"
    async with (
        relaying(tmp_path, Upstream(address=address)) as process,
        dial(process.addresses["listen"][0]) as client,
    ):
        for call in (client.Say(Echo()), client.Join(iter([Echo()]))):
            with pytest.raises(aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            found = details(caught.value)[1]
            assert found["ErrorInfo"].reason == "UPSTREAM_UNAVAILABLE"
            assert found["RetryInfo"].retry_delay.ToMilliseconds() > 0
        assert await client.Chat(iter([Echo()])).code() is grpc.StatusCode.UNAVAILABLE
        async with running(settings(tmp_path, listen=(address,)), servicer):
            async with asyncio.timeout(60):
                while await client.Say(Echo()).code() is not grpc.StatusCode.OK:
                    await asyncio.sleep(0.1)


async def test_an_outage_is_one_short_line_in_the_log_however_often_callers_try(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = f"unix:{tmp_path}/up.sock"
    async with (
        relaying(tmp_path, Upstream(address=where)) as process,
        dial(process.addresses["listen"][0]) as client,
    ):
        for _ in range(5):
            assert await client.Say(Echo()).code() is grpc.StatusCode.UNAVAILABLE
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line.startswith(f"cannot reach the upstream {where}: ")
    assert "AioRpcError" not in line
    assert "\n" not in line


async def test_the_relay_holds_the_credentials(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    authority = Authority(tmp_path)
    pair, ours = authority.issue("server"), authority.issue("relay")
    tokens, token = tmp_path / "tokens", tmp_path / "token"
    for path, text in ((tokens, "operator secret"), (token, "secret\n")):
        path.write_text(text)
        path.chmod(0o600)
    tls = Tls(cert_file=pair.cert_file, key_file=pair.key_file, client_ca_file=authority.file)
    where = settings(tmp_path, tls=tls, token_file=tokens, require_token=True)
    async with running(where, servicer) as upstream:
        to = Upstream(
            address=upstream.addresses["listen"][0],
            token_file=token,
            tls=UpstreamTls(
                ca_file=authority.file,
                cert_file=ours.cert_file,
                key_file=ours.key_file,
                server_name="localhost",
            ),
        )
        async with relaying(tmp_path, to) as relay, dial(relay.addresses["control"][0]) as client:
            assert (await client.Operate(Echo(text="x"))).text == "x"


async def test_an_open_token_of_the_upstream_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    with pytest.raises(StartError, match="chmod o="):
        async with relaying(tmp_path, Upstream(address="127.0.0.1:1", token_file=token)):
            pass
