"""The engine; see the package."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

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
from retinue_server.leaderelection.engines.etcd import kv_pb2, rpc_pb2
from retinue_server.leaderelection.engines.etcd.client import RETRY_MS, Client
from retinue_server.leaderelection.engines.etcd.layout import Layout, Seen, Step
from retinue_server.leaderelection.engines.etcd.lease import Lease
from retinue_server.leaderelection.engines.etcd.watcher import Watcher
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import Reason, RetinueError, Unavailable

if TYPE_CHECKING:
    import grpc

_log = logging.getLogger(__name__)

_SOUND = {(3, 5): 23, (3, 6): 5}
"""The first patch of each line in which a revoked lease cannot be renewed."""
_POLL_MS = 5_000
_OPS = 128
"""How many steps etcd takes in a transaction unless told otherwise."""
_TRIES = 16
_RENEWALS = 3
"""How often a lease is kept alive within its length while sessions stand in line."""


class _Place:
    """A session's place in a line."""

    def __init__(self, election_id: str, session_id: str, lease: Lease) -> None:
        self.election_id, self.session_id, self.lease = election_id, session_id, lease
        self.lease_id, self.key = 0, ""
        self.term: Seen | None = None
        """While it leads: how that was last seen. None = it waits."""


class EtcdEngine:
    """See engine.Engine. Endpoints are HOST:PORT; each call may take `timeout_s` at each of them."""

    capabilities = Capabilities("etcd", Scope.CLUSTER, min_lease_ms=2_000, poll_ms=_POLL_MS)

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        prefix: str,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = 2.0,
    ) -> None:
        self._client = Client(endpoints, credentials, timeout_s)
        self._layout = Layout(prefix)
        self._leases: dict[int, Lease] = {}
        """By their length in seconds."""
        self._adopted: dict[int, Lease] = {}
        """Of an earlier process, by their ids."""
        self._places: dict[tuple[str, str], _Place] = {}
        """By election and session."""
        self._told: Callable[[str], None] = lambda _: None
        self._watched: set[str] = set()
        self._joined = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._client.open()
        self._watcher = watcher = Watcher(self._client, self._layout.everything, self._heard, self._missed)
        self._tasks = [asyncio.create_task(watcher.run()), asyncio.create_task(self._keep_waiting())]
        try:
            _check_version(await self._client.version())
            async with asyncio.timeout(self._client.timeout_s):
                await watcher.watching.wait()
        except (Unavailable, TimeoutError):
            _log.warning("etcd does not answer yet; nobody can be elected until it does")

    async def stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
            with contextlib.suppress(RetinueError):
                await self._leave_lines()
        self._places.clear()
        self._leases, self._adopted = {}, {}
        await self._client.close()

    def listen(self, told: Callable[[str], None]) -> None:
        self._told = told

    def watch(self, election_id: str) -> None:
        self._watched.add(election_id)

    def unwatch(self, election_id: str) -> None:
        self._watched.discard(election_id)

    # Leading

    async def claim(self, claim: Claim, watched: str | None = None) -> Granted | Refused:  # noqa: ARG002 - as etcd
        place = self._place(claim)
        lease_id, seen = await asyncio.gather(place.lease.refresh(), self._see(claim.election_id, place.key))
        if lease_id != place.lease_id:
            place.lease_id, place.key = lease_id, self._layout.place(claim.election_id, lease_id, claim.session_id)
            seen = seen._replace(own=None)
        if seen.first is not None and (key := self._layout.place_of(seen.first, claim.session_id)) not in (
            "",
            place.key,
        ):
            seen = await self._adopt(place, key, seen.first.lease)
        claim = replace(claim, lease_ms=min(claim.lease_ms, place.lease.ttl_s * 1_000))
        for _ in range(_TRIES):
            if (outcome := self._outcome(place, claim, seen)) is not None:
                return outcome
            _, seen = await self._write(claim.election_id, self._step(place, claim, seen), place.key)
        raise _contended()

    async def _adopt(self, place: _Place, key: str, lease_id: int) -> Seen:
        """Goes on in the place that the session has from an earlier process of this server, if its lease stands."""
        lease = self._adopted.setdefault(lease_id, Lease(self._client, place.lease.ttl_s, lease_id))
        if await lease.refresh() == lease_id:
            await self._client.txn(rpc_pb2.TxnRequest(success=[self._layout.delete(place.key)]))
            place.lease, place.lease_id, place.key = lease, lease_id, key
        return await self._see(place.election_id, place.key)

    def _outcome(self, place: _Place, claim: Claim, seen: Seen) -> Granted | Refused | None:
        """What a reading says; None if there is something to be done first."""
        if seen.own is None or seen.first is None:
            return None
        if seen.first.key != seen.own.key:
            place.term = None
            return Refused(seen.record(2 * _POLL_MS))
        if not seen.leads or seen.stored is None or seen.stored.session_id != claim.session_id:
            return None
        place.term = seen
        return Granted(self._record(seen), seen.stored.owed_ms)

    def _step(self, place: _Place, claim: Claim, seen: Seen) -> Step:
        self._joined.set()
        if seen.first is not None and seen.own is None:
            return self._layout.join(place.key, claim, place.lease_id)
        return self._layout.begin(place.key, claim, place.lease_id, seen)

    def _place(self, claim: Claim) -> _Place:
        known = self._places.get((claim.election_id, claim.session_id))
        if known is not None:
            return known
        ttl_s = max(-(-claim.lease_ms // 1_000), self.capabilities.min_lease_ms // 1_000)
        lease = self._leases.setdefault(ttl_s, Lease(self._client, ttl_s))
        place = _Place(claim.election_id, claim.session_id, lease)
        self._places[claim.election_id, claim.session_id] = place
        return place

    async def withdraw(self, election_id: str, session_id: str) -> None:
        place = self._places.get((election_id, session_id))
        if place is None:
            return
        if place.key:
            await self._client.txn(rpc_pb2.TxnRequest(success=[self._layout.delete(place.key)]))
        self._forget(place)

    async def renew(self, holds: Sequence[Hold]) -> Sequence[Record | None]:
        places = [self._places.get((hold.election_id, hold.session_id)) for hold in holds]
        await asyncio.gather(*(lease.refresh() for lease in {place.lease for place in places if place is not None}))
        found = await self._see_all([hold.election_id for hold in holds])
        return [self._renewed(*each) for each in zip(holds, places, found, strict=True)]

    def _renewed(self, hold: Hold, place: _Place | None, seen: Seen) -> Record | None:
        if place is None or place.lease_id != place.lease.id or not (seen.leads and seen.is_of(hold)):
            return None
        place.term = seen
        return self._record(seen)

    async def release(self, hold: Hold, reason: EndReason, wall_ms: int) -> bool:
        place = self._places.get((hold.election_id, hold.session_id))
        seen = place.term if place is not None and place.term is not None else await self._see(hold.election_id)
        for _ in range(_TRIES):
            if not seen.is_of(hold):
                await self.withdraw(hold.election_id, hold.session_id)
                return False
            done, seen = await self._write(hold.election_id, self._layout.end(seen, reason, wall_ms))
            if done:
                self._forget(place)
                return True
        raise _contended()

    async def proclaim(self, hold: Hold, value: str) -> Record | None:
        place = self._places.get((hold.election_id, hold.session_id))
        if place is None:
            return None
        done, seen = await self._write(hold.election_id, self._layout.proclaim(place.key, hold.epoch, value))
        if not done or not seen.is_of(hold):
            return None
        place.term = seen
        return self._record(seen)

    async def ask_step_down(self, election_id: str, epoch: int) -> Record | None:
        seen = await self._see(election_id)
        for _ in range(_TRIES):
            if seen.stored is None or not seen.leads or seen.stored.epoch != epoch:
                return None
            if seen.stored.step_down:
                return self._record(seen)
            _, seen = await self._write(election_id, self._layout.step_down(seen))
        raise _contended()

    # Looking

    async def read(self, election_id: str) -> Record | None:
        return (await self._see(election_id)).record(2 * _POLL_MS)

    async def records(self, after: str, limit: int) -> Sequence[Record]:
        listed = await self._client.txn(rpc_pb2.TxnRequest(success=[self._layout.names(after, limit)]))
        found = await self._see_all(self._layout.names_of(listed.responses[0]))
        return [record for seen in found if (record := seen.record(2 * _POLL_MS)) is not None]

    async def terms(self, election_id: str, before: int | None, limit: int) -> Sequence[Term]:
        steps = [*self._layout.look(election_id), self._layout.past(election_id)]
        answer = await self._client.txn(rpc_pb2.TxnRequest(success=steps))
        seen = self._layout.seen(election_id, answer.header, answer.responses[:-1])
        terms = self._layout.terms(seen, answer.responses[-1])
        return [term for term in terms if before is None or term.epoch < before][:limit]

    def _record(self, seen: Seen) -> Record:
        record = seen.record(2 * _POLL_MS)
        assert record is not None, "it was read with a term"
        return record

    # Calls

    async def _see(self, election_id: str, own: str = "") -> Seen:
        steps = self._layout.look(election_id, own)
        answer = await self._client.txn(rpc_pb2.TxnRequest(success=steps))
        return self._layout.seen(election_id, answer.header, answer.responses)

    async def _see_all(self, election_ids: Sequence[str]) -> list[Seen]:
        """Many elections in few calls, those of one call at one moment."""
        each = len(self._layout.look(""))
        blocks = [election_ids[i : i + _OPS // each] for i in range(0, len(election_ids), _OPS // each)]
        found = await asyncio.gather(*(self._see_block(block, each) for block in blocks))
        return [seen for block in found for seen in block]

    async def _see_block(self, block: Sequence[str], each: int) -> list[Seen]:
        steps = [step for election_id in block for step in self._layout.look(election_id)]
        answer = await self._client.txn(rpc_pb2.TxnRequest(success=steps))
        parts = (answer.responses[i : i + each] for i in range(0, len(answer.responses), each))
        return [self._layout.seen(name, answer.header, part) for name, part in zip(block, parts, strict=True)]

    async def _write(self, election_id: str, step: Step, own: str = "") -> tuple[bool, Seen]:
        """Whether it held and was done, and how things are since."""
        look = self._layout.look(election_id, own)
        request = rpc_pb2.TxnRequest(compare=step.holds, success=[*step.writes, *look], failure=look)
        answer = await self._client.txn(request)
        return answer.succeeded, self._layout.seen(election_id, answer.header, answer.responses[-len(look) :])

    def _forget(self, place: _Place | None) -> None:
        if place is not None:
            self._places.pop((place.election_id, place.session_id), None)

    # Standing in line

    def _waiting(self) -> list[_Place]:
        return [place for place in self._places.values() if place.term is None]

    async def _keep_waiting(self) -> None:
        """Keeps alive the leases of those who stand in line."""
        while True:
            self._joined.clear()
            lengths = [place.lease.ttl_s for place in self._waiting()]
            if not lengths:
                await self._joined.wait()
                continue
            await asyncio.sleep(min(lengths) / _RENEWALS)
            for lease in {place.lease for place in self._waiting()}:
                with contextlib.suppress(RetinueError):
                    await lease.refresh()
            for place in self._waiting():
                if place.lease.id != place.lease_id:  # its key is gone: it must claim again
                    self._tell([place.election_id])

    async def _leave_lines(self) -> None:
        """Nobody waits for those who stood in line here; what is led runs out."""
        steps = [self._layout.delete(place.key) for place in self._waiting() if place.key]
        for start in range(0, len(steps), _OPS):
            await self._client.txn(rpc_pb2.TxnRequest(success=steps[start : start + _OPS]))

    # Changes by others

    def _heard(self, events: Iterable[kv_pb2.Event]) -> None:
        self._tell(dict.fromkeys(name for event in events if (name := self._layout.touched(event)) is not None))

    def _missed(self) -> None:
        self._tell(list(self._watched))

    def _tell(self, election_ids: Iterable[str]) -> None:
        for election_id in election_ids:
            if election_id in self._watched:
                self._told(election_id)


def _check_version(version: str) -> None:
    major, minor, patch = (int(part) for part in version.partition("-")[0].split("."))
    if (major, minor) < min(_SOUND) or patch < _SOUND.get((major, minor), 0):
        raise StartError(
            f"cannot elect with etcd {version}: before 3.5.23 and 3.6.5 a lease that was revoked could be renewed, "
            "so that two could lead; upgrade etcd"
        )


def _contended() -> Unavailable:
    return Unavailable(
        "cannot go on: the election changes too fast", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=RETRY_MS
    )
