"""Builds kube-apiserver and etcd from the published modules that go.mod here pins, and keeps them in .retinue.

PYTHONPATH=tests python -m support.kubernetes.build    builds now: a quarter of an hour of CPU, 2 GiB of build cache
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]
_CACHE = _ROOT / ".retinue" / "kubernetes"
_PROGRAMS = {"etcd": "go.etcd.io/etcd/server/v3", "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver"}


def directory() -> Path:
    """Where both programs are kept, for these pins."""
    return _CACHE / hashlib.sha256((_HERE / "go.sum").read_bytes()).hexdigest()[:12]


def are_built() -> bool:
    """Whether both are there."""
    return all((directory() / program).exists() for program in _PROGRAMS)


def built() -> Path:
    """The directory with both programs; builds what is missing, one process at a time."""
    where = directory()
    where.mkdir(parents=True, exist_ok=True)
    with (where / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for program, package in _PROGRAMS.items():
            if not (where / program).exists():
                _build(package, where / program)
    return where


def _build(package: str, target: Path) -> None:
    """Into a file beside, so that there is never half a program."""
    beside = target.with_suffix(".new")
    command = ["nice", "-n", "19", "go", "build", "-trimpath", "-ldflags=-s -w", "-o", str(beside), package]
    environment = {**os.environ, "GOFLAGS": "-mod=readonly -buildvcs=false", "GOTOOLCHAIN": "local"}
    done = subprocess.run(command, cwd=_HERE, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"cannot build {package}: {done.stderr[-2000:]}"
    beside.rename(target)


if __name__ == "__main__":
    began = time.monotonic()
    sys.stdout.write(f"{built()} after {time.monotonic() - began:.0f} s\n")
