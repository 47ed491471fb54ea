"""`make demo DEMO=leaderelection`: three apps, each with a server at its side, and a register that the leader writes.

Whoever leads is killed, stopped, frozen, or loses its server. The register keeps the highest token that it has seen,
refuses lower ones, and shows who wrote when.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

from retinue.client.sync import run_leader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from retinue.client.election import Term

ELECTION = "register"
NAMES = ("ann", "ben", "cid")
LEASE, APP_LEASE = 3.0, 1.0
"""Short, for those who watch; 15 s and 2 s by default."""
STEP = 0.1
"""How long the app prepares each write, in seconds."""
WRITES = 8
"""How many writes each leader is granted, before something happens to it."""
PATIENCE = 30.0

console = Console()


# The register: what the leader works on


@dataclass
class Write:
    """One write that came, on the boot clock in seconds."""

    at: float
    app: str
    token: int
    accepted: bool


@dataclass
class Register:
    """Takes writes by a Unix socket, and refuses tokens below the highest it has seen: all that fencing asks for."""

    path: Path
    highest: int = 0
    writes: list[Write] = field(default_factory=list)
    news: threading.Condition = field(default_factory=threading.Condition)

    def open(self) -> None:
        """Begins to listen."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("r") as lines:
            for line in lines:
                self._take(**json.loads(line))

    def _take(self, app: str, token: int) -> None:
        with self.news:
            accepted = token >= self.highest
            self.highest = max(self.highest, token)
            self.writes.append(Write(now(), app, token, accepted))
            self.news.notify_all()

    def wait(self, what: str, *, above: int = -1, stale: int = -1) -> Write:
        """The first write that was accepted under a token above, or refused under one that is stale."""

        def found() -> Iterator[Write]:
            for write in self.writes:
                if (write.token > above >= 0) if write.accepted else write.token == stale:
                    yield write

        self._await(lambda: any(found()), what)
        return next(found())

    def wait_for_writes(self, token: int, count: int) -> None:
        """Returns when so many were accepted under a token."""
        self._await(lambda: sum(w.accepted and w.token == token for w in self.writes) >= count, "the leader writes")

    def _await(self, claim: Callable[[], bool], what: str) -> None:
        with self.news:
            if not self.news.wait_for(claim, PATIENCE):
                raise SystemExit(f"cannot see that {what}: look into {self.path.parent}")

    def last(self, token: int) -> Write:
        """The last write that was accepted under a token."""
        with self.news:
            return [write for write in self.writes if write.accepted and write.token == token][-1]


def now() -> float:
    """The boot clock, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# The app


def app(name: str, address: str, register: str) -> None:
    """One of the three: while it leads it writes to the register, ten times a second."""
    options = {"candidate_id": name, "address": address, "lease": LEASE, "app_lease": APP_LEASE}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(register)

        def work(term: Term) -> None:
            while True:
                term.check()  # raises when the leadership is over
                time.sleep(STEP)  # prepares a write; whoever is frozen here wakes up too late
                connection.sendall(json.dumps({"app": name, "token": term.token.value}).encode() + b"\n")

        run_leader(ELECTION, work, **options)


# The pods: an app and its server


class Pod:
    """An app and the server at its side, as processes."""

    def __init__(self, name: str, root: Path, store: Path, register: Path) -> None:
        self.name, self._root, self._register = name, root / name, register
        self._root.mkdir(parents=True)
        self._environment = {**os.environ, "RETINUE_LEADERELECTION__SQLITE__PATH": str(store)}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.start_server()
        self.start_app()

    def start_server(self) -> None:
        """As a kubelet starts the sidecar; again after it was killed."""
        where = ["--listen", self.address, "--data-dir", str(self._root / "data")]
        self.server = self._spawn("server", "-m", "retinue_server", "leaderelection", *where)

    def start_app(self) -> None:
        """Likewise the app."""
        self.app = self._spawn("app", __file__, self.name, self.address, str(self._register))

    def _spawn(self, log: str, *words: str) -> subprocess.Popen[bytes]:
        with (self._root / f"{log}.log").open("ab") as file:
            command = [sys.executable, *words]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self._environment)

    def stop(self) -> None:
        """The app first, then its server."""
        for process in (self.app, self.server):
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait()


# What is done to leaders


def kill_app(pod: Pod) -> None:
    """SIGKILL: the kernel frees the lock on its proof file."""
    pod.app.kill()
    pod.app.wait()


def stop_app(pod: Pod) -> None:
    """SIGTERM: it ends its work and resigns."""
    pod.app.terminate()
    pod.app.wait()


def freeze_app(pod: Pod) -> None:
    """SIGSTOP, as a page fault, a debugger or a suspended machine would."""
    pod.app.send_signal(signal.SIGSTOP)


def thaw_app(pod: Pod) -> None:
    """SIGCONT."""
    pod.app.send_signal(signal.SIGCONT)


def kill_server(pod: Pod) -> None:
    """SIGKILL to the server: the app cannot renew, and stops at its deadline."""
    pod.server.kill()
    pod.server.wait()


class Scene(NamedTuple):
    """What happens to a leader."""

    what: str
    decides: str
    """When the next one may lead."""
    strike: Callable[[Pod], None]
    mend: Callable[[Pod], None]
    wakes: bool = False
    """It lives on, and writes too late."""


STORY = (
    Scene("app is killed", "the lock on its proof file is free", kill_app, Pod.start_app),
    Scene("app is stopped", "it resigned", stop_app, Pod.start_app),
    Scene("app is frozen", f"the app's lease of {APP_LEASE:g} s ran out", freeze_app, thaw_app, wakes=True),
    Scene("server is killed", f"the engine's lease of {LEASE:g} s ran out", kill_server, Pod.start_server),
)


def main() -> int:
    """Runs the demo; 0 if no two led at once and no stale write was taken."""
    root = Path(".retinue/demo-leaderelection").absolute()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    register = Register(Path(os.path.relpath(root / "register.sock")))
    register.open()
    pods = {name: Pod(name, root, root / "elections.db", register.path) for name in NAMES}
    try:
        console.print(f"three apps ({', '.join(NAMES)}), each with a server beside it, all on one SQLite file")
        writes = play(register, pods)
    finally:
        for pod in pods.values():
            pod.stop()
    return report(writes)


def play(register: Register, pods: dict[str, Pod]) -> list[Write]:
    """Strikes each leader in turn, and tells who came next; all writes until then."""
    first = register.wait("anybody writes", above=0)
    console.print(f"{first.app} leads under token {first.token}")
    token = first.token
    for scene in STORY:
        leader = register.last(token).app
        register.wait_for_writes(token, WRITES)
        struck = now()
        scene.strike(pods[leader])
        after = register.wait(f"another writes after the {scene.what}", above=token)
        console.print(
            f"{leader}'s {scene.what:16} -> {after.app} writes {after.at - struck:4.2f} s later, token {after.token}"
            f"   ({scene.decides})",
            soft_wrap=True,
        )
        scene.mend(pods[leader])
        if scene.wakes:
            late = register.wait("it wakes up and writes", stale=token)
            console.print(f"{late.app} wakes up and writes under token {late.token}: [bold]refused[/bold]")
        token = after.token
    register.wait_for_writes(token, WRITES)
    return list(register.writes)


class Turn(NamedTuple):
    """A term, as the register saw it."""

    token: int
    app: str
    writes: int
    first: float
    last: float


def turns(writes: list[Write]) -> Iterator[Turn]:
    """Who wrote under which token: how often, from when to when."""
    for token in sorted({write.token for write in writes if write.accepted}):
        own = [write for write in writes if write.token == token and write.accepted]
        yield Turn(token, own[0].app, len(own), own[0].at, own[-1].at)


def report(writes: list[Write]) -> int:
    """What the register saw."""
    found = list(turns(writes))
    table = Table(title="what the register saw")
    for column in ("token", "app", "writes", "first", "last"):
        table.add_column(column, justify="left" if column == "app" else "right")
    zero = found[0].first
    for turn in found:
        times = [f"{at - zero:.2f} s" for at in (turn.first, turn.last)]
        table.add_row(str(turn.token), turn.app, str(turn.writes), *times)
    console.print(table)
    refused = sum(not write.accepted for write in writes)
    overlaps = sum(before.last > after.first for before, after in pairwise(found))
    console.print(f"{len(found)} terms; overlaps: {overlaps}; stale writes refused: {refused}")
    return 1 if overlaps or not refused else 0


if __name__ == "__main__":
    if sys.argv[1:]:
        app(*sys.argv[1:])
    else:
        sys.exit(main())
