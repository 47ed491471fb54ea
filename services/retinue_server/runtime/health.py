"""grpc.health.v1 and reflection, as services of the method table."""

from __future__ import annotations

import asyncio
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

import msgspec
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from retinue_server.runtime.dispatch import Call, Method, Pattern, Service
from retinue_server.runtime.errors import Code
from retinue_server.runtime.status import Refusal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

HEALTH: Final[Any] = health_pb2.DESCRIPTOR.services_by_name["Health"]
REFLECTION: Final[Any] = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
REFLECTION_V1: Final = "grpc.reflection.v1.ServerReflection"

_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService:
    """Health by service name; the name "" stands for the whole process: all that it has serve.

    Nothing serves before `open` and after `close`, whatever the patterns say.
    """

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._names = {s.descriptor.full_name: p.name for p in patterns for s in p.services}
        self._healthy = {p.name: p.health is None for p in patterns}
        self._finer = [p.health_of for p in patterns]
        self._open = False
        self._closed = False
        self._change = asyncio.Event()
        for pattern in patterns:
            if pattern.health is not None:
                pattern.health.subscribe(partial(self._set, pattern.name))

    def open(self) -> None:
        """From now on the patterns' own state shows."""
        self._open = True
        self._notify()

    def close(self) -> None:
        """NOT_SERVING for good; every Watch says so and ends."""
        self._open = False
        self._closed = True
        self._notify()

    def serving(self) -> bool:
        """Whether the whole process serves."""
        return self.status("") == _SERVING

    def status(self, name: str) -> int:
        """The state of a service, SERVICE_UNKNOWN when this process has none of the name."""
        if not name:
            return _SERVING if self._open and all(self._healthy.values()) else _NOT_SERVING
        pattern = self._names.get(name)
        states = (self._healthy[pattern],) if pattern else (ask(name) for ask in self._finer)
        state = next((one for one in states if one is not None), None)
        if state is None:
            return _UNKNOWN
        return _SERVING if self._open and state else _NOT_SERVING

    async def Check(self, request: Any, _: Call) -> Any:  # noqa: N802 - the RPC's name
        """The state of one service; NOT_FOUND when it is unknown."""
        status = self.status(request.service)
        if status == _UNKNOWN:
            raise Refusal(Code.NOT_FOUND, f"cannot check: no service {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, _request: Any, _call: Call) -> Any:  # noqa: N802 - the RPC's name
        """The state of every service."""
        reply = health_pb2.HealthListResponse()  # type: ignore[attr-defined] # the stubs lack it
        for name in ("", *self._names):
            reply.statuses[name].status = self.status(name)
        return reply

    async def Watch(self, request: Any, call: Call) -> None:  # noqa: N802 - the RPC's name
        """The state now and at each change, until the process stops."""
        sent = None
        while True:
            change, status = self._change, self.status(request.service)
            if status != sent:
                await call.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
            if self._closed:
                return
            await change.wait()

    def _set(self, name: str, healthy: bool) -> None:  # noqa: FBT001 - dispatch.Health calls it so
        self._healthy[name] = healthy
        self._notify()

    def _notify(self) -> None:
        change, self._change = self._change, asyncio.Event()
        change.set()


class _Symbols:
    """The default pool, which knows methods too: it finds services by name, but not what they hold."""

    def __getattr__(self, name: str) -> Any:
        return getattr(descriptor_pool.Default(), name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:  # noqa: N802 - the pool's name
        """The file that has the symbol; raises KeyError."""
        pool = descriptor_pool.Default()
        try:
            return pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            found = pool.FindServiceByName(service)
            if method not in found.methods_by_name:
                raise
            return found.file


class ReflectionService:
    """Answers by grpcio-reflection; a reflection stream that idles ends when the process stops."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted(names)
        self._closed = asyncio.Event()

    @cached_property
    def _answers(self) -> Any:
        """Made when somebody asks: few servers are ever asked, and it loads a lot."""
        from grpc_reflection.v1alpha import reflection  # noqa: PLC0415 - as said

        return reflection.aio.ReflectionServicer(self._names, pool=_Symbols())

    def close(self) -> None:
        """Ends every stream."""
        self._closed.set()

    async def ServerReflectionInfo(self, call: Call) -> None:  # noqa: N802 - the RPC's name
        """Answers question by question."""
        async for answer in self._answers.ServerReflectionInfo(self._questions(call), None):
            await call.write(answer)

    async def _questions(self, call: Call) -> AsyncIterator[Any]:
        closed = asyncio.create_task(self._closed.wait())
        try:
            while (question := await _read_before(call, closed)) is not None:
                yield question
        finally:
            closed.cancel()

    def methods(self) -> list[Method]:
        """As v1alpha and as v1, whose messages are the same on the wire."""
        alpha = Service(REFLECTION, self).methods()
        return alpha + [msgspec.structs.replace(method, service=REFLECTION_V1) for method in alpha]


async def _read_before(call: Call, closed: asyncio.Task[Any]) -> Any:
    """The next request; None at the end of the stream or of the process."""
    read = asyncio.ensure_future(call.read())
    try:
        await asyncio.wait({read, closed}, return_when=asyncio.FIRST_COMPLETED)
        return read.result() if read.done() else None
    finally:
        read.cancel()
