"""The incremental aggregated discovery service: tells one Envoy what is wanted, and hears what it takes.

Each change is a response of one resource, so that a refusal concerns that resource alone. Versions are digests of
content: an Envoy that comes back, to this process or to another, says what it has, and is told what differs. What was
taken before goes to a new Envoy all at once, since it begins with what the first response has.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from grpc import aio

from retinue_server.ambassador.engine import Refused
from retinue_server.ambassador.engines.envoy import bindings, render

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path

    from retinue_server.ambassador.engines.envoy.bindings import Json

log = logging.getLogger(__name__)

_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
_REQUEST = "envoy.service.discovery.v3.DeltaDiscoveryRequest"
_RESPONSE = "envoy.service.discovery.v3.DeltaDiscoveryResponse"
_WILDCARD = frozenset({render.CLUSTER, render.LISTENER})
"""Types of which Envoy wants all; of the others it asks by name."""
_ADOPTION_S = 30.0
"""What an Envoy has of a server before this one goes on so long, and then ends unless it has been declared anew."""
_ORDER = (render.LISTENER, render.ROUTES, render.CLUSTER, render.ENDPOINTS, render.SECRET)
"""In which resources go: what needs another before it."""
_OPTIONS = (("grpc.max_receive_message_length", 64 * 1024 * 1024), ("grpc.so_reuseport", 0))


class Key(NamedTuple):
    """A resource: its type, by the full name of the message, and its name."""

    kind: str
    name: str


class Resource(NamedTuple):
    """A resource as it goes out."""

    content: bytes
    version: str


class Xds:
    """A part: serves on a socket; on the event loop only."""

    def __init__(self, socket: Path, changed: Callable[[], None]) -> None:
        """`changed` is called when Envoy comes or goes."""
        self._socket, self._changed = socket, changed
        self._wanted: dict[Key, Resource] = {}
        self._taken: dict[Key, str] = {}
        """The versions that Envoy took last, also of one that is gone."""
        self._waiting: dict[Key, list[tuple[str, asyncio.Future[None]]]] = {}
        self._stream: _Stream | None = None
        self._server: aio.Server | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self.version = ""
        """Of Envoy."""

    @property
    def connected(self) -> bool:
        """Whether there is an Envoy."""
        return self._stream is not None

    def has(self, key: Key) -> bool:
        """Whether it is wanted."""
        return key in self._wanted

    def may_have(self, key: Key) -> bool:
        """Whether Envoy has some version of it; of one that is away that is not known."""
        return self._stream is None or self._stream.knows(key)

    def is_asked(self, key: Key) -> bool:
        """Whether there is an Envoy that wants to hear of it."""
        return self._stream is not None and self._stream.is_asked(key)

    def get(self, key: Key) -> Resource | None:
        """What is wanted."""
        return self._wanted.get(key)

    def changes(self, key: Key, said: Json) -> bool:
        """Whether there is such a resource, and it would be another."""
        before = self._wanted.get(key)
        return before is not None and before != _resource(key, said)

    # What is wanted

    async def put(self, key: Key, said: Json, *, again: bool = False) -> None:
        """Wants this, and returns when Envoy has taken it; raises Refused, and then the former is wanted as before.

        What it has already is not sent, unless `again` says so.
        """
        resource = _resource(key, said)
        before = self._wanted.get(key)
        self._wanted[key] = resource
        if self._stream is not None and self._stream.has(key, resource.version) and not again:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append((resource.version, future))
        if self._stream is not None:
            self._stream.tell([key], again=again)
        try:
            await future
        except Refused:
            if self._wanted.get(key) is resource:
                self._restore(key, before)
            raise
        finally:
            self._forget(key, future)

    def _restore(self, key: Key, before: Resource | None) -> None:
        if before is None:
            del self._wanted[key]
        else:
            self._wanted[key] = before

    def _forget(self, key: Key, future: asyncio.Future[None]) -> None:
        left = [entry for entry in self._waiting.get(key, ()) if entry[1] is not future]
        if left:
            self._waiting[key] = left
        else:
            self._waiting.pop(key, None)

    def want(self, key: Key, said: Json) -> None:
        """As `put`, for what Envoy asks for by itself once it has something else: waits for nothing."""
        self._wanted[key] = _resource(key, said)
        if self._stream is not None and self._taken.get(key) != self._wanted[key].version:
            self._stream.tell([key])

    def drop(self, keys: Iterable[Key]) -> None:
        """Wants these no more; nobody may be waiting for one of them."""
        gone = [key for key in keys if self._wanted.pop(key, None) is not None]
        for key in gone:
            self._taken.pop(key, None)
        if self._stream is not None:
            self._stream.tell(gone)

    # What Envoy says

    def took(self, key: Key, version: str) -> None:
        """It has it; who waits for it, or for an older one, goes on."""
        self._taken[key] = version
        waiting = self._waiting.get(key, [])
        last = max((index for index, (wanted, _) in enumerate(waiting) if wanted == version), default=-1)
        for _, future in waiting[: last + 1]:
            if not future.done():
                future.set_result(None)

    def refused(self, key: Key, version: str, message: str) -> None:
        """It does not take it."""
        message = message.strip()
        log.warning("Envoy refuses %s %s: %s", key.kind.rpartition(".")[2], key.name, message)
        for wanted, future in self._waiting.get(key, []):
            if wanted == version and not future.done():
                future.set_exception(Refused(message))

    def opened(self, stream: _Stream, node: Any) -> None:
        """An Envoy has come; what it says it has is what has been taken."""
        build = node.user_agent_build_version.version
        self.version = f"{build.major_number}.{build.minor_number}.{build.patch}"
        self._stream = stream
        self._changed()

    def closed(self, stream: _Stream) -> None:
        """It has gone."""
        if self._stream is stream:
            self._stream = None
            self._changed()

    def resources(self, kind: str) -> Iterable[Key]:
        """All that are wanted of a type."""
        return [key for key in self._wanted if key.kind == kind]

    def is_known_good(self, key: Key) -> bool:
        """Whether an Envoy took this very one before."""
        return self._wanted[key].version == self._taken.get(key)

    @property
    def is_adopting(self) -> bool:
        """Whether what Envoy has, and nobody has declared yet, is left to it."""
        return self._sweeping is not None

    def sweep(self) -> None:
        """From now on Envoy has what is declared, and nothing else."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        if self._stream is not None:
            self._stream.sweep()

    # Life

    async def start(self) -> None:
        if self._server is not None:
            return
        self._sweeping = asyncio.get_running_loop().call_later(_ADOPTION_S, self.sweep)
        self._socket.parent.mkdir(parents=True, exist_ok=True)
        self._socket.unlink(missing_ok=True)  # the data directory is locked: nobody answers on it
        self._server = aio.server(options=_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(
            self._serve,
            request_deserializer=bindings.message(_REQUEST).FromString,
            response_serializer=bindings.message(_RESPONSE).SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, {"DeltaAggregatedResources": handler}),)
        )
        self._server.add_insecure_port(f"unix:{self._socket}")
        await self._server.start()
        self._socket.chmod(0o600)

    async def stop(self) -> None:
        server, self._server = self._server, None
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        if server is not None:
            await server.stop(None)

    async def _serve(self, requests: AsyncIterator[Any], _: object) -> AsyncIterator[Any]:
        stream = _Stream(self)
        reading = asyncio.create_task(stream.read(requests))
        try:
            async for response in stream.responses(reading):
                yield response
        finally:
            reading.cancel()
            self.closed(stream)


class _Stream:
    """One Envoy: what it asked for, what it was sent."""

    def __init__(self, xds: Xds) -> None:
        self._xds = xds
        self._asked: set[Key] = set()
        """Of types that are asked for by name."""
        self._kinds: set[str] = set()
        self._known: dict[Key, str] = {}
        """What it has, or was sent."""
        self._acknowledged: dict[Key, str] = {}
        """What it has for certain."""
        self._last: dict[Key, str] = {}
        """The nonce of the latest response in which a resource was."""
        self._sent: dict[str, dict[Key, str]] = {}
        """By nonce: the versions that were in it; empty for what was removed."""
        self._nonces = itertools.count(1)
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    async def responses(self, reading: asyncio.Task[None]) -> AsyncIterator[Any]:
        """What goes to Envoy, until it has gone."""
        reading.add_done_callback(lambda _: self._queue.put_nowait(None))
        while (response := await self._queue.get()) is not None:
            yield response

    async def read(self, requests: AsyncIterator[Any]) -> None:
        """What comes from Envoy."""
        first = True
        with contextlib.suppress(aio.UsageError):
            async for request in requests:
                if first:
                    self._xds.opened(self, request.node)
                    first = False
                self._heard(request)

    def _heard(self, request: Any) -> None:
        kind = request.type_url.removeprefix(bindings.type_url(""))
        if request.response_nonce:
            sent = self._sent.pop(request.response_nonce, {})
            self._answered(request.response_nonce, sent, request.error_detail.message)
        for name, version in request.initial_resource_versions.items():
            key = Key(kind, name)
            self._known[key] = self._acknowledged[key] = version
            self._xds.took(key, version)
        self._asked -= {Key(kind, name) for name in request.resource_names_unsubscribe}
        asked = [Key(kind, name) for name in request.resource_names_subscribe]
        self._asked.update(asked)
        if kind not in self._kinds:
            self._kinds.add(kind)
            self._begin(kind)
        elif asked:
            self._send(key for key in asked if self._xds.has(key))

    def _answered(self, nonce: str, sent: dict[Key, str], error: str) -> None:
        for key, version in sent.items():
            is_last = self._last.get(key) == nonce
            if error:
                if is_last:
                    self._known.pop(key, None)
                self._xds.refused(key, version, error)
            elif version and is_last:  # else something newer is on the way: another content, or its removal
                self._acknowledged[key] = version
                self._xds.took(key, version)

    def has(self, key: Key, version: str) -> bool:
        """Whether Envoy has this for certain, and nothing newer is on the way."""
        return self._known.get(key) == self._acknowledged.get(key) == version

    def knows(self, key: Key) -> bool:
        """Whether Envoy has some version of it, or was sent one."""
        return key in self._known

    def sweep(self) -> None:
        """What is not wanted ends."""
        gone = [key for key in self._known if not self._xds.has(key)]
        self.tell(sorted(gone, key=lambda key: _ORDER.index(key.kind)))

    def _begin(self, kind: str) -> None:
        """A type is asked for first: all of it that this Envoy does not have, what is known to be good at once."""
        wanted = [key for key in self._xds.resources(kind) if self.is_asked(key)]
        differing = [key for key in wanted if self._known.get(key) != self._version(key)]
        good = [key for key in differing if self._xds.is_known_good(key)]
        gone = [key for key in self._known if key.kind == kind and not self._xds.has(key)]
        if self._xds.is_adopting:
            gone = []
        if good or gone or (not wanted and kind in _WILDCARD):
            self._respond(kind, good, gone)
        self._send(key for key in differing if key not in set(good))
        for key in set(wanted) - set(differing):
            self._xds.took(key, self._known[key])

    def tell(self, keys: Iterable[Key], *, again: bool = False) -> None:
        """These have changed, or are gone. What was sent already is not, unless `again` says so."""
        keys = list(keys)
        asked = [key for key in keys if self._xds.has(key) and key.kind in self._kinds and self.is_asked(key)]
        self._send(key for key in asked if again or self._known.get(key) != self._version(key))
        gone = [key for key in keys if not self._xds.has(key) and key in self._known]
        for key in gone:
            self._respond(key.kind, [], [key])

    def is_asked(self, key: Key) -> bool:
        """Whether Envoy wants to hear of it."""
        return key.kind in _WILDCARD or key in self._asked

    def _version(self, key: Key) -> str:
        found = self._xds.get(key)
        return found.version if found else ""

    def _send(self, keys: Iterable[Key]) -> None:
        """Each in a response of its own."""
        for key in list(keys):
            self._respond(key.kind, [key], [])

    def _respond(self, kind: str, keys: Iterable[Key], gone: Iterable[Key]) -> None:
        nonce = str(next(self._nonces))
        response = bindings.message(_RESPONSE)(type_url=bindings.type_url(kind), nonce=nonce)
        sent = dict.fromkeys(gone, "")
        for key in keys:
            found = self._xds.get(key)
            assert found is not None
            entry = response.resources.add(name=key.name, version=found.version)
            entry.resource.type_url, entry.resource.value = bindings.type_url(kind), found.content
            sent[key] = found.version
        response.removed_resources.extend(key.name for key, version in sent.items() if not version)
        for key, version in sent.items():
            self._last[key] = nonce
            if version:
                self._known[key] = version
            else:
                self._known.pop(key, None)
                self._acknowledged.pop(key, None)
        self._sent[nonce] = sent
        self._queue.put_nowait(response)


def _resource(key: Key, said: Json) -> Resource:
    content = bindings.parsed(key.kind, said).SerializeToString(deterministic=True)
    return Resource(content, bindings.digest(content))
