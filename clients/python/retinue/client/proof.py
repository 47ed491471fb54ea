"""Proof of death: a file in a directory shared with the server, whose lock the kernel frees when we are all gone.

The descriptor is inherited by processes that are forked; a subprocess gets it by `pass_fds`. The lock is free only when
the last of them has ended, so that a child which still works for the leader keeps the election from passing on early.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path


class ProofFile:
    """A file with an exclusive lock that is held until close()."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError if the directory takes no file."""
        self.name = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._path = Path(directory) / self.name
        self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.set_inheritable(self.descriptor, True)  # noqa: FBT003 - takes no keyword

    def close(self) -> None:
        """Removes the file and lets go of the lock. Safe to repeat."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(descriptor)
