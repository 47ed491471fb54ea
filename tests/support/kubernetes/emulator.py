"""An EMULATED API server: what is used of Leases, EndpointSlices and pods, where the real one is not built.

It has the requests, codes and bodies that the transcripts recorded of the real one. It has no RBAC, discovery, paging,
finalizers, managedFields, or PATCH but of labels, sends bookmarks only when it is told to, and refuses what it does not
know with 501. All is in memory and in one thread; it is no peer to measure against.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import uvicorn

from support.certificates import Authority
from support.kubernetes.api import APIS, Api, new_name, write_kubeconfig
from support.kubernetes.store import RESOURCES, Refusal, Resource, Selection, Store, Thing, read

_PATH = re.compile(r"(/apis?/.+/namespaces)/([^/]+)/([a-z]+)(?:/([^/]+))?")
_PARAMETERS = {
    "watch",
    "timeoutSeconds",
    "resourceVersion",
    "fieldSelector",
    "labelSelector",
    "allowWatchBookmarks",
}
_SELECTOR = re.compile(r"([^ =!,]+)(?:=([^ ,=!]*)| in \(([^)]*)\))?")
_START = 60.0

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


class App:
    """The API over ASGI."""

    def __init__(self, token: str) -> None:
        self.store = Store()
        self.latency_s = 0.0
        self.drops = self.ends = self.bookmarks = 0
        """Watches that began before the latest are over, or have one to get."""
        self.marked = 0
        """Bookmarks that were sent."""
        self.nonsense: bytes | None = None
        """What it answers to everything, if anything."""
        self.requests: list[str] = []
        """`list` and `watch`, as they came."""
        self._token = token

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body = b""
        while (part := await receive())["type"] == "http.request":
            body += part["body"]
            if not part.get("more_body"):
                break
        await asyncio.sleep(self.latency_s)
        if self.nonsense is not None:
            await _head(send, 200)
            await send({"type": "http.response.body", "body": self.nonsense})
            return
        params = dict(parse_qsl(scope["query_string"].decode()))
        try:
            wanted = self._route(scope, params)
            if params.get("watch") == "true":
                await self._watch(wanted, params, receive, send)
                return
            code, said = self._answer(scope["method"], wanted, body)
        except Refusal as refusal:
            code, said = refusal.code, refusal.status
        await _head(send, code)
        await _body(send, said, more=False)

    def _route(self, scope: Message, params: dict[str, str]) -> Selection:
        if dict(scope["headers"]).get(b"authorization") != f"Bearer {self._token}".encode():
            raise Refusal(401, "Unauthorized", "Unauthorized")
        route = _PATH.fullmatch(scope["path"])
        if route is None or APIS.get(route[3]) != route[1] or not _PARAMETERS.issuperset(params):
            raise Refusal(501, "NotImplemented", f"not emulated: {scope['method']} {scope['path']} {params}")
        wanted = Selection(RESOURCES[route[3]], route[2], route[4], listed=route[4] is None)
        return _selected(wanted, params) if wanted.listed else wanted

    def _answer(self, method: str, wanted: Selection, body: bytes) -> Any:
        store, (of, namespace, *_), name = self.store, wanted, "" if wanted.listed else wanted.name or ""
        match method, wanted.listed:
            case "GET", True:
                self.requests.append("list")
                return 200, self._listed(wanted)
            case "GET", False:
                return 200, store.get(of, namespace, name)
            case "POST", True:
                return 201, store.create(of, namespace, read(of, body, namespace, None))
            case "PUT", False:
                return store.put(of, namespace, read(of, body, namespace, name))
            case "PATCH", False:
                return 200, store.patch(of, namespace, name, body)
            case "DELETE", False:
                return 200, _deleted(of, store.delete(of, namespace, name))
        raise Refusal(501, "NotImplemented", f"not emulated: {method} of {name}")

    def _listed(self, wanted: Selection) -> Any:
        items = [_without_kind(thing) for thing in self.store.list(wanted)]
        kind, version = wanted.resource.kind, wanted.resource.version
        meta = {"resourceVersion": str(self.store.version)}
        return {"kind": f"{kind}List", "apiVersion": version, "metadata": meta, "items": items}

    async def _watch(self, wanted: Selection, params: dict[str, str], receive: Receive, send: Send) -> None:
        drops = self.drops
        await _head(send, 200)
        gone = asyncio.ensure_future(receive())
        try:
            async for said in self._changes(wanted, params, gone):
                await _body(send, said, more=True)
        except Refusal as refusal:
            await _body(send, {"type": "ERROR", "object": refusal.status}, more=True)
        finally:
            gone.cancel()
        if self.drops != drops:
            raise ConnectionResetError("the watch is dropped")  # uvicorn then closes the connection
        await send({"type": "http.response.body", "body": b""})

    async def _changes(
        self, wanted: Selection, params: dict[str, str], gone: asyncio.Future[Message]
    ) -> AsyncIterator[Any]:
        version = int(params.get("resourceVersion", "0"))
        if version == 0:
            version = self.store.version
            for thing in self.store.list(wanted):
                yield {"type": "ADDED", "object": thing}
        begun, marked = (self.drops, self.ends), self.bookmarks
        self.requests.append("watch")  # only now does it notice when it is to end
        end = time.monotonic() + float(params.get("timeoutSeconds", "1800"))
        while time.monotonic() < end and (self.drops, self.ends) == begun and not gone.done():
            changed = asyncio.ensure_future(self.store.changed.wait())
            for at, kind, thing in self.store.since(version, wanted):
                yield {"type": kind, "object": thing}
                version = at
            if marked != self.bookmarks and "allowWatchBookmarks" in params:
                marked, version = self.bookmarks, self.store.version
                yield _bookmark(wanted.resource, version)
                self.marked += 1
            either: set[asyncio.Future[Any]] = {changed, gone}
            await asyncio.wait(either, timeout=end - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()


def _bookmark(of: Resource, version: int) -> Any:
    meta = {"resourceVersion": str(version), "creationTimestamp": None}
    return {"type": "BOOKMARK", "object": {"kind": of.kind, "apiVersion": of.version, "metadata": meta}}


def _without_kind(thing: Thing) -> Any:
    """As it stands in a list."""
    return {name: part for name, part in msgspec.to_builtins(thing).items() if name not in ("kind", "apiVersion")}


def _selected(wanted: Selection, params: dict[str, str]) -> Selection:
    fields, labels = params.get("fieldSelector"), params.get("labelSelector")
    if fields is not None:
        if not fields.startswith("metadata.name="):
            raise Refusal(501, "NotImplemented", f"not emulated: fieldSelector {fields}")
        wanted = wanted._replace(name=fields.removeprefix("metadata.name="))
    if labels is not None:
        selector = _SELECTOR.fullmatch(labels)
        if selector is None:
            raise Refusal(501, "NotImplemented", f"not emulated: labelSelector {labels}")
        label, one, some = selector.groups()
        values = [one] if one is not None else some.replace(" ", "").split(",") if some else None
        wanted = wanted._replace(label=label, values=None if values is None else frozenset(values))
    return wanted


def _deleted(of: Resource, thing: Thing) -> Any:
    details = {"name": thing.metadata.name, "group": of.group, "kind": of.plural, "uid": thing.metadata.uid}
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}


async def _head(send: Send, code: int) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": code, "headers": headers})


async def _body(send: Send, said: object, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": msgspec.json.encode(said) + b"\n", "more_body": more})


class Emulator(Api):
    """An emulated API server on a free port of loopback, over TLS, in a thread of this process."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "kubeconfig")
        token, authority = secrets.token_hex(8), Authority(directory)
        pair = authority.issue("apiserver")
        self._app = App(token)
        config = uvicorn.Config(
            self._app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.CRITICAL + 1,  # it would tell of the watches that are dropped on purpose
            timeout_graceful_shutdown=1,
            ssl_certfile=pair.cert_file,
            ssl_keyfile=str(pair.key_file),
        )
        self._server = uvicorn.Server(config)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="kubernetes-emulated")
        write_kubeconfig(self.kubeconfig, f"https://127.0.0.1:{self._port}", str(authority.file), token)

    @property
    def _port(self) -> int:
        return int(self._socket.getsockname()[1])

    def namespace(self) -> str:
        name = new_name()
        self._app.store.namespaces.add(name)
        return name

    def remove(self, namespace: str) -> None:
        self._app.store.namespaces.discard(namespace)

    # What a test may do to it

    @contextlib.contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        """Answers only after that time."""
        self._app.latency_s = seconds
        yield
        self._app.latency_s = 0.0

    @contextlib.contextmanager
    def talking(self, nonsense: bytes) -> Iterator[None]:
        """Answers as something that is no API server and sits in front of it."""
        self._app.nonsense = nonsense
        self.drop_watches()
        try:
            yield
        finally:
            self._app.nonsense = None

    def refuse_writes(self, times: int) -> None:
        """So many of the next PUTs find that somebody else was faster."""
        self._app.store.conflicts = times

    @property
    def requests(self) -> list[str]:
        """`list` and `watch`, as they came so far."""
        return list(self._app.requests)

    def bookmark_watches(self) -> None:
        """All watches that want them get a bookmark; returns when one did."""
        before, end = self._app.marked, time.monotonic() + _START
        self._app.bookmarks += 1
        self._call(self._app.store.wake)
        while self._app.marked == before:
            assert time.monotonic() < end
            time.sleep(0.01)

    def drop_watches(self) -> None:
        """All watches break off amid what they say."""
        self._app.drops += 1
        self._call(self._app.store.wake)

    def forget_what_was(self) -> None:
        """No watch can begin before what is now; those that run go on."""
        self._app.store.forgotten = self._app.store.version

    def end_watches(self, *, forget: bool = False) -> None:
        """All watches end as by their timeout; with `forget` none can go on from where it was."""
        if forget:
            self._call(self._app.store.forget)
        self._app.ends += 1
        self._call(self._app.store.wake)

    def _call(self, what: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(what)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve([self._socket])

    def start(self) -> None:
        """Returns when it serves."""
        self._thread.start()
        end = time.monotonic() + _START
        while not self._server.started:
            assert time.monotonic() < end
            assert self._thread.is_alive()
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends its watches and itself."""
        self.end_watches()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


@contextlib.contextmanager
def emulated() -> Iterator[Emulator]:
    """One in a directory of its own, while it is needed."""
    with tempfile.TemporaryDirectory(prefix="retinue-kubernetes-emulated-") as where:
        emulator = Emulator(Path(where))
        emulator.start()
        try:
            yield emulator
        finally:
            emulator.stop()
