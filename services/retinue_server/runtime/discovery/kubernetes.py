"""Discovery by the EndpointSlices of Kubernetes: listed once, then watched; one watch for all Services of a namespace.

A watch ends after a minute and goes on where it was, so that a connection that died without a word is noticed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.discovery.endpointslices import SERVICE, Metadata, Slice, addresses

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0
_WATCH_S = 60
"""After which the API server ends a watch."""
_FIRST_WAIT_S, _MAX_WAIT_S = 0.25, 30.0
_SHORTEST_S = 1.0
"""Between the beginnings of two watches, also when each is ended at once."""
_MAX_NAMED = 64
"""For more Services of a namespace, all slices are asked for: a request's address has an end."""
_OK, _GONE = 200, 410
_FORBIDDEN = 401, 403


class _List(msgspec.Struct):
    """Nothing is optional: what is no list must not be taken for an empty one."""

    kind: Literal["EndpointSliceList"]
    metadata: Metadata
    items: tuple[Slice, ...] | None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    """Of a request that failed."""

    message: str = ""
    code: int = 0


class _Refused(Exception):
    """By the API server."""

    def __init__(self, status: _Status) -> None:
        super().__init__(f"{status.code} {status.message}")
        self.code = status.code


class _Name(NamedTuple):
    service: str
    namespace: str
    """Empty = the root's own."""
    port: str


def _parse(name: str) -> _Name:
    host, _, port = name.rpartition(":")
    service, _, namespace = host.partition(".")
    return _Name(service, namespace, port)


class KubernetesDiscovery:
    """A part; a name is SERVICE[.NAMESPACE]:PORT, and each pod of the Service that is ready is an endpoint.

    PORT is a port of the pods, or the name that the Service gives it. The client library is loaded and the API server
    found by `prepare`, which whoever is about to watch for the first time should call before, on another thread.
    """

    def __init__(self, kubeconfig: Path | None, namespace: str, pattern: str) -> None:
        """Without a kubeconfig it is the pod's service account that asks; an empty namespace is that of either.

        `pattern` is whose settings and manifest are named when something is wrong with them.
        """
        self._kubeconfig, self._namespace, self._pattern = kubeconfig, namespace, pattern
        self._followers: dict[str, _Follower] = {}
        self._prepared = False

    def prepare(self) -> None:
        """On any thread, again and again. Raises StartError: a package is missing, or where the API server is."""
        if not self._prepared:
            self._namespace = self._namespace or self._find().namespace
            self._prepared = True

    def _find(self) -> Any:
        try:
            from retinue_server.runtime import kubernetes  # noqa: PLC0415 - most roots have no use for it
        except ImportError as error:
            raise StartError(
                f"cannot find endpoints by Kubernetes: {error.name} is missing;"
                " install it with pip install 'retinue-server[kubernetes]'"
            ) from error
        return kubernetes.find(self._kubeconfig, f"{self._pattern}.kubernetes.kubeconfig")

    def _connect(self) -> Any:
        """Reads anew who we are, and whom to trust; for another thread, since it reads files."""
        from lightkube.config.client_adapter import AsyncClient, ConnectionParams  # noqa: PLC0415 - as said

        return AsyncClient(self._find(), ConnectionParams(timeout=_PATIENCE_S))  # type: ignore[arg-type] # seconds do

    def watch(self, name: str, found: Callable[[Sequence[str]], None]) -> Callable[[], None]:
        self.prepare()
        service, namespace, port = _parse(name)
        namespace = namespace or self._namespace
        if namespace not in self._followers:
            self._followers[namespace] = _Follower(self._connect, namespace, f"deploy/{self._pattern}/kubernetes.yaml")
        return self._followers[namespace].add(_Asked(service, port, found))

    async def start(self) -> None:
        """Ready as it is."""

    async def stop(self) -> None:
        followers, self._followers = self._followers, {}
        for follower in followers.values():
            await follower.stop()


class _Asked:
    """Who wants to know of a Service's endpoints."""

    def __init__(self, service: str, port: str, found: Callable[[Sequence[str]], None]) -> None:
        self.service, self.port, self._found = service, port, found
        self._told: Sequence[str] | None = None

    def tell(self, slices: Sequence[Slice]) -> None:
        now = addresses(slices, self.port)
        if now == self._told:
            return
        self._told = now
        if not now:
            log.warning("Service %s has no endpoints at port %s: %s", self.service, self.port, _why(slices, self.port))
        self._found(now)


def _why(slices: Sequence[Slice], port: str) -> str:
    """There are no endpoints."""
    if not slices:
        return "it has no EndpointSlices, so there is no such Service, or it selects no pods"
    names = {p.name or "" for one in slices for p in one.ports or ()}
    if not port.isdecimal() and names and port not in names:
        return f"its ports are named {', '.join(sorted(names)) or 'nothing'}"
    return "none of its pods is ready"


class _Follower:
    """Follows the EndpointSlices of those Services of a namespace that somebody asks for."""

    def __init__(self, connect: Callable[[], Any], namespace: str, manifest: str) -> None:
        self._connect, self._namespace, self._manifest = connect, namespace, manifest
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._asked: dict[str, list[_Asked]] = {}
        self._selected: set[str] = set()
        """Services whose slices are followed."""
        self._listed: set[str] = set()
        """Those of them whose slices are known."""
        self._slices: dict[str, Slice] = {}
        self._watching = self._away = False
        self._wait_s = _FIRST_WAIT_S
        self._following: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, asked: _Asked) -> Callable[[], None]:
        self._asked.setdefault(asked.service, []).append(asked)
        if asked.service not in self._selected:
            self._begin()
        elif asked.service in self._listed:
            asyncio.get_running_loop().call_soon(self._tell, asked.service)

        def unwatch() -> None:
            self._remove(asked)

        return unwatch

    def _remove(self, asked: _Asked) -> None:
        those = self._asked.get(asked.service, [])
        if asked not in those:
            return
        those.remove(asked)
        if not those:
            del self._asked[asked.service]
            self._selected.discard(asked.service)
            self._listed.discard(asked.service)
        if not self._asked:
            self._end()

    def _begin(self) -> None:
        """From the beginning, with all that are asked for."""
        self._end()
        self._selected, self._watching = set(self._asked), False
        self._following = asyncio.create_task(self._follow())
        self._tasks.add(self._following)
        self._following.add_done_callback(self._tasks.discard)

    def _end(self) -> None:
        following, self._following = self._following, None
        if following is not None:
            following.cancel()

    async def stop(self) -> None:
        self._asked.clear()
        self._end()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _follow(self) -> None:
        """For ever; with another connection after each failure, and with pauses that grow."""
        while True:
            try:
                async with await asyncio.to_thread(self._connect) as client:
                    while True:
                        await self._watch(client, await self._list(client))
            except Exception as error:  # noqa: BLE001 - whatever fails, what was found stands, and is to be found anew
                self._failed(error)
            await asyncio.sleep(self._wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - not all roots at once
            self._wait_s = min(2 * self._wait_s, _MAX_WAIT_S)

    def _failed(self, error: Exception) -> None:
        """Of an API server that is away the log says so once; that watches break off is usual."""
        why = str(error) or type(error).__name__
        if isinstance(error, _Refused) and error.code in _FORBIDDEN:
            why += f"; apply {self._manifest}"
        if self._watching:
            log.info("the watch of EndpointSlices in namespace %s broke off: %s", self._namespace, why)
        elif not self._away:
            text = "cannot follow the EndpointSlices in namespace %s: %s; what was found last stands"
            log.warning(text, self._namespace, why)
            self._away = True
        self._watching = False

    def _succeeded(self) -> None:
        """A watch began."""
        if self._away:
            log.info("the EndpointSlices in namespace %s can be followed again", self._namespace)
        self._watching, self._away, self._wait_s = True, False, _FIRST_WAIT_S

    def _selection(self) -> str:
        some = len(self._selected) <= _MAX_NAMED
        return f"{SERVICE} in ({','.join(sorted(self._selected))})" if some else SERVICE

    async def _list(self, client: Any) -> str:
        """Takes all as they are; gives the version from which on they are to be watched."""
        answer = await client.get(self._path, params={"labelSelector": self._selection()})
        if answer.status_code != _OK:
            raise _refused(answer.status_code, answer.content)
        listed = msgspec.json.decode(answer.content, type=_List)
        self._slices = {one.metadata.name: one for one in listed.items or ()}
        self._listed = set(self._selected)
        for service in list(self._asked):
            self._tell(service)
        return listed.metadata.resource_version

    async def _watch(self, client: Any, version: str) -> None:
        """Takes changes; returns when they can't be had from where it is, and all must be listed again."""
        while version:
            next_at = asyncio.get_running_loop().time() + _SHORTEST_S
            version = await self._watch_once(client, version)
            await asyncio.sleep(next_at - asyncio.get_running_loop().time())

    async def _watch_once(self, client: Any, version: str) -> str:
        """Gives the version from which to go on; empty = that is too old."""
        try:
            async with aclosing(self._events(client, version)) as events:
                async for event in events:
                    version = self._take(event)
        except _Refused as refused:
            if refused.code != _GONE:
                raise
            return ""
        return version

    async def _events(self, client: Any, version: str) -> AsyncGenerator[_Event]:
        """Until the API server ends the watch."""
        params = {
            "labelSelector": self._selection(),
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(_WATCH_S),
        }
        patience = (_PATIENCE_S, _WATCH_S + _PATIENCE_S, _PATIENCE_S, _PATIENCE_S)  # to connect, read, write, begin
        request = client.build_request("GET", self._path, params=params, timeout=patience)
        async with asyncio.timeout(_PATIENCE_S):
            answer = await client.send(request, stream=True)
        try:
            if answer.status_code != _OK:
                raise _refused(answer.status_code, await answer.aread())
            self._succeeded()
            async for line in answer.aiter_lines():
                yield msgspec.json.decode(line, type=_Event)
        finally:
            await answer.aclose()

    def _take(self, event: _Event) -> str:
        """Gives the version that it has."""
        if event.type == "ERROR":
            raise _Refused(msgspec.json.decode(event.object, type=_Status))
        one = msgspec.json.decode(event.object, type=Slice)
        if event.type != "BOOKMARK":
            name = one.metadata.name
            before = self._slices.pop(name, one)
            if event.type != "DELETED":
                self._slices[name] = one
            for service in {before.service, one.service}:
                self._tell(service)
        return one.metadata.resource_version

    def _tell(self, service: str) -> None:
        asked = self._asked.get(service, ())
        slices = [one for one in self._slices.values() if one.service == service] if asked else []
        for each in list(asked):
            each.tell(slices)


def _refused(code: int, body: bytes) -> _Refused:
    """What was answered may be a proxy's, and no Status."""
    try:
        status = msgspec.json.decode(body, type=_Status)
    except msgspec.DecodeError:
        status = _Status("an answer that is no API server's")
    return _Refused(msgspec.structs.replace(status, code=code))
