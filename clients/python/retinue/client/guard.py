"""A child process of the runner that outlives it for a moment: kills what a dead runner leaves, and
removes its files.

    python guard.py DIRECTORY...

Reads `+PGID` and `-PGID` lines, and `!` to forget the groups that are no more. At the end of its input, however the
runner died, it kills the process groups that are left and removes the directories. It imports little and ignores the
signals of the terminal.
"""

import os
import shutil
import signal
import sys


def main(directories: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        if line[0] == "!":
            groups = {group for group in groups if _exists(group)}
        else:
            (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        _kill(group)
    for directory in directories:
        _remove(directory)


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
