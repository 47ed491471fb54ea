"""Installs the peers, pinned, into `.retinue/bench`: what is there and matches its lock file is left alone."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import venv
from typing import TYPE_CHECKING

from bench.processes import HERE, HOME, Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def ensure(need: str) -> None:
    """Installs what a system needs: `python`, `node`, `go`, or a program of the machine. Raises Failure."""
    if need in _KINDS:
        lock, install = _KINDS[need]
        _once(need, HERE / lock, install)
    elif need and shutil.which(need) is None:
        raise Failure(f"{need} is not here: apt-get install {_PACKAGES.get(need, need)}")


def _once(name: str, lock: Path, install: Callable[[], None]) -> None:
    mark = HOME / f"{name}.installed"
    wanted = hashlib.sha256(lock.read_bytes()).hexdigest()
    if mark.exists() and mark.read_text() == wanted:
        return
    HOME.mkdir(parents=True, exist_ok=True)
    print(f"installing the peers that run on {name} (once) ...", flush=True)
    install()
    mark.write_text(wanted)


def _run(command: Sequence[str], where: Path, **environment: str) -> None:
    environ = dict(os.environ) | environment
    done = subprocess.run(command, cwd=where, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"cannot install: {(done.stderr or done.stdout).strip()[-300:]}")


def _python() -> None:
    where = HOME / "venv"
    venv.EnvBuilder(clear=True, with_pip=True).create(where)
    python = str(where / "bin" / "python")
    _run([python, "-m", "pip", "install", "-q", "--require-hashes", "-r", str(HERE / "peers.txt")], HOME)


def _node() -> None:
    if shutil.which("npm") is None:
        raise Failure("npm is not here: apt-get install npm")
    where = HOME / "node"
    where.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(HERE / "node" / name, where / name)
    # Not `npm ci`: it insists on packages for other platforms, which a registry may not have.
    _run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"], where)


def _go() -> None:
    if shutil.which("go") is None:
        raise Failure("go is not here")
    (HOME / "go").mkdir(parents=True, exist_ok=True)
    programs = ("./river", "./faktory_", "github.com/contribsys/faktory/cmd/faktory")
    _run(["go", "build", "-o", str(HOME / "go"), *programs], HERE / "go")


def _go_elections() -> None:
    if shutil.which("go") is None:
        raise Failure("go is not here")
    where = HOME / "go-elections"
    where.mkdir(parents=True, exist_ok=True)
    _run(["nice", "go", "build", "-trimpath", "-o", f"{where}/", "./etcd", "./clientgo"], HERE / "go" / "elections")


def _go_scatter() -> None:
    if shutil.which("go") is None:
        raise Failure("go is not here")
    where = HOME / "go-scatter"
    where.mkdir(parents=True, exist_ok=True)
    _run(["nice", "go", "build", "-trimpath", "-o", f"{where}/", "./leaf", "./load"], HERE / "go" / "scatter")


_KINDS: dict[str, tuple[str, Callable[[], None]]] = {
    "python": ("peers.txt", _python),
    "node": ("node/package-lock.json", _node),
    "go": ("go/go.sum", _go),
    "go-elections": ("go/elections/go.sum", _go_elections),
}
_PACKAGES = {"initdb": "postgresql"}
