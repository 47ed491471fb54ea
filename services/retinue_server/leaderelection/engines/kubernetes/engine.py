"""The port over Leases; see the package."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from typing import TYPE_CHECKING

from retinue_server.leaderelection.engine import (
    Capabilities,
    Claim,
    EndReason,
    Granted,
    Hold,
    Record,
    Refused,
    Scope,
    Term,
)
from retinue_server.leaderelection.engines.kubernetes.client import ConflictError, ForbiddenError, Leases
from retinue_server.leaderelection.engines.kubernetes.lease import Lease
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import InvalidArgument, NotFound, Reason, RetinueError, Unavailable, Violation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)

_POLL_MS = 2_000
_TRIES = 8
_AT_ONCE = 16
"""How many renewals are on their way at a time."""
_WATCH_AGAIN_S = 1.0
_MAX_WATCHES = 64
"""Each has a connection; for more elections than that, watch the namespace."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


class KubernetesEngine:
    """See engine.Engine.

    Without a kubeconfig it uses the pod's service account; without a namespace, that of either. `create` makes missing
    Leases, which needs a role that may; otherwise they must have been applied. `watch_namespace` watches all Leases of
    the namespace at once. `names` are the elections that are served, if not all.
    """

    def __init__(
        self,
        *,
        kubeconfig: Path | None = None,
        namespace: str = "",
        create: bool = False,
        watch_namespace: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        self.capabilities = Capabilities("kubernetes", Scope.CLUSTER, poll_ms=_POLL_MS)
        self._kubeconfig, self._namespace = kubeconfig, namespace
        self._create, self._watch_namespace, self._names = create, watch_namespace, names
        self._leases: Leases | None = None
        self._seen: dict[str, Lease] = {}
        """As they were told last."""
        self._met: set[str] = set(names)
        """Elections that were asked for, for a role that may not list."""
        self._told: Callable[[str], None] = lambda _: None
        self._watched: dict[str, asyncio.Task[None] | None] = {}
        self._following_all: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._leases = Leases(self._kubeconfig, self._namespace)
        try:
            await self.records("", 1)
            missing = [] if self._create else [name for name in self._names if await self._api.get(name) is None]
        except RetinueError as error:
            await self.stop()
            raise StartError(f"cannot use the API server: {error}") from error
        if missing:
            await self.stop()
            raise StartError(_missing(", ".join(missing), self._namespace))
        if self._watch_namespace:
            self._following_all = asyncio.create_task(self._follow(None))

    async def stop(self) -> None:
        tasks = [task for task in (*self._watched.values(), self._following_all) if task is not None]
        self._watched.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        leases, self._leases = self._leases, None
        if leases is not None:
            await leases.close()

    @property
    def _api(self) -> Leases:
        if self._leases is None:
            raise Unavailable("cannot go on: the engine is stopped", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=500)
        return self._leases

    # Watching

    def listen(self, told: Callable[[str], None]) -> None:
        self._told = told

    def watch(self, election_id: str) -> None:
        if election_id in self._watched or not _NAME.fullmatch(election_id):
            return
        alone = not self._watch_namespace and len(self._watched) < _MAX_WATCHES
        self._watched[election_id] = asyncio.create_task(self._follow(election_id)) if alone else None

    def unwatch(self, election_id: str) -> None:
        following = self._watched.pop(election_id, None)
        if following is not None:
            following.cancel()
        self._seen.pop(election_id, None)

    async def _follow(self, election_id: str | None) -> None:
        """Watches one, or all, for ever."""
        while True:
            try:
                async with contextlib.aclosing(self._api.watch(election_id)) as leases:
                    async for lease in leases:
                        self._hear(lease)
            except RetinueError as error:
                _log.info("cannot watch %s: %s", election_id or "the namespace", error)
            await asyncio.sleep(_WATCH_AGAIN_S)
            for name in list(self._watched) if election_id is None else [election_id]:
                self._told(name)

    def _hear(self, lease: Lease) -> None:
        if lease.name not in self._watched:
            return
        before = self._seen.get(lease.name)
        self._seen[lease.name] = lease
        if before is None or before.version != lease.version:
            self._told(lease.name)

    # The port

    async def claim(self, claim: Claim, watched: str | None = None) -> Granted | Refused:
        def step(lease: Lease) -> Lease | None:
            if lease.is_led_by(claim.session_id):
                return lease.renewed(claim.lease_ms)
            return lease.claimed(claim) if lease.is_free(watched) else None

        before, after = await self._change(claim.election_id, step)
        if before is None:
            raise NotFound(
                _missing(claim.election_id, self._api.namespace),
                reason=Reason.ELECTION_NOT_FOUND,
                election_id=claim.election_id,
            )
        record = (after or before).record()
        if after is None or record is None:
            return Refused(record)
        return Granted(record, after.wait_ms)

    async def withdraw(self, election_id: str, session_id: str) -> None:
        """There is no line."""

    async def renew(self, holds: Sequence[Hold]) -> Sequence[Record | None]:
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(hold: Hold) -> Record | None:
            async with room:
                return await self._change_held(hold, lambda lease: lease.renewed())

        outcomes = await asyncio.gather(*map(one, holds), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]

    async def release(self, hold: Hold, reason: EndReason, wall_ms: int) -> bool:
        released = await self._change_held(hold, lambda lease: lease.released(reason, wall_ms))
        if hold.election_id not in self._watched:
            self._seen.pop(hold.election_id, None)
        return released is not None

    async def proclaim(self, hold: Hold, value: str) -> Record | None:
        return await self._change_held(hold, lambda lease: lease.proclaimed(value))

    async def ask_step_down(self, election_id: str, epoch: int) -> Record | None:
        def step(lease: Lease) -> Lease | None:
            record = lease.record()
            led = record is not None and record.session_id and record.epoch == epoch
            return lease.asked_to_step_down() if led else None

        _, after = await self._change(election_id, step)
        return after.record() if after is not None else None

    async def read(self, election_id: str) -> Record | None:
        lease = await self._get(election_id)
        return lease.record() if lease is not None else None

    async def records(self, after: str, limit: int) -> Sequence[Record]:
        leases = {lease.name: lease for lease in await self._all(after, limit)}
        records = [leases[name].record() for name in sorted(leases) if name > after]
        return [record for record in records if record is not None][:limit]

    async def terms(self, election_id: str, before: int | None, limit: int) -> Sequence[Term]:
        lease = await self._get(election_id)
        return lease.terms(before, limit) if lease is not None else []

    # Steps

    async def _all(self, after: str, limit: int) -> Sequence[Lease]:
        """All Leases of the namespace, or those that are known by name, for a role that may not list."""
        if not self._names:
            with contextlib.suppress(ForbiddenError):
                return await self._api.list()
        names = sorted(name for name in self._met if name > after)
        found = [await self._api.get(name) for name in names[:limit]]
        return [lease for lease in found if lease is not None]

    async def _get(self, election_id: str) -> Lease | None:
        if not _NAME.fullmatch(election_id):
            raise InvalidArgument(
                "cannot go on: a Lease cannot have the election's name",
                [Violation("election_id", "must be of a-z 0-9 . - and begin and end with a letter or digit")],
            )
        lease = await self._api.get(election_id)
        if lease is not None:
            self._met.add(election_id)
        return lease

    async def _change_held(self, hold: Hold, change: Callable[[Lease], Lease]) -> Record | None:
        _, after = await self._change(hold.election_id, lambda lease: change(lease) if lease.is_held_by(hold) else None)
        return after.record() if after is not None else None

    async def _change(
        self, election_id: str, step: Callable[[Lease], Lease | None]
    ) -> tuple[Lease | None, Lease | None]:
        """The Lease as it was, and as it became if there was a step; begins with what was seen last, to be quick."""
        seen = self._seen.get(election_id)
        lease = seen or await self._found(election_id)
        for _ in range(_TRIES):
            wanted = step(lease) if lease is not None else None
            if wanted is None:
                if seen is None:
                    return lease, None
            else:
                with contextlib.suppress(ConflictError):
                    if (stored := await self._store(wanted)) is not None:
                        return lease, stored
            seen, lease = None, await self._found(election_id)
        raise Unavailable(
            f"cannot change election {election_id}: others are faster, again and again",
            reason=Reason.ENGINE_UNAVAILABLE,
            retry_ms=500,
        )

    async def _found(self, election_id: str) -> Lease | None:
        lease = await self._get(election_id)
        return Lease.new(election_id) if lease is None and self._create else lease

    async def _store(self, lease: Lease) -> Lease | None:
        self._seen.pop(lease.name, None)
        stored = await (self._api.put(lease) if lease.version else self._api.create(lease))
        if stored is not None:
            self._met.add(stored.name)
            self._seen[stored.name] = stored
        return stored


def _missing(names: str, namespace: str) -> str:
    where = f" in namespace {namespace}" if namespace else ""
    return (
        f"cannot find the Lease of election {names}{where}: apply deploy/leaderelection/kubernetes.yaml with its name,"
        " or set leaderelection.kubernetes.create"
    )
