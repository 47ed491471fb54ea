"""One upstream from its declaration to its end: keeps a data plane told, and knows what has become of it."""

from __future__ import annotations

import asyncio
import logging
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from retinue_server.ambassador.core.spec import Balancer, LoadBalancing
from retinue_server.ambassador.core.spec import Protocol as Speaks
from retinue_server.ambassador.engine import Assignment, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from retinue_server.ambassador.core.spec import Endpoint, Listen, Spec
    from retinue_server.ambassador.engine import DataPlane, EndpointHealth

log = logging.getLogger(__name__)

_LOOK_S = 0.05
"""How often it is looked whether the last connection has ended."""


class State(IntEnum):
    """As in the contract."""

    PENDING = 1
    ACTIVE = 2
    REJECTED = 3
    DRAINING = 4


class Rejection(NamedTuple):
    """Which generation the data plane refused, and why."""

    generation: int
    message: str


class View(NamedTuple):
    """An upstream as it is at this moment."""

    spec: Spec
    """As declared."""
    etag: str
    state: State
    generation: int
    active_generation: int
    address: str
    endpoints: Sequence[Endpoint]
    health: Sequence[EndpointHealth]
    resolved: bool
    rejection: Rejection | None
    connections: int
    standalone: bool
    plane: DataPlane
    from_file: bool


class Upstream:
    """See the module; on the event loop only."""

    def __init__(
        self,
        spec: Spec,
        listen: Listen,
        plane: DataPlane,
        *,
        etag: str,
        changed: Callable[[], None],
        standalone: Endpoint | None = None,
        from_file: bool = False,
    ) -> None:
        self.declared, self.listen, self.plane, self.etag = spec, listen, plane, etag
        self._changed, self.standalone, self.from_file = changed, standalone, from_file
        self.unwatch: Callable[[], None] = _nothing
        """Ends its discovery."""
        self.state = State.PENDING
        self.endpoints: tuple[Endpoint, ...] = ()
        self.objections: Mapping[str, str] = {}
        """Whom the endpoint policy left out, and why."""
        self._resolved = False
        self._generation = self._active_generation = 0
        self._rejection: Rejection | None = None
        self._dirty = asyncio.Event()
        self._settled = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self.is_leaving = False
        """Whether it is being removed."""

    @property
    def upstream_id(self) -> str:
        """Its name."""
        return self.declared.upstream_id

    def names(self, upstream_id: str) -> bool:
        """Whether it splits or mirrors to that one."""
        return upstream_id in self.declared.policy.references

    @property
    def address(self) -> str:
        """Where the app dials."""
        return f"unix:{self.listen.path}" if self.listen.path else f"127.0.0.1:{self.listen.port}"

    @property
    def generation(self) -> int:
        """Of the latest change."""
        return self._generation

    def view(self) -> View:
        """As it is now."""
        return View(
            self.declared,
            self.etag,
            self.state,
            self._generation,
            self._active_generation,
            self.address,
            self.endpoints,
            self.plane.health(self.upstream_id),
            self._resolved and bool(self.endpoints),
            self._rejection,
            self.plane.connections(self.upstream_id),
            self.standalone is not None,
            self.plane,
            self.from_file,
        )

    # Serving

    def begin(self) -> None:
        """Is served as soon as it is known by whom."""
        self._serving = asyncio.create_task(self._serve())

    def redeclare(self, spec: Spec, etag: str) -> None:
        """Is served so from now on; ends a drain."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        self.is_leaving = False
        if self.state is State.DRAINING:
            self.state = State.ACTIVE if self._active_generation else State.PENDING
        self.declared, self.etag = spec, etag
        self._touch()

    def found(self, endpoints: tuple[Endpoint, ...], objections: Mapping[str, str]) -> None:
        """These serve it from now on."""
        self.objections = objections
        if self._resolved and endpoints == self.endpoints:
            return
        self.endpoints, self._resolved = endpoints, True
        self._touch()

    def _touch(self) -> None:
        self._generation += 1
        self._settled.clear()
        self._dirty.set()
        self._changed()

    async def _serve(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if self._resolved and self.state is not State.DRAINING:
                await self._put(self._assignment())

    def _assignment(self) -> Assignment:
        spec = msgspec.structs.replace(self.declared, listen=self.listen)
        return Assignment(_alone(spec) if self.standalone else spec, self.endpoints, self._generation)

    async def _put(self, wanted: Assignment) -> None:
        """Until it is served or refused; or, while the data plane is away, until there is something newer."""
        putting = asyncio.ensure_future(self.plane.put(wanted))
        try:
            while not putting.done():
                newer = asyncio.ensure_future(self._dirty.wait())
                await asyncio.wait({putting, newer}, return_when=asyncio.FIRST_COMPLETED)
                newer.cancel()
                if not putting.done() and not self.plane.state.live:
                    return
                if not putting.done():
                    await asyncio.wait({putting})
            putting.result()
        except Refused as error:
            self._refused(wanted.generation, str(error))
        except Exception:
            log.exception("upstream %s: the data plane failed", self.upstream_id)
            self._refused(wanted.generation, "the data plane failed; see the server's log")
        else:
            self._served(wanted.generation)
        finally:
            putting.cancel()

    def _served(self, generation: int) -> None:
        self._active_generation = generation
        self._rejection = None
        if self.state is not State.DRAINING:
            self.state = State.ACTIVE
        self._settle(generation)

    def _refused(self, generation: int, message: str) -> None:
        log.warning("upstream %s: generation %s is refused: %s", self.upstream_id, generation, message)
        self._rejection = Rejection(generation, message)
        if not self._active_generation and self.state is not State.DRAINING:
            self.state = State.REJECTED
        self._settle(generation)

    def _settle(self, generation: int) -> None:
        if generation == self._generation:
            self._settled.set()
        self._changed()

    async def settled(self, seconds: float) -> None:
        """Returns when the latest generation is served or refused, or so much time has passed."""
        try:
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        except TimeoutError:
            return

    # Leaving

    async def drain(self, seconds: float, then: Callable[[], None] | None = None) -> None:
        """Takes no new connections; cuts what is open when the time is over, and then does what is said."""
        if self._leaving is not None:
            self._leaving.cancel()
        self.is_leaving = self.is_leaving or then is not None
        self.state = State.DRAINING
        await self.plane.drain(self.upstream_id)
        self._leaving = asyncio.create_task(self._leave(seconds, then))
        self._changed()

    async def _leave(self, seconds: float, then: Callable[[], None] | None) -> None:
        await self.emptied(seconds)
        if cut := self.plane.connections(self.upstream_id):
            log.info("upstream %s: %s connections are cut after %g s of draining", self.upstream_id, cut, seconds)
        await self.plane.remove(self.upstream_id)
        self._active_generation = 0
        self._changed()
        if then is not None:
            then()

    async def emptied(self, seconds: float) -> None:
        """Returns when no connection is open, or so much time has passed."""
        end = asyncio.get_running_loop().time() + seconds
        while self.state is State.DRAINING and self.plane.connections(self.upstream_id):
            left = end - asyncio.get_running_loop().time()
            if left <= 0:
                return
            await asyncio.sleep(min(left, _LOOK_S))

    def end(self) -> None:
        """Nothing is under way any more."""
        self.unwatch()
        for task in (self._serving, self._leaving):
            if task is not None and task is not asyncio.current_task():
                task.cancel()


def _alone(spec: Spec) -> Spec:
    """As in development: one server stands in for all, in plaintext."""
    sharded = spec.protocol in (Speaks.REDIS, Speaks.MEMCACHED)
    balancing = spec.policy.load_balancing if sharded else LoadBalancing(Balancer.ROUND_ROBIN)
    policy = msgspec.structs.replace(spec.policy, load_balancing=balancing, splits=(), mirror=None)
    return msgspec.structs.replace(spec, policy=policy, tls=None)


def _nothing() -> None:
    """There is no discovery to end."""
