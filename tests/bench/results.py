"""What was played, as it is stored: JSON under `results/`, without host names and paths."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from bench.figures import percentile
from bench.processes import HERE, ROOT

REFERENCE = HERE / "results" / "reference.json"


class Played(msgspec.Struct):
    """What a system did in a cell: figures by name for each round, or why it counts for nothing."""

    tasks: int
    rounds: list[dict[str, float]] = []
    void: str = ""

    def values(self, figure: str) -> list[float]:
        """One per round; empty if the cell is void or has no such figure."""
        return [] if self.void else [row[figure] for row in self.rounds if figure in row]


class PlayedCell(msgspec.Struct):
    """A cell with all its systems, by name."""

    title: str
    pins: str
    systems: dict[str, Played]
    played: str = ""
    """When and how: commit, load average at the start, priority of the processes where it was raised."""


class Results(msgspec.Struct):
    """A run, or what several runs with the same command left; cells by name."""

    command: str = "make bench"
    machine: dict[str, str] = {}
    cells: dict[str, PlayedCell] = {}


def load(path: Path) -> Results:
    return msgspec.json.decode(path.read_bytes(), type=Results) if path.exists() else Results()


def store(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = _rounded(msgspec.to_builtins(results))
    path.write_bytes(msgspec.json.format(msgspec.json.encode(rounded), indent=1) + b"\n")


def _rounded(value: Any) -> Any:
    """Numbers to five significant digits: the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def machine() -> dict[str, str]:
    """What the figures depend on; no names of hosts or users."""
    return {
        "processor": f"{_line('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores",
        "memory": f"{int(_line('/proc/meminfo', 'MemTotal').split()[0]) / 1024**2:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "4 KiB write + fdatasync, µs p50 / p99": _disk(),
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
    }


def circumstances() -> str:
    """What differs from cell to cell; some are played again without the others."""
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    raised = f", nice {priority}" if priority else ""
    return f"commit {_commit()}, load average {os.getloadavg()[0]:.1f} at the start{raised}"


def _line(path: str, key: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "unknown")


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _disk() -> str:
    times = []
    with tempfile.TemporaryFile(dir=HERE) as file:
        for at in range(200):
            os.pwrite(file.fileno(), bytes(4096), at * 4096)
            start = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - start) * 1e6)
    return f"{percentile(times, 0.5):.0f} / {percentile(times, 0.99):.0f}"
