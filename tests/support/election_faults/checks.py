"""The rules that a history of leadership must keep. Pure functions; each gives what breaks its rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from support.election_faults.history import Belief, Fault, Interval, Write, intervals


class Finding(NamedTuple):
    """A rule that was broken."""

    check: str
    what: str


def overlaps(terms: Iterable[Interval]) -> Iterator[Finding]:
    """Intervals of valid leadership never overlap, whatever their domains."""
    longest: Interval | None = None
    for later in sorted(terms):
        if longest is not None and later.begin < longest.end:
            ms = (min(longest.end, later.end) - later.begin) / 1e6
            yield Finding("overlap", f"{later.who} led for {ms:.1f} ms beside {longest.who}: {longest}, {later}")
        if longest is None or later.end > longest.end:
            longest = later


def tokens(terms: Iterable[Interval]) -> Iterator[Finding]:
    """Tokens strictly increase within a domain, in the order in which the terms began."""
    highest: dict[str, Interval] = {}
    for later in sorted(terms):
        before = highest.get(later.domain)
        if before is not None and later.token <= before.token:
            yield Finding("token", f"token {later.token} after {before.token}: {before}, {later}")
        else:
            highest[later.domain] = later


def stale_writes(writes: Iterable[Write]) -> Iterator[Finding]:
    """The register accepts none under a lower token than it has accepted before."""
    highest: dict[str, int] = defaultdict(int)
    for write in writes:
        if write.accepted and write.token < highest[write.domain]:
            yield Finding("stale write", f"accepted after token {highest[write.domain]}: {write}")
        if write.accepted:
            highest[write.domain] = max(highest[write.domain], write.token)


def undecided_writes(writes: Iterable[Write], terms: Iterable[Interval]) -> Iterator[Finding]:
    """Whatever was written was decided by one who led under that token, late as it may have come."""
    known = {(term.who, term.domain, term.token): term for term in terms}
    for write in writes:
        term = known.get((write.who, write.domain, write.token))
        if term is None or not term.begin <= write.decided <= term.end:
            yield Finding("undecided write", f"decided outside of {term}: {write}")


def stuck(terms: Sequence[Interval], faults: Iterable[Fault], bound_ns: int) -> Iterator[Finding]:
    """Within the bound after each fault somebody leads."""
    for fault in faults:
        due = fault.end + bound_ns
        if not any(term.end > fault.end and term.begin <= due for term in terms):
            yield Finding("stuck", f"nobody led within {bound_ns / 1e9:.1f} s after {fault}")


def take_overs(terms: Sequence[Interval], faults: Sequence[Fault]) -> Iterator[tuple[str, int]]:
    """For each fault that ended a term before the next one was played: its kind, and the nanoseconds until somebody saw
    himself elected under a higher token. They count from its beginning, or from when the engine runs again."""
    ordered = sorted(faults, key=lambda fault: fault.begin)
    ends = [fault.begin for fault in ordered[1:]] + [max([term.begin for term in terms], default=0) + 1]
    for fault, end in zip(ordered, ends, strict=True):
        begins = [t.begin for t in terms if t.token > fault.token and fault.begin < t.begin < end]
        if fault.token and begins:
            yield fault.kind, max(min(begins) - (fault.end if fault.of_engine else fault.begin), 0)


def check(
    beliefs: Sequence[Belief],
    deaths: Mapping[str, int],
    writes: Sequence[Write],
    faults: Iterable[Fault],
    bound_ns: int,
) -> list[Finding]:
    """All rules. A death is stamped before the kill, and its process may decide something yet."""
    terms = intervals(beliefs, deaths)
    return [
        *overlaps(terms),
        *tokens(terms),
        *stale_writes(writes),
        *undecided_writes(writes, intervals(beliefs, {})),
        *stuck(terms, faults, bound_ns),
    ]
