"""What a campaign is told as: a table for people, a JSON file for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.scatter_faults.campaign import Campaign, rows
from support.scatter_faults.checks import CHECKS, Finding
from support.scatter_faults.history import Story
from support.scatter_faults.pulse import NO_PROCESSOR

_COLUMNS = ("asked", "complete", "partial", "left", "hedges", "retries")


def table(story: Story) -> Iterator[str]:
    """A row for each pool and mode: how its requests ended."""
    yield "| pool, mode | " + " | ".join(_COLUMNS) + " | errors |"
    yield "| --- " * (len(_COLUMNS) + 2) + "|"
    for name, ends in rows(story):
        errors = "; ".join(f"{what} {count}" for what, count in sorted(ends.items()) if what not in _COLUMNS)
        yield f"| {name} | " + " | ".join(f"{ends[column]:,}" for column in _COLUMNS) + f" | {errors} |"


def totals(campaign: Campaign, story: Story, findings: Sequence[Finding], seconds: float) -> dict[str, int | float]:
    """The figures of a run; all that begin with `broken` must be 0."""
    ends: Counter[str] = Counter()
    for _, row in rows(story):
        ends.update(row)
    broken = Counter(finding.check for finding in findings)
    return {
        "seconds": round(seconds, 1),
        "of these without a processor": round(sum(_stalls(story)), 1),
        "faults": campaign.faults.total(),
        "requests": ends["asked"],
        **{name: ends[name] for name in ("complete", "partial", "left")},
        "errors": ends["asked"] - ends["complete"] - ends["partial"] - ends["left"],
        "calls that leaves got": len(story.calls),
        "of these cancelled": sum(call.gave is not None and call.gave.end == "cancelled" for call in story.calls),
        "hedges": ends["hedges"],
        "retries": ends["retries"],
        **{f"broken: {name}": broken[name] for name in (*(one.__name__ for one in CHECKS), "log")},
    }


def _stalls(story: Story) -> Iterator[float]:
    """Seconds in which the machine had no time for anybody, so that the checks on time were lenient."""
    for fault in story.faults:
        if fault.kind == NO_PROCESSOR:
            yield ((fault.end or story.read_at) - fault.begin) / 1e9


def save(figures: dict[str, int | float], seed: int, directory: Path) -> Path:
    """As DIRECTORY/scattergather-SEED.json."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"scattergather-{seed}.json"
    path.write_text(json.dumps(figures, indent=2))
    return path
