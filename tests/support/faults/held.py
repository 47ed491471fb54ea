"""Holds a transaction open on the database while coordinators work, and tells what that costs; exit code 1 if too much.

python -m support.faults.held [--seconds 60]     with tests/ on PYTHONPATH

Rows that a transaction may still see can't be cleared away: queues that mark every lease and completion in place slow
down with each. The load is paced, since the claim is that it is still carried.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

import psycopg

from support.faults.campaign import Campaign, Size
from support.faults.clients import build_go_worker
from support.faults.engines import postgres
from support.history.checks import check

GOAL = 0.9
_WARM_S = 10.0
_DEAD = "SELECT relname, n_live_tup, n_dead_tup FROM pg_stat_user_tables WHERE n_dead_tup > 0 ORDER BY 3 DESC"


def main() -> int:
    parser = argparse.ArgumentParser(description="Holds a transaction open under load.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=50.0, help="tasks a second of each of two producers")
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with tempfile.TemporaryDirectory(prefix="retinue-faults-") as where, postgres(Path(where)) as engine:
        url = engine.env["RETINUE_WORKQUEUE__POSTGRES__URL"]
        size = Size(0, 0, flags.rate)
        with Campaign(Path(where), engine, 1, build_go_worker(Path(where)), size) as campaign:
            time.sleep(_WARM_S)
            before = _rate(campaign, min(flags.seconds / 2, 60.0))
            with psycopg.connect(url) as held:
                held.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                held.execute("SELECT count(*) FROM pg_class")
                during = _rate(campaign, flags.seconds)
                _tell_dead(url, f"held for {flags.seconds:.0f} s")
            campaign.settle()
            findings = check(campaign.story())
        _tell_dead(url, "at the end")
    print(f"completions a second: {before:.1f} before, {during:.1f} while held: {during / before:.2f}, goal {GOAL}")
    print(*findings[:20], sep="\n")
    return during < GOAL * before or bool(findings)


def _rate(campaign: Campaign, seconds: float) -> float:
    """Completions a second over so long."""
    began, done = time.monotonic(), campaign.completed()
    time.sleep(seconds)
    return (campaign.completed() - done) / (time.monotonic() - began)


def _tell_dead(url: str, when: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_stat_force_next_flush()")
        rows = connection.execute(_DEAD).fetchall()
    print(f"{when}:", *(f"{table} {live:,} live {dead:,} dead;" for table, live, dead in rows))


if __name__ == "__main__":
    sys.exit(main())
