"""What a history of the ambassador must not show: each check is a pure function of a story.

`slack_ns` is for what takes time by itself on a machine that does much else: from the acknowledgement of a change until
every worker of a data plane goes by it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from support.ambassador_faults.history import Call, Story, Told

PATIENCE_NS = 10_000_000_000
"""Callers give up after so long; none may have to."""


class Finding(NamedTuple):
    """A rule that was broken."""

    check: str
    call: int
    """0 = it is no call's."""
    what: str


def served(story: Story, _: int) -> Iterator[Finding]:
    """No call fails, but for faults that hit its own upstream."""
    for call in story.calls:
        if call.told is not None and call.told.failure and not story.excused(call):
            yield Finding("served", call.sent.call, f"{call.sent.upstream}: {call.told.failure}")


def answered(story: Story, slack_ns: int) -> Iterator[Finding]:
    """Every call ends."""
    for call in story.calls:
        if call.told is None and story.read_at - call.sent.at > PATIENCE_NS + slack_ns:
            yield Finding("answered", call.sent.call, f"{call.sent.upstream}: nothing was heard any more")


def right_server(story: Story, slack_ns: int) -> Iterator[Finding]:
    """A call is answered by a server that was declared while it was under way, on its connection if that is pinned."""
    pinned: dict[str, str] = {}
    for call, told in _heard(story):
        sent = call.sent
        if not told.server:
            continue
        if sent.pinned and sent.connection in pinned:
            if told.server != pinned[sent.connection]:
                what = f"{sent.upstream}: {told.server} answers on a connection to {pinned[sent.connection]}"
                yield Finding("right_server", sent.call, what)
            continue
        if sent.pinned and sent.connection:
            pinned[sent.connection] = told.server
        allowed = story.servers(sent.upstream, sent.at - slack_ns, told.at)
        if told.server not in allowed:
            what = f"{sent.upstream}: {told.server} answers; declared are {sorted(allowed)}"
            yield Finding("right_server", sent.call, what)


def own_value(story: Story, _: int) -> Iterator[Finding]:
    """A key has a value that was stored under it, or none."""
    for call, told in _heard(story):
        if told.value and not told.value.startswith(f"{call.sent.key}="):
            yield Finding("own_value", call.sent.call, f"{call.sent.upstream}: {call.sent.key} is {told.value!r}")


def unchanged(story: Story, _: int) -> Iterator[Finding]:
    """A new control plane changes nothing of what a data plane has, and takes nothing away."""
    for one in story.kept:
        for name in sorted(one.before.keys() | one.after.keys()):
            if one.before.get(name) != one.after.get(name):
                what = f"{name} was {one.before.get(name)}, and is {one.after.get(name)}"
                yield Finding("unchanged", 0, what)


def recovered(story: Story, _: int) -> Iterator[Finding]:
    """After a fault that has an end each upstream that it hit is served again, and was asked."""
    last: dict[str, int] = defaultdict(int)
    for call, _told in _heard(story):
        last[call.sent.upstream] = max(last[call.sent.upstream], call.sent.at)
    for fault in story.faults:
        for name in fault.upstreams:
            if fault.end and last[name] < fault.begin:
                yield Finding("recovered", 0, f"{name} did not answer any more after: {fault.kind}")


def _heard(story: Story) -> Iterator[tuple[Call, Told]]:
    """Calls that were answered."""
    for call in story.calls:
        if call.told is not None and not call.told.failure:
            yield call, call.told


CHECKS: tuple[Callable[[Story, int], Iterator[Finding]], ...] = (
    served,
    answered,
    right_server,
    own_value,
    unchanged,
    recovered,
)


def check(story: Story, slack_ns: int) -> list[Finding]:
    """Every rule that was broken."""
    return [finding for one in CHECKS for finding in one(story, slack_ns)]
