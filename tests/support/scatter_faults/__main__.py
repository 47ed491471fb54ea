"""Plays faults of scatter/gather at random, or each in each mode, and prints a table; exit code 1 if a rule was broken.

python -m support.scatter_faults [--seconds 60] [--seed N]     several faults at a time, by seed
python -m support.scatter_faults --table                       every fault in every mode

with tests/, services/ and clients/python/ on PYTHONPATH
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from servers import ROOT

from support.scatter_faults import matrix, report
from support.scatter_faults.campaign import Campaign
from support.scatter_faults.checks import Finding, check
from support.scatter_faults.leaves import build_go_leaf
from support.scatter_faults.scenes import DEADLINE_S

_SHOWN = 20


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m support.scatter_faults",
        description="Disturbs twelve shards of two replicas, and their root, while callers of every mode ask. Then it "
        "checks the history: what was merged, what coverage was said, when calls ended, and how many there were.",
        epilog="`make faults` plays it, too. A finding names its request; --keep keeps the history: a line an event.",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults are played (default 60)")
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().getrandbits(31), help="repeats the schedule of an earlier run"
    )
    parser.add_argument(
        "--table", action="store_true", help="play every fault in every mode instead, and print the cells"
    )
    parser.add_argument("--keep", action="store_true", help="keep logs and history, and say where they are")
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    directory = Path(tempfile.mkdtemp(prefix="retinue-scatters-"))
    findings = _play_table(directory) if flags.table else _play(directory, flags.seconds, flags.seed)
    for one in findings[:_SHOWN]:
        print(f"{one.check}: {one.request} {one.what}")
    if findings or flags.keep:
        print(f"the history is in {directory}")
    else:
        shutil.rmtree(directory)
    return bool(findings)


def _play_table(directory: Path) -> Sequence[Finding]:
    with matrix.Matrix(directory) as played:
        cells = played.play()
        print(*matrix.table(cells), sep="\n", flush=True)
        return check(played.stage.story(), int(DEADLINE_S * 1e9))


def _play(directory: Path, seconds: float, seed: int) -> Sequence[Finding]:
    print(f"scatter/gather: seed {seed}", flush=True)
    began = time.monotonic()
    with Campaign(directory, seed, _go_leaf(directory)) as campaign:
        campaign.run(seconds)
        story, findings = campaign.story(), campaign.findings()
        figures = report.totals(campaign, story, findings, time.monotonic() - began)
    print(*report.table(story), sep="\n")
    print(*(f"  {kind:40}{count:>8,}" for kind, count in sorted(campaign.faults.items())), sep="\n")
    print(*(f"  {name:40}{count:>8,}" for name, count in figures.items()), sep="\n")
    print(f"saved as {report.save(figures, seed, ROOT / '.retinue/faults').relative_to(ROOT)}", flush=True)
    return findings


def _go_leaf(directory: Path) -> Path | None:
    try:
        return build_go_leaf(directory)
    except LookupError as missing:
        print(f"all leaves are in Python, since one in Go {missing}")
        return None


if __name__ == "__main__":
    sys.exit(main())
