"""Plays one campaign and prints its history table; exit code 1 if a rule was broken.

python -m support.faults [--engine sqlite] [--kills 10] [--tasks 4000] [--seed N]     with tests/ on PYTHONPATH
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from servers import ROOT

from support.faults.campaign import Campaign, Size
from support.faults.clients import build_go_worker
from support.faults.engines import ENGINES
from support.faults.report import save, summarised, table

_SHOWN = 20


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills things while they work, and checks the history.")
    parser.add_argument("--engine", choices=ENGINES, default="sqlite")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=4_000)
    parser.add_argument("--rate", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31))
    parser.add_argument("--keep", action="store_true", help="keep the history, and say where it is")
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    print(f"campaign: engine {flags.engine}, seed {flags.seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="retinue-faults-"))
    began = time.monotonic()
    size = Size(flags.kills, flags.tasks, flags.rate)
    worker = build_go_worker(directory)
    with (
        ENGINES[flags.engine](directory) as engine,
        Campaign(directory, engine, flags.seed, worker, size) as campaign,
    ):
        campaign.run()
        campaign.settle()
        story = campaign.story()
    faults = {str(kind): count for kind, count in campaign.faults.items()}
    report, findings = summarised(story, engine.name, flags.seed, time.monotonic() - began, faults)
    print(table(report))
    print(f"saved as {save(report, ROOT / '.retinue/faults').relative_to(ROOT)}")
    for finding in findings[:_SHOWN]:
        print(*finding)
    if findings:
        print(f"{len(findings)} findings")
    if findings or flags.keep:
        print(f"the history is in {directory}")
    else:
        shutil.rmtree(directory)
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
