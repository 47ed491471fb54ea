"""The method table: what a pattern serves, independent of the transport that carries it.

A pattern gives its servicers with their descriptors; `Method` pairs each RPC of a descriptor with the coroutine of the
same name, and an RPC without one is refused when the process starts. gRPC, Connect and the relay all serve this table.

A servicer's coroutines have one of four shapes, by the kind of the RPC:

    async def Unary(self, request, call) -> response
    async def ServerStream(self, request, call) -> None      # await call.write(response)
    async def ClientStream(self, call) -> response           # request = await call.read()
    async def Bidi(self, call) -> None                       # both
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
from google.protobuf.message_factory import GetMessageClass

if TYPE_CHECKING:
    from google.protobuf.descriptor import ServiceDescriptor
    from google.protobuf.message import Message

    from retinue_server.runtime.metrics import Family, MetricPages, Resource

Handler = Callable[..., Awaitable[Any]]


class Role(IntEnum):
    """What a caller may do; each role includes the ones below it."""

    APP = 1
    DIAGNOSTICS = 2
    OPERATOR = 3


class Call(Protocol):
    """What a servicer sees of the call it serves, whatever carried it."""

    role: Role
    metadata: Mapping[str, str]
    """Request metadata with lower-case keys; of a repeated key the last, binary ones (`-bin`) left out."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""

    async def read(self) -> Any:
        """The next request of a client stream; None at its end."""

    async def write(self, response: Any) -> None:
        """Sends one response of a server stream, and waits while the transport can't take more."""

    def set_trailing_metadata(self, key: str, value: str | bytes) -> None:
        """Adds one pair to the trailing metadata of the reply; bytes for a key that ends in `-bin`."""


class Method(msgspec.Struct, frozen=True):
    """One RPC: its names, its kind, the role it needs and the coroutine that serves it."""

    service: str
    name: str
    client_streaming: bool
    server_streaming: bool
    request_type: type[Message]
    response_type: type[Message]
    role: Role
    handler: Handler
    raw: bool = False
    """The handler takes and gives serialised messages (the relay)."""

    @property
    def path(self) -> str:
        """As on the wire: `/package.Service/Method`."""
        return f"/{self.service}/{self.name}"


class Service(msgspec.Struct, frozen=True):
    """A servicer with the descriptor it implements and the RPCs that need more than the role app."""

    descriptor: ServiceDescriptor
    servicer: object
    roles: Mapping[str, Role] = {}

    def methods(self) -> list[Method]:
        """The table's rows; raises TypeError naming every RPC that the servicer lacks."""
        missing = [m.name for m in self.descriptor.methods if not hasattr(self.servicer, m.name)]
        if missing:
            raise TypeError(f"{type(self.servicer).__name__} lacks {', '.join(missing)}")
        return [
            Method(
                service=self.descriptor.full_name,
                name=m.name,
                client_streaming=m.client_streaming,
                server_streaming=m.server_streaming,
                request_type=GetMessageClass(m.input_type),
                response_type=GetMessageClass(m.output_type),
                role=self.roles.get(m.name, Role.APP),
                handler=getattr(self.servicer, m.name),
                raw=getattr(self.servicer, "raw", False),
            )
            for m in self.descriptor.methods
        ]


class Part(Protocol):
    """Something with a life. `stop` before `start`, and a second `stop`, do nothing."""

    async def start(self) -> None:
        """Returns when it is ready; raises what keeps the process from starting."""

    async def stop(self) -> None:
        """Returns when nothing of it runs any more; what was acknowledged is durable."""


class Health(Protocol):
    """Tells the runtime whether a pattern can serve; the runtime shows it by grpc.health.v1."""

    def subscribe(self, listener: Callable[[bool], None]) -> None:
        """Calls the listener at once with the present state and again at each change, on the event loop."""


class Shown(NamedTuple):
    """What a page shows."""

    holds: bool
    """Whether what it is asked for is so: the status is 200 then, otherwise 503, as load balancers understand it."""
    message: Message
    """What is known, in either case."""


Page = Callable[[str], "Shown | None"]
"""Answers `GET /KEY/NAME` of the HTTP face from what is in memory; None = there is no such thing here (404)."""


class Pattern(msgspec.Struct, frozen=True):
    """A wired pattern: what its `wiring.py` returns and the runtime runs."""

    name: str
    services: Sequence[Service]
    parts: Sequence[Part] = ()
    health: Health | None = None
    health_of: Callable[[str], bool | None] = lambda _: None
    """The state of something within the pattern, which grpc.health.v1 tells by its name (`upstream/cache`); None = no
    such thing. Its changes are told by `health`."""
    quiesce: Callable[[], Awaitable[None]] | None = None
    """Called first on SIGTERM: ends long polls and streams with grace, so that the drain is short."""
    metrics: Callable[[], Iterable[Family]] | None = None
    """What the pattern counts, read when somebody asks; on the event loop, and it must not block."""
    resources: Callable[[], Iterable[Resource]] | None = None
    """What the pattern knows of others: goes out by OTLP beside what this process counts. As `metrics`, it must not
    block."""
    metric_pages: MetricPages | None = None
    """What the metrics listener shows instead of the process's metrics alone."""
    pages: Mapping[str, Page] = {}
    """What can be looked up by plain HTTP, by the first part of its path."""
    notices: Callable[[], Sequence[str]] = tuple
    """Lines for the start-up banner, the durability level among them; asked once everything has started."""
