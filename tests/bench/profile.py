"""`make bench-profile CELL=process`: where server and client spend their time while Retinue plays a cell.

py-spy samples the Python stacks that hold the GIL (folded files, which speedscope and flamegraph tools read), perf the
kernel, grpc and SQLite beneath, in a pass of its own. Of a queue that is burned down, filling it is not sampled.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bench import closed
from bench.cells import CELLS, Cell
from bench.entrants import Entrant, enter
from bench.processes import HOME, tree
from bench.systems import SYSTEMS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_SAMPLES_PER_SECOND = 250
_MOST = 28


class Samplers:
    """Samplers attached to processes, until stop()."""

    def __init__(self, command: Callable[[int, Path], list[str]], suffix: str) -> None:
        self._command, self._suffix = command, suffix
        self.files: dict[str, Path] = {}
        self._running: list[subprocess.Popen[bytes]] = []

    def attach(self, name: str, pid: int) -> None:
        where = HOME / "profile"
        where.mkdir(parents=True, exist_ok=True)
        self.files[name] = where / f"{name}.{self._suffix}"
        command = self._command(pid, self.files[name])
        self._running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def stop(self) -> None:
        for sampler in self._running:
            if sampler.poll() is None:
                sampler.send_signal(signal.SIGINT)
        for sampler in self._running:
            sampler.wait(60)


def python_stacks(pid: int, file: Path) -> list[str]:
    program = str(Path(sys.executable).parent / "py-spy")
    rate, forever = str(_SAMPLES_PER_SECOND), "600"
    how = ["--gil", "--nonblocking", "--function", "--format", "raw"]
    return [program, "record", "-p", str(pid), "-d", forever, "-r", rate, *how, "-o", str(file)]


def all_symbols(pid: int, file: Path) -> list[str]:
    rate = str(_SAMPLES_PER_SECOND)
    return [shutil.which("perf") or "perf", "record", "-e", "cpu-clock", "-F", rate, "-p", str(pid), "-o", str(file)]


@contextlib.contextmanager
def sampled(entrant: Entrant, samplers: Samplers, play: object) -> Iterator[None]:
    """Samples server and client while the cell is played; a worker and its server from its first second on."""
    roles = {"server": entrant.broker.server.pid, "producer": entrant.producer.pid}
    stop = threading.Event()
    watch = threading.Thread(target=_attach_worker, args=(roles, samplers, stop, play is closed.process))
    if play in (closed.process, closed.cycle):
        watch.start()
    else:
        _attach(roles, samplers)
    try:
        yield
    finally:
        stop.set()
        if watch.ident:
            watch.join()
        samplers.stop()


def _attach(roles: dict[str, int], samplers: Samplers) -> None:
    for name, pid in roles.items():
        samplers.attach(name, pid)


def _attach_worker(roles: dict[str, int], samplers: Samplers, stop: threading.Event, only_worker: bool) -> None:  # noqa: FBT001 - a thread's argument
    while not stop.wait(0.02):
        for pid in set(tree(os.getpid())) - set(roles.values()):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "work" in words and "-c" not in words:
                    time.sleep(0.35)  # past its imports
                    roles = {name: of for name, of in roles.items() if name != "producer" or not only_worker}
                    _attach(roles | {"worker": pid}, samplers)
                    return


def functions(lines: Iterable[str]) -> tuple[Counter[str], Counter[str], int]:
    """Samples by function, alone and with what it called, and all samples, of folded stacks."""
    alone: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        alone[frames[-1]] += int(count)
        for frame in set(frames):
            within[frame] += int(count)
    return alone, within, alone.total()


def show(name: str, file: Path) -> None:
    if not file.exists():
        return
    alone, within, total = functions(file.read_text().splitlines())
    print(f"\n{name}: {total} samples with the GIL, {total / _SAMPLES_PER_SECOND:.1f} s; {file}")
    print(f"  {'alone':>6}                                                                 {'with callees':>13}")
    rows = zip(alone.most_common(_MOST), within.most_common(_MOST), strict=False)
    for (own, count), (frame, whole) in rows:
        print(f"  {count / total:6.1%}  {own[:68]:68}  {whole / total:6.1%}  {frame[:80]}")


def show_symbols(name: str, file: Path) -> None:
    if not file.exists():
        return
    print(f"\n{name}, by object and symbol (perf); {file}")
    for keys, most in (("dso", 8), ("dso,symbol", 30)):
        command = ["perf", "report", "-i", str(file), "--stdio", "-q", "--sort", keys]
        report = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        lines = [line.rstrip() for line in report.splitlines() if line.strip() and not line.startswith("#")]
        print("\n".join(lines[:most]), end="\n\n")


def play(cell: Cell, tasks: int, samplers: Samplers, system: str) -> None:
    with ExitStack() as stack:
        entrant = enter(stack, SYSTEMS[system], "profile")
        with sampled(entrant, samplers, cell.play):
            figures = cell.play(entrant, tasks).figures
    print("  ".join(f"{key} {value:,.1f}" for key, value in figures.items()))


def main() -> int:
    p = argparse.ArgumentParser(prog="bench.profile")
    p.add_argument("cell", choices=list(CELLS))
    p.add_argument("--tasks", type=int)
    p.add_argument("--system", default="retinue", choices=list(SYSTEMS))
    flags = p.parse_args()
    cell = CELLS[flags.cell]
    tasks = flags.tasks or cell.count(SYSTEMS[flags.system], None)
    stacks = Samplers(python_stacks, "folded")
    play(cell, tasks, stacks, flags.system)
    for name, file in stacks.files.items():
        show(name, file)
    if shutil.which("perf"):
        symbols = Samplers(all_symbols, "perf")
        play(cell, tasks, symbols, flags.system)
        for name, file in symbols.files.items():
            show_symbols(name, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
