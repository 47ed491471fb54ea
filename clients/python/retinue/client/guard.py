"""A child process of the runner that outlives it for a moment: kills what a dead runner leaves, and
removes its files.

    python guard.py DIRECTORY...

Reads `+PGID` and `-PGID` lines, `!` to forget the groups that are no more, and `@SECONDS`: until when, on the boot
clock, the groups may live unless it is told a later time. At the end of its input, however the runner died, it kills
the process groups that are left and removes the directories. It imports little and ignores the signals of the terminal.
"""

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_LOOK = 0.25
"""How often to look at the boot clock: a wait stands still while the machine is suspended."""


def main(directories: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups = Groups()
    for line in _lines(groups.wait):
        groups.take(line)
    groups.kill()
    for directory in directories:
        _remove(directory)


class Groups:
    """The process groups that are alive, and until when they may be."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._until: float | None = None

    def take(self, line: str) -> None:
        if line[0] == "!":
            self._groups = {group for group in self._groups if _exists(group)}
        elif line[0] == "@":
            self._until = float(line[1:])
        else:
            (self._groups.add if line[0] == "+" else self._groups.discard)(int(line[1:]))

    def wait(self) -> float | None:
        """How long to wait for news; kills what has lived too long."""
        if self._until is None:
            return None
        left = self._until - time.clock_gettime(_CLOCK)
        if left <= 0:
            self.kill()
        return min(left, _LOOK) if left > 0 else _LOOK

    def kill(self) -> None:
        for group in self._groups:
            _kill(group)


def _lines(wait: Callable[[], float | None]) -> Iterator[str]:
    rest = b""
    while True:
        if not select.select([0], [], [], wait())[0]:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode() for line in lines)


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # gone already, or no longer what we knew


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(directory: str) -> None:
    for parent, _, _ in os.walk(directory):
        os.chmod(parent, 0o700)  # noqa: PTH101 - inputs are read-only, and pathlib is slow to load
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
