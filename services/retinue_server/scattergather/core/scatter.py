"""One request: from its first call to a leaf to the moment when its end is known.

All of it happens on the event loop, in callbacks: a task for each leaf would cost more than the leaf's call.
"""

from __future__ import annotations

import asyncio
from collections import deque
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Protocol

import msgspec

from retinue_server.runtime.errors import Code, Reason, RetinueError
from retinue_server.scattergather.core import rules
from retinue_server.scattergather.core.replicas import Replica, choose
from retinue_server.scattergather.core.requests import Coverage, Gathered, Malformed, Outcome, Reply, Stats
from retinue_server.scattergather.core.topology import MergeKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from retinue_server.scattergather.core.clock import Clock, Timer
    from retinue_server.scattergather.core.merges import Merge
    from retinue_server.scattergather.core.pool import LivePool, Member
    from retinue_server.scattergather.core.requests import Ask
    from retinue_server.scattergather.engine import Metadata

MAX_FAILURES = 16
_ONE = Coverage(1, 1, complete=True)
_MESSAGE_BYTES = 256
_CROWD_SHARE, _CROWD = 0.1, 2
"""If more of the calls are late at once, and two, it is not for a leaf: this process was held up, or all are slow."""
_LOOKS = 8
"""A crowd is looked at again as long as replies come in, so often; within twice the delay of a hedge more."""


class Kind(IntEnum):
    """Why a call is made; as in the contract."""

    PRIMARY = 1
    HEDGE = 2
    RETRY = 3


class End(IntEnum):
    """How a call ended; as in the contract."""

    WON = 1
    LOST = 2
    FAILED = 3


class ScatterError(RetinueError):
    """A request that failed although leaves were asked."""

    gathered: Gathered | None = None

    def __init__(self, code: Code, message: str, *, reason: Reason, retry_ms: int = 0, **metadata: object) -> None:
        super().__init__(message, reason=reason, retry_ms=retry_ms, **metadata)
        self.code = code  # type: ignore[misc] # the one error whose code depends on what happened


class Attempt(msgspec.Struct, eq=False, gc=False):
    """A call to a leaf. (No work for the garbage collector: when it has ended, it is in no cycle.)"""

    part: Part
    kind: Kind
    replica: Replica
    started_at: float
    ended_at: float
    end: End | None = None
    code: int = 0
    reply_bytes: int = 0
    denied: bool = False
    """Whether the budget had no hedge for it so far."""
    cancel: Callable[[], None] | None = None
    trace: object = None
    """The observer's."""


class Part(msgspec.Struct, eq=False, gc=False):
    """What is asked together: a shard, or those of a batch."""

    members: Sequence[Member]
    replicas: Sequence[Replica]
    weight: int
    """Leaves beneath it."""
    begun_at: float
    tried: tuple[Replica, ...] = ()
    open: tuple[Attempt, ...] = ()
    attempts: int = 0
    retries: int = 0
    hedges: int = 0
    done: bool = False
    code: int = int(Code.CANCELLED)
    message: str = ""
    coverage: Coverage | None = None


class Observer(Protocol):
    """Follows a request: traces, events."""

    def asked(self, attempt: Attempt) -> Metadata:
        """A call is about to be made; what goes with it."""

    def answered(self, part: Part, attempt: Attempt, reply: Reply) -> None:
        """A reply was taken."""

    def failed(self, part: Part) -> None:
        """Nobody is left who could answer for it."""

    def ended(self, scatter: Scatter) -> None:
        """All attempts have ended."""


class Scatter:
    """See the module. `begin`, wait for `ended`, then `gathered` or `error`; `abandon` when nobody waits any more."""

    def __init__(
        self,
        live: LivePool,
        members: Sequence[Member],
        ask: Ask,
        *,
        merge: Merge,
        clock: Clock,
        observer: Observer | None = None,
    ) -> None:
        self.ask, self.topology, self.members = ask, ask.topology, members
        self.scatter_id = ask.scatter_id
        self._live, self._merge, self._clock, self._observer = live, merge, clock, observer
        self._pool = ask.topology.pool
        self._policy = ask.policy
        self._is_first = self._pool.merging.kind is MergeKind.FIRST
        self.begun_at = clock.now()
        self.wall_ms = clock.wall_ms()
        timeout = self._pool.timeout_s if ask.timeout_s is None else min(ask.timeout_s, self._pool.timeout_s)
        self.timeout_s = timeout
        self._leaf_deadline = self.begun_at + rules.leaf_timeout_s(timeout)
        self._expected = sum(member.shard.weight for member in members)
        self._needed = rules.needed(self._policy.min_coverage, self._expected)
        self._answered = self._lost = self._answered_shards = self._lost_shards = 0
        self._degraded = False
        self._parts: list[Part] = []
        self._pending = 0
        self._unsent: deque[tuple[Part, Replica | None]] = deque()
        hedges = self._pool.idempotent and not self._policy.no_hedge
        self._hedge_delay = live.hedge_delay_s(self.begun_at) if hedges else None
        self._hedges: deque[Attempt] = deque()
        """Those that may yet get company, in the order of their beginning."""
        self._hedge_timer: Timer | None = None
        self._looks, self._seen_answered = 0, -1
        self._timers: list[Timer] = []
        self._soft_over = False
        self._gathered_bytes = 0
        self.attempts: list[Attempt] = []
        self.won: list[Attempt] = []
        """In the order in which they were answered."""
        self.error: RetinueError | None = None
        self.gathered: Gathered | None = None
        self.code = Code.OK
        """What the caller is told; for those who remember it."""
        self._over = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # From the beginning

    def begin(self) -> None:
        """Asks the first shards; the others follow in turns. Nobody is asked when the time is over already."""
        live, clock, policy = self._live, self._clock, self._policy
        self._divide()
        self._pending = len(self._parts)
        live.running += 1
        live.open_calls += self._pending
        live.unsent += self._pending
        if self._leaf_deadline <= self.begun_at:
            self._time_out()
            return
        live.budget.earn(self._pending)
        self._timers.append(clock.at(self._leaf_deadline, self._time_out))
        if policy.soft_deadline_s is not None:
            self._timers.append(clock.at(self.begun_at + policy.soft_deadline_s, self._end_of_patience))
        live.turns.add(self._send)

    def _divide(self) -> None:
        """Into what is asked together, and of batches already whom."""
        if self._pool.batch:
            self._unsent.extend(self._batches())
        else:
            self._unsent.extend([(self._part(member), None) for member in self.members])
        self._parts = [part for part, _ in self._unsent]

    def _part(self, member: Member) -> Part:
        return Part((member,), member.replicas, member.shard.weight, self.begun_at)

    def _batches(self) -> Iterator[tuple[Part, Replica | None]]:
        groups: dict[Replica, list[Member]] = {}
        for member in self.members:
            replica = self._choose(member.replicas, ())
            if replica is None:
                yield self._part(member), None
            else:
                groups.setdefault(replica, []).append(member)
        for replica, group in groups.items():
            weight = sum(member.shard.weight for member in group)
            yield Part(tuple(group), _common(group, replica), weight, self.begun_at), replica

    def _send(self, most: int) -> int:
        """Asks so many more, and says how many."""
        for sent in range(most):
            if not self._unsent:  # or it is over, and they were dropped
                return sent
            part, replica = self._unsent.popleft()
            self._live.unsent -= 1
            self._try(part, Kind.PRIMARY, replica)
        return most

    def _try(self, part: Part, kind: Kind, replica: Replica | None = None) -> None:
        """Asks a replica, or finds that there is none."""
        replica = replica or self._choose(part.replicas, part.tried)
        if replica is not None:
            self._call(part, kind, replica)
            return
        full = any(one.in_flight for one in part.replicas)
        found = "every endpoint has all the calls it may" if full else "no endpoint is known"
        self._settle_failure(part, Code.RESOURCE_EXHAUSTED if full else Code.UNAVAILABLE, found)

    def _choose(self, replicas: Sequence[Replica], tried: Sequence[Replica]) -> Replica | None:
        limit = self._pool.limits.max_calls_per_endpoint
        return choose(replicas, tried, self._clock.now(), self._live.draw, limit)

    def _call(self, part: Part, kind: Kind, replica: Replica) -> None:
        now = self._clock.now()
        attempt = Attempt(part, kind, replica, now, now)
        part.attempts += 1
        part.tried += (replica,)
        part.open += (attempt,)
        self.attempts.append(attempt)
        replica.in_flight += 1
        shards = [member.shard for member in part.members]
        question = self.ask.question
        metadata = question.metadata(shards, part.attempts)
        if self._observer is not None:
            metadata = (*metadata, *self._observer.asked(attempt))
        data, left = question.data(shards, part.attempts), max(self._leaf_deadline - now, 0.001)
        attempt.cancel = replica.line.call(data, left, metadata, partial(self._done, attempt))
        if self._hedge_delay is not None and part.hedges < self._pool.hedging.max_hedges:
            self._hedges.append(attempt)
            if self._hedge_timer is None and kind is not Kind.HEDGE:  # for those `_hedge` does
                self._hedge_timer = self._clock.at(now + self._hedge_delay, self._hedge)

    # What comes back

    def _done(self, attempt: Attempt, code: int, message: str, reply: bytes | None) -> None:
        if attempt.end is not None:
            return
        now, part = self._clock.now(), attempt.part
        attempt.ended_at, attempt.cancel = now, None
        attempt.replica.in_flight -= 1
        part.open = tuple([one for one in part.open if one is not attempt]) if len(part.open) > 1 else ()
        if code == 0:
            self._replied(attempt, reply or b"", now)
        else:
            self._failed(attempt, code, message, now)

    def _replied(self, attempt: Attempt, data: bytes, now: float) -> None:
        part, took = attempt.part, now - attempt.started_at
        attempt.reply_bytes = len(data)
        if self._gathered_bytes + len(data) > self._pool.limits.max_gathered_bytes:
            attempt.end, attempt.code = End.FAILED, int(Code.RESOURCE_EXHAUSTED)
            part.code, part.message = attempt.code, "its reply is more than what is left of the byte budget"
            self._fail(Code.RESOURCE_EXHAUSTED, Reason.GATHER_TOO_LARGE, self._over_budget())
            return
        try:
            reply = self.ask.question.read(data)
            covered = _coverage(part.weight, reply.coverage)
            if self._is_first:
                self._check_first(covered)
            self._merge.add(part.members[0].place, reply.payload)
        except Malformed as error:
            self._failed(attempt, Code.DATA_LOSS, f"a malformed reply: {error}", now)
            return
        attempt.replica.observe(took, now)
        self._live.latencies.add(took)
        self._gathered_bytes += len(data)
        attempt.end = End.WON
        self.won.append(attempt)
        self._settle_answer(part, attempt, reply, covered)

    def _check_first(self, covered: Coverage) -> None:
        """One reply stands for all shards only if it is good enough: another's may be."""
        if not covered.answered or (self._policy.strict and not covered.complete):
            raise Malformed("it is the answer of a part only")

    def _over_budget(self) -> str:
        limit = self._pool.limits.max_gathered_bytes
        return f"cannot gather the replies: they are more than {limit} bytes; ask for less, or raise max_gathered_bytes"

    def _settle_answer(self, part: Part, attempt: Attempt, reply: Reply, covered: Coverage) -> None:
        part.done, part.code, part.coverage = True, 0, covered
        if part.open:
            self._give_up(part)
        self._pending -= 1
        self._live.open_calls -= 1
        self._answered += covered.answered
        self._lost += part.weight - covered.answered
        self._answered_shards += len(part.members)
        self._degraded |= not covered.complete
        if self._observer is not None:
            self._observer.answered(part, attempt, reply)
        self._decide()

    def _failed(self, attempt: Attempt, code: int, message: str, now: float) -> None:
        code = code if code in rules.CODES else Code.UNKNOWN
        attempt.end, attempt.code = End.FAILED, int(code)
        part = attempt.part
        if code in rules.REFUSALS:
            shard = part.members[0].shard.shard_id
            part.code, part.message = int(code), _cut(message)
            self._fail(Code(code), Reason.LEAF_REFUSED, message or f"shard {shard} refused the request", shard_id=shard)
            return
        attempt.replica.observe(max(now - attempt.started_at, self._leaf_deadline - self.begun_at), now)
        if part.open:  # a hedge, or what was hedged, may still answer
            return
        parts = self._split(part) if len(part.members) > 1 and self._may_retry(part, code) else [part]
        for one in parts:
            if not self._over and not self._retry(one, code):
                self._settle_failure(one, code, message)

    def _may_retry(self, part: Part, code: int) -> bool:
        return code in rules.RETRYABLE and self._pool.idempotent and part.retries < self._pool.max_retries

    def _retry(self, part: Part, code: int) -> bool:
        replica = self._choose(part.replicas, part.tried) if self._may_retry(part, code) else None
        if replica is None or not self._may_add():
            return False
        part.retries += 1
        self._call(part, Kind.RETRY, replica)
        return True

    def _split(self, batch: Part) -> Sequence[Part]:
        """The shards of a batch that failed, each by itself; those in front that nobody else has."""
        parts = [self._part(member) for member in batch.members]
        for part in parts:
            part.retries, part.attempts, part.tried = batch.retries, batch.attempts, batch.tried
        self._parts.remove(batch)
        self._parts += parts
        self._pending += len(parts) - 1
        self._live.open_calls += len(parts) - 1
        return sorted(parts, key=lambda part: not set(part.tried).issuperset(part.replicas))

    def _may_add(self) -> bool:
        if self._live.budget.spend():
            return True
        self._live.denied += 1
        return False

    def _settle_failure(self, part: Part, code: int, message: str) -> None:
        part.done, part.code = True, int(code)
        part.message = _cut(message)
        self._pending -= 1
        self._live.open_calls -= 1
        self._lost += part.weight
        self._lost_shards += len(part.members)
        if self._observer is not None:
            self._observer.failed(part)
        self._decide()

    # Hedges

    def _hedge(self) -> None:
        """Gives company to what is late, and comes again for what is not yet."""
        self._hedge_timer = None
        assert self._hedge_delay is not None
        delay, now = self._hedge_delay, self._clock.now()
        hedges = self._hedges = deque([attempt for attempt in self._hedges if attempt.end is None])
        late = sum([attempt.started_at + delay <= now for attempt in hedges])
        if self._is_crowd(late):
            again = now + delay / 4
        else:
            denied = [slow for slow in [hedges.popleft() for _ in range(late)] if not self._hedge_one(slow)]
            hedges.extendleft(reversed(denied))
            again = now + delay if denied or not hedges else hedges[0].started_at + delay
        if hedges and not self._over:
            self._hedge_timer = self._clock.at(again, self._hedge)

    def _is_crowd(self, late: int) -> bool:
        """Whether to wait for replies that are just behind others: hedges of these would use up the budget."""
        if late <= max(_CROWD, _CROWD_SHARE * len(self._parts)):
            return False
        coming, self._seen_answered = self._answered_shards > self._seen_answered, self._answered_shards
        self._looks += 1
        return coming and self._looks <= _LOOKS

    def _hedge_one(self, slow: Attempt) -> bool:
        """False if the budget has none for it now: it may have later, and who is slow for long is what it is for."""
        part = slow.part
        if self._over or slow.end is not None or part.done or slow is not part.open[-1]:
            return True
        replica = self._choose(part.replicas, part.tried)
        if replica is None and part.hedges:  # all were asked: the one that was asked first, once more
            replica = part.tried[0] if part.tried[0].in_flight < self._pool.limits.max_calls_per_endpoint else None
        if replica is None or not replica.line.connected:
            return True
        if not self._live.budget.spend():
            self._live.denied += not slow.denied
            slow.denied = True
            return False
        part.hedges += 1
        self._call(part, Kind.HEDGE, replica)
        return True

    # To the end

    def _decide(self) -> None:
        if self._over:
            return
        if not self._pending:
            self._finish() if self._is_enough() else self._fall_short()
        elif (self._lost or self._degraded) and not self._can_be_enough():
            self._fall_short()
        elif self._wants_no_more() and self._is_enough():
            self._finish()

    def _wants_no_more(self) -> bool:
        """Whether what is enough is not waited beyond."""
        first_k = 1 if self._is_first else self._policy.first_k
        return self._soft_over or 0 < first_k <= self._answered_shards

    def _is_enough(self) -> bool:
        policy = self._policy
        if self._is_first and self._answered_shards:
            return True
        if policy.strict and (self._degraded or self._answered < self._expected):
            return False
        return self._answered >= self._needed and self._answered_shards >= policy.min_shards

    def _can_be_enough(self) -> bool:
        policy = self._policy
        if self._is_first:
            return True
        if policy.strict and (self._degraded or self._lost):
            return False
        left = len(self.members) - self._lost_shards
        return self._expected - self._lost >= self._needed and left >= policy.min_shards

    def _end_of_patience(self) -> None:
        self._soft_over = True
        self._decide()

    def _time_out(self) -> None:
        """The leaves' time is over; whatever they do, they are not waited for."""
        if self._over:
            return
        for part in self._parts:
            if not part.done:
                self._expire(part)
        self._finish() if self._is_enough() else self._fall_short()

    def _expire(self, part: Part) -> None:
        now = self._clock.now()
        part.code = int(Code.DEADLINE_EXCEEDED)
        part.message = "no reply in time" if part.attempts else "no time was left to ask it"
        for attempt in part.open:
            attempt.replica.observe(now - attempt.started_at, now)
            self._cancel(attempt, End.FAILED, part.code, now)
        part.open = ()
        if self._observer is not None:
            self._observer.failed(part)

    def _fall_short(self) -> None:
        codes = [part.code for part in self._parts if part.code not in (Code.OK, Code.CANCELLED)]
        code = rules.combined(codes)
        missing = len(self.members) - self._answered_shards
        worst = next((part for part in self._parts if part.code == code), None)
        why = f"; {worst.members[0].shard.shard_id}: {worst.message}" if worst else ""
        text = f"cannot answer: {self._answered} of {self._expected} leaves answered, {missing} shards are missing{why}"
        self._fail(code, Reason.COVERAGE_NOT_MET, text)

    def _fail(self, code: Code, reason: Reason, message: str, **metadata: str) -> None:
        if self._over:
            return
        error = ScatterError(code, message, reason=reason, retry_ms=0, scatter_id=self.scatter_id, **metadata)
        self.error = error
        self._finish()
        error.gathered = self.gathered

    def abandon(self) -> None:
        """The caller has gone."""
        if not self._over:
            self._fail(Code.CANCELLED, Reason.INTERNAL, "the caller has gone")

    def _finish(self) -> None:
        if self._over:
            return
        self._over = True
        for timer in self._timers:
            timer.cancel()
        if self._hedge_timer is not None:
            self._hedge_timer.cancel()
        live = self._live
        live.running -= 1
        live.unsent -= len(self._unsent)
        live.open_calls -= self._pending
        self._unsent.clear()
        self._hedges.clear()
        for part in self._parts:
            if part.open:
                self._give_up(part)
            part.tried = ()
        self.gathered = self._gather()
        if self._observer is not None:
            self._observer.ended(self)
        if not self.ended.done():
            self.ended.set_result(None)

    def _give_up(self, part: Part) -> None:
        """Cancels what is still under way for it."""
        now = self._clock.now()
        for attempt in part.open:
            waited = now - attempt.started_at  # it takes at least so long
            if part.coverage is not None or waited > attempt.replica.latency_s(now):
                attempt.replica.observe(waited, now)
            self._cancel(attempt, End.LOST, int(Code.CANCELLED), now)
        part.open = ()

    def _cancel(self, attempt: Attempt, end: End, code: int, now: float) -> None:
        attempt.end, attempt.code, attempt.ended_at = end, code, now
        attempt.replica.in_flight -= 1
        cancel, attempt.cancel = attempt.cancel, None
        if cancel is not None:
            cancel()

    def _gather(self) -> Gathered:
        complete = not self._degraded and self._answered == self._expected
        if self._is_first and self._answered_shards:
            whole = not self._degraded
            coverage = Coverage(self._answered, self._answered, whole)
        else:
            coverage = Coverage(self._expected, self._answered, complete)
        missing = [] if coverage.complete else [part for part in self._parts if _is_missing(part)]
        by_code: dict[str, int] = {}
        for part in missing:
            if part.code:
                name = Code(part.code).name
                by_code[name] = by_code.get(name, 0) + len(part.members)
        failures = [outcome(part, i) for part in sorted(missing, key=_by_gravity) for i in range(len(part.members))]
        return Gathered(
            self.scatter_id, self.topology.version, coverage, failures[:MAX_FAILURES], by_code, self._stats()
        )

    def _stats(self) -> Stats:
        more = [attempt.kind for attempt in self.attempts if attempt.kind is not Kind.PRIMARY]
        slowest = self.won[-1] if self.won else None
        return Stats(
            shards=len(self.members),
            attempts=len(self.attempts),
            hedges=more.count(Kind.HEDGE),
            hedges_won=sum([attempt.kind is Kind.HEDGE for attempt in self.won]) if more else 0,
            retries=more.count(Kind.RETRY),
            gathered_bytes=self._gathered_bytes,
            elapsed_s=self._clock.now() - self.begun_at,
            slowest_s=slowest.ended_at - self.begun_at if slowest else 0.0,
            slowest_shard_id=slowest.part.members[0].shard.shard_id if slowest else "",
        )


def outcome(part: Part, index: int = 0) -> Outcome:
    """What became of a shard of a part; of a batch that answered in part, the coverage is the whole batch's."""
    shard, covered = part.members[index].shard, part.coverage
    if covered is not None and covered.complete:
        covered = Coverage(shard.weight, shard.weight, complete=True)
    return Outcome(shard.shard_id, part.code, part.message, part.attempts, covered)


def _cut(message: str) -> str:
    return message.encode()[:_MESSAGE_BYTES].decode(errors="ignore")


def _coverage(weight: int, said: Coverage | None) -> Coverage:
    """Of a leaf that says more than it has been asked for, no more than that counts."""
    if said is None:
        return _ONE if weight == 1 else Coverage(weight, weight, complete=True)
    expected = said.expected or weight
    answered = min(max(said.answered, 0), expected)
    share = weight * answered // expected if said.expected != weight else answered
    return Coverage(weight, min(share, weight), said.complete and answered == expected)


def _is_missing(part: Part) -> bool:
    return part.coverage is None or not part.coverage.complete


def _by_gravity(part: Part) -> tuple[bool, int]:
    return part.code in (Code.OK, Code.CANCELLED), part.members[0].place


def _common(group: Sequence[Member], first: Replica) -> tuple[Replica, ...]:
    """Who serves all of them; the chosen one in front."""
    others = set(group[0].replicas).intersection(*(member.replicas for member in group[1:])) - {first}
    return (first, *sorted(others, key=lambda replica: replica.address))
