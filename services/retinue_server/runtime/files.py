"""Directories that survive power loss."""

from __future__ import annotations

import os
from pathlib import Path


def make_directory(path: Path, mode: int = 0o777) -> None:
    """Makes it, with its parents, where it is missing. Its name survives power loss: the parent is synced."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(mode, exist_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
