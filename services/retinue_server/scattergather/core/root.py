"""The root: its pools, whom they have to ask, what is let in, and what is remembered."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from retinue_server.runtime.errors import Code, Reason, ResourceExhausted, Unavailable
from retinue_server.scattergather.core import limits, merges
from retinue_server.scattergather.core.pool import LivePool, Member, Topology
from retinue_server.scattergather.core.replicas import Replica
from retinue_server.scattergather.core.requests import Malformed
from retinue_server.scattergather.core.rules import leaf_timeout_s
from retinue_server.scattergather.core.scatter import End, Kind, Scatter, ScatterError
from retinue_server.scattergather.core.topology import MergeKind
from retinue_server.scattergather.core.turns import Turns
from retinue_server.scattergather.engine import Target

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, MutableSequence, Sequence

    from retinue_server.runtime.errors import Violation
    from retinue_server.scattergather.core.clock import Clock
    from retinue_server.scattergather.core.merges import Merge
    from retinue_server.scattergather.core.requests import Ask, Gathered
    from retinue_server.scattergather.core.scatter import Attempt, Observer
    from retinue_server.scattergather.core.topology import Pool, Shard
    from retinue_server.scattergather.engine import Discovery, Leaves, Line, UserMerge, UserMerges

log = logging.getLogger(__name__)
Made = TypeVar("Made")

_RETRY_MS = 100
_REMEMBERED = 256
_REMEMBERED_ATTEMPTS = 8192


class Answer(NamedTuple):
    """A request that succeeded."""

    gathered: Gathered
    kind: MergeKind
    result: Any
    """As the merge gives it: bytes, a JSON value, or pairs of place and payload."""
    topology: Topology


class Plan(NamedTuple):
    """What a request would do."""

    topology: Topology
    members: Sequence[Member]
    """Replicas in the order in which they would be asked."""
    timeout_s: float
    leaf_timeout_s: float
    hedge_delay_s: float | None
    budget: float


class Recent(NamedTuple):
    """A past request: what became of it, and none of its bytes."""

    number: int
    scatter_id: str
    pool_id: str
    wall_ms: int
    begun_at: float
    code: int
    gathered: Gathered
    trace_id: str
    parent_scatter_id: str
    attempts: Sequence[Attempt]


class Root:
    """See the module; on the event loop only."""

    def __init__(
        self,
        server_id: str,
        leaves: Leaves,
        discoveries: Mapping[str, Discovery],
        services: UserMerges,
        clock: Clock,
        *,
        share: int = 1,
        ended: Callable[[Scatter], None] = lambda _: None,
    ) -> None:
        self.server_id = server_id
        self._leaves, self._discoveries, self._services, self._clock = leaves, discoveries, services, clock
        self._share, self._ended = share, ended
        self._turns = Turns(clock)
        self.pools: dict[str, _Kept] = {}
        self._number = self._noted = 0
        self.recent: deque[Recent] = deque()
        self._recent_attempts = 0
        self._prefix = os.urandom(4).hex()
        self._stopping = False

    # Topology

    def apply(self, pools: Sequence[Pool]) -> None:
        """Serves these pools from now on; requests under way end with the topology that they saw."""
        wanted = {pool.pool_id: pool for pool in pools}
        for pool_id in [known for known in self.pools if known not in wanted]:
            self.pools.pop(pool_id).close()
        for pool_id, pool in wanted.items():
            kept = self.pools.get(pool_id)
            if kept is None:
                self.pools[pool_id] = _Kept(
                    pool, self._leaves, self._discoveries, clock=self._clock, turns=self._turns, share=self._share
                )
            elif kept.live.pool != pool:
                kept.update(pool)

    def topology(self, pool_id: str) -> Topology:
        """As it is now; raises POOL_NOT_FOUND."""
        return self._kept(pool_id).live.topology

    async def watch(self, pool_id: str) -> AsyncGenerator[Topology, None]:
        """As it is now, and after each change the latest; raises POOL_NOT_FOUND when it is gone."""
        kept = self._kept(pool_id)
        changed = asyncio.Event()
        kept.watchers.add(changed)
        try:
            while True:
                changed.clear()
                yield kept.live.topology
                if not self._stopping:
                    await changed.wait()
                if self._stopping:
                    raise Unavailable(
                        "cannot go on: the server is stopping", reason=Reason.SHUTTING_DOWN, retry_ms=1000
                    )
                kept_now = self._kept(pool_id)
                if kept_now is not kept:
                    kept_now.watchers.add(changed)
                    kept = kept_now
        finally:
            kept.watchers.discard(changed)

    async def quiesce(self) -> None:
        """Ends the watching."""
        self._stopping = True
        for kept in self.pools.values():
            kept.tell()

    async def start(self) -> None:
        """Pools come by `apply`."""

    async def stop(self) -> None:
        """Serves no pool any more."""
        self.apply(())

    def _kept(self, pool_id: str) -> _Kept:
        kept = self.pools.get(pool_id)
        if kept is None:
            raise limits.unknown_pool(pool_id)
        return kept

    # Requests

    def new_id(self) -> str:
        """For one request; of another process it is another."""
        self._number += 1
        return f"{self._prefix}-{self._number}"

    async def scatter(
        self,
        ask: Ask,
        violations: MutableSequence[Violation],
        make: Callable[[Answer], Made],
        observer: Callable[[Topology, int], Observer | None] = lambda _, __: None,
    ) -> Made:
        """Asks, gathers and merges; raises as the contract of Scatter says.

        `make` makes of the answer what the caller gets; it may raise ScatterError, which is then how the request ended.
        """
        live, members = self._admitted(ask, violations)
        merge, service = self._merge(ask)
        watching = observer(ask.topology, len(members))
        scatter = Scatter(live, members, ask, merge=merge, clock=self._clock, observer=watching)
        scatter.begin()
        try:
            await scatter.ended
            result = await self._result(scatter, merge, service)
            made = make(self._answer(scatter, result))
        except asyncio.CancelledError:
            scatter.abandon()
            self._note(live, scatter, Code.CANCELLED)
            raise
        except ScatterError as error:
            self._note(live, scatter, error.code)
            raise
        finally:
            if service is not None:
                service.cancel()
        self._note(live, scatter, Code.OK)
        return made

    def plan(self, ask: Ask, violations: MutableSequence[Violation]) -> Plan:
        """What `scatter` would do now."""
        live = self._kept(ask.pool_id).live
        limits.check_depth(ask, f"{self.server_id}/{ask.pool_id}")
        members = limits.select(ask.topology, ask, violations)
        now, pool = self._clock.now(), live.pool
        timeout = pool.timeout_s if ask.timeout_s is None else min(ask.timeout_s, pool.timeout_s)
        ordered = [
            Member(m.place, m.shard, tuple(sorted(m.replicas, key=lambda r: (not r.line.connected, r.cost(now)))))
            for m in members
        ]
        delay = None if ask.policy.no_hedge else live.hedge_delay_s(now)
        return Plan(ask.topology, ordered, timeout, leaf_timeout_s(timeout), delay, live.budget.level)

    def _admitted(self, ask: Ask, violations: MutableSequence[Violation]) -> tuple[LivePool, Sequence[Member]]:
        live = self._kept(ask.pool_id).live
        limits.check_depth(ask, f"{self.server_id}/{ask.pool_id}")
        members = limits.select(ask.topology, ask, violations)
        self._check_room(live, len(members))
        return live, members

    def check_room(self, pool_id: str) -> None:
        """Raises SCATTER_LIMIT if a request for all shards would be refused now: refusing must cost little."""
        kept = self.pools.get(pool_id)
        if kept is not None:
            self._check_room(kept.live, len(kept.live.topology.members))

    def _check_room(self, live: LivePool, calls: int) -> None:
        if live.admits(calls):
            return
        self._turns.refused()
        live.shed_at = self._clock.now()
        live.ended["shed"] += 1
        pool_id = live.pool.pool_id
        raise ResourceExhausted(
            f"cannot scatter: pool {pool_id} has as many calls to make as it takes; try again later",
            reason=Reason.SCATTER_LIMIT,
            retry_ms=_RETRY_MS,
            pool_id=pool_id,
        )

    def _merge(self, ask: Ask) -> tuple[Merge, UserMerge | None]:
        merging, topology = ask.topology.pool.merging, ask.topology
        if merging.kind is not MergeKind.SERVICE:
            return merges.make(merging), None
        timeout = topology.pool.timeout_s if ask.timeout_s is None else min(ask.timeout_s, topology.pool.timeout_s)
        service = self._services.begin(
            merging.address, ask.pool_id, ask.payload, timeout_s=timeout, stream=merging.commutative
        )
        if not merging.commutative:
            return merges.make(merging), service
        return _Forward(service, [member.shard.shard_id for member in topology.members]), service

    async def _result(self, scatter: Scatter, merge: Merge, service: UserMerge | None) -> Any:
        if scatter.error is not None:
            raise scatter.error
        assert scatter.gathered is not None
        if service is None:
            return _merged(merge, scatter.gathered)
        members = scatter.topology.members
        for place, payload in merge.result():
            service.add(members[place].shard.shard_id, payload)
        covered = scatter.gathered.coverage
        try:
            return await service.finish(covered.expected, covered.answered, complete=covered.complete)
        except ScatterError as error:
            error.gathered = scatter.gathered
            raise

    def _answer(self, scatter: Scatter, result: Any) -> Answer:
        """With the time that merging took, too."""
        known, topology = scatter.gathered, scatter.topology
        assert known is not None
        elapsed = self._clock.now() - scatter.begun_at
        scatter.gathered = known._replace(stats=known.stats._replace(elapsed_s=elapsed))
        return Answer(scatter.gathered, topology.pool.merging.kind, result, topology)

    # What is remembered

    def _note(self, live: LivePool, scatter: Scatter, code: Code) -> None:
        scatter.code = code
        known, ask = scatter.gathered, scatter.ask
        assert known is not None
        end = ("complete" if known.coverage.complete else "partial") if code is Code.OK else code.name.lower()
        live.ended[end] += 1
        live.expected += known.coverage.expected
        live.answered += known.coverage.answered
        _count(live, scatter.attempts)
        if code is Code.OK:
            _measure(live, scatter, self._clock.now())
        self._noted += 1
        self.recent.append(
            Recent(
                self._noted,
                scatter.scatter_id,
                ask.pool_id,
                scatter.wall_ms,
                scatter.begun_at,
                code,
                known,
                ask.trace_id,
                ask.parent_scatter_id,
                scatter.attempts,
            )
        )
        self._recent_attempts += len(scatter.attempts)
        while len(self.recent) > _REMEMBERED or (self._recent_attempts > _REMEMBERED_ATTEMPTS and len(self.recent) > 1):
            self._recent_attempts -= len(self.recent.popleft().attempts)
        self._ended(scatter)


class _Forward:
    """Gives replies to the user's merge as they come."""

    def __init__(self, service: UserMerge, shard_ids: Sequence[str]) -> None:
        self._service, self._shard_ids = service, shard_ids

    def add(self, index: int, payload: bytes) -> None:
        self._service.add(self._shard_ids[index], payload)

    def result(self) -> Sequence[tuple[int, bytes]]:
        return ()


def _merged(merge: Merge, gathered: Gathered) -> Any:
    try:
        return merge.result()
    except Malformed as error:
        failure = ScatterError(Code.INTERNAL, f"cannot merge the replies: {error}", reason=Reason.MERGE_FAILED)
        failure.gathered = gathered
        raise failure from None


def _count(live: LivePool, attempts: Sequence[Attempt]) -> None:
    """By kind and outcome; nearly all are first calls that were answered."""
    others = [one for one in attempts if one.end is not End.WON or one.kind is not Kind.PRIMARY]
    live.attempts["primary", "won"] += len(attempts) - len(others)
    for one in others:
        live.attempts[one.kind.name.lower(), (one.end or End.LOST).name.lower()] += 1


def _measure(live: LivePool, scatter: Scatter, now: float) -> None:
    """The root's own part of the time, and how far the slowest reply was behind the middle one."""
    if not scatter.won:
        return
    last, middle = scatter.won[-1].ended_at, scatter.won[len(scatter.won) // 2].ended_at
    live.measured += 1
    live.overhead_s += now - last + scatter.attempts[0].started_at - scatter.begun_at
    live.straggler_s += last - middle


class _Kept:
    """A pool that is served: its sources are watched, its lines open."""

    def __init__(
        self,
        pool: Pool,
        leaves: Leaves,
        discoveries: Mapping[str, Discovery],
        *,
        clock: Clock,
        turns: Turns,
        share: int,
    ) -> None:
        self._leaves, self._discoveries, self._clock = leaves, discoveries, clock
        self.watchers: set[asyncio.Event] = set()
        self._found: dict[str, tuple[str, ...]] = {}
        self._unwatch: dict[str, Callable[[], None]] = {}
        self._replicas: dict[Target, Replica] = {}
        self._pool = pool
        self._watch_sources()
        self.live = LivePool(Topology(pool, 1, self._members()), turns, share)

    def update(self, pool: Pool) -> None:
        """As the file says now."""
        self._pool = pool
        self._watch_sources()
        self._rebuild()

    def close(self) -> None:
        for unwatch in self._unwatch.values():
            unwatch()
        self._unwatch.clear()
        self._retire(set(self._replicas), self._pool.timeout_s)
        self.tell()

    def tell(self) -> None:
        """Wakes who watches."""
        for event in self.watchers:
            event.set()

    def _watch_sources(self) -> None:
        wanted = {source for shard in self._pool.shards for source in shard.sources if _scheme(source)}
        for source in set(self._unwatch) - wanted:
            self._unwatch.pop(source)()
            self._found.pop(source, None)
        for source in wanted - set(self._unwatch):
            scheme, name = source.split(":", 1)
            self._unwatch[source] = self._discoveries[scheme].watch(name, self._finder(source))

    def _finder(self, source: str) -> Callable[[Sequence[str]], None]:
        def found(addresses: Sequence[str]) -> None:
            if self._found.get(source) == tuple(addresses):
                return
            self._found[source] = tuple(addresses)
            self._rebuild()

        return found

    def _rebuild(self) -> None:
        version, longest = self.live.topology.version + 1, max(self.live.pool.timeout_s, self._pool.timeout_s)
        self.live.update(Topology(self._pool, version, self._members()))
        used = {replica for member in self.live.topology.members for replica in member.replicas}
        self._retire({target for target, replica in self._replicas.items() if replica not in used}, longest)
        log.info(
            "pool %s has topology %s: %s shards, %s endpoints",
            self._pool.pool_id,
            version,
            len(self._pool.shards),
            len(used),
        )
        self.tell()

    def _members(self) -> tuple[Member, ...]:
        return tuple(
            Member(place, shard, tuple(self._replica(address) for address in self._addresses(shard)))
            for place, shard in enumerate(self._pool.shards)
        )

    def _addresses(self, shard: Shard) -> Sequence[str]:
        """Each once, in the order of the sources."""
        found = (self._found.get(source, ()) if _scheme(source) else (source,) for source in shard.sources)
        return list(dict.fromkeys(address for addresses in found for address in addresses))

    def _replica(self, address: str) -> Replica:
        pool = self._pool
        target = Target(address, pool.method, pool.limits.max_reply_bytes, pool.tls, pool.stream)
        if target not in self._replicas:
            self._replicas[target] = Replica(address, self._leaves.open(target, self.tell))
        return self._replicas[target]

    def _retire(self, targets: set[Target], longest_s: float) -> None:
        """Closes lines once the requests that may use them are over."""
        lines = [self._replicas.pop(target).line for target in targets]
        if lines:
            last = self._clock.now() + longest_s
            self._clock.at(last, partial(_close, lines))


def _close(lines: Sequence[Line]) -> None:
    for line in lines:
        line.close()


def _scheme(source: str) -> str:
    """dns or kubernetes; empty for an address."""
    scheme = source.partition(":")[0]
    return scheme if scheme in ("dns", "kubernetes") else ""
