"""A small pattern for tests of the runtime, which knows none: methods of each kind, described at run time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message_factory import GetMessageClass

from retinue_server.runtime import errors
from retinue_server.runtime.dispatch import Pattern, Role, Service

if TYPE_CHECKING:
    from retinue_server.runtime.dispatch import Call

SERVICE = "retinue.test.v1.EchoService"


def _describe() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="retinue/test/v1/echo.proto", package="retinue.test.v1", syntax="proto3"
    )
    field = descriptor_pb2.FieldDescriptorProto
    message = file.message_type.add(name="Echo")
    message.field.add(name="text", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    message.field.add(name="repeat_count", number=2, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    message.field.add(name="data", number=3, type=field.TYPE_BYTES, label=field.LABEL_OPTIONAL)
    service = file.service.add(name="EchoService")
    kinds = {
        "Say": (False, False),
        "Repeat": (False, True),
        "Join": (True, False),
        "Chat": (True, True),
        "Fail": (False, False),
        "Wait": (False, False),
        "Operate": (False, False),
    }
    for name, (client, server) in kinds.items():
        service.method.add(
            name=name,
            input_type=".retinue.test.v1.Echo",
            output_type=".retinue.test.v1.Echo",
            client_streaming=client,
            server_streaming=server,
        )
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindServiceByName(SERVICE)


DESCRIPTOR: Any = _describe()
Echo: Any = GetMessageClass(DESCRIPTOR.methods_by_name["Say"].input_type)


def failure(name: str) -> BaseException:
    """What `Fail` raises for the text of its request."""
    many = [errors.Violation(f"items[{n}].text", "must be shorter than 64 characters") for n in range(500)]
    failures: dict[str, BaseException] = {
        "lease": errors.FailedPrecondition(
            "cannot complete: the lease is lost", reason=errors.Reason.LEASE_LOST, task_id="t1"
        ),
        "busy": errors.Unavailable("cannot: busy", reason=errors.Reason.ENGINE_UNAVAILABLE, retry_ms=1500),
        "fields": errors.InvalidArgument(
            "cannot echo: two fields", [errors.Violation("text", "is bad"), errors.Violation("data", "too")]
        ),
        "many": errors.InvalidArgument("cannot echo: many fields", many),
        "long": errors.NotFound("cannot find: " + "x" * 100_000, reason=errors.Reason.TASK_NOT_FOUND, k="v" * 9000),
        "bug": ValueError("the secret cause"),
    }
    return failures[name]


class EchoServicer:
    """Keeps what happened in `events`, so that tests can await it."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[str] = asyncio.Queue()
        self.release = asyncio.Event()
        self.metadata: dict[str, str] = {}
        self.remaining: float | None = None
        self.written = 0

    async def Say(self, request: Any, call: Call) -> Any:
        self.metadata = dict(call.metadata)
        self.remaining = call.time_remaining()
        call.set_trailing_metadata("role", call.role.name.lower())
        return Echo(text=request.text, data=bytes(request.repeat_count) or request.data)

    async def Repeat(self, request: Any, call: Call) -> None:
        try:
            for _ in range(request.repeat_count):
                await call.write(request)
                self.written += 1
            if request.text in ("lease", "bug"):
                raise failure(request.text)
            if request.text == "wait":
                self.events.put_nowait("repeat waits")
                await self.release.wait()
        except asyncio.CancelledError:
            self.events.put_nowait("repeat cancelled")
            raise

    async def Join(self, call: Call) -> Any:
        texts = []
        try:
            while (request := await call.read()) is not None:
                texts.append(request.text)
                self.events.put_nowait("join read")
        except asyncio.CancelledError:
            self.events.put_nowait("join cancelled")
            raise
        self.events.put_nowait("join ended")
        return Echo(text=" ".join(texts))

    async def Chat(self, call: Call) -> None:
        call.set_trailing_metadata("mood", "good")
        try:
            while (request := await call.read()) is not None:
                if request.text == "lease":
                    raise failure("lease")
                await call.write(request)
        except asyncio.CancelledError:
            self.events.put_nowait("chat cancelled")
            raise
        self.events.put_nowait("chat ended")

    async def Fail(self, request: Any, call: Call) -> Any:
        raise failure(request.text)

    async def Wait(self, request: Any, call: Call) -> Any:
        self.events.put_nowait("waits")
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.events.put_nowait("wait cancelled")
            raise
        return request

    async def Operate(self, request: Any, call: Call) -> Any:
        return request


class SwitchedHealth:
    """A `dispatch.Health` that a test switches."""

    def __init__(self) -> None:
        self.healthy = True
        self._listeners: list[Any] = []

    def subscribe(self, listener: Any) -> None:
        self._listeners.append(listener)
        listener(self.healthy)

    def set(self, healthy: bool) -> None:  # noqa: FBT001 - as dispatch.Health calls its listeners
        self.healthy = healthy
        for listener in self._listeners:
            listener(healthy)


def pattern(servicer: EchoServicer, **keywords: Any) -> Pattern:
    """The servicer as a pattern whose `Operate` is for operators."""
    service = Service(DESCRIPTOR, servicer, roles={"Operate": Role.OPERATOR})
    return Pattern(name="echo", services=[service], **keywords)
