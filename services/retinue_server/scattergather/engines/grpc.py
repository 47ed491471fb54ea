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

if TYPE_CHECKING:
    from collections.abc import Callable

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
_GRACE_S = 30.0
"""What calls under way have when their connection gets another certificate."""


def credentials(said: Tls | None) -> grpc.ChannelCredentials | None:
    """For plaintext None; raises StartError naming the file that is wrong."""
    if said is None:
        return None
    paths = [Path(name) if name else None for name in (said.ca_file, said.cert_file, said.key_file)]
    return tls.channel_credentials(UpstreamTls(ca_file=paths[0], cert_file=paths[1], key_file=paths[2]))


def open_channel(address: str, said: Tls | None, max_reply_bytes: int) -> aio.Channel:
    """A channel that connects when it is used."""
    options: list[tuple[str, Any]] = [*_OPTIONS, ("grpc.max_receive_message_length", max_reply_bytes)]
    shown = credentials(said)
    if shown is None:
        return aio.insecure_channel(address, options=options)
    if said is not None and said.server_name:
        options.append(("grpc.ssl_target_name_override", said.server_name))
    return aio.secure_channel(address, shown, options=options)


class GrpcLine:
    """A channel to one endpoint, kept connected."""

    def __init__(self, target: Target, changed: Callable[[], None], closed: Callable[[GrpcLine], None]) -> None:
        self.target, self._changed, self._closed = target, changed, closed
        self.connected = False
        self._channel: aio.Channel | None = None
        self._method: Any = None
        self._watching: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.reopen()

    def reopen(self) -> None:
        """Another channel, with the certificates as they are now; calls under way end on the old one."""
        try:
            channel = open_channel(self.target.address, self.target.tls, self.target.max_reply_bytes)
        except StartError as error:
            log.warning("%s", error)
            return
        self._leave(_GRACE_S)
        self._channel = channel
        self._method = channel.unary_unary(self.target.method)
        self._watching = asyncio.create_task(self._watch(channel))

    def call(self, data: bytes, timeout_s: float, metadata: Metadata, done: Done) -> Callable[[], None]:
        if self._channel is None:
            asyncio.get_running_loop().call_soon(done, int(Code.UNAVAILABLE), "there is no connection", None)
            return _nothing
        call = self._method(data, timeout=timeout_s, metadata=metadata)
        task = asyncio.create_task(_wait(call, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return partial(_cancel, call)

    def close(self) -> None:
        self._leave(0)
        self._channel = None
        self._closed(self)

    def _leave(self, grace_s: float) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if self._channel is not None:
            task = asyncio.create_task(self._channel.close(grace_s))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._set(connected=False)

    async def _watch(self, channel: aio.Channel) -> None:
        while True:
            state = channel.get_state(try_to_connect=True)
            self._set(connected=state is grpc.ChannelConnectivity.READY)
            await channel.wait_for_state_change(state)

    def _set(self, *, connected: bool) -> None:
        if self.connected != connected:
            self.connected = connected
            self._changed()


async def _wait(call: Any, done: Done) -> None:
    try:
        reply = await call
    except aio.AioRpcError as error:
        done(error.code().value[0], error.details() or "", None)
    except asyncio.CancelledError:
        return  # by `cancel`: nobody listens any more
    else:
        done(0, "", reply)


def _cancel(call: Any) -> None:
    """Ends the call, and lets its task take the end in.

    `call.cancel` ends the task too, which then never frees what it holds: a KiB for each (grpc/grpc#43360).
    """
    call._cancel("nobody waits any more")  # noqa: SLF001 - as said


def _nothing() -> None:
    """There is no call to cancel."""


class GrpcLeaves:
    """A part; see the module."""

    def __init__(self) -> None:
        self._lines: set[GrpcLine] = set()
        self._looking: asyncio.Task[None] | None = None
        self._stamps: dict[str, tuple[int, int]] = {}

    def open(self, target: Target, changed: Callable[[], None]) -> Line:
        line = GrpcLine(target, changed, self._lines.discard)
        self._lines.add(line)
        return line

    async def start(self) -> None:
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.cancel()
            await asyncio.wait({looking})
        lines, self._lines = self._lines, set()
        for line in lines:
            line.close()

    async def _look(self) -> None:
        """Certificates that changed are taken."""
        while True:
            await asyncio.sleep(_LOOK_S)
            secure = [line for line in self._lines if line.target.tls is not None]
            names = {name for line in secure for name in _files(line.target.tls)}
            stamps = await asyncio.to_thread(_stamps, names)
            changed = {name for name, stamp in stamps.items() if self._stamps.get(name, stamp) != stamp}
            self._stamps = stamps
            for line in secure:
                if changed.intersection(_files(line.target.tls)):
                    line.reopen()


def _files(said: Tls | None) -> list[str]:
    return [name for name in (said.ca_file, said.cert_file, said.key_file) if name] if said else []


def _stamps(names: set[str]) -> dict[str, tuple[int, int]]:
    found = {}
    for name in names:
        try:
            status = Path(name).stat()
        except OSError:
            continue  # being replaced; the next look has it
        found[name] = status.st_mtime_ns, status.st_ino
    return found
