"""An EMULATED API server: what the engine kubernetes uses of Leases, for machines where the real one is not built.

It has the requests, codes and bodies that `transcript.json` recorded of the real one. It has no RBAC, discovery, PATCH,
paging, bookmarks, finalizers or managedFields, and refuses what it does not know with 501. All is in memory and in one
thread; it is no peer to measure against.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import re
import secrets
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec
import uvicorn

from support.certificates import Authority
from support.kubernetes.api import LEASES, Api, new_name, write_kubeconfig

_PATH = re.compile(rf"{re.escape(LEASES)}/([^/]+)/leases(?:/([^/]+))?")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_PARAMETERS = {"watch", "timeoutSeconds", "resourceVersion", "fieldSelector"}
_START = 10.0

MicroTime = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")]
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


class Metadata(msgspec.Struct, rename="camel", omit_defaults=True):
    """What is kept of an object's."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class Spec(msgspec.Struct, rename="camel", omit_defaults=True):
    """Of a Lease; other fields are lost, as in the real one."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: MicroTime | None = None
    renew_time: MicroTime | None = None
    lease_transitions: int | None = None


class Lease(msgspec.Struct, rename="camel"):
    """As it is stored."""

    kind: str = "Lease"
    api_version: str = "coordination.k8s.io/v1"
    metadata: Metadata = msgspec.field(default_factory=Metadata)
    spec: Spec = msgspec.field(default_factory=Spec)


class Event(NamedTuple):
    """A change."""

    version: int
    kind: str
    lease: Lease


class Refusal(Exception):
    """A Status that says what failed."""

    def __init__(self, code: int, reason: str, message: str, **details: str) -> None:
        super().__init__(message)
        self.code = code
        self.status: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
        }
        self.status |= {"reason": reason} if reason else {}
        self.status |= {"details": details} if details else {}
        self.status |= {"code": code}


class Store:
    """Leases, their changes, and the counter of versions; known to one thread."""

    def __init__(self) -> None:
        self.namespaces = {"default"}
        self.conflicts = 0
        self.version = 1
        self.forgotten = 0
        """Changes up to this version cannot be watched any more."""
        self.changed = asyncio.Event()
        self._leases: dict[tuple[str, str], Lease] = {}
        self._events: list[Event] = []

    def get(self, namespace: str, name: str) -> Lease:
        found = self._leases.get((namespace, name))
        if found is None:
            raise _refused(404, "NotFound", f'leases.coordination.k8s.io "{name}" not found', name)
        return found

    def list(self, namespace: str, name: str | None) -> list[Lease]:
        """In the order of their names."""
        names = sorted(key for key in self._leases if key[0] == namespace and name in (None, key[1]))
        return [self._leases[key] for key in names]

    def create(self, namespace: str, lease: Lease) -> Lease:
        meta = lease.metadata
        if namespace not in self.namespaces:
            message = f'namespaces "{namespace}" not found'
            raise Refusal(404, "NotFound", message, name=namespace, kind="namespaces")
        if meta.resource_version:
            raise Refusal(500, "", "resourceVersion should not be set on objects to be created")
        if (namespace, meta.name) in self._leases:
            raise _refused(409, "AlreadyExists", f'leases.coordination.k8s.io "{meta.name}" already exists', meta.name)
        meta.uid, meta.namespace, meta.creation_timestamp = str(uuid.uuid4()), namespace, _now()
        return self._store("ADDED", lease)

    def put(self, namespace: str, lease: Lease) -> tuple[int, Lease]:
        """As made from the latest; one that does not exist is created."""
        meta = lease.metadata
        before = self._leases.get((namespace, meta.name))
        uid = before.metadata.uid if before else ""
        if meta.uid not in ("", uid):
            raise _conflict(
                meta.name, f"Precondition failed: UID in precondition: {meta.uid}, UID in object meta: {uid}"
            )
        if before is None:
            meta.resource_version = ""
            return 201, self.create(namespace, lease)
        self._check(before, meta)
        kept = before.metadata
        meta.uid, meta.namespace, meta.creation_timestamp = kept.uid, kept.namespace, kept.creation_timestamp
        return 200, before if before == lease else self._store("MODIFIED", lease)

    def _check(self, before: Lease, meta: Metadata) -> None:
        if not meta.resource_version:
            message = "metadata.resourceVersion: Invalid value: 0: must be specified for an update"
            raise _refused(422, "Invalid", f'leases.coordination.k8s.io "{meta.name}" is invalid: {message}', meta.name)
        if self.conflicts or meta.resource_version != before.metadata.resource_version:
            self.conflicts = max(0, self.conflicts - 1)
            what = "the object has been modified; please apply your changes to the latest version and try again"
            raise _conflict(meta.name, what)

    def delete(self, namespace: str, name: str) -> Lease:
        lease = self.get(namespace, name)
        del self._leases[namespace, name]
        return self._note("DELETED", msgspec.structs.replace(lease, metadata=msgspec.structs.replace(lease.metadata)))

    def _store(self, kind: str, lease: Lease) -> Lease:
        self._leases[lease.metadata.namespace, lease.metadata.name] = lease
        return self._note(kind, lease)

    def _note(self, kind: str, lease: Lease) -> Lease:
        self.version += 1
        lease.metadata.resource_version = str(self.version)
        self._events.append(Event(self.version, kind, lease))
        self.wake()
        return lease

    def wake(self) -> None:
        """Lets those go on who watch."""
        self.changed.set()
        self.changed = asyncio.Event()

    def forget(self) -> None:
        """Something else changed, and what was before it is forgotten."""
        self.version += 1
        self.forgotten = self.version

    def since(self, version: int, namespace: str, name: str | None) -> Iterator[Event]:
        """Changes after a version; raises Refusal if they are forgotten."""
        if version < self.forgotten:
            raise Refusal(410, "Expired", f"too old resource version: {version} ({self.forgotten})")
        for event in self._events:
            meta = event.lease.metadata
            if event.version > version and meta.namespace == namespace and name in (None, meta.name):
                yield event


class App:
    """The API over ASGI."""

    def __init__(self, token: str) -> None:
        self.store = Store()
        self.latency_s = 0.0
        self.drops = self.ends = 0
        """Watches that began before the latest are over."""
        self._token = token

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body = b""
        while (part := await receive())["type"] == "http.request":
            body += part["body"]
            if not part.get("more_body"):
                break
        await asyncio.sleep(self.latency_s)
        params = dict(parse_qsl(scope["query_string"].decode()))
        try:
            namespace, name = self._route(scope, params)
            if params.get("watch") == "true":
                await self._watch(namespace, params, receive, send)
                return
            code, said = self._answer(scope["method"], namespace, name, params, body)
        except Refusal as refusal:
            code, said = refusal.code, refusal.status
        await _head(send, code)
        await _body(send, said, more=False)

    def _route(self, scope: Message, params: dict[str, str]) -> tuple[str, str | None]:
        if dict(scope["headers"]).get(b"authorization") != f"Bearer {self._token}".encode():
            raise Refusal(401, "Unauthorized", "Unauthorized")
        route = _PATH.fullmatch(scope["path"])
        if route is None or not _PARAMETERS.issuperset(params):
            raise Refusal(501, "NotImplemented", f"not emulated: {scope['method']} {scope['path']} {params}")
        return route[1], route[2]

    def _answer(self, method: str, namespace: str, name: str | None, params: dict[str, str], body: bytes) -> Any:
        store = self.store
        match method, name:
            case "GET", None:
                return 200, self._listed(namespace, _selected(params))
            case "GET", str():
                return 200, store.get(namespace, name)
            case "POST", None:
                return 201, store.create(namespace, _read(body, namespace, None))
            case "PUT", str():
                return store.put(namespace, _read(body, namespace, name))
            case "DELETE", str():
                return 200, _deleted(store.delete(namespace, name))
        raise Refusal(501, "NotImplemented", f"not emulated: {method} of {name}")

    def _listed(self, namespace: str, name: str | None) -> Any:
        items = [{"metadata": lease.metadata, "spec": lease.spec} for lease in self.store.list(namespace, name)]
        meta = {"resourceVersion": str(self.store.version)}
        return {"kind": "LeaseList", "apiVersion": "coordination.k8s.io/v1", "metadata": meta, "items": items}

    async def _watch(self, namespace: str, params: dict[str, str], receive: Receive, send: Send) -> None:
        drops = self.drops
        await _head(send, 200)
        gone = asyncio.ensure_future(receive())
        try:
            async for said in self._changes(namespace, params, gone):
                await _body(send, said, more=True)
        except Refusal as refusal:
            await _body(send, {"type": "ERROR", "object": refusal.status}, more=True)
        finally:
            gone.cancel()
        if self.drops != drops:
            raise ConnectionResetError("the watch is dropped")  # uvicorn then closes the connection
        await send({"type": "http.response.body", "body": b""})

    async def _changes(
        self, namespace: str, params: dict[str, str], gone: asyncio.Future[Message]
    ) -> AsyncIterator[Any]:
        name, version = _selected(params), int(params.get("resourceVersion", "0"))
        if version == 0:
            version = self.store.version
            for lease in self.store.list(namespace, name):
                yield {"type": "ADDED", "object": lease}
        begun = self.drops, self.ends
        end = time.monotonic() + float(params.get("timeoutSeconds", "1800"))
        while time.monotonic() < end and (self.drops, self.ends) == begun and not gone.done():
            changed = asyncio.ensure_future(self.store.changed.wait())
            for event in self.store.since(version, namespace, name):
                yield {"type": event.kind, "object": event.lease}
                version = event.version
            either: set[asyncio.Future[Any]] = {changed, gone}
            await asyncio.wait(either, timeout=end - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()


def _refused(code: int, reason: str, message: str, name: str, kind: str = "leases") -> Refusal:
    return Refusal(code, reason, message, name=name, group="coordination.k8s.io", kind=kind)


def _conflict(name: str, what: str) -> Refusal:
    message = f'Operation cannot be fulfilled on leases.coordination.k8s.io "{name}": {what}'
    return _refused(409, "Conflict", message, name)


def _read(body: bytes, namespace: str, name: str | None) -> Lease:
    """The Lease that was sent; raises Refusal if it is none, is spoiled, or is another's."""
    try:
        lease = msgspec.json.decode(body, type=Lease)
    except msgspec.MsgspecError as error:
        raise Refusal(400, "BadRequest", f'Lease in version "v1" cannot be handled as a Lease: {error}') from error
    meta = lease.metadata
    meta.labels, meta.annotations = meta.labels or None, meta.annotations or None
    if name not in (None, meta.name):
        message = f"the name of the object ({meta.name}) does not match the name on the URL ({name})"
        raise Refusal(400, "BadRequest", message)
    if meta.namespace not in ("", namespace):
        message = "the namespace of the provided object does not match the namespace sent on the request"
        raise Refusal(400, "BadRequest", message)
    if (wrong := _wrong(lease)) is not None:
        message = f'Lease.coordination.k8s.io "{meta.name}" is invalid: {wrong}'
        raise _refused(422, "Invalid", message, meta.name, kind="Lease")
    return lease


def _wrong(lease: Lease) -> str | None:
    length, transitions = lease.spec.lease_duration_seconds, lease.spec.lease_transitions
    if not _NAME.fullmatch(lease.metadata.name):
        return "metadata.name: Invalid value"
    if length is not None and length <= 0:
        return f"spec.leaseDurationSeconds: Invalid value: {length}: must be greater than 0"
    if transitions is not None and transitions < 0:
        return f"spec.leaseTransitions: Invalid value: {transitions}: must be greater than or equal to 0"
    return None


def _selected(params: dict[str, str]) -> str | None:
    selector = params.get("fieldSelector")
    if selector is not None and not selector.startswith("metadata.name="):
        raise Refusal(501, "NotImplemented", f"not emulated: fieldSelector {selector}")
    return selector and selector.removeprefix("metadata.name=")


def _deleted(lease: Lease) -> Any:
    details = {"name": lease.metadata.name, "group": "coordination.k8s.io", "kind": "leases", "uid": lease.metadata.uid}
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


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

    def refuse_writes(self, times: int) -> None:
        """So many of the next PUTs find that somebody else was faster."""
        self._app.store.conflicts = times

    def drop_watches(self) -> None:
        """All watches break off amid what they say."""
        self._app.drops += 1
        self._call(self._app.store.wake)

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
