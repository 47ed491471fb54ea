"""Calls to leaves by gRPC: one channel for each endpoint, bytes in, bytes out."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc import aio

from retinue_server.runtime import tls
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.config import UpstreamTls
from retinue_server.runtime.errors import Code
from retinue_server.scattergather.engines.handshakes import plainly

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from retinue_server.scattergather.engine import Done, Line, Metadata, Target, Tls

log = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # pools, and roots in one process, fail one by one
    ("grpc.enable_retries", 0),  # whoever counts attempts must make them
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.bdp_probe", 0),  # a ping for most messages of a quiet connection
)
_LOOK_S = 5.0
"""How often certificates are looked at."""
_NO_CONNECTION = "there is no connection, since its certificates cannot be used: see the root's log"
_GRACE_S = 30.0
"""What calls under way have when their connection gets another certificate."""


def open_channel(
    address: str, shown: grpc.ChannelCredentials | None, max_reply_bytes: int, server_name: str = ""
) -> aio.Channel:
    """A channel that connects when it is used; plaintext without credentials."""
    options: list[tuple[str, Any]] = [*_OPTIONS, ("grpc.max_receive_message_length", max_reply_bytes)]
    if address.startswith("unix:"):  # else it is the path, which is no host: Rust's servers refuse it, Node's fail
        options.append(("grpc.default_authority", "localhost"))
    if shown is None:
        return aio.insecure_channel(address, options=options)
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    return aio.secure_channel(address, shown, options=options)


class GrpcLine:
    """A channel to one endpoint, kept connected."""

    most_received = 0
    """The largest message that is read at all; 0 = a reply of the target's limit."""

    def __init__(self, target: Target, changed: Callable[[], None], closed: Callable[[GrpcLine], None]) -> None:
        self.target, self._changed, self._closed = target, changed, closed
        self.connected = False
        self._channel: aio.Channel | None = None
        self._method: Any = None
        self._watching: asyncio.Task[None] | None = None
        self._next: aio.Channel | None = None
        """Is to take the other's place."""
        self._replacing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def connect(self, shown: grpc.ChannelCredentials | None) -> None:
        """Connects, or connects anew: then what is connected serves on until the new connection is there."""
        target = self.target
        name = target.tls.server_name if target.tls is not None else ""
        channel = open_channel(target.address, shown, self.most_received or target.max_reply_bytes, name)
        self._discard_next()
        if not self.connected:
            self._take(channel)
            return
        self._next = channel
        self._replacing = asyncio.create_task(self._replace(channel))

    async def _replace(self, channel: aio.Channel) -> None:
        while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            await channel.wait_for_state_change(state)
        self._take(channel)

    def _take(self, channel: aio.Channel) -> None:
        """Calls that are under way end on the channel that was there."""
        self._leave(_GRACE_S)
        self._next, replacing, self._replacing = None, self._replacing, None
        if replacing is not None:
            replacing.cancel()
        self._channel = channel
        self._method = channel.unary_unary(self.target.method)
        self._watching = asyncio.create_task(self._watch(channel))
        self._set(connected=channel.get_state() is grpc.ChannelConnectivity.READY)

    def call(self, data: bytes, timeout_s: float, metadata: Metadata, done: Done) -> Callable[[], None]:
        if self._channel is None:
            asyncio.get_running_loop().call_soon(done, int(Code.UNAVAILABLE), _NO_CONNECTION, None)
            return _nothing
        if self.target.tls is not None:
            done = partial(plainly, done)
        call = self._method(data, timeout=timeout_s, metadata=metadata)
        waiting = call.__await__()
        next(waiting).add_done_callback(partial(_tell, done, waiting))
        return partial(_cancel, call)

    def close(self) -> None:
        self._discard_next()
        self._leave(0)
        self._channel = None
        self._set(connected=False)
        self._closed(self)

    def _leave(self, grace_s: float) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if self._channel is not None:
            self._end(self._channel, grace_s)

    def _discard_next(self) -> None:
        channel, self._next = self._next, None
        if self._replacing is not None:
            self._replacing.cancel()
        if channel is not None:
            self._end(channel, 0)

    def _end(self, channel: aio.Channel, grace_s: float) -> None:
        task = asyncio.create_task(channel.close(grace_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, channel: aio.Channel) -> None:
        while True:
            state = channel.get_state(try_to_connect=True)
            self._set(connected=state is grpc.ChannelConnectivity.READY)
            if self._next is not None and not self.connected:
                self._take(self._next)  # what is there is no better
                return
            await channel.wait_for_state_change(state)

    def _set(self, *, connected: bool) -> None:
        if self.connected != connected:
            self.connected = connected
            self._changed()


def _tell(done: Done, waiting: Generator[Any, None, bytes], _: object) -> None:
    """Goes on where a task would, which costs more."""
    try:
        next(waiting)
    except StopIteration as ended:
        done(0, "", ended.value)
    except aio.AioRpcError as error:
        done(error.code().value[0], error.details() or "", None)
    except asyncio.CancelledError:
        done(int(Code.UNAVAILABLE), "the connection was closed", None)  # or the call cancelled; then nobody listens


def _cancel(call: Any) -> None:
    """Ends the call, and lets what waits for its answer take the end in.

    `call.cancel` ends that, too, which then never frees what it holds: a KiB for each (grpc/grpc#43360).
    """
    call._cancel("nobody waits any more")  # noqa: SLF001 - as said


def _nothing() -> None:
    """There is no call to cancel."""


class GrpcLeaves:
    """A part; see the module."""

    def __init__(self, look_s: float = _LOOK_S) -> None:
        self._look_s = look_s
        self._lines: set[GrpcLine] = set()
        self._shown: dict[Tls, _Shown] = {}
        self._looking: asyncio.Task[None] | None = None

    def open(self, target: Target, changed: Callable[[], None]) -> Line:
        line = _kind(target)(target, changed, self._lines.discard)
        self._lines.add(line)
        if target.tls is None:
            line.connect(None)
        elif (shown := self._credentials(target.tls)) is not None:
            line.connect(shown)
        return line

    def _credentials(self, said: Tls) -> grpc.ChannelCredentials | None:
        """The same for all lines; None while they can't be had."""
        if said not in self._shown:
            self._shown[said] = _Shown(said)
            self._shown[said].read()
        return self._shown[said].credentials

    async def start(self) -> None:
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.cancel()
            await asyncio.wait({looking})
        for line in list(self._lines):  # each leaves them when it is closed
            line.close()

    async def _look(self) -> None:
        """Certificates that changed are taken."""
        while True:
            await asyncio.sleep(self._look_s)
            used = {line.target.tls for line in self._lines}
            for said in set(self._shown) - used:
                del self._shown[said]
            for shown in list(self._shown.values()):
                if await asyncio.to_thread(shown.read):
                    self._connect(shown)

    def _connect(self, shown: _Shown) -> None:
        for line in [line for line in self._lines if line.target.tls == shown.said]:
            line.connect(shown.credentials)


def _kind(target: Target) -> type[GrpcLine]:
    if not target.stream:
        return GrpcLine
    from retinue_server.scattergather.engines.streaming import StreamLine  # noqa: PLC0415 - it is one of these

    return StreamLine


class _Shown:
    """How one kind of connection checks leaves and shows itself, as its files say."""

    def __init__(self, said: Tls) -> None:
        self.said = said
        self.credentials: grpc.ChannelCredentials | None = None
        """None while they could not be read."""
        self._paths = {name: Path(name) for name in (said.ca_file, said.cert_file, said.key_file) if name}
        self._read: Sequence[tuple[int, ...]] | None = None
        self._complaint = ""

    def read(self) -> bool:
        """Whether there are others now. What is wrong goes to the log, once, and is tried again at the next call."""
        stamps = [_stamp(path) for path in self._paths.values()]
        if stamps == self._read:
            return False
        path, said = self._paths.get, self.said
        files = UpstreamTls(ca_file=path(said.ca_file), cert_file=path(said.cert_file), key_file=path(said.key_file))
        try:
            self.credentials = tls.channel_credentials(files)
        except StartError as error:
            self._complain(str(error))
            return False
        self._read, self._complaint = stamps, ""
        return True

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            stays = "the connections stay as they are" if self.credentials else "there is no connection until then"
            log.warning("%s; %s", text, stays)
        self._complaint = text


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes with the content; empty while there is no file."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino
