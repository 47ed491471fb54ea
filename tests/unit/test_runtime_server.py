"""Claims about the gRPC listeners, over real loopback sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from support import echo
from support.echo import Echo
from support.serving import Client, details, dial, running, settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from retinue_server.runtime.lifecycle import Process

SAY = f"/{echo.SERVICE}/Say"


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
        async with asyncio.timeout(5):
            assert await servicer.events.get() == "join cancelled"
