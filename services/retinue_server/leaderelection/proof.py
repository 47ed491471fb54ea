"""Proof of death: an exclusive flock(2) that the app's process holds as long as it lives.

The kernel frees it only when every process that inherited the descriptor is gone, so that a child which still works for
the leader keeps it held.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from retinue_server.runtime.errors import Violation

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Proofs:
    """The directory with the files; names are plain, so nothing outside it is ever opened."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def watch(self, name: str, found: list[Violation]) -> Callable[[], bool] | None:
        """Tells, when asked, whether the lock on a file is free; a file without a held lock is a violation."""
        if not name:
            return None
        is_dead = self._watched(name)
        if is_dead is None:
            found.append(Violation("start.proof_file", f"must be a file in {self.directory}"))
        elif is_dead():
            found.append(
                Violation("start.proof_file", "nobody holds its lock: take it with flock(2), exclusive, first")
            )
        return is_dead

    def _watched(self, name: str) -> Callable[[], bool] | None:
        path = self.directory / name
        if path.parent != self.directory:
            return None
        try:
            known = path.lstat()
        except OSError:
            return None

        def is_dead() -> bool:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:  # it was removed: no proof any more
                return False
            try:
                file = os.fstat(descriptor)
                if (file.st_dev, file.st_ino) != (known.st_dev, known.st_ino):
                    return False
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            else:
                return True
            finally:
                os.close(descriptor)

        return is_dead
