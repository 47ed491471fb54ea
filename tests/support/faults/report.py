"""What a run is told as: a table for people, a JSON file for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from support.history import Op, Verdict
from support.history.checks import Finding, check

if TYPE_CHECKING:
    from pathlib import Path

    from support.history import Story


class Report(Struct, frozen=True):
    """The figures of one run. `lost`, `double_completions` and `unexplained` must be 0, and `broken` empty."""

    engine: str
    seed: int
    seconds: float
    faults: dict[str, int]
    tasks: int
    """As they stood at the end, follow-ups included."""
    acknowledged: int
    """Of those that producers asked for."""
    lost: int
    completions: int
    """That were accepted."""
    double_completions: int
    executions: int
    second_executions: int
    unexplained: int
    follow_ups: int
    refused: int
    """Outcomes of leases that were over."""
    unknown: int
    """Calls whose answer was lost."""
    broken: dict[str, int]
    """Findings by check."""


def summarised(
    story: Story, engine: str, seed: int, seconds: float, faults: dict[str, int]
) -> tuple[Report, list[Finding]]:
    """A story as figures, and what the checks find."""
    findings = check(story)
    broken = Counter(finding.check for finding in findings)
    executions = sum(map(len, story.executions.values()))
    report = Report(
        engine=engine,
        seed=seed,
        seconds=round(seconds, 1),
        faults=faults,
        tasks=len(story.tasks),
        acknowledged=sum(any(s.verdict == Verdict.ACCEPTED for s in asked) for asked in story.enqueues.values()),
        lost=broken["lost"],
        completions=sum(map(len, map(story.accepted_completions, story.executions))),
        double_completions=broken["completed_once"],
        executions=executions,
        second_executions=executions - len(story.executions),
        unexplained=broken["explained"],
        follow_ups=sum(bool(record.parent) for record in story.tasks.values()),
        refused=sum(_refused(story)),
        unknown=sum(key not in story.replies or story.replies[key].outcome != "ok" for key in story.calls),
        broken=dict(broken),
    )
    return report, findings


def _refused(story: Story) -> Iterator[int]:
    for leases in story.executions.values():
        for lease in leases.values():
            yield sum(s.verdict == Verdict.REFUSED for s in lease.settlements if s.op != Op.EXTEND)


def table(report: Report) -> str:
    """For people."""
    rows = [("engine", report.engine), ("seed", str(report.seed)), ("seconds", str(report.seconds))]
    rows += [(f"fault: {kind}", f"{count:,}") for kind, count in sorted(report.faults.items())]
    figures = "tasks acknowledged lost completions double_completions executions second_executions unexplained"
    rows += [
        (name.replace("_", " "), f"{getattr(report, name):,}")
        for name in f"{figures} follow_ups refused unknown".split()
    ]
    rows += [(f"broken: {name}", f"{count:,}") for name, count in report.broken.items()]
    return "\n".join(f"  {name:24}{value:>12}" for name, value in rows)


def save(report: Report, directory: Path) -> Path:
    """As DIRECTORY/ENGINE-SEED.json."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{report.engine}-{report.seed}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    return path
