"""Any story at all: leaves that answer, in part, not at all or late; callers that leave; pools that change.

After every step the guarantees of the package hold (G1 to G8), as far as the core alone can keep them. What a request
must answer is worked out here a second time, from what its leaves were seen to do.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import permutations
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support.scattergather_core import Played, PlayedCall, played, rest

from retinue_server.runtime.errors import Code, Reason, RetinueError
from retinue_server.scattergather.core import rules
from retinue_server.scattergather.core import scatter as scattering
from retinue_server.scattergather.core.requests import Ask, Coverage, Malformed, Policy, Reply
from retinue_server.scattergather.core.root import Answer
from retinue_server.scattergather.core.scatter import Attempt, Part, Scatter, ScatterError
from retinue_server.scattergather.core.topology import Budget, Hedging, MergeKind, Merging, Pool, PoolLimits, Shard
from retinue_server.scattergather.engine import Metadata

ADDRESSES = ("r0:1", "r1:1", "r2:1")
TIMEOUT_S = 1.0
HEDGE_S = 0.02
CODES: list[Any] = [Code.UNAVAILABLE, Code.UNAVAILABLE, Code.INTERNAL, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED]
ODD_CODES = [Code.CANCELLED, Code.UNIMPLEMENTED, Code.INVALID_ARGUMENT, Code.PERMISSION_DENIED]
REPLICAS = [*permutations(ADDRESSES, 2), *permutations(ADDRESSES, 3), *permutations(ADDRESSES, 1)]
SHARDS = (
    st.sampled_from([3, 2, 4, 5, 1])
    .flatmap(lambda n: st.lists(st.tuples(st.integers(1, 4), st.sampled_from(REPLICAS)), min_size=n, max_size=n))
    .map(lambda each: tuple(Shard(f"s{i}", who, weight) for i, (weight, who) in enumerate(each)))
)
POOLS = st.fixed_dictionaries(
    {
        "shards": SHARDS,
        "merging": st.sampled_from([Merging(MergeKind.SUM)] * 3 + [Merging(MergeKind.FIRST)]),
        "idempotent": st.sampled_from([True, True, True, False]),
        "batch": st.sampled_from([False, False, True]),
        "max_retries": st.integers(0, 3),
        "hedging": st.sampled_from([Hedging(min_samples=0, min_delay_s=HEDGE_S)] * 3 + [Hedging(enabled=False)]),
        "limits": st.builds(
            PoolLimits,
            max_calls=st.sampled_from([8192, 8192, 6]),
            max_calls_per_endpoint=st.sampled_from([1024, 1024, 2]),
            max_gathered_bytes=st.sampled_from([1 << 20, 1 << 20, 60]),
        ),
    }
)
BUDGETS = st.builds(Budget, st.sampled_from([0.5, 0.05, 0.0]), st.sampled_from([50.0, 50.0, 1.0]))
POLICIES = st.builds(
    Policy,
    min_coverage=st.sampled_from([1.0, 1.0, 1.0, 0.0, 1e-9, 0.3, 0.5, 0.55, 0.75]),
    min_shards=st.sampled_from([0, 0, 1, 2]),
    soft_deadline_s=st.sampled_from([None, None, 0.0, 0.05, 0.5]),
    first_k=st.sampled_from([0, 0, 1, 2]),
    no_hedge=st.sampled_from([False, False, False, True]),
)
NONSENSE: list[Any] = [b"!", b'"no number"', b"9" * 400]
COVERAGES = st.none() | st.none() | st.none() | st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans())


STEPS = {
    "ask": 4,
    "hesitate": 3,
    "reply": 9,
    "reply_to_all": 2,
    "fail": 3,
    "wait": 1,
    "leave": 1,
    "connect": 1,
    "reload": 1,
}
Draw = Callable[[Any], Any]


class Numbered:
    """A question that says in its data of which request it is, and reads `NUMBER|EXPECTED ANSWERED COMPLETE`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def data(self, shards: Sequence[Shard], attempt: int) -> bytes:
        return f"{self.number}|{' '.join(shard.shard_id for shard in shards)}|{attempt}".encode()

    def metadata(self, shards: Sequence[Shard], attempt: int) -> Metadata:
        return ()

    def read(self, data: bytes) -> Reply:
        if data == b"!":
            raise Malformed("it is a !")
        number, _, said = data.partition(b"|")
        if not said:
            return Reply(number)
        expected, answered, complete = map(int, said.split())
        return Reply(number, Coverage(expected, answered, bool(complete)))


@dataclass
class Asked:
    """A request and what was seen of it."""

    number: int
    pool: Pool
    policy: Policy
    begun_at: float
    task: asyncio.Task[Answer] | None = None
    answered: dict[str, int] = field(default_factory=dict)
    """By shard, the leaves that it counts for; of a batch all are with the first."""
    whole: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    total: int = 0
    taken: list[bytes] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    """When."""
    left: bool = False
    refused: bool = False
    judged: bool = False

    # As an observer

    def asked(self, attempt: Attempt) -> Metadata:
        assert not self.ended
        return ()

    def answered_by(self, part: Part, reply: Reply) -> None:
        ids = [member.shard.shard_id for member in part.members]
        assert not {*self.answered, *self.failed}.intersection(ids), "each shard is settled once (G1)"
        weight = sum(member.shard.weight for member in part.members)
        leaves, whole = counted(weight, reply.coverage)
        self.answered |= dict.fromkeys(ids, 0) | {ids[0]: leaves}
        self.whole.update(ids if whole else ())
        self.total += int(reply.payload)
        self.taken.append(reply.payload)

    def failed_by(self, part: Part) -> None:
        ids = [member.shard.shard_id for member in part.members]
        assert not {*self.answered, *self.failed}.intersection(ids), "each shard is settled once (G1)"
        self.failed.update(ids)

    # What must be so

    @property
    def expected(self) -> int:
        return sum(shard.weight for shard in self.pool.shards)

    @property
    def complete(self) -> bool:
        return self.whole == {shard.shard_id for shard in self.pool.shards}

    @property
    def is_first(self) -> bool:
        return self.pool.merging.kind is MergeKind.FIRST

    def is_enough(self) -> bool:
        if self.is_first and self.answered:
            return True
        if self.policy.min_coverage == 1 and not self.complete:
            return False
        leaves, wanted = sum(self.answered.values()), Fraction(str(self.policy.min_coverage)) * self.expected
        return leaves >= wanted and len(self.answered) >= self.policy.min_shards

    def can_be_enough(self) -> bool:
        unsettled = [s for s in self.pool.shards if s.shard_id not in self.answered and s.shard_id not in self.failed]
        if self.is_first:
            return bool(unsettled)
        if self.policy.min_coverage == 1:
            return not self.failed and self.whole == set(self.answered)
        best = sum(self.answered.values()) + sum(shard.weight for shard in unsettled)
        wanted = Fraction(str(self.policy.min_coverage)) * self.expected
        return best >= wanted and len(self.answered) + len(unsettled) >= self.policy.min_shards

    def is_settled(self) -> bool:
        return len(self.answered) + len(self.failed) == len(self.pool.shards)

    def wants_no_more(self, now: float) -> bool:
        soft = self.policy.soft_deadline_s
        first_k = 1 if self.is_first else self.policy.first_k
        return (soft is not None and now >= self.begun_at + soft) or 0 < first_k <= len(self.answered)


def counted(weight: int, said: Coverage | None) -> tuple[int, bool]:
    """What a reply counts for: never more than was asked of it."""
    if said is None:
        return weight, True
    expected = said.expected or weight
    answered = min(said.answered, expected)
    return min(weight * answered // expected, weight), said.complete and answered == expected


class Watch:
    """The observer of a request; the method names are the port's."""

    def __init__(self, request: Asked, now: Callable[[], float]) -> None:
        self.request, self.now = request, now

    def asked(self, attempt: Attempt) -> Metadata:
        return self.request.asked(attempt)

    def answered(self, part: Part, attempt: Attempt, reply: Reply) -> None:
        self.request.answered_by(part, reply)

    def failed(self, part: Part) -> None:
        self.request.failed_by(part)

    def ended(self, scatter: Scatter) -> None:
        self.request.ended.append(self.now())


class Story(RuleBasedStateMachine):
    """One root, one pool, a few requests at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.play: Played = self.run(self.start())
        self.requests: list[Asked] = []
        self.numbers = 0
        self.budget = Budget()

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    async def start(self) -> Played:
        return played()

    def teardown(self) -> None:
        """In the end everything is over, and nothing is left of it."""
        try:
            self.run(self.play.clock.advance(TIMEOUT_S))
            self.judge()
            assert not self.running
            if "p" in self.play.root.pools:
                self.play.is_clean()
            self.run(self.play.clock.advance(10))  # lines that nobody uses are closed by then
            assert self.play.clock.timers == 0
        finally:
            self.runner.close()

    @property
    def running(self) -> list[Asked]:
        return [one for one in self.requests if one.task is not None and not one.task.done()]

    @initialize(pool=POOLS, budget=BUDGETS)
    def serve(self, pool: dict[str, Any], budget: Budget) -> None:
        self.budget = budget
        self.run(self._apply(pool))

    @rule(kind=st.sampled_from([kind for kind, weight in STEPS.items() for _ in range(weight)]), data=st.data())
    def step(self, kind: str, data: Any) -> None:
        """One of many things, each as often as it makes a story."""
        getattr(self, kind)(data.draw)

    def reload(self, draw: Draw) -> None:
        """Another file; requests under way see nothing of it (G5)."""
        self.run(self._apply(draw(POOLS)))

    async def _apply(self, pool: dict[str, Any]) -> None:
        self.play.root.apply([Pool("p", **pool, budget=self.budget, timeout_s=TIMEOUT_S)])

    def ask(self, draw: Draw) -> None:
        if len(self.running) < 4:
            self.run(self._ask(draw(POLICIES), draw(st.sampled_from([None, None, None, 0.3, 0.004]))))

    async def _ask(self, policy: Policy, left: float | None) -> None:
        root, number = self.play.root, len(self.requests)
        topology = root.topology("p")
        request = Asked(number, topology.pool, policy, self.play.clock.now())
        ask = Ask("p", root.new_id(), topology, Numbered(number), policy=policy, timeout_s=left)
        call = root.scatter(ask, [], lambda answer: answer, lambda _, __: Watch(request, self.play.clock.now))
        request.task = asyncio.create_task(call)
        self.requests.append(request)
        await rest()

    def call(self, draw: Draw) -> PlayedCall | None:
        calls = self.play.leaves.open_calls
        return draw(st.sampled_from(calls)) if calls else None

    def reply(self, draw: Draw) -> None:
        """And perhaps, who has lost by it, too: late, since it was cancelled."""
        call, before = self.call(draw), self.play.leaves.open_calls
        if call is None:
            return
        self.run(call.reply(self.data(draw(COVERAGES))))
        for loser in [one for one in before if one.cancelled]:
            if draw(st.booleans()):
                self.run(loser.reply(self.data(None)))

    def reply_to_all(self, draw: Draw) -> None:
        """In the order in which they were asked, or the latest first: then hedges win."""
        calls = self.play.leaves.open_calls
        for call in calls[::-1] if draw(st.booleans()) else calls:
            if call.open:
                self.run(call.reply(self.data(None)))

    def data(self, coverage: tuple[int, int, bool] | None) -> bytes:
        """Each number is another power of two, so that a sum tells which are in it."""
        self.numbers += 1
        number = str(1 << self.numbers % 500).encode()
        return number if coverage is None else number + b"|%d %d %d" % coverage

    def fail(self, draw: Draw) -> None:
        call, what = self.call(draw), draw(st.sampled_from(CODES * 3 + ODD_CODES + NONSENSE * 2))
        if call and isinstance(what, Code):
            self.run(call.fail(what))
        elif call and (what == b"!" or not self.request_of(call).is_first):  # FIRST takes what is no number
            self.run(call.reply(what))

    def hesitate(self, draw: Draw) -> None:
        """As long as it takes until calls get company."""
        self.run(self.play.clock.advance(HEDGE_S))

    def wait(self, draw: Draw) -> None:
        self.run(self.play.clock.advance(draw(st.sampled_from([0.001, 0.01, 0.1, 0.5]))))

    def leave(self, draw: Draw) -> None:
        """A caller goes."""
        if self.running:
            self.run(self._leave(draw(st.sampled_from(self.running))))

    async def _leave(self, request: Asked) -> None:
        assert request.task is not None
        request.left = True
        request.task.cancel()
        await rest()

    def connect(self, draw: Draw) -> None:
        draw(st.sampled_from(self.play.leaves.lines)).connected = draw(st.sampled_from([True, True, False]))

    def request_of(self, call: PlayedCall) -> Asked:
        return self.requests[int(call.data.partition(b"|")[0])]

    # The guarantees

    @invariant()
    def judge(self) -> None:
        for request in self.requests:
            if request.task is not None and request.task.done() and not request.judged:
                request.judged = True
                self._judge(request)

    def _judge(self, request: Asked) -> None:
        assert request.task is not None
        if request.task.cancelled():
            assert request.left
            return
        error = request.task.exception()
        if error is None:
            self._judge_answer(request, request.task.result())
        elif isinstance(error, ScatterError):
            self._judge_error(request, error)
        else:
            assert isinstance(error, RetinueError), error
            self._judge_refusal(request, error)

    def _judge_answer(self, request: Asked, answer: Answer) -> None:
        known, [ended] = answer.gathered, request.ended
        assert request.is_enough()
        assert request.is_settled() or request.wants_no_more(ended), "who waits for all gets all that comes in time"
        if request.is_first and request.answered:
            assert known.coverage.complete == bool(request.whole)
            assert answer.result == request.taken[0]
        else:
            assert known.coverage == Coverage(request.expected, sum(request.answered.values()), request.complete)  # G2
            assert answer.result in ({0, None, b""} if not request.taken else {request.total})  # G1
        assert request.taken or request.policy.min_coverage == 0, "never OK without an answer (G3)"
        assert known.stats.gathered_bytes <= request.pool.limits.max_gathered_bytes  # G8
        assert ended < request.begun_at + TIMEOUT_S  # G7

    def _judge_error(self, request: Asked, error: ScatterError) -> None:
        assert len(request.ended) == 1
        assert error.gathered is not None
        assert error.gathered.coverage.answered <= error.gathered.coverage.expected
        if error.reason == Reason.COVERAGE_NOT_MET:
            assert not request.is_enough()
            assert request.is_settled() or not request.can_be_enough(), "it fails when it must, and not before"
            assert error.code in (
                Code.RESOURCE_EXHAUSTED,
                Code.DEADLINE_EXCEEDED,
                Code.UNAVAILABLE,
                Code.INTERNAL,
            )
        elif error.reason == Reason.LEAF_REFUSED:
            assert error.code in rules.REFUSALS
        else:
            assert error.reason == Reason.GATHER_TOO_LARGE

    def _judge_refusal(self, request: Asked, error: RetinueError) -> None:
        assert not [call for call in self.play.leaves.calls if self.request_of(call) is request], "nobody was asked"
        partly = request.policy.min_coverage < 1 or request.policy.first_k
        if error.reason == Reason.POOL_NOT_IDEMPOTENT:
            assert partly
            assert not request.pool.idempotent  # G4
        elif error.reason == Reason.INVALID_FIELD:
            assert max(request.policy.min_shards, request.policy.first_k) > len(request.pool.shards)
        else:
            assert error.reason == Reason.SCATTER_LIMIT

    @invariant()
    def no_call_outlives_its_request(self) -> None:
        """G6; and no request outlives its calls."""
        waited_for = {self.request_of(call).number for call in self.play.leaves.open_calls}
        assert waited_for == {request.number for request in self.running}

    @invariant()
    def nobody_waits_for_what_is_known(self) -> None:
        before = self.play.clock.now() - 1e-6  # a timer that is due at this very moment comes next
        for request in self.running:
            assert request.can_be_enough()
            assert not (request.is_enough() and request.wants_no_more(before))
            assert not request.is_settled()

    @invariant()
    def counts_are_true(self) -> None:
        open_calls = Counter(call.address for call in self.play.leaves.open_calls)
        if "p" in self.play.root.pools:
            live = self.play.live
            assert live.running == len(self.running)
            assert live.unsent == 0
            assert (live.open_calls > 0) == bool(self.running)
            for replica in {r for member in live.topology.members for r in member.replicas}:
                assert 0 <= replica.in_flight <= open_calls[replica.address]

    @invariant()
    def extra_calls_stay_within_the_budget(self) -> None:
        first = {(call.data.rpartition(b"|")[0]) for call in self.play.leaves.calls if call.data.endswith(b"|1")}
        extra = len(self.play.leaves.calls) - len(first)
        assert extra <= self.budget.burst + self.budget.ratio * len(first) + 1e-6

    @invariant()
    def leaves_of_pools_that_are_not_idempotent_are_asked_once(self) -> None:
        """G4."""
        for call in self.play.leaves.calls:
            assert self.request_of(call).pool.idempotent or call.data.endswith(b"|1")

    @invariant()
    def leaves_have_less_time_than_the_request(self) -> None:
        """G7."""
        assert all(0 < call.timeout_s <= 0.95 * TIMEOUT_S + 1e-9 for call in self.play.leaves.calls)


PLAIN: Any = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def test_the_guarantees_hold_in_any_story() -> None:
    run_state_machine_as_test(Story, settings=settings(max_examples=120, stateful_step_count=40, **PLAIN))


def takes_late_replies(self: Scatter, attempt: Attempt, code: int, message: str, reply: bytes | None) -> None:
    if attempt.end is scattering.End.LOST and code == 0:
        self._merge.add(0, reply or b"0")
    done(self, attempt, code, message, reply)


def answers_with_any(self: Scatter) -> bool:
    return bool(self._answered_shards)


def retries_anything(self: Scatter, part: Part, code: int) -> bool:
    return code in rules.RETRYABLE


def forgets_to_cancel(self: Scatter, part: Part) -> None:
    """Losers go on."""


def believes_all(weight: int, said: Coverage | None) -> Coverage:
    return Coverage(weight, weight, complete=True)


done = Scatter._done
BROKEN: dict[str, tuple[object, str, object]] = {
    "a late reply is merged (G1)": (Scatter, "_done", takes_late_replies),
    "a part counts as all (G2)": (scattering, "_coverage", believes_all),
    "nothing is an answer (G3)": (rules, "needed", lambda *_: 0),
    "any part is an answer": (Scatter, "_is_enough", answers_with_any),
    "any pool gets retries (G4)": (Scatter, "_may_retry", retries_anything),
    "losers go on (G6)": (Scatter, "_give_up", forgets_to_cancel),
    "leaves have all the time (G7)": (rules, "leaf_timeout_s", lambda left: left),
    "the budget is no limit": (rules.TokenBucket, "spend", lambda _: True),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_rule_is_caught(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[what])
    bounds = settings(max_examples=500, stateful_step_count=40, phases=[Phase.generate], **PLAIN)
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(Story, settings=bounds)
