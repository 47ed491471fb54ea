"""The goals, and whether results meet them. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.figures import Spread, ratio, spread

if TYPE_CHECKING:
    from bench.results import Results


@dataclass(frozen=True)
class Goal:
    """`figure` of `system` in `cell`, as a ratio to what `against` had in the same rounds if that is given."""

    what: str
    cell: str
    bound: float
    against: str = ""
    figure: str = "rate"
    system: str = "retinue"
    at_most: bool = False
    unit: str = ""

    @property
    def text(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return f"{sign} {self.bound:g}× {self.against}" if self.against else f"{sign} {self.bound:g} {self.unit}"


def _most(what: str, cell: str, bound: float, figure: str, unit: str) -> Goal:
    return Goal(what, cell, bound, figure=figure, at_most=True, unit=unit)


GOALS = (
    Goal("processing per worker process", "process", 2, "bullmq"),
    Goal("processing per worker process", "process", 25, "celery"),
    Goal("processing per worker process", "process", 3, "beanstalkd"),
    Goal("bulk enqueue, 100 per call", "enqueue_bulk", 3.5, "bullmq"),
    Goal("enqueue one by one, awaited", "enqueue_one", 1, "celery"),
    Goal("enqueue pipelined", "enqueue_pipelined", 3, "celery"),
    Goal("on PostgreSQL, of our SQLite", "postgres", 0.7, "retinue", system="retinue-postgres"),
    Goal("on PostgreSQL", "postgres", 20, "procrastinate", system="retinue-postgres"),
    Goal("on PostgreSQL", "postgres", 3, "river", system="retinue-postgres"),
    _most("open loop at 50 %, p99.9 of due to started", "open", 25, "p999_50", "ms"),
    Goal("lease rate with 1,000,000 waiting, of empty", "backlog", 0.8, figure="deep_share"),
    _most("restart after SIGKILL to the first lease", "restart", 1000, "restart_ms", "ms"),
    _most("idle server", "idle", 0.002, "idle_share", "cores"),
    _most("1,000 idle workers on streams", "idle", 0.05, "workers_share", "cores"),
    _most("1,000 idle workers on streams", "idle", 150, "workers_rss_mib", "MiB"),
    _most("server start", "start", 150, "start_ms", "ms"),
    _most("server memory after start", "start", 45, "rss_mib", "MiB"),
    Goal("CPU per task with metrics read", "observed", 1.03, "retinue", "cpu_us", "retinue-metrics", at_most=True),
    Goal("CPU per task, unsampled tracing", "observed", 1.05, "retinue", "cpu_us", "retinue-tracing", at_most=True),
)


def outcome(goal: Goal, results: Results) -> tuple[Spread | None, str]:
    """What was measured, and `met`, `missed by ...`, or why it is not known."""
    cell = results.cells.get(goal.cell)
    ours = cell.systems.get(goal.system) if cell else None
    theirs = cell.systems.get(goal.against) if cell and goal.against else None
    if ours is None or (goal.against and theirs is None):
        return None, "not played"
    if void := ours.void or (theirs.void if theirs else ""):
        return None, f"void: {void}"
    found = ours.values(goal.figure)
    measured = ratio(found, theirs.values(goal.figure)) if theirs else spread(found)
    return measured, judged(goal, measured.median)


def judged(goal: Goal, value: float) -> str:
    """By how much a goal is missed, in percent of it."""
    if (value <= goal.bound) if goal.at_most else (value >= goal.bound):
        return "met"
    return f"**missed** by {abs(value - goal.bound) / goal.bound:.0%}"
