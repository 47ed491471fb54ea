"""What a history must not show: each check is a pure function of a story and names what breaks its rule.

A check speaks only of what is certain. An answer that was lost leaves open whether its call took effect; the checks
then allow both, and so never cry wolf.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from support.history.records import Op
from support.history.story import Ending, Execution, Policy, Story, Verdict


class Finding(NamedTuple):
    """A rule that was broken."""

    check: str
    task: str
    what: str


def lost(story: Story) -> Iterator[Finding]:
    """What was acknowledged is there at the end: tasks, and completions."""
    for task, asked in story.enqueues.items():
        if task not in story.tasks and any(s.verdict == Verdict.ACCEPTED for s in asked):
            yield Finding("lost", task, "it was acknowledged and is not there")
    for task in story.executions:
        record = story.tasks.get(task)
        if story.accepted_completions(task) and (record is None or record.state != "SUCCEEDED"):
            yield Finding("lost", task, f"its completion was accepted and it is {record.state if record else 'gone'}")


def invented(story: Story) -> Iterator[Finding]:
    """What is there was asked for: tasks by a producer or a completion, successes by a completion."""
    for task, record in story.tasks.items():
        if not record.parent and task not in story.enqueues:
            yield Finding("invented", task, "nobody enqueued it")
        if record.state == "SUCCEEDED" and not (story.accepted_completions(task) or story.possible_completions(task)):
            yield Finding("invented", task, "it succeeded and nobody can have completed it")


def completed_once(story: Story) -> Iterator[Finding]:
    """At most one completion of a task is accepted; saying it again under the same lease does not count."""
    for task in story.executions:
        epochs = sorted(story.accepted_completions(task))
        if len(epochs) > 1:
            yield Finding("completed_once", task, f"completions were accepted under the leases {epochs}")


def first_result_stands(story: Story) -> Iterator[Finding]:
    """The result is that of the completion that was accepted, whatever was said later."""
    for task, record in story.tasks.items():
        if record.state == "SUCCEEDED" and record.result is not None:
            allowed = sorted(story.accepted_completions(task)) or [
                s.item.epoch for s in story.possible_completions(task)
            ]
            if record.result not in map(str, allowed):
                yield Finding(
                    "first_result_stands", task, f"its result is that of lease {record.result}, not {allowed}"
                )


def ended_once(story: Story) -> Iterator[Finding]:
    """A lease ends in one way only."""
    for lease in _leases(story):
        ends = {s.op for s in lease.settlements if s.verdict == Verdict.ACCEPTED and s.op != Op.EXTEND}
        if len(ends) > 1:
            yield Finding("ended_once", lease.task, f"lease {lease.epoch} ended as {sorted(ends)}")


def explained(story: Story) -> Iterator[Finding]:
    """A task is leased again only after its lease expired, failed or was released."""
    for task in story.executions:
        leases = story.in_order(task)
        for lease, following in pairwise(leases):
            if not story.endings(lease, following) - {Ending.COMPLETED}:
                yield Finding(
                    "explained", task, f"lease {following.epoch} came while lease {lease.epoch} had not ended"
                )


def not_shared(story: Story) -> Iterator[Finding]:
    """A lease belongs to one worker, and a worker's lease no longer counts once the next one was handed out."""
    for task in story.executions:
        leases = story.in_order(task)
        for lease in leases:
            if len(lease.holders) > 1:
                yield Finding("not_shared", task, f"lease {lease.epoch} was given to {sorted(lease.holders)}")
        for lease, following in pairwise(leases):
            stale = [s for s in lease.settlements if s.verdict == Verdict.ACCEPTED and s.call_at > following.at]
            for settlement in stale:
                what = f"{settlement.op} of lease {lease.epoch} was accepted after lease {following.epoch} was there"
                yield Finding("not_shared", task, what)


def epochs_rise(story: Story) -> Iterator[Finding]:
    """A later lease has a higher epoch, and the task ends with the highest."""
    for task in story.executions:
        leases = story.in_order(task)
        for lease, following in pairwise(leases):
            if following.at < lease.since:
                yield Finding("epochs_rise", task, f"epoch {lease.epoch} came after epoch {following.epoch}")
        record = story.tasks.get(task)
        if record is not None and record.lease_epoch < leases[-1].epoch:
            yield Finding("epochs_rise", task, f"it ends at epoch {record.lease_epoch}, below {leases[-1].epoch}")


def refusals_stand(story: Story) -> Iterator[Finding]:
    """Once a lease was said to be lost, nothing that is asked under it later is accepted.

    A restarted server is excused: it can't know which leases had just run out, and gives them one more term.
    """
    for lease in _leases(story):
        told = [s.reply_at for s in lease.settlements if s.reason == "LEASE_LOST" and s.reply_at is not None]
        for settlement in lease.settlements:
            later = [at for at in told if at < settlement.call_at and not _restarted_since(story, at)]
            if settlement.verdict == Verdict.ACCEPTED and later:
                yield Finding(
                    "refusals_stand", lease.task, f"{settlement.op} under lost lease {lease.epoch} was accepted"
                )


def _restarted_since(story: Story, at: int) -> bool:
    return any(begin >= at or killed >= at for killed, begin in story.restarts)


def follow_ups(story: Story) -> Iterator[Finding]:
    """Each accepted completion brings its follow-ups exactly once; a refused one brings none."""
    children: dict[str, Counter[int]] = defaultdict(Counter)
    for record in story.tasks.values():
        if record.parent:
            children[record.parent][record.parent_epoch] += 1
    for task in dict.fromkeys([*story.executions, *children]):
        found, allowed = dict(children[task]), _families(story, task)
        if found not in allowed:
            yield Finding("follow_ups", task, f"its follow-ups by lease are {found}; they may be {allowed}")


def _families(story: Story, task: str) -> list[dict[int, int]]:
    """Which follow-ups a task may have: how many by the lease that brought them."""
    sure = story.accepted_completions(task).values()
    record = story.tasks.get(task)
    if not sure and (record is None or record.state != "SUCCEEDED"):
        return [{}]
    counts = [(s.item.epoch, s.item.follow_ups) for s in sure or story.possible_completions(task)]
    return [{epoch: count} if count else {} for epoch, count in counts]


class _Counters(NamedTuple):
    """What the server counts of a task."""

    attempt: int = 0
    expirations: int = 0
    state: str = "waiting"
    """waiting, leased, dead or done."""


def counted(story: Story) -> Iterator[Finding]:
    """`attempt` and `lease_expirations` are what the leases make of them, at each lease and at the end.

    What can't be known (a lease that reached nobody, an answer that was lost) may have gone either way.
    """
    for task, record in story.tasks.items():
        leases = story.executions.get(task, {})
        possible = {_Counters()}
        for epoch in range(1, record.lease_epoch + 1):
            ready = _ready(story, task, possible)
            lease = leases.get(epoch)
            attempts = {counters.attempt + 1 for counters in ready}
            if lease is not None and lease.attempt not in attempts:
                yield Finding("counted", task, f"lease {epoch} is attempt {lease.attempt}; it may be {attempts}")
                break
            held = {c for c in ready if lease is None or c.attempt + 1 == lease.attempt}
            ends = _ends(story, leases, epoch, record.lease_epoch)
            possible = {_after(counters, end, story.policy) for counters in held for end in ends}
        else:
            shown = _Counters(record.attempt, record.lease_expirations, _SHOWN.get(record.state, "waiting"))
            if shown not in possible | _ready(story, task, possible):
                yield Finding("counted", task, f"it ends as {tuple(shown)}; it may be {sorted(map(tuple, possible))}")


def _ready(story: Story, task: str, possible: set[_Counters]) -> set[_Counters]:
    """Those that can be leased; a dead one only if somebody may have redriven it."""
    redriven = any(s.verdict != Verdict.REFUSED for s in story.redrives.get(task, ()))
    ready = {c for c in possible if c.state == "waiting"}
    return ready | ({_Counters()} if redriven and any(c.state == "dead" for c in possible) else set())


def _ends(story: Story, leases: Mapping[int, Execution], epoch: int, last: int) -> set[Ending]:
    """How a lease may have ended, one that nobody knows of included."""
    open_ = {Ending.NOT_YET} if epoch == last else set()
    if epoch not in leases:
        return {Ending.EXPIRED, Ending.RELEASED} | open_
    following = min((later for later in leases if later > epoch), default=None)
    return story.endings(leases[epoch], leases[following] if following else None) | open_


def _after(before: _Counters, end: Ending, policy: Policy) -> _Counters:
    """What one more lease makes of the counters."""
    attempt, expirations = before.attempt + 1, before.expirations
    match end:
        case Ending.NOT_YET:
            return _Counters(attempt, expirations, "leased")
        case Ending.COMPLETED:
            return _Counters(attempt, expirations, "done")
        case Ending.RELEASED:
            return _Counters(attempt - 1, expirations)
        case Ending.EXPIRED:
            dead = expirations + 1 >= policy.max_lease_expirations
            return _Counters(attempt - 1, expirations + 1, "dead" if dead else "waiting")
    dead = end == Ending.FAILED_FINALLY or attempt >= policy.max_attempts
    return _Counters(attempt, expirations, "dead" if dead else "waiting")


_SHOWN = {"LEASED": "leased", "DEAD": "dead", "SUCCEEDED": "done"}


def _leases(story: Story) -> Iterator[Execution]:
    return (lease for leases in story.executions.values() for lease in leases.values())


Check = Callable[[Story], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    lost,
    invented,
    completed_once,
    first_result_stands,
    ended_once,
    explained,
    not_shared,
    epochs_rise,
    refusals_stand,
    follow_ups,
    counted,
)


def check(story: Story) -> list[Finding]:
    """What all checks find."""
    return [finding for one in CHECKS for finding in one(story)]
