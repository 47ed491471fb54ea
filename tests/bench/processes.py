"""Processes that are measured: started on a core, read from /proc, ended by their id."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import selectors
import signal
import struct
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
HOME = ROOT / ".retinue" / "bench"
"""Where peers are installed and servers keep their data; nothing of it is committed."""

SERVER_CORE, LOAD_CORE = "0", "1"
_TICKS = os.sysconf("SC_CLK_TCK")
_END = 15.0


class Failure(Exception):
    """What voids a cell: the message goes into the table."""


@dataclass(frozen=True)
class Usage:
    """What a process tree has used since it started; differences are what counts."""

    cpu_seconds: float
    bytes_written: int
    fsyncs: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.cpu_seconds + other.cpu_seconds,
            self.bytes_written + other.bytes_written,
            self.fsyncs + other.fsyncs,
        )

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.cpu_seconds - other.cpu_seconds,
            self.bytes_written - other.bytes_written,
            self.fsyncs - other.fsyncs,
        )


def pinned(core: str, command: Sequence[str]) -> list[str]:
    """The command on one core; with fewer than two cores nothing is pinned."""
    return ["taskset", "-c", core, *command] if (os.cpu_count() or 1) > 1 and core else list(command)


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                found += tree(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """User + system time of a process, its threads, and of the children it has reaped."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS
    return 0.0


def threads_cpu_seconds(pid: int) -> float:
    """What the living threads of a process have used, to the nanosecond where the kernel tells."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(thread.read_text().split()[0])
    return total / 1e9 or cpu_seconds(pid)


def bytes_written(pid: int) -> int:
    """Bytes the process caused to be written to disk, with those of reaped children."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/io").read_text().split("\n")
        return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))
    return 0


def peak_rss_mib(pid: int) -> float:
    """The sum of the peaks of a process tree; shared pages count in each."""
    return sum(_status_mib(member, "VmHWM") for member in tree(pid))


def rss_mib(pid: int) -> float:
    """What a process tree has in memory now."""
    return sum(_status_mib(member, "VmRSS") for member in tree(pid))


def _status_mib(pid: int, key: str) -> float:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().split("\n")
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
    return 0.0


class Syncs:
    """The shared counter of `syncs.c`."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(8))
        path.chmod(0o666)
        self.environment = {"LD_PRELOAD": str(_shim()), "BENCH_SYNCS": str(path)}
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 8)

    @property
    def count(self) -> int:
        (found,) = struct.unpack("q", self._page[:8])
        return int(found)


def _shim() -> Path:
    built, source = HOME / "syncs.so", HERE / "syncs.c"
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(built), str(source), "-ldl"], check=True)
    return built


class Server:
    """A peer's server with its data in a directory of its own."""

    def __init__(self, command: Sequence[str], where: Path, *, user: str | None = None, **environment: str) -> None:
        self.syncs = Syncs(where / "syncs")
        self.log = where / "server.log"
        environ = clean_environment() | environment | self.syncs.environment
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                pinned(SERVER_CORE, command), cwd=where, env=environ, user=user, stdout=log, stderr=log
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def usage(self) -> Usage:
        members = tree(self.pid)
        return Usage(sum(map(cpu_seconds, members)), sum(map(bytes_written, members)), self.syncs.count)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END)
            return
        self.process.kill()
        self.process.wait(_END)


@contextmanager
def started(
    command: Sequence[str], where: Path, core: str, environment: Mapping[str, str], out: Any = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that ends with its block; what it says against itself is in `log`."""
    with (where / "log").open("wb") as log:
        process = subprocess.Popen(pinned(core, command), cwd=where, env=environment, stdout=out, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Adapter:
    """An adapter process; it speaks JSON lines."""

    def __init__(self, command: Sequence[str], where: Path, core: str = LOAD_CORE, **environment: str) -> None:
        self.log = where / "adapter.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                pinned(core, command),
                cwd=where,
                env=clean_environment() | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def _out(self) -> Any:
        return self.process.stdout

    def answer(self, patience: float) -> dict[str, Any]:
        """The next JSON line; lines that are none are the peer's chatter."""
        end = time.monotonic() + patience
        while True:
            line = self._line(end)
            if line.startswith(b"{"):
                found: dict[str, Any] = json.loads(line)
                if "error" in found:
                    raise Failure(str(found["error"])[:200])
                return found

    def _line(self, end: float) -> bytes:
        while b"\n" not in self._rest:
            if not self._selector.select(max(end - time.monotonic(), 0)):
                raise Failure(f"no answer in time; its log ends: {self._last_words()}")
            chunk = os.read(self._out.fileno(), 1 << 16)
            if not chunk:
                raise Failure(f"the adapter ended; its log ends: {self._last_words()}")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-300:].replace("\n", " ").replace("|", "/")

    def tell(self, text: str = "") -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(text.encode() + b"\n")
            self.process.stdin.flush()

    def ask(self, patience: float = 600.0, **command: Any) -> dict[str, Any]:
        self.tell(json.dumps(command))
        return self.answer(patience)

    def close(self) -> None:
        """Ends it and what it started."""
        members = tree(self.pid) if self.process.poll() is None else []
        for member in reversed(members):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        self.process.wait(_END)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def clean_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without what would lead servers and clients astray."""
    kept = os.environ if environ is None else environ
    strange = ("RETINUE_", "OTEL_", "TRACEPARENT", "PYTHONPATH", "MAKE", "MFLAGS", "PG")
    return {key: value for key, value in kept.items() if not key.startswith(strange)}
