"""What a campaign is told as: tables for people, a JSON file for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from support.ambassador_faults.campaign import Campaign
from support.ambassador_faults.checks import CHECKS, Finding
from support.ambassador_faults.history import Fault, Story
from support.ambassador_faults.schedule import Kind


def table(story: Story) -> Iterator[str]:
    """A row for each upstream: how many calls there were, and how many of them failed by faults of its own."""
    asked, failed = Counter[str](), Counter[str]()
    for call in story.calls:
        asked[call.sent.upstream] += 1
        failed[call.sent.upstream] += bool(call.told and call.told.failure)
    yield "| upstream | calls | failed by faults of its own |"
    yield "| --- | --- | --- |"
    for name in sorted(asked):
        yield f"| {name} | {asked[name]:,} | {failed[name]:,} |"


def totals(campaign: Campaign, story: Story, findings: Sequence[Finding], seconds: float) -> dict[str, int | float]:
    """The figures of a run; all that begin with `broken` must be 0."""
    broken = Counter(finding.check for finding in findings)
    away = sorted(outages(story))
    found: dict[str, int | float] = {
        "seconds": round(seconds, 1),
        "changes of endpoints and weights": sum(map(len, story.served.values())),
        "faults": campaign.faults.total(),
        "calls": len(story.calls),
        "connections that stayed": len({call.sent.connection for call in story.calls} - {""}),
    }
    if away:
        found |= {"Envoy away, ms, middle": round(median(away)), "Envoy away, ms, longest": round(away[-1])}
    return found | {f"broken: {name}": broken[name] for name in (*(one.__name__ for one in CHECKS), "log")}


def outages(story: Story) -> Iterator[float]:
    """For each kill of Envoy, the milliseconds until every upstream of its had answered a call that came later."""
    for fault in story.faults:
        if fault.kind == Kind.KILL_ENVOY:
            yield max(_outage(story, fault, name) for name in fault.upstreams) / 1e6


def _outage(story: Story, fault: Fault, upstream: str) -> int:
    return min(
        call.told.at - fault.begin
        for call in story.calls
        if call.sent.upstream == upstream and call.sent.at > fault.begin and call.told and not call.told.failure
    )


def save(figures: dict[str, int | float], name: str, directory: Path) -> Path:
    """As DIRECTORY/ambassador-NAME.json."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"ambassador-{name}.json"
    path.write_text(json.dumps(figures, indent=2))
    return path
