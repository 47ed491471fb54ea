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
    elif need:
        program(need)


def program(name: str) -> str:
    """The path of a program of the machine, also where only root looks for it. Raises Failure."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if found is None:
        raise Failure(f"{name} is not here: apt-get install {_PACKAGES.get(name, name)}")
    return found


def _once(name: str, lock: Path, install: Callable[[], None]) -> None:
    mark = HOME / f"{name}.installed"
    files = sorted(lock.rglob("*.*")) if lock.is_dir() else [lock]  # programs of our own change without their lock file
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
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


def _node(name: str, lock: str) -> Callable[[], None]:
    def install() -> None:
        if shutil.which("npm") is None:
            raise Failure("npm is not here: apt-get install npm")
        where = HOME / name
        where.mkdir(parents=True, exist_ok=True)
        for file in ("package.json", "package-lock.json", ".npmrc"):
            shutil.copy((HERE / lock).with_name(file), where / file)
        # Not `npm ci`: it insists on packages for other platforms, which a registry may not have.
        _run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"], where)

    return install


def _go() -> None:
    if shutil.which("go") is None:
        raise Failure("go is not here")
    (HOME / "go").mkdir(parents=True, exist_ok=True)
    programs = ("./river", "./faktory_", "github.com/contribsys/faktory/cmd/faktory")
    _run(["go", "build", "-o", str(HOME / "go"), *programs], HERE / "go")


def _go_programs(name: str, tree: str, *programs: str) -> Callable[[], None]:
    def build() -> None:
        if shutil.which("go") is None:
            raise Failure("go is not here")
        where = HOME / name
        where.mkdir(parents=True, exist_ok=True)
        _run(["nice", "go", "build", "-trimpath", "-o", f"{where}/", *programs], HERE / "go" / tree)

    return build


_KINDS: dict[str, tuple[str, Callable[[], None]]] = {
    "python": ("peers.txt", _python),
    "node": ("node/package-lock.json", _node("node", "node/package-lock.json")),
    "node-scatter": ("node/scatter/package-lock.json", _node("node-scatter", "node/scatter/package-lock.json")),
    "go": ("go/go.sum", _go),
    "go-elections": ("go/elections/go.sum", _go_programs("go-elections", "elections", "./etcd", "./clientgo")),
    "go-ambassador": ("go/ambassador", _go_programs("go-ambassador", "ambassador", "./load", "./backend")),
    "go-scatter": ("go/scatter", _go_programs("go-scatter", "scatter", "./leaf", "./load")),
}
_PACKAGES = {"initdb": "postgresql", "redis-benchmark": "redis-tools"}
