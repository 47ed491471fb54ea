"""Small file systems that a test may fill: mounted in its own directory, and unmounted whatever comes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MIB = 1024 * 1024
KINDS = ("tmpfs", "ext4")


def why_not(kind: str) -> str:
    """Why such a file system can't be mounted here; empty if it can."""
    if os.geteuid() != 0:
        return "mounts a small file system: run it as root"
    if kind == "ext4" and shutil.which("mkfs.ext4") is None:
        return "needs mkfs.ext4: apt-get install e2fsprogs"
    return ""


@contextmanager
def mounted(kind: str, at: Path, size_mib: int) -> Iterator[Path]:
    """A fresh file system of this size. Whoever uses it must be gone at the end."""
    at.mkdir()
    if kind == "tmpfs":
        _run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "retinue-test", at)
    else:
        image = at.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(size_mib * MIB)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", image)
        _run("mount", "-o", "loop", image, at)
    try:
        yield at
    finally:
        _run("umount", at)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


class Filler:
    """Another program's file on the disk, that grows and shrinks."""

    def __init__(self, disk: Path) -> None:
        self._path = disk / "filler"

    def leave(self, free_bytes: int) -> None:
        """Grows until no more than so much is free."""
        disk = os.statvfs(self._path.parent)
        room = disk.f_bavail * disk.f_frsize - free_bytes
        with self._path.open("ab") as file, suppress(OSError):
            while room > 0:
                file.write(bytes(min(room, MIB)))
                file.flush()
                room -= MIB

    def fill(self) -> None:
        """Takes the last byte, again and again, until there is none."""
        size = MIB
        with self._path.open("ab", buffering=0) as file:
            while size >= 1:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 16

    def empty(self) -> None:
        """Gives all of it back."""
        self._path.unlink(missing_ok=True)
