"""`make demo DEMO=ambassador`: an app has the docstrings of Python's library in a cache at localhost, which is sharded.

The app is an unmodified client of one server. Three real ones are behind its port, and a fourth joins while it goes
on. Where each key is, the servers themselves say. Where Envoy and Redis are, the same is shown of them.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from pymemcache.client.base import Client
from rich.console import Console
from rich.table import Table

from retinue.ambassador.v1 import upstream_pb2 as pb
from retinue.client import sync

AT_FIRST = 3
QUARTER = range(15, 36)
"""What percentage of the keys may move when a fourth shard joins."""
PATIENCE_S = 150.0
LIBRARY = Path(sysconfig.get_path("stdlib"))
PACKAGES = "asyncio collections concurrent email html http importlib json logging multiprocessing unittest urllib xml"

console = Console(highlight=False)


def main() -> int:
    """Runs the demo; 0 if the app saw no error, and the keys moved that had to."""
    if shutil.which("memcached") is None:
        raise SystemExit("cannot show it: memcached is missing; apt-get install memcached, or brew install memcached")
    root = Path(".retinue/demo-ambassador").absolute()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    documents = docstrings()
    size = sum(map(len, documents.values())) / 1e6
    console.print(f"{len(documents):,} docstrings of Python's library ({size:.1f} MB)")
    with Ambassador(root) as ambassador:
        stories = [Story(Memcached(), ambassador, documents)]
        if missing := ambassador.lacks_for_redis():
            console.print(f"Redis is left out: {missing}", markup=False)
        else:
            stories.append(Story(Redis(), ambassador, documents))
        ends = [story.told() for story in stories]
    return 0 if all(ends) else 1


def docstrings() -> dict[str, bytes]:
    """The first paragraph of each, by the name of what it is about."""
    found: dict[str, bytes] = {}
    places = [LIBRARY.glob("*.py"), *((LIBRARY / name).rglob("*.py") for name in PACKAGES.split())]
    for path in sorted(path for place in places for path in place):
        module = ".".join(path.relative_to(LIBRARY).with_suffix("").parts)
        _collect(ast.parse(path.read_bytes()), module, found)
    return found


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _collect(node: _Documented, name: str, found: dict[str, bytes]) -> None:
    paragraph, _, _ = (ast.get_docstring(node) or "").partition("\n\n")
    if paragraph.strip():
        found[name] = " ".join(paragraph.split()).encode()
    for child in node.body:
        if isinstance(child, _Documented):
            _collect(child, f"{name}.{child.name}", found)


# The processes


def free_port() -> int:
    """A port of loopback that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


def await_true(claim: Callable[[], bool], what: str) -> None:
    """Asks until it holds."""
    end = time.monotonic() + PATIENCE_S
    while not claim():
        if time.monotonic() > end:
            raise SystemExit(f"cannot see that {what}")
        time.sleep(0.02)


def accepts(port: int) -> bool:
    """Whether somebody does."""
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


class Ambassador:
    """The server, and what its operator does; a context, which also ends what was started in it."""

    def __init__(self, root: Path) -> None:
        self._stack, self._log = ExitStack(), root / "server.log"
        self._words = ["ambassador", "--listen", "127.0.0.1:0", "--http", "none", "--data-dir", str(root / "data")]

    def __enter__(self) -> Self:
        # What stands behind it is on loopback, too, which is forbidden otherwise.
        env = {**os.environ, "RETINUE_AMBASSADOR__ENDPOINTS__ALLOW": "127.0.0.1:1024-65535"}
        server = self.start([sys.executable, "-m", "retinue_server", *self._words], env)
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline() or "null")
        if ready is None:
            raise SystemExit(f"cannot start the ambassador: look into {self._log}")
        self.operator = self._stack.enter_context(sync.Ambassador(ready["control"]))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """A process that ends with us."""
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=env
            )

        def end() -> None:
            process.send_signal(signal.SIGTERM)
            process.wait()

        self._stack.callback(end)
        return process

    def lacks_for_redis(self) -> str:
        """What is not here; empty if all is."""
        spoken = {protocol for plane in self.operator.data_planes() for protocol in plane.protocols}
        if pb.PROTOCOL_REDIS not in spoken:
            return "no Envoy is in use; pip install 'retinue-server[envoy]'"
        absent = [name for name in ("redis-server", "redis-cli") if shutil.which(name) is None]
        return f"{' and '.join(absent)} missing; apt-get install redis-server" if absent else ""

    def declare(self, kind: Kind) -> int:
        """A port behind which nobody is yet; the port."""
        wanted = pb.Upstream(upstream_id=kind.name, protocol=kind.protocol, pushed=pb.PushedEndpoints())
        address = self.operator.declare(wanted, wait=60).status.address
        return int(address.rpartition(":")[2])

    def put_behind(self, kind: Kind, shards: Sequence[Shard]) -> None:
        """Returns when these serve it. Their names are hashed, not their addresses, so that they may move."""
        endpoints = [pb.Endpoint(address=f"127.0.0.1:{shard.port}", shard_name=shard.name) for shard in shards]
        generation = self.operator.set_endpoints(kind.name, endpoints).status.generation
        await_true(
            lambda: self.operator.get(kind.name).status.active_generation >= generation, f"{kind.name} is served"
        )


@dataclass
class Shard:
    """A real server."""

    name: str
    port: int


class App(Protocol):
    """An unmodified client of one server."""

    def get(self, key: str) -> bytes | None:
        """What is there; None for nothing."""

    def set(self, key: str, value: bytes) -> object:
        """Puts it there."""

    def close(self) -> None:
        """Ends its connection."""


class Kind(Protocol):
    """What memcached and Redis differ in."""

    name: str
    client: str
    protocol: pb.Protocol
    moves_only_to_the_new: bool

    def command(self, port: int) -> list[str]:
        """That of a server."""

    def connect(self, port: int) -> App:
        """A client."""

    def keys(self, port: int, known: Iterable[str]) -> set[str]:
        """Those that a server has, as it says itself."""


class Memcached:
    """See `Kind`."""

    name, client = "memcached", "pymemcache"
    protocol = pb.PROTOCOL_MEMCACHED
    moves_only_to_the_new = True
    """Ketama."""

    def command(self, port: int) -> list[str]:
        return ["memcached", "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", "nobody", "-t", "1"]

    def connect(self, port: int) -> App:
        client: App = Client(("127.0.0.1", port), connect_timeout=5, timeout=5, no_delay=True, default_noreply=False)
        return client

    def keys(self, port: int, known: Iterable[str]) -> set[str]:
        client = Client(("127.0.0.1", port))  # a dump of all would lack what is on the move between its lists
        try:
            return set(client.get_many(known))
        finally:
            client.close()


class Redis:
    """See `Kind`."""

    name, client = "redis", "redis-cli"
    protocol = pb.PROTOCOL_REDIS
    moves_only_to_the_new = False
    """Maglev: a few move between the others."""

    def command(self, port: int) -> list[str]:
        return ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]

    def connect(self, port: int) -> App:
        return RedisCli(port)

    def keys(self, port: int, known: Iterable[str]) -> set[str]:
        command = ["redis-cli", "-p", str(port), "--scan"]
        held = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return set(held) & set(known)


class RedisCli:
    """redis-cli, which reads commands and prints a line for each."""

    def __init__(self, port: int) -> None:
        command = ["redis-cli", "-p", str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def get(self, key: str) -> bytes | None:
        """An empty line is nothing: no value here is empty."""
        return self._said(b"GET %s" % key.encode()) or None

    def set(self, key: str, value: bytes) -> None:
        quoted = b"".join(b"\\x%02x" % byte if byte in b'"\\' else bytes([byte]) for byte in value)
        if (said := self._said(b'SET %s "%s"' % (key.encode(), quoted))) != b"OK":
            raise ValueError(said.decode())

    def _said(self, command: bytes) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ConnectionError("redis-cli ended")
        return line.rstrip(b"\n")

    def close(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


# The app


@dataclass
class Pass:
    """What came of asking for every key once."""

    missed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


class Traffic(threading.Thread):
    """An app that asks for every key, again and again; what is not there, it takes from the library and puts there."""

    def __init__(self, app: App, documents: Mapping[str, bytes]) -> None:
        super().__init__(daemon=True)
        self._app, self._documents = app, documents
        self._ended, self._changed = False, threading.Condition()
        self.passes: list[Pass] = []

    def run(self) -> None:
        """Until it is ended."""
        keys, draw = list(self._documents), random.Random(5)  # noqa: S311 - the same in each run
        while not self._ended:
            draw.shuffle(keys)
            current = Pass()
            for key in keys:
                self._ask(key, current)
            with self._changed:
                self.passes.append(current)
                self._changed.notify_all()

    def _ask(self, key: str, current: Pass) -> None:
        begun = time.perf_counter()
        try:
            found = self._app.get(key)
            if found is None:
                current.missed.append(key)
                self._app.set(key, self._documents[key])
            elif found != self._documents[key]:
                current.errors.append(f"{key} is {found!r}")
        except Exception as error:  # noqa: BLE001 - whatever a client raises, the app has seen an error
            current.errors.append(f"{key}: {error!r}")
        current.slowest_s = max(current.slowest_s, time.perf_counter() - begun)

    def await_passes(self, count: int) -> list[Pass]:
        """So many more, beside the one that is under way."""
        with self._changed:
            before = len(self.passes)
            if not self._changed.wait_for(lambda: len(self.passes) > before + count, PATIENCE_S):
                raise SystemExit("cannot go on: the app hangs")
            return self.passes[before:]

    def end(self) -> None:
        """After the pass that is under way."""
        self._ended = True
        self.join()


# The story


class Story:
    """Three shards, and then four."""

    def __init__(self, kind: Kind, ambassador: Ambassador, documents: Mapping[str, bytes]) -> None:
        self._kind, self._ambassador, self._documents = kind, ambassador, documents
        self._shards: list[Shard] = []

    def told(self) -> bool:
        """From the beginning to the end; whether it ended well."""
        port = self._ambassador.declare(self._kind)
        for _ in range(AT_FIRST):
            self._start_shard()
        self._ambassador.put_behind(self._kind, self._shards)
        app = self._kind.connect(port)
        traffic = Traffic(app, self._documents)
        begun = time.monotonic()
        traffic.start()
        first, second = traffic.await_passes(1)
        console.print(
            f"\n{self._kind.client} at 127.0.0.1:{port}, which is {AT_FIRST} × {self._kind.name}: "
            f"all loaded and read back in {time.monotonic() - begun:.1f} s",
            soft_wrap=True,
        )
        loaded = len(first.missed) == len(self._documents) and not second.missed
        before = self._held()
        self._start_shard()
        self._ambassador.put_behind(self._kind, self._shards)
        console.print(f"{self._shards[-1].name} joins while the app goes on")
        meanwhile = traffic.await_passes(2)
        traffic.end()
        app.close()
        return self._report(before, self._held(), meanwhile, [first, second]) and loaded

    def _start_shard(self) -> None:
        shard = Shard(f"shard-{len(self._shards) + 1}", free_port())
        self._ambassador.start(self._kind.command(shard.port))
        await_true(lambda: accepts(shard.port), f"{shard.name} of {self._kind.name} accepts")
        self._shards.append(shard)

    def _held(self) -> dict[str, set[str]]:
        """The keys that each shard has."""
        return {shard.name: self._kind.keys(shard.port, self._documents) for shard in self._shards}

    def _report(
        self, before: Mapping[str, set[str]], after: Mapping[str, set[str]], meanwhile: list[Pass], earlier: list[Pass]
    ) -> bool:
        """A shard keeps what it no longer is asked for: who got a key last has it now."""
        gained = {name: keys - before.get(name, set()) for name, keys in after.items()}
        moved = set().union(*gained.values())
        table = Table(title=f"{self._kind.name}: keys by shard")
        for column in ("", "before", "moved away", "came", "after"):
            table.add_column(column, justify="right" if column else "left")
        for name in after:
            had = before.get(name, set())
            left = had & moved
            numbers = (len(had), len(left), len(gained[name]), len(had) - len(left) + len(gained[name]))
            table.add_row(name, *(f"{number:,}" for number in numbers))
        console.print(table)
        new = self._shards[-1].name
        others = len(moved) - len(gained[new])
        percent = 100 * len(moved) / len(self._documents)
        beside = f", and {others} between the others" if others else f", all of them to {new}"
        console.print(f"{len(moved):,} of {len(self._documents):,} keys moved ({percent:.1f} %){beside}")
        errors = [error for one in [*earlier, *meanwhile] for error in one.errors]
        missed = [key for one in meanwhile for key in one.missed]
        slowest = max(one.slowest_s for one in meanwhile) * 1000
        color = "[red]" if errors else "[green]"
        console.print(
            f"{color}errors seen by {self._kind.client}: {len(errors)}[/]; misses: {len(missed):,}, each loaded again; "
            f"slowest call meanwhile {slowest:.0f} ms",
            soft_wrap=True,
        )
        for error in errors[:10]:
            console.print(error, markup=False)
        lost = sorted(set(missed) ^ moved) or meanwhile[-1].missed
        moved_as_they_must = round(percent) in QUARTER and (not others or not self._kind.moves_only_to_the_new)
        return not errors and not lost and moved_as_they_must


if __name__ == "__main__":
    sys.exit(main())
