"""A history read by task: who had it when, what they said became of it, and what they were told."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import msgspec

from support.history.records import Call, Event, Fault, Item, Leased, Op, Outcome, Reply, TaskRecord, decode

if TYPE_CHECKING:
    from pathlib import Path

_MS = 1_000_000
_ROUNDING_MS = 2
"""Leases are counted in whole milliseconds, by some engines on a clock that NTP slews."""


class Verdict(Enum):
    """What is known of one item."""

    ACCEPTED = 1
    REFUSED = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings of the queue that decide on endings."""

    max_attempts: int = 5
    max_lease_expirations: int = 3
    renewed_at_start: bool = True
    """A server that starts gives the leases that it finds one full term, since it can't know how old they are."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """One item that was asked for a lease, with its answer. `reply_at` is None for one that never came."""

    op: Op
    item: Item
    call_at: int
    reply_at: int | None
    verdict: Verdict
    reason: str = ""


@dataclass(slots=True)
class Execution:
    """A lease that came to a worker."""

    task: str
    epoch: int
    attempt: int
    who: str
    n: int
    since: int
    """The grant is not before this,"""
    at: int
    """and not after this."""
    lasts_ms: int
    maybe_given_back: bool = False
    """It was the last that came on a stream that broke: the server may think that it was not delivered."""
    settlements: list[Settlement] = field(default_factory=list)
    holders: set[str] = field(default_factory=set)

    def of(self, op: Op, *verdicts: Verdict) -> list[Settlement]:
        """What was asked of that kind, with these verdicts."""
        return [s for s in self.settlements if s.op == op and s.verdict in verdicts]

    def accepted(self, op: Op) -> bool:
        """Whether the server said so."""
        return bool(self.of(op, Verdict.ACCEPTED))


class Ending(Enum):
    """How a lease may have ended, as far as it matters to the counters."""

    COMPLETED = 1
    FAILED = 2
    FAILED_FINALLY = 3
    RELEASED = 4
    EXPIRED = 5
    NOT_YET = 6


class Story:
    """A whole history, with the tasks as they stood at the end (`read_at`: when they were read)."""

    def __init__(self, events: Iterable[Event], tasks: Iterable[TaskRecord], policy: Policy = Policy()) -> None:
        ordered = sorted(events, key=lambda event: event.at)
        self.policy = policy
        self.tasks: Mapping[str, TaskRecord] = {task.task: task for task in tasks}
        self.read_at = ordered[-1].at if ordered else 0
        self.calls = {(e.who, e.n): e for e in ordered if isinstance(e, Call)}
        self.replies = {(e.who, e.n): e for e in ordered if isinstance(e, Reply)}
        self.faults = [e for e in ordered if isinstance(e, Fault)]
        self.restarts = _restarts(self.faults) if policy.renewed_at_start else []
        self.enqueues: dict[str, list[Settlement]] = defaultdict(list)
        self.redrives: dict[str, list[Settlement]] = defaultdict(list)
        self.executions: dict[str, dict[int, Execution]] = defaultdict(dict)
        self._take_leases([e for e in ordered if isinstance(e, Leased)])
        self._take_calls()

    def _take_leases(self, leased: list[Leased]) -> None:
        last = self._last_messages(leased)
        for event in leased:
            stream = (event.who, event.n)
            unsure = last.get(stream) == event.at and self._broke(stream)
            for grant in event.leases:
                new = Execution(
                    grant.task,
                    grant.epoch,
                    grant.attempt,
                    event.who,
                    event.n,
                    event.since,
                    event.at,
                    grant.lasts_ms,
                    unsure,
                )
                known = self.executions[grant.task].setdefault(grant.epoch, new)
                known.holders.add(event.who)

    def _last_messages(self, leased: list[Leased]) -> dict[tuple[str, int], int]:
        """When each stream brought something for the last time."""
        last = {(e.who, e.n): e.at for e in leased}
        for key, call in self.calls.items():
            if call.stream and (reply := self.replies.get(key)) and reply.outcome == Outcome.OK:
                stream = (call.who, call.stream)
                last[stream] = max(last.get(stream, 0), reply.at)
        return last

    def _broke(self, call: tuple[str, int]) -> bool:
        """Whether a stream did not come to an orderly end. Leases that came by a call came with its OK."""
        reply = self.replies.get(call)
        return reply is None or reply.outcome != Outcome.OK

    def _take_calls(self) -> None:
        for call in sorted(self.calls.values(), key=lambda call: call.at):
            for settlement in _items(call, self.replies.get((call.who, call.n))):
                self._take(settlement)

    def _take(self, one: Settlement) -> None:
        task = one.item.task
        if one.op == Op.ENQUEUE:
            self.enqueues[task].append(one)
        elif one.op == Op.REDRIVE:
            self.redrives[task].append(one)
        elif execution := self.executions.get(task, {}).get(one.item.epoch):
            execution.settlements.append(one)

    def in_order(self, task: str) -> list[Execution]:
        """A task's leases that came to a worker, by epoch."""
        return [execution for _, execution in sorted(self.executions.get(task, {}).items())]

    def known_tasks(self) -> Iterator[str]:
        """All tasks that anybody heard of."""
        yield from dict.fromkeys([*self.enqueues, *self.executions, *self.tasks])

    def surely_until(self, lease: Execution) -> int:
        """Before this the lease has not expired: counted from the earliest grant, over extensions and restarts.

        A restarted server gives a lease that it finds one full term. Of several durations the shortest counts. Limits
        of attempts, which end leases earlier, are not known here: histories are of queues without.
        """
        asked = [s.item.lasts_ms for s in lease.settlements if s.op == Op.EXTEND and s.item.lasts_ms]
        term = (min([lease.lasts_ms, *asked]) - _ROUNDING_MS) * _MS
        until = lease.since + term
        extended = [(s.call_at, s.call_at) for s in lease.of(Op.EXTEND, Verdict.ACCEPTED)]
        for before, begin in sorted([*extended, *(r for r in self.restarts if r[0] >= lease.at)]):
            if before < until or before == begin:
                until = max(until, begin + term)
        return until

    def endings(self, lease: Execution, following: Execution | None) -> set[Ending]:
        """How the lease may have ended, given that `following` came next (None = nothing did that anybody saw)."""
        sure = [_ENDINGS[s.op](s.item) for s in lease.settlements if s.verdict == Verdict.ACCEPTED and s.op in _ENDINGS]
        if sure:
            return {sure[0]}
        by = following.at if following else self.read_at
        possible = {
            _ENDINGS[s.op](s.item)
            for s in lease.settlements
            if s.verdict == Verdict.UNKNOWN and s.op in _ENDINGS and s.call_at <= by
        }
        if lease.maybe_given_back:
            possible.add(Ending.RELEASED)
        if self.surely_until(lease) <= by:
            possible.add(Ending.EXPIRED)
        return possible

    def possible_completions(self, task: str) -> list[Settlement]:
        """Completions that may have taken effect without anybody having been told."""
        return [s for e in self.in_order(task) for s in e.of(Op.COMPLETE, Verdict.UNKNOWN)]

    def accepted_completions(self, task: str) -> dict[int, Settlement]:
        """Completions that were answered OK, by epoch; a repetition counts once."""
        return {s.item.epoch: s for e in self.in_order(task) for s in e.of(Op.COMPLETE, Verdict.ACCEPTED)}


_ENDINGS: Mapping[Op, Callable[[Item], Ending]] = {
    Op.COMPLETE: lambda _: Ending.COMPLETED,
    Op.FAIL: lambda item: Ending.FAILED_FINALLY if item.final else Ending.FAILED,
    Op.RELEASE: lambda _: Ending.RELEASED,
}


def _restarts(faults: list[Fault]) -> list[tuple[int, int]]:
    """(killed, started again) of the server."""
    found, killed = [], None
    for fault in faults:
        if fault.target != "server":
            continue
        if fault.kind == "kill":
            killed = fault.at
        elif fault.kind == "start" and killed is not None:
            found.append((killed, fault.at))
            killed = None
    return found


def _items(call: Call, reply: Reply | None) -> Iterator[Settlement]:
    for number, item in enumerate(call.items):
        verdict, reason = _verdict(reply, number)
        yield Settlement(call.op, item, call.at, reply.at if reply else None, verdict, reason)


def _verdict(reply: Reply | None, number: int) -> tuple[Verdict, str]:
    if reply is None:
        return Verdict.UNKNOWN, ""
    match reply.outcome:
        case Outcome.UNKNOWN:
            return Verdict.UNKNOWN, reply.reason
        case Outcome.REFUSED:
            return Verdict.REFUSED, reply.reason
    reason = reply.refused.get(number, "")
    return (Verdict.REFUSED if reason else Verdict.ACCEPTED), reason


def read(directory: Path) -> list[Event]:
    """All events of the files `*.jsonl` of a directory."""
    return [event for file in sorted(directory.glob("*.jsonl")) for event in read_file(file)]


def read_file(file: Path) -> list[Event]:
    """The events of one process. A last line that a kill has cut short never happened."""
    *lines, rest = file.read_bytes().split(b"\n")
    events = [decode(line) for line in lines]
    if rest:
        with contextlib.suppress(msgspec.DecodeError):
            events.append(decode(rest))
    return events
