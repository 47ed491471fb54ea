"""Claims about the gRPC listeners, over real loopback sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from grpc import aio
from grpc._cython import cygrpc  # type: ignore[attr-defined] # no stubs for it
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from support import echo
from support.certificates import Authority
from support.echo import Echo
from support.serving import Client, details, dial, running, settings

from retinue_server.runtime import relay, server
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.config import Limits, Tls
from retinue_server.runtime.dispatch import Service
from retinue_server.runtime.metrics import Family, Sample

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from retinue_server.runtime.lifecycle import Process

SAY = f"/{echo.SERVICE}/Say"


SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(address: str, service: str = "") -> int:
    async with aio.insecure_channel(address) as channel:
        check: Any = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        status: int = (await check(health_pb2.HealthCheckRequest(service=service), timeout=60)).status
        return status


def watch_health(channel: aio.Channel, service: str) -> Any:
    method: Any = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return method(health_pb2.HealthCheckRequest(service=service))


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def fetch(address: str, path: str, verb: str = "GET") -> tuple[int, str]:
    """Status and body; 0 when the connection closes without an answer."""
    reader, writer = await connect(address)
    writer.write(f"{verb} {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    reply = b""
    with suppress(OSError):
        reply = await reader.read()
    writer.close()
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body.decode()


def token_file(directory: Path, *lines: str) -> Path:
    path = directory / "tokens"
    path.write_text("\n".join(("# tokens", *lines)))
    path.chmod(0o600)
    return path


@pytest.fixture
def servicer() -> echo.EchoServicer:
    return echo.EchoServicer()


@pytest.fixture
async def process(tmp_path: Path, servicer: echo.EchoServicer) -> AsyncIterator[Process]:
    async with running(settings(tmp_path), servicer) as process:
        yield process


@pytest.fixture
async def client(process: Process) -> AsyncIterator[Client]:
    async with dial(process.addresses["listen"][0]) as client:
        yield client


async def test_each_kind_of_method_is_served(client: Client) -> None:
    assert (await client.Say(Echo(text="hi"))).text == "hi"
    assert [r.text async for r in client.Repeat(Echo(text="r", repeat_count=3))] == ["r"] * 3
    assert (await client.Join(iter([Echo(text="a"), Echo(text="b")]))).text == "a b"
    chat = client.Chat(iter([Echo(text="x"), Echo(text="y")]))
    assert [r.text async for r in chat] == ["x", "y"]
    assert dict(await chat.trailing_metadata())["mood"] == "good"


async def test_a_domain_error_becomes_a_status_with_its_reason(client: Client) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await client.Fail(Echo(text="lease"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    status, found = details(caught.value)
    assert status.code == 9
    assert status.message == caught.value.details()
    assert found["ErrorInfo"].reason == "LEASE_LOST"
    assert found["ErrorInfo"].domain == "retinue"
    assert found["ErrorInfo"].metadata == {"task_id": "t1"}
    assert "RetryInfo" not in found


async def test_a_reflection_client_finds_the_services_and_their_file(process: Process) -> None:
    for name in ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection"):
        async with aio.insecure_channel(process.addresses["listen"][0]) as channel:
            ask: Any = channel.stream_stream(
                f"/{name}/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            call = ask()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            names = {s.name for s in (await call.read()).list_services_response.service}
            assert {echo.SERVICE, "grpc.health.v1.Health"} <= names
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=echo.SERVICE))
            assert (await call.read()).file_descriptor_response.file_descriptor_proto
            await call.done_writing()


async def test_health_is_told_by_service_name(process: Process) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    async with aio.insecure_channel(process.addresses["control"][0]) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        for name in ("", echo.SERVICE):
            assert (await check(health_pb2.HealthCheckRequest(service=name))).status == serving
        with pytest.raises(aio.AioRpcError) as caught:
            await check(health_pb2.HealthCheckRequest(service="no.Such"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_control_socket_is_for_operators(process: Process, client: Client) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await client.Operate(Echo())
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert details(caught.value)[1]["ErrorInfo"].reason == "ROLE_REQUIRED"
    control = process.addresses["control"][0]
    async with dial(control) as operator:
        assert (await operator.Operate(Echo(text="x"))).text == "x"
    assert Path(control.removeprefix("unix:")).stat().st_mode & 0o777 == 0o600


async def test_a_cancelled_client_stream_is_never_taken_for_a_complete_one(
    client: Client, servicer: echo.EchoServicer
) -> None:
    for _ in range(50):
        call = client.Join()
        await call.write(Echo(text="half"))
        assert await servicer.events.get() == "join read"
        call.cancel()
        async with asyncio.timeout(60):
            assert await servicer.events.get() == "join cancelled"


async def test_every_violation_is_named(client: Client) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await client.Fail(Echo(text="fields"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    fields = details(caught.value)[1]["BadRequest"].field_violations
    assert [v.field for v in fields] == ["text", "data"]


async def test_details_stay_under_six_kibibytes_and_say_what_they_leave_out(client: Client) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await client.Fail(Echo(text="many"))
    status, found = details(caught.value)
    shown = len(found["BadRequest"].field_violations)
    assert status.ByteSize() < 6 * 1024
    assert shown > 20
    assert int(found["ErrorInfo"].metadata["omitted"]) == 500 - shown


async def test_a_message_of_any_length_arrives_shortened(client: Client) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await client.Fail(Echo(text="long"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert len(caught.value.details() or "") == 512
    assert details(caught.value)[1]["ErrorInfo"].reason == "TASK_NOT_FOUND"


async def test_what_may_be_tried_again_says_when(client: Client) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await client.Fail(Echo(text="busy"))
    assert details(caught.value)[1]["RetryInfo"].retry_delay.ToMilliseconds() == 1500


async def test_an_unexpected_exception_goes_to_the_log_under_an_id(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await client.Fail(Echo(text="bug"))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value.trailing_metadata()) + str(caught.value.details())
    error_id = details(caught.value)[1]["ErrorInfo"].metadata["error_id"]
    assert error_id in (caught.value.details() or "")
    (record,) = [r for r in caplog.records if error_id in r.getMessage()]
    assert record.exc_info is not None
    assert "the secret cause" in str(record.exc_info[1])


async def test_a_stream_that_fails_midway_keeps_what_it_sent(client: Client) -> None:
    call = client.Repeat(Echo(text="lease", repeat_count=2))
    assert [(await call.read()).text, (await call.read()).text] == ["lease", "lease"]
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    assert details(caught.value)[1]["ErrorInfo"].reason == "LEASE_LOST"


async def test_a_cancelled_call_cancels_its_handler(client: Client, servicer: echo.EchoServicer) -> None:
    call = client.Wait(Echo())
    waiting = asyncio.ensure_future(call)
    assert await servicer.events.get() == "waits"
    waiting.cancel()
    async with asyncio.timeout(60):
        assert await servicer.events.get() == "wait cancelled"


async def test_a_deadline_that_passes_cancels_the_handler(client: Client, servicer: echo.EchoServicer) -> None:
    for patience in (0.1, 1, 10):
        with pytest.raises(aio.AioRpcError) as caught:
            await client.Wait(Echo(), timeout=patience)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if not servicer.events.empty():  # else it was over before the call arrived
            break
    async with asyncio.timeout(60):
        assert [await servicer.events.get(), await servicer.events.get()] == ["waits", "wait cancelled"]


async def test_a_handler_sees_deadline_and_metadata_without_binary_keys(
    client: Client, servicer: echo.EchoServicer
) -> None:
    await client.Say(Echo(), timeout=60, metadata=(("x-a", "1"), ("x-a", "2"), ("x-bin", b"\xff")))
    assert servicer.metadata["x-a"] == "2"
    assert "x-bin" not in servicer.metadata
    assert servicer.remaining is not None
    assert 30 < servicer.remaining <= 60.6  # gRPC may round a timeout up by 1 % on the wire


async def test_a_malformed_message_is_an_invalid_argument(process: Process, client: Client) -> None:
    async with aio.insecure_channel(process.addresses["listen"][0]) as channel:
        for method, kind in (("Say", "unary_unary"), ("Repeat", "unary_stream")):
            call = getattr(channel, kind)(f"/{echo.SERVICE}/{method}")(b"\xff\xff")
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        for method, kind in (("Join", "stream_unary"), ("Chat", "stream_stream")):
            call = getattr(channel, kind)(f"/{echo.SERVICE}/{method}")(iter([b"\xff\xff"]))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await client.Say(Echo(text="alive"))).text == "alive"


async def test_a_request_over_four_mebibytes_is_refused(client: Client) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await client.Say(Echo(data=bytes(4 * 1024 * 1024 + 1)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_reply_over_three_mebibytes_is_refused_with_a_reason(client: Client) -> None:
    largest = 3 * 1024 * 1024 - 16
    assert len((await client.Say(Echo(repeat_count=largest))).data) == largest
    with pytest.raises(aio.AioRpcError) as caught:
        await client.Say(Echo(repeat_count=3 * 1024 * 1024))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(caught.value)[1]["ErrorInfo"].reason == "MESSAGE_TOO_LARGE"


async def test_calls_over_the_limit_are_told_to_come_back(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    limits = Limits(max_concurrent_calls=2, max_concurrent_streams=1)
    async with (
        running(settings(tmp_path, limits=limits), servicer) as process,
        dial(process.addresses["listen"][0]) as client,
        dial(process.addresses["control"][0]) as control,
    ):
        waiting = [asyncio.ensure_future(one.Wait(Echo())) for one in (client, control)]
        assert [await servicer.events.get(), await servicer.events.get()] == ["waits", "waits"]
        chat = client.Chat()
        await chat.write(Echo(text="a"))
        await chat.read()
        for refused in (client.Say(Echo()), control.Join(iter([]))):
            with pytest.raises(aio.AioRpcError) as caught:
                await refused
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details(caught.value)[1]["ErrorInfo"].reason == "CONCURRENCY_LIMIT"
            assert details(caught.value)[1]["RetryInfo"].retry_delay.ToMilliseconds() > 0
        servicer.release.set()
        await asyncio.gather(*waiting)
        await chat.done_writing()
        assert await chat.code() is grpc.StatusCode.OK
        assert (await client.Say(Echo(text="room"))).text == "room"
        assert (await client.Join(iter([Echo(text="too")]))).text == "too"


async def test_calls_that_wait_for_a_busy_loop_are_answered_or_refused_in_words(
    tmp_path: Path, servicer: echo.EchoServicer
) -> None:
    """gRPC's own limit on them cuts calls off, as CANCELLED."""
    async with running(settings(tmp_path), servicer) as process:
        channel = grpc.insecure_channel(process.addresses["listen"][0])
        say: Any = channel.unary_unary(SAY, request_serializer=Echo.SerializeToString)
        calls: list[Any] = []
        sender = threading.Thread(target=lambda: calls.extend(say.future(Echo(), timeout=250) for _ in range(4_000)))
        sender.start()
        sender.join()  # the loop is busy with this
        codes = await asyncio.to_thread(lambda: {call.code() for call in calls})
        channel.close()
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


async def test_a_slow_reader_holds_the_writer_back(client: Client, servicer: echo.EchoServicer) -> None:
    call = client.Repeat(Echo(data=bytes(100_000), repeat_count=1000))
    await call.read()
    seen = -1
    while servicer.written != seen:  # until it writes no more
        seen = servicer.written
        await asyncio.sleep(0.2)
    assert 0 < seen < 900
    call.cancel()
    async with asyncio.timeout(60):
        assert await servicer.events.get() == "repeat cancelled"


@pytest.mark.parametrize("name", ["listen", "control", "probe", "metrics"])
async def test_garbage_does_not_stop_a_listener(tmp_path: Path, servicer: echo.EchoServicer, name: str) -> None:
    where = settings(tmp_path, probe="127.0.0.1:0", metrics="127.0.0.1:0")
    async with running(where, servicer) as process:
        for garbage in (
            b"\0" * 70_000,
            b"GET / HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff",
            b"",
        ):
            reader, writer = await connect(process.addresses[name][0])
            with suppress(OSError):
                writer.write(garbage)
                writer.write_eof()
                async with asyncio.timeout(60):
                    await reader.read()
            writer.close()
        await asyncio.sleep(0)
        if name == "metrics":
            assert (await fetch(process.addresses[name][0], "/healthz"))[0] == 200
        else:
            assert await health_of(process.addresses[name][0]) == SERVING


async def test_a_listener_on_every_address_of_a_name(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    async with running(settings(tmp_path, listen=("localhost:0",)), servicer) as process:
        bound = process.addresses["listen"]
        assert len({address.rpartition(":")[2] for address in bound}) == 1
        for address in bound:
            assert await health_of(address) == SERVING


async def test_a_unix_socket_for_apps_is_for_its_group(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    path = tmp_path / "deep" / "app.sock"
    async with running(settings(tmp_path, listen=(f"unix:{path}",)), servicer):
        assert path.stat().st_mode & 0o777 == 0o660
        assert path.parent.stat().st_mode & 0o070 == 0o050
        assert await health_of(f"unix:{path}") == SERVING
        assert not path.with_name("app.sock~").exists()
    assert not path.exists()


async def test_a_taken_port_is_refused_with_its_owner(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    async with running(settings(tmp_path), servicer) as process:
        taken = process.addresses["listen"][0]
        for more in ({"listen": (taken,)}, {"probe": taken}, {"metrics": taken}, {"http": taken}):
            with pytest.raises(StartError) as caught:
                async with running(settings(tmp_path / "2", **more), echo.EchoServicer()):
                    pass
            option = f"--{next(iter(more))}"
            assert f"cannot listen on {taken}: pid {os.getpid()} (" in str(caught.value)
            assert option in str(caught.value)
        assert await health_of(taken) == SERVING


async def test_a_live_socket_is_refused_with_its_owner(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    async with running(settings(tmp_path), servicer) as process:
        with pytest.raises(StartError, match=rf"pid {os.getpid()} \(.*holds the socket.*--control"):
            async with running(settings(tmp_path), echo.EchoServicer()):
                pass
        assert await health_of(process.addresses["control"][0]) == SERVING


async def test_a_socket_left_behind_is_replaced(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "c.sock"))
    async with running(settings(tmp_path), servicer) as process:
        assert await health_of(process.addresses["control"][0]) == SERVING


async def test_a_file_in_the_place_of_a_socket_stays(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    (tmp_path / "c.sock").write_text("precious")
    with pytest.raises(StartError, match="a file is there"):
        async with running(settings(tmp_path), servicer):
            pass
    assert (tmp_path / "c.sock").read_text() == "precious"


async def test_a_stolen_socket_is_left_to_its_new_owner(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    async with running(settings(tmp_path), servicer):
        (tmp_path / "c.sock").unlink()
        with socket.socket(socket.AF_UNIX) as thief:
            thief.bind(str(tmp_path / "c.sock"))
    assert (tmp_path / "c.sock").exists()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
async def test_a_listener_beyond_loopback_is_refused_unless_insecure(
    tmp_path: Path, servicer: echo.EchoServicer, address: str
) -> None:
    for more in ({"listen": (address,)}, {"http": address}):
        with pytest.raises(StartError, match=r"other hosts can dial it.*--insecure"):
            async with running(settings(tmp_path, **more), servicer):
                pass
    async with running(settings(tmp_path, listen=(address,), insecure=True), servicer) as process:
        port = process.addresses["listen"][0].rpartition(":")[2]
        assert await health_of(f"127.0.0.1:{port}" if address[0] == "0" else f"[::1]:{port}") == SERVING


async def test_a_probe_listener_may_bind_any_address_and_has_health_alone(
    tmp_path: Path, servicer: echo.EchoServicer
) -> None:
    async with running(settings(tmp_path, probe="0.0.0.0:0"), servicer) as process:
        port = process.addresses["probe"][0].rpartition(":")[2]
        assert await health_of(f"127.0.0.1:{port}") == SERVING
        async with dial(f"127.0.0.1:{port}") as client:
            with pytest.raises(aio.AioRpcError) as caught:
                await client.Say(Echo())
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_follows_the_pattern_and_its_watchers_hear_it(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    switch = echo.SwitchedHealth()
    async with running(settings(tmp_path), servicer, health=switch) as process:
        address = process.addresses["listen"][0]
        async with aio.insecure_channel(address) as channel:
            watch = watch_health(channel, echo.SERVICE)
            assert (await watch.read()).status == SERVING
            switch.set(False)
            assert (await watch.read()).status == NOT_SERVING
            assert await health_of(address) == NOT_SERVING
            switch.set(True)
            assert (await watch.read()).status == SERVING
            unknown = watch_health(channel, "no.Such")
            assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            await process.stop()
            assert (await watch.read()).status == NOT_SERVING
            assert await watch.read() is aio.EOF


async def test_the_metrics_listener_has_two_pages_and_nothing_else(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    families = [
        Family("echo_things_total", "Things.", "counter", [Sample({"colour": 'bl"ue'}, 3)]),
        Family("echo_depth", "Depth.", "gauge", [Sample({}, 1.5)]),
    ]
    where = settings(tmp_path, metrics="0.0.0.0:0")
    switch = echo.SwitchedHealth()
    async with running(where, servicer, metrics=lambda: families, health=switch) as process:
        address = "127.0.0.1:" + process.addresses["metrics"][0].rpartition(":")[2]
        async with dial(process.addresses["listen"][0]) as client:
            await client.Say(Echo())
            with suppress(aio.AioRpcError):
                await client.Fail(Echo(text="lease"))
        status, text = await fetch(address, "/metrics")
        assert status == 200
        labels = f'method="Say",service="{echo.SERVICE}"'
        assert f'retinue_server_handled_total{{code="OK",{labels}}} 1.0' in text
        assert 'code="FAILED_PRECONDITION",method="Fail"' in text
        assert f'retinue_server_handling_seconds_bucket{{le="+Inf",{labels}}} 1.0' in text
        assert 'retinue_server_open_calls{kind="unary"} 0.0' in text
        assert 'echo_things_total{colour="bl\\"ue"} 3.0' in text
        assert "echo_depth 1.5" in text
        assert await fetch(address, "/healthz") == (200, "serving\n")
        switch.set(False)
        assert (await fetch(address, "/healthz"))[0] == 503
        assert (await fetch(address, "/metrics", "POST"))[0] == 405
        assert (await fetch(address, "/"))[0] == 404
        assert (await fetch(address, "/" + "x" * 20_000)) == (0, "")


async def test_tls_with_tokens_admits_whoever_has_one(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    tokens = token_file(tmp_path, "app a-token", "operator o-token  # of the night shift")
    where = settings(
        tmp_path,
        listen=("0.0.0.0:0",),
        tls=Tls(cert_file=pair.cert_file, key_file=pair.key_file),
        token_file=tokens,
    )
    async with running(where, servicer) as process:
        address = "localhost:" + process.addresses["listen"][0].rpartition(":")[2]
        credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
        async with aio.secure_channel(address, credentials) as channel:
            client = Client(channel)
            for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "Basic a-token"),)):
                with pytest.raises(aio.AioRpcError) as caught:
                    await client.Say(Echo(), metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert details(caught.value)[1]["ErrorInfo"].reason == "UNAUTHENTICATED"
            app = (("authorization", "Bearer a-token"),)
            assert (await client.Say(Echo(text="hi"), metadata=app)).text == "hi"
            with pytest.raises(aio.AioRpcError) as caught:
                await client.Operate(Echo(), metadata=app)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            await client.Operate(Echo(), metadata=(("authorization", "bearer o-token"),))
        async with dial(address) as plain:
            with pytest.raises(aio.AioRpcError) as caught:
                await plain.Say(Echo(), timeout=60)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        async with dial(process.addresses["control"][0]) as control:
            await control.Operate(Echo())


async def test_mtls_admits_its_own_certificates_only(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    pair, ours, theirs = authority.issue("server"), authority.issue("ours"), stranger.issue("theirs")
    mtls = Tls(cert_file=pair.cert_file, key_file=pair.key_file, client_ca_file=authority.file)
    async with running(settings(tmp_path, listen=("0.0.0.0:0",), tls=mtls), servicer) as process:
        address = "localhost:" + process.addresses["listen"][0].rpartition(":")[2]
        root = authority.file.read_bytes()
        for client_pair, admitted in ((ours, True), (theirs, False), (None, False)):
            files = (
                (client_pair.key_file.read_bytes(), client_pair.cert_file.read_bytes()) if client_pair else (None, None)
            )
            async with aio.secure_channel(address, grpc.ssl_channel_credentials(root, *files)) as channel:
                code = await Client(channel).Say(Echo(), timeout=60).code()
            assert (code is grpc.StatusCode.OK) is admitted


async def test_https_serves_the_connect_protocol(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    where = settings(tmp_path, http="127.0.0.1:0", tls=Tls(cert_file=pair.cert_file, key_file=pair.key_file))
    async with running(where, servicer) as process:
        context = ssl.create_default_context(cafile=str(authority.file))
        async with httpx.AsyncClient(verify=context) as web:
            url = f"https://{process.addresses['http'][0]}/{echo.SERVICE}/Say"
            assert (await web.post(url, json={"text": "tls"})).json() == {"text": "tls"}


async def test_a_wrong_certificate_is_named_at_start(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    authority = Authority(tmp_path)
    one, other = authority.issue("one"), authority.issue("other")
    with pytest.raises(StartError, match=r"one\.crt with the key .*other\.key"):
        async with running(settings(tmp_path, tls=Tls(cert_file=one.cert_file, key_file=other.key_file)), servicer):
            pass


async def test_tokens_are_read_again_when_the_file_changes(
    tmp_path: Path, servicer: echo.EchoServicer, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = token_file(tmp_path, "app first")
    where = settings(tmp_path, token_file=tokens, require_token=True)
    async with running(where, servicer) as process, dial(process.addresses["listen"][0]) as client:

        async def code(token: str) -> grpc.StatusCode:
            found: grpc.StatusCode = await client.Say(Echo(), metadata=(("authorization", f"Bearer {token}"),)).code()
            return found

        assert await code("first") is grpc.StatusCode.OK
        assert await client.Say(Echo()).code() is grpc.StatusCode.UNAUTHENTICATED
        token_file(tmp_path, "app second")
        assert await code("second") is grpc.StatusCode.OK
        assert await code("first") is grpc.StatusCode.UNAUTHENTICATED
        token_file(tmp_path, "nonsense")
        assert await code("second") is grpc.StatusCode.OK
        assert "the tokens stay as they were" in caplog.text


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [("app x", 0o604, "chmod o="), ("boss x", 0o600, "line 2 must be ROLE TOKEN"), ("app", 0o600, "line 2")],
)
async def test_an_unusable_token_file_is_refused(
    tmp_path: Path, servicer: echo.EchoServicer, text: str, mode: int, message: str
) -> None:
    tokens = token_file(tmp_path, text)
    tokens.chmod(mode)
    with pytest.raises(StartError, match=message):
        async with running(settings(tmp_path, token_file=tokens), servicer):
            pass


async def test_a_method_without_a_coroutine_is_refused() -> None:
    with pytest.raises(TypeError, match="object lacks Say, Repeat"):
        Service(echo.DESCRIPTOR, object()).methods()


def test_every_option_of_ours_is_one_that_grpc_knows() -> None:
    """gRPC ignores a name that it does not know; idle relays were cut off by a misspelt one."""
    library = Path(cygrpc.__file__).read_bytes()
    names = {name for name, _ in (*server._OPTIONS, *relay._OPTIONS)}
    assert [name for name in sorted(names) if name.encode() not in library] == []
