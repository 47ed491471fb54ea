"""Plays one run and prints its table rows; exit code 1 if a rule was broken.

python -m support.election_faults --engine etcd [--transitions 200] [--seconds 0] [--seed N]

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
from pathlib import Path

from support.election_faults.engines import ENGINES
from support.election_faults.report import HEAD, TOTAL_HEAD, rows, total
from support.election_faults.trial import Trial
from support.kubernetes.build import are_built

_SHOWN = 20


def main() -> int:
    parser = argparse.ArgumentParser(description="Disturbs three candidates of one election, and checks who led when.")
    parser.add_argument("--engine", choices=ENGINES, default="sqlite")
    parser.add_argument("--transitions", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.0, help="at least so long")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31))
    parser.add_argument("--keep", action="store_true", help="keep logs and history, and say where they are")
    parser.add_argument("--list", action="store_true", help="only say which engines can be tried here")
    flags = parser.parse_args()
    if flags.list:
        print(*(name for name in ENGINES if name != "kubernetes" or are_built()))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    print(f"election: engine {flags.engine}, seed {flags.seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="retinue-elections-"))
    began = time.monotonic()
    with ENGINES[flags.engine](directory) as engine, Trial(directory, engine, flags.seed) as trial:
        try:
            trial.run(flags.transitions, flags.seconds)
        finally:
            findings = trial.findings()
            print(HEAD, *rows(flags.engine, trial.terms(), trial.faults), sep="\n")
            print(TOTAL_HEAD, total(flags.engine, flags.seed, time.monotonic() - began, trial), sep="\n")
            print(*(f"{check}: {what}" for check, what in findings[:_SHOWN]), sep="\n", flush=True)
    if findings or flags.keep:
        print(f"the history is in {directory}")
    else:
        shutil.rmtree(directory)
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
