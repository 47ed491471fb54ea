"""What a run is told as: rows for a table of people."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from support.election_faults.checks import take_overs
from support.election_faults.history import Fault, Interval
from support.election_faults.trial import Trial

HEAD = "| engine | fault | played | on a leader | terms ended | take-over p50 | p99 |\n" + "| --- " * 7 + "|"


def rows(engine: str, terms: Sequence[Interval], faults: Sequence[Fault]) -> Iterator[str]:
    """A row a fault; see take_overs()."""
    took: dict[str, list[int]] = defaultdict(list)
    for kind, ns in take_overs(terms, faults):
        took[kind].append(ns)
    played, hit = Counter(f.kind for f in faults), Counter(f.kind for f in faults if f.token)
    for kind in sorted(played):
        some = took[kind]
        cells = (engine, kind, played[kind], hit[kind], len(some), percentile(some, 50), percentile(some, 99))
        yield "| " + " | ".join(map(str, cells)) + " |"


def percentile(ns: Sequence[int], of: int) -> str:
    """By nearest rank; of few it is the largest."""
    if not ns:
        return "-"
    ordered = sorted(ns)
    return f"{ordered[max(-(-len(ordered) * of // 100) - 1, 0)] / 1e6:,.0f} ms"


def total(engine: str, seed: int, seconds: float, trial: Trial) -> str:
    """One row for the whole run."""
    found = Counter(finding.check for finding in trial.findings())
    terms, writes = trial.terms(), trial.writes
    refused = sum(not write.accepted for write in writes)
    cells = (
        engine,
        seed,
        f"{seconds:.0f} s",
        len(trial.faults),
        len(terms) - 1,
        found["overlap"],
        found["token"],
        f"{len(writes):,}",
        refused,
        found["stale write"],
        found["undecided write"],
        found["stuck"],
    )
    return "| " + " | ".join(map(str, cells)) + " |"


TOTAL_HEAD = "| engine | fault | played | on a leader | terms ended | take-over p50 | p99 |\n" + "| --- " * 7 + "|"
