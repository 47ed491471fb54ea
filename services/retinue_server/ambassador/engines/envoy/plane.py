"""The data plane envoy: assignments in, xDS out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from retinue_server.ambassador.core.spec import HTTP_LIKE, Balancer, Protocol
from retinue_server.ambassador.engine import Assignment, Counts, EndpointHealth, PlaneKind, Refused, State
from retinue_server.ambassador.engines import tls
from retinue_server.ambassador.engines.envoy import render
from retinue_server.ambassador.engines.envoy.accepting import Accepting
from retinue_server.ambassador.engines.envoy.admin import Admin
from retinue_server.ambassador.engines.envoy.bootstrap import bootstrap, tracing
from retinue_server.ambassador.engines.envoy.child import Child, find
from retinue_server.ambassador.engines.envoy.cutting import cut
from retinue_server.ambassador.engines.envoy.figures import Figures
from retinue_server.ambassador.engines.envoy.xds import Key, Xds
from retinue_server.runtime.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from retinue_server.ambassador.config import EnvoySettings
    from retinue_server.ambassador.core.spec import Listen, Spec
    from retinue_server.ambassador.engines.envoy.bindings import Json

log = logging.getLogger(__name__)

_LOOK_S, _LOOK_SOON_S = 5.0, 0.1
"""How often Envoy's figures are read by themselves, and while something drains."""
_GRACE_S = 5.0
"""What requests that are under way have when a child ends."""
_FILES_S = 1.0
"""How often certificates and passwords are looked at."""
_LISTENING_S, _DEAF_S = 10.0, 1.0
"""How long a listener may take to accept, and to end."""
_HTTP_POLICIES = [
    "policy.timeouts.request_duration",
    "policy.timeouts.per_try_duration",
    "policy.retry",
    "policy.hedge",
    "policy.splits",
    "policy.mirror",
    "policy.fault",
    "policy.circuit_breaker.max_pending_requests",
    "policy.circuit_breaker.max_requests",
]
_ALL = [
    "listen.unix_socket",
    "tls",
    "tls.subject_alt_names",
    "policy.outlier_detection",
    "policy.health_check",
    "policy.rate_limit",
]
_NOT_OF_REDIS = ["policy.timeouts.idle_duration", "policy.circuit_breaker.max_connections"]
_REDIS_ONLY = ["redis_auth", "policy.timeouts.request_duration"]
_BALANCERS = {
    Protocol.TCP: (Balancer.ROUND_ROBIN, Balancer.LEAST_REQUEST, Balancer.RANDOM, Balancer.RING_HASH, Balancer.MAGLEV),
    Protocol.REDIS: (Balancer.RING_HASH, Balancer.MAGLEV),
}
_CAPABILITIES: Mapping[Protocol, frozenset[str]] = {
    protocol: frozenset(
        (
            protocol.name.lower(),
            *_ALL,
            *(_HTTP_POLICIES if protocol in HTTP_LIKE else ()),
            *(_REDIS_ONLY if protocol is Protocol.REDIS else _NOT_OF_REDIS),
            *(
                f"policy.load_balancing.balancer={one.name}"
                for one in _BALANCERS.get(protocol, _BALANCERS[Protocol.TCP])
            ),
        )
    )
    for protocol in (Protocol.TCP, Protocol.HTTP, Protocol.GRPC, Protocol.REDIS)
}


_OWN = "envoy-"
"""Of directories, each of one start."""


class _Files(NamedTuple):
    """What stands in files: contents of those that an upstream names."""

    ca: bytes = b""
    cert: bytes = b""
    key: bytes = b""
    password: str = ""


def make(said: EnvoySettings, directory: Path) -> EnvoyPlane | None:
    """None where there is no Envoy to be started."""
    if said.mode == "attach":
        return EnvoyPlane(directory, said.socket or directory / "xds.sock", None)
    program = find(said.path)
    if program is None:
        return None
    own = directory / f"{_OWN}{os.urandom(4).hex()}"  # a child of a killed server may still have that one's sockets
    return EnvoyPlane(own, own / "xds.sock", program, said.concurrency)


class EnvoyPlane:
    """See the port; on the event loop only."""

    def __init__(self, directory: Path, socket: Path, program: Path | None, concurrency: int = 1) -> None:
        self.kind = PlaneKind.ENVOY_CHILD if program else PlaneKind.ENVOY_ATTACHED
        self._changed: Callable[[], None] = lambda: None
        self._xds = Xds(socket, self._came_or_went)
        admin = socket.with_name("admin.sock")
        self._admin = Admin(admin)
        self._figures = Figures(self._admin)
        self._accepting = Accepting()
        endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
        self._tracing = tracing("retinue-ambassador") if endpoint and program else None
        self._program, self._directory = program, directory
        self._bootstrap = bootstrap("retinue", socket, admin, endpoint if program else "")
        self._child = Child(program, directory, self._bootstrap, concurrency, self._ended) if program else None
        self.state = State(live=False, reason="Envoy has not come yet")
        self._served: dict[str, Assignment] = {}
        self._files: dict[str, _Files] = {}
        """What stood in the files of what is served."""
        self._refused: dict[str, _Files] = {}
        """What stands in files that have changed, and Envoy does not take."""
        self._locks: dict[str, asyncio.Lock] = {}
        self._changing: dict[str, asyncio.Future[None]] = {}
        self._complaints: dict[str, str] = {}
        """What is wrong with files, so that the log says it once."""
        self._draining: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._look = asyncio.Event()

    def capabilities(self, protocol: Protocol) -> frozenset[str]:
        return _CAPABILITIES.get(protocol, frozenset())

    def listen(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    def _ended(self) -> None:
        self._figures.forget()
        self._came_or_went()

    def _came_or_went(self) -> None:
        live = self._xds.connected
        self.state = State(live, "" if live else "Envoy is away", self._xds.version)
        self._changed()

    # Serving

    async def put(self, wanted: Assignment) -> None:
        async with self._lock(wanted.spec.upstream_id):
            await self._change(wanted)

    def _lock(self, name: str) -> asyncio.Lock:
        """One change of an upstream at a time."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def _change(self, wanted: Assignment) -> None:
        """In a task of its own, which `drain` and `remove` end: what they take away would be waited for for ever."""
        name = wanted.spec.upstream_id
        changing = self._changing[name] = asyncio.ensure_future(self._serve(wanted))
        try:
            await changing
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise Refused("it was drained or removed before it was served") from None
        finally:
            del self._changing[name]

    async def _serve(self, wanted: Assignment) -> None:
        """To this from what was served before, or not at all.

        Files that have changed to what Envoy refuses keep nothing else from changing: what stood there before goes on.
        """
        name, former = wanted.spec.upstream_id, self._former(wanted.spec)
        files = await self._current(wanted.spec)
        try:
            await self._put(wanted, files)
        except Refused as error:
            await self._put_back(name)
            if former in (None, files):
                raise
            self._refused[name] = files
            self._complain(name, error)
            await self._serve(wanted)
            return
        self._served[name], self._files[name] = wanted, files
        self._draining.discard(name)

    def _former(self, spec: Spec) -> _Files | None:
        """What stood in the same files when they were served last."""
        served = self._served.get(spec.upstream_id)
        same = served is not None and (served.spec.tls, served.spec.redis_auth) == (spec.tls, spec.redis_auth)
        return self._files[spec.upstream_id] if same else None

    async def _current(self, spec: Spec) -> _Files:
        """What stands in its files; the former where that can't be used. Raises Refused where there is no former."""
        name, former = spec.upstream_id, self._former(spec)
        try:
            files = await asyncio.to_thread(_read, spec)
        except Refused as error:
            if former is None:
                raise
            self._complain(name, error)
            return former
        if former is not None and files == self._refused.get(name):
            return former
        self._refused.pop(name, None)
        self._complaints.pop(name, None)
        return files

    def _complain(self, name: str, error: Refused) -> None:
        if self._complaints.get(name) != str(error):
            log.warning("upstream %s: %s; the former go on", name, error)
        self._complaints[name] = str(error)

    async def _stop_changing(self, name: str) -> None:
        if (changing := self._changing.get(name)) is not None:
            changing.cancel()
            await asyncio.wait({changing})

    async def _put(self, wanted: Assignment, files: _Files) -> None:
        """Each part after those that it needs."""
        spec, xds, name = wanted.spec, self._xds, wanted.spec.upstream_id
        await self._put_cluster(wanted, files)
        routes = Key(render.ROUTES, name)
        has_listener = xds.has(Key(render.LISTENER, name))
        if spec.protocol in HTTP_LIKE and not has_listener:
            xds.want(routes, render.routes(spec))
        await xds.put(Key(render.LISTENER, name), render.listener(spec, self._tracing))
        if spec.protocol in HTTP_LIKE:
            await xds.put(routes, render.routes(spec))
        if not has_listener:
            await self._accepts(spec.listen)

    async def _accepts(self, listen: Listen) -> None:
        try:
            await self._accepting.until(listen, _LISTENING_S, accepts=True)
        except TimeoutError:
            raise Refused("its listener does not accept: see Envoy's log") from None

    async def _put_cluster(self, wanted: Assignment, files: _Files) -> None:
        """Envoy takes a cluster only when it has its endpoints, and wants those of one that changes anew.

        It asks for secrets when it has the cluster, and serves nothing of it as long as it refuses them. Those that it
        has already go before: one that it refused spoils the cluster, and the other secret, until it has a better one.
        """
        spec, xds, name = wanted.spec, self._xds, wanted.spec.upstream_id
        cluster, endpoints = Key(render.CLUSTER, name), Key(render.ENDPOINTS, name)
        said, known = render.cluster(spec, files.password), render.endpoints(spec, wanted.endpoints)
        for secret, content in _secrets(spec, files):
            if xds.is_asked(secret):
                await xds.put(secret, content)
        changes = xds.changes(cluster, said)
        if not xds.has(cluster):
            xds.want(endpoints, known)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(xds.put(cluster, said))
                group.create_task(xds.put(endpoints, known, again=changes))
                for secret, content in _secrets(spec, files):
                    group.create_task(xds.put(secret, content))
        except* Refused as refusals:
            raise refusals.exceptions[0] from None

    async def _put_back(self, name: str) -> None:
        """What was served before is wanted again; of what never was, nothing."""
        if (before := self._served.get(name)) is None:
            self._xds.drop(_keys(name))
            return
        with contextlib.suppress(Refused):
            await self._put(before, self._files[name])

    async def drain(self, upstream_id: str) -> None:
        await self._stop_changing(upstream_id)
        self._draining.add(upstream_id)
        self._xds.drop([Key(render.LISTENER, upstream_id)])
        if (served := self._served.get(upstream_id)) is not None and self._xds.connected:
            with contextlib.suppress(TimeoutError, Unavailable):
                await self._accepting.until(served.spec.listen, _DEAF_S, accepts=False)
                await self._figures.look()  # whoever asks for its connections now gets those that were accepted last
        self._look.set()

    async def remove(self, upstream_id: str) -> None:
        await self._stop_changing(upstream_id)
        self._xds.drop(_keys(upstream_id))
        served = self._served.pop(upstream_id, None)
        self._files.pop(upstream_id, None)
        self._refused.pop(upstream_id, None)
        self._complaints.pop(upstream_id, None)
        self._draining.discard(upstream_id)
        if not self._lock(upstream_id).locked():
            del self._locks[upstream_id]
        if served is not None:
            await self._cut(served)

    async def _cut(self, served: Assignment) -> None:
        """Once nobody is accepted any more."""
        if self._child is None or not self._xds.connected:
            return  # an Envoy beside us ends them when its drain time is over
        with contextlib.suppress(TimeoutError):
            await self._accepting.until(served.spec.listen, _DEAF_S, accepts=False)
        try:
            await asyncio.to_thread(cut, self._child.pid, served.spec.listen)
        except OSError as error:
            log.warning(
                "upstream %s: its connections can't be cut (%s); they end within an hour",
                served.spec.upstream_id,
                error,
            )

    async def validate(self, wanted: Assignment) -> None:
        from retinue_server.ambassador.engines.envoy import validation  # noqa: PLC0415 - asked for seldom

        resources = self._resources(wanted, await asyncio.to_thread(_read, wanted.spec))
        if self._program is not None:
            await validation.validate(self._program, self._directory, resources)

    def _resources(self, wanted: Assignment, files: _Files) -> Mapping[Key, Json]:
        spec, name = wanted.spec, wanted.spec.upstream_id
        found = {
            Key(render.CLUSTER, name): render.cluster(spec, files.password),
            Key(render.ENDPOINTS, name): render.endpoints(spec, wanted.endpoints),
            Key(render.LISTENER, name): render.listener(spec),
        }
        if spec.protocol in HTTP_LIKE:
            found[Key(render.ROUTES, name)] = render.routes(spec)
        return found

    # Looking

    def may_serve(self, upstream_id: str) -> bool:
        return self._child is None and self._xds.may_have(Key(render.LISTENER, upstream_id))

    def connections(self, upstream_id: str) -> int:
        return self._figures.connections(upstream_id)

    def health(self, upstream_id: str) -> Sequence[EndpointHealth]:
        return self._figures.health(upstream_id)

    async def counts(self) -> Mapping[str, Counts]:
        await self._figures.look()
        return {name: self._figures.counts(served.spec) for name, served in self._served.items()}

    async def _keep_looking(self) -> None:
        """For health, and for the connections of what drains."""
        while True:
            seen = {name: tuple(self._figures.health(name)) for name in self._served}
            if self._served and self._xds.connected:
                with contextlib.suppress(Unavailable):
                    await self._figures.look()
            if any(tuple(self._figures.health(name)) != known for name, known in seen.items()):
                self._changed()
            self._look.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), _LOOK_SOON_S if self._draining else _LOOK_S)

    async def _keep_files(self) -> None:
        """Certificates and passwords that change go out; not of what is changing or draining anyway."""
        while True:
            for name, served in list(self._served.items()):
                has_files = served.spec.tls is not None or served.spec.redis_auth is not None
                if has_files and name not in self._draining and not self._lock(name).locked():
                    async with self._lock(name):
                        await self._renew(name, served)
            await asyncio.sleep(_FILES_S)

    async def _renew(self, name: str, served: Assignment) -> None:
        files = await self._current(served.spec)
        if self._served.get(name) is not served or name in self._draining or files == self._files[name]:
            return
        log.info("upstream %s: its files have changed", name)
        with contextlib.suppress(Refused):  # it has been said; or it was drained or removed
            await self._change(served)

    # Life

    async def start(self) -> None:
        if self._tasks:
            return
        if self._child is not None:
            await asyncio.to_thread(_clear, self._directory.parent)
        await self._xds.start()
        if self._child is not None:
            await self._child.start()
        self._tasks = [asyncio.create_task(self._keep_looking()), asyncio.create_task(self._keep_files())]

    async def stop(self) -> None:
        """A child takes no new connections, and ends; one that is attached goes on."""
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if self._child is not None:
            with contextlib.suppress(Unavailable):
                await self._admin.post("/drain_listeners?graceful")  # from now on answers end their connections
                await self._admin.post("/drain_listeners")  # and nobody is accepted any more
                await self._at_rest()
            await self._child.stop()
        await self._xds.stop()

    async def _at_rest(self) -> None:
        """Returns when no request is under way, or patience is over."""
        end = asyncio.get_running_loop().time() + _GRACE_S
        while asyncio.get_running_loop().time() < end:
            if not any(counts.active_requests for counts in (await self.counts()).values()):
                return
            await asyncio.sleep(_LOOK_SOON_S)


def _clear(directory: Path) -> None:
    """Takes away what former starts left; the data directory is locked, so that nobody of ours uses it."""
    for left in directory.glob(f"{_OWN}*"):
        shutil.rmtree(left, ignore_errors=True)


def _secrets(spec: Spec, files: _Files) -> Iterator[tuple[Key, Json]]:
    name = spec.upstream_id
    if spec.tls is not None and spec.tls.cert_file:
        yield Key(render.SECRET, f"{name}/cert"), render.cert_secret(name, files.cert, files.key)
    if spec.tls is not None:
        yield Key(render.SECRET, f"{name}/ca"), render.ca_secret(name, files.ca)


def _keys(name: str) -> list[Key]:
    """In the order in which they go: what needs another before it."""
    return [
        Key(render.LISTENER, name),
        Key(render.ROUTES, name),
        Key(render.CLUSTER, name),
        Key(render.ENDPOINTS, name),
        Key(render.SECRET, f"{name}/ca"),
        Key(render.SECRET, f"{name}/cert"),
    ]


def _read(spec: Spec) -> _Files:
    """Raises Refused for what can't be read."""
    try:
        ca = cert = key = b""
        password = ""
        if spec.tls is not None:
            tls.context(spec.tls)  # which says of a file what is wrong with it; Envoy does not say of which
            ca = Path(spec.tls.ca_file or ssl.get_default_verify_paths().cafile or _SYSTEM_CA).read_bytes()
        if spec.tls is not None and spec.tls.cert_file:
            cert, key = Path(spec.tls.cert_file).read_bytes(), Path(spec.tls.key_file).read_bytes()
        if spec.redis_auth is not None:
            password = Path(spec.redis_auth.password_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"cannot read a file that it names: {error}") from None
    return _Files(ca, cert, key, password)


_SYSTEM_CA = "/etc/ssl/certs/ca-certificates.crt"
