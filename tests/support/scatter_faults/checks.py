"""What a history of scatter/gather must not show: each check is a pure function of a story.

Callers and leaves know only when something reached them. So whatever is measured at both has a slack, and what a fault
held on its way may come when the fault is over.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from support.scatter_faults.history import LEFT, OK, Asked, Call, Known, Ran, Story, Told

_CANCELLED, _DEADLINE_EXCEEDED = 1, 4
_RETRYABLE = (2, 10, 13, 14, 15)
_MOST_HEDGES = 2
_MOST_EXTRA = _MOST_HEDGES + 2
"""Calls that a shard may have beside the first: hedges and two retries."""
_MOST_FAILURES = 16
_NEARLY = 0.9
"""Leaves have at least so much of the time."""
_RECOVERS_NS = 5_000_000_000
"""After a fault a connection may take so long to be made anew."""
ROOT = "root"
"""Among the leaves of a fault: the root itself was hit."""


class Finding(NamedTuple):
    """A rule that was broken."""

    check: str
    request: str
    what: str


def merged_once(story: Story, _: int) -> Iterator[Finding]:
    """An answer is the merge of at most one reply of each shard, given for this request by a leaf of the shard."""
    for asked, told in _answered(story):
        for shard, count in Counter(piece.shard for piece in told.pieces).items():
            if count > 1:
                yield Finding("merged_once", told.request, f"{count} replies of {shard} were merged")
        for piece in told.pieces:
            call = story.by_serial.get(piece.serial)
            if call is None or (call.got.request, call.got.shard) != (asked.request, piece.shard):
                yield Finding("merged_once", told.request, f"{piece} is no reply to it: {call}")
            elif call.gave is None or call.gave.end not in ("answered", "part") or call.gave.at > told.at:
                yield Finding("merged_once", told.request, f"{piece} was not given by then: {call}")


def truthful(story: Story, _: int) -> Iterator[Finding]:
    """Coverage, completeness and the shards that are said to be missing are what the merged replies make of them."""
    for asked, told in _answered(story):
        if told.coverage != (right := _coverage(story, asked, told)):
            yield Finding("truthful", told.request, f"coverage is {told.coverage}; it must be {right}")
        whole = {piece.shard for piece in told.pieces if not _in_part(story, piece.serial)}
        yield from _said_missing(told, set(asked.shards) - whole)
        missing = len(asked.shards) - len({piece.shard for piece in told.pieces})
        if sum(told.failed_by_code.values()) != missing:
            yield Finding("truthful", told.request, f"{missing} shards are missing, said are {told.failed_by_code}")
    for asked, told in _failed(story):
        yield from _true_failure(asked, told)


def _said_missing(told: Told, missing: set[str]) -> Iterator[Finding]:
    said = set(told.failures)
    if not said <= missing or len(said) != min(len(missing), _MOST_FAILURES):
        yield Finding("truthful", told.request, f"missing are {sorted(missing)}, said are {sorted(said)}")


def _true_failure(asked: Asked, told: Told) -> Iterator[Finding]:
    """An error's coverage agrees with the shards that it names."""
    assert told.coverage is not None
    if told.coverage.expected != sum(asked.shards.values()) or not set(told.failures) <= set(asked.shards):
        yield Finding("truthful", told.request, f"it is told about others than {asked.shards}: {told}")
        return
    if told.reason == "LEAF_REFUSED" and told.code not in told.failures.values():
        yield Finding("truthful", told.request, f"no shard is named that refused with {told.code}: {told.failures}")
    missing = {shard for shard, code in told.failures.items() if code != OK}
    if sum(told.failed_by_code.values()) != len(missing) or len(told.failures) != len(missing):
        return  # some are not named, or answered in part
    answered = sum(weight for shard, weight in asked.shards.items() if shard not in missing)
    if told.coverage.answered != answered:
        yield Finding("truthful", told.request, f"coverage is {told.coverage}, and missing are {told.failures}")


def enough(story: Story, _: int) -> Iterator[Finding]:
    """OK only with the minimum, and never of nothing unless that was asked for; an error only without the minimum."""
    for asked, told in _answered(story):
        assert told.coverage is not None
        if not _is_enough(asked, told.coverage):
            yield Finding("enough", told.request, f"OK with {told.coverage}, wanted were {asked.min_coverage}")
        if not told.pieces and asked.min_coverage > 0:
            yield Finding("enough", told.request, "OK with no answer at all")
        if _CANCELLED in told.failures.values() and not _may_stop(asked, told):
            yield Finding("enough", told.request, f"it did not wait for {told.failures}")
    for asked, told in _failed(story):
        assert told.coverage is not None
        if told.reason == "COVERAGE_NOT_MET" and _is_enough(asked, told.coverage):
            yield Finding("enough", told.request, f"an error with {told.coverage}, wanted were {asked.min_coverage}")


def _is_enough(asked: Asked, known: Known) -> bool:
    if asked.min_coverage >= 1:
        return known.complete
    return known.answered / known.expected >= asked.min_coverage


def _may_stop(asked: Asked, told: Told) -> bool:
    by_count = 0 < asked.first_k <= len(told.pieces)
    return by_count or (asked.soft_ns > 0 and told.at - asked.at >= asked.soft_ns)


def in_time(story: Story, slack_ns: int) -> Iterator[Finding]:
    """Every call is answered by its deadline."""
    for asked in story.asked.values():
        told = story.told.get(asked.request)
        took = (told.at if told else story.read_at) - asked.at
        if took > asked.timeout_ns + slack_ns and not _hits(story, ROOT, asked.at, asked.at + took):
            yield Finding(
                "in_time", asked.request, f"took {took / 1e9:.2f} s of {asked.timeout_ns / 1e9:.2f} s: {told}"
            )


def ended(story: Story, slack_ns: int) -> Iterator[Finding]:
    """When a request is over, every call to a leaf is; none comes later, and each has less time than the request."""
    for call in story.calls:
        asked, got = story.asked.get(call.got.request), call.got
        if asked is None:
            yield Finding("ended", got.request, f"nobody asked it: {got}")
            continue
        over = story.over_at(asked)
        if got.at > (latest := story.held_until(got.leaf, asked.at, over) + slack_ns):
            yield Finding("ended", got.request, f"{(got.at - latest) / 1e9:.2f} s too late: {got}")
        last = story.held_until(got.leaf, got.at, max(over, got.at)) + slack_ns
        until = call.gave.at if call.gave else story.read_at
        if until > last and not story.died(call, last):
            yield Finding("ended", got.request, f"it went on for {(until - over) / 1e9:.2f} s: {call}")
        if got.left_ns >= asked.timeout_ns:
            yield Finding("ended", got.request, f"it has no less time than the request: {got}")


def bounded(story: Story, _: int) -> Iterator[Finding]:
    """A shard is asked once, once more beside a slow call, once more after each failure, each time somebody else; and
    all that is more than once stays within the pool's budget."""
    primaries: Counter[str] = Counter()
    for asked in story.asked.values():
        primaries[asked.pool] += len(asked.shards)
    extra: Counter[str] = Counter()
    for request, calls in story.by_request.items():
        if request in story.asked:
            pool = story.asked[request].pool
            yield from _bounded_calls(story.pools[pool], request, calls)
            extra[pool] += sum(count - 1 for count in Counter(call.got.shard for call in calls).values())
    said: Counter[str] = Counter()
    for asked, told in _answered(story):
        said[asked.pool] += told.hedges + told.retries
    for name, ran in story.pools.items():
        most = ran.roots * ran.burst + ran.ratio * primaries[name]
        if max(extra[name], said[name]) > most:
            yield Finding(
                "bounded", name, f"{extra[name]} more calls came, {said[name]} were said, {most} were allowed"
            )


def _bounded_calls(pool: Ran, request: str, calls: list[Call]) -> Iterator[Finding]:
    most = 1 + pool.hedged * _MOST_HEDGES + pool.max_retries if pool.idempotent else 1
    by_shard: dict[str, list[str]] = defaultdict(list)
    for call in calls:
        by_shard[call.got.shard].append(call.got.leaf)
    for shard, leaves in by_shard.items():
        if len(leaves) > most:
            yield Finding("bounded", request, f"{shard} was asked {len(leaves)} times, of {leaves}")
        if len(leaves) - len(set(leaves)) > pool.hedged * (
            _MOST_HEDGES - 1
        ):  # the second hedge may go to who was asked
            yield Finding("bounded", request, f"leaves were asked again for {shard}: {leaves}")


def explained(story: Story, slack_ns: int) -> Iterator[Finding]:
    """A shard is missing, and a request fails, for a reason that was there: a fault, or the end of its time."""
    for asked, told in (*_answered(story), *_failed(story)):
        for shard, code in told.failures.items():
            leaves = story.pools[asked.pool].replicas[shard]
            hit = any(_hits(story, leaf, asked.at - _RECOVERS_NS, told.at) for leaf in leaves)
            if code == _DEADLINE_EXCEEDED and told.at - asked.at < _NEARLY * asked.timeout_ns - slack_ns:
                yield Finding("explained", told.request, f"{shard} had more time than it is said to have had: {told}")
            if code not in (OK, _CANCELLED, _DEADLINE_EXCEEDED) and not hit:
                yield Finding("explained", told.request, f"{shard} failed with {code}, and nothing ailed it: {told}")
    yield from _retried(story)
    for asked, told in _pairs(story):
        if told.code in (OK, LEFT) or told.coverage is not None or told.reason == "SCATTER_LIMIT":
            continue
        is_over = told.code == _DEADLINE_EXCEEDED and told.at - asked.at >= _NEARLY * asked.timeout_ns
        if not is_over and not _hits(story, ROOT, asked.at - _RECOVERS_NS, told.at):
            yield Finding("explained", told.request, f"it failed without saying how far it came: {told}")


def _retried(story: Story) -> Iterator[Finding]:
    """Where the budget can't have run out, another replica was asked: only shards without a healthy one fail."""
    primaries = Counter(asked.pool for asked in story.asked.values() for _ in asked.shards)
    plenty = {
        name for name, ran in story.pools.items() if ran.idempotent and ran.burst >= _MOST_EXTRA * primaries[name]
    }
    for asked, told in (*_answered(story), *_failed(story)):
        for shard in (shard for shard, code in told.failures.items() if code in _RETRYABLE and asked.pool in plenty):
            begin, leaves = asked.at - _RECOVERS_NS, story.pools[asked.pool].replicas[shard]
            well = [leaf for leaf in leaves if not _hits(story, leaf, begin, told.at)]
            if well:
                yield Finding("explained", told.request, f"{shard} failed although nothing ailed {well}: {told}")


def _hits(story: Story, leaf: str, begin: int, end: int) -> bool:
    return any(
        leaf in fault.leaves and fault.begin <= end and (fault.end or story.read_at) >= begin for fault in story.faults
    )


def _coverage(story: Story, asked: Asked, told: Told) -> Known:
    answered = 0
    for piece in told.pieces:
        weight = asked.shards.get(piece.shard, 0)
        answered += weight // 2 if _in_part(story, piece.serial) else weight
    whole = sum(not _in_part(story, piece.serial) for piece in told.pieces)
    return Known(sum(asked.shards.values()), answered, whole == len(asked.shards))


def _in_part(story: Story, serial: int) -> bool:
    call = story.by_serial.get(serial)
    return call is not None and call.gave is not None and call.gave.end == "part"


def _pairs(story: Story) -> Iterator[tuple[Asked, Told]]:
    return ((story.asked[request], told) for request, told in story.told.items() if request in story.asked)


def _answered(story: Story) -> Iterator[tuple[Asked, Told]]:
    return ((asked, told) for asked, told in _pairs(story) if told.code == OK)


def _failed(story: Story) -> Iterator[tuple[Asked, Told]]:
    """Those that say how far they came."""
    return ((asked, told) for asked, told in _pairs(story) if told.code != OK and told.coverage is not None)


Check = Callable[[Story, int], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (merged_once, truthful, enough, in_time, ended, bounded, explained)


def check(story: Story, slack_ns: int) -> list[Finding]:
    """What all checks find; the slack is for what happens between two processes of a busy machine."""
    return [finding for one in CHECKS for finding in one(story, slack_ns)]
