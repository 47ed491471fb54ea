"""Power loss, applied to a recording of what a server did to its files (power.c): only what was synced is sure to be
there, and of the rest a part that a seed chooses: none, all, the first so many writes with the last of them torn, or
any sectors of any of them. Names are lost alike: a new file may vanish while its directory is not synced.

The recording is in the order in which things took effect, so that power may be lost at every point of it. What a
caller had been told by then is known from the length that the recording had when the answer was there.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

HEAD = struct.Struct("=IIQQQQ")
SECTOR, PAGE = 512, 4096
SOURCE = Path(__file__).with_name("power.c")


def compiled(where: Path) -> Path:
    """The library to preload; skips where there is no compiler."""
    made = where / "power.so"
    try:
        subprocess.run(
            ["cc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl", "-lpthread"], check=True
        )
    except FileNotFoundError:
        pytest.skip("needs a C compiler: apt-get install build-essential")
    return made


class Record(NamedTuple):
    """One thing that was done: C created, W wrote, T truncated, S synced, R renamed, U unlinked; M made, D synced a
    directory."""

    end: int
    """How long the recording was with it."""
    op: str
    path: str
    inode: int
    offset: int
    size: int
    data: bytes


def records(log: Path) -> Iterator[Record]:
    """What was recorded; a last record that is not whole is left out."""
    with log.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        at = 0
        while at + HEAD.size <= len(view):
            op, path_length, inode, offset, size, data_length = HEAD.unpack_from(view, at)
            begin = at + HEAD.size
            end = begin + path_length + data_length
            if end > len(view):
                return
            path = view[begin : begin + path_length].decode()
            yield Record(end, chr(op), path, inode, offset, size, view[begin + path_length : end])
            at = end


class Change(NamedTuple):
    """A write, or with `data` None a truncation to `offset`."""

    offset: int
    data: bytes | None

    def apply(self, content: bytearray) -> None:
        if self.data is None:
            del content[self.offset :]
            content.extend(bytes(self.offset - len(content)))
            return
        content.extend(bytes(max(0, self.offset - len(content))))
        content[self.offset : self.offset + len(self.data)] = self.data


@dataclass
class File:
    """What is surely on disk, and what was changed since."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)

    def sync(self) -> None:
        for change in self.pending:
            change.apply(self.durable)
        self.pending.clear()

    def after(self, chance: random.Random) -> bytes:
        """The content after the power was lost."""
        content = bytearray(self.durable)
        for change in _surviving(self.pending, chance):
            change.apply(content)
        return bytes(content)


def _surviving(pending: list[Change], chance: random.Random) -> Iterable[Change]:
    fate = chance.choice(["none", "all", "torn", "torn", "sectors", "sectors"])
    if fate in ("none", "all") or not pending:
        return pending if fate == "all" else ()
    if fate == "torn":
        count = chance.randrange(len(pending))
        return [*pending[:count], *_torn(pending[count], chance)]
    grain, share = chance.choice([SECTOR, PAGE]), chance.random()
    pieces = (piece for change in pending for piece in _pieces(change, grain))
    return [piece for piece in pieces if chance.random() < share]


def _torn(change: Change, chance: random.Random) -> list[Change]:
    """The first sectors of a write."""
    if change.data is None:
        return []
    pieces = list(_pieces(change, SECTOR))
    return pieces[: chance.randrange(len(pieces) + 1)]


def _pieces(change: Change, grain: int) -> Iterator[Change]:
    """A write, cut where sectors of the disk end."""
    if change.data is None:
        yield change
        return
    at = 0
    while at < len(change.data):
        end = min(len(change.data), at + grain - (change.offset + at) % grain)
        yield Change(change.offset + at, change.data[at:end])
        at = end


class Name(NamedTuple):
    """A change of a directory: the name now means this file, a directory (True) or nothing (None)."""

    path: str
    means: File | bool | None


class Disk:
    """A disk to which a recording happens."""

    def __init__(self) -> None:
        self._inodes: dict[int, File] = {}
        self._now: dict[str, File | bool] = {}
        self._durable: dict[str, File | bool] = {}
        self._pending: list[Name] = []

    def apply(self, record: Record) -> None:
        """Does what was recorded."""
        if record.op in "WT":
            change = Change(record.offset, record.data) if record.op == "W" else Change(record.size, None)
            self._inodes[record.inode].pending.append(change)
        elif record.op == "S":
            self._inodes[record.inode].sync()
        elif record.op == "D":
            self._sync_names(record.path)
        elif record.op == "R":
            if moved := self._now.get(record.path):  # a socket is not recorded
                self._name(record.data.decode(), moved)
                self._name(record.path, None)
        elif record.op == "C":
            self._inodes[record.inode] = File()
            self._name(record.path, self._inodes[record.inode])
        else:
            self._name(record.path, True if record.op == "M" else None)

    def _name(self, path: str, means: File | bool | None) -> None:  # noqa: FBT001 - see Name
        self._pending.append(Name(path, means))
        _set(self._now, Name(path, means))

    def _sync_names(self, directory: str) -> None:
        kept = []
        for name in self._pending:
            if os.path.dirname(name.path) == directory:  # noqa: PTH120 - often
                _set(self._durable, name)
            else:
                kept.append(name)
        self._pending = kept

    def lose_power(self, chance: random.Random) -> dict[str, bytes | None]:
        """What is there afterwards: files with their content, directories as None."""
        names = dict(self._durable)
        for name in self._surviving_names(chance):
            _set(names, name)
        left: dict[str, bytes | None] = {}
        for path, found in sorted(names.items()):
            parent = os.path.dirname(path)  # noqa: PTH120 - as above
            if parent in left or parent not in self._now:  # the root was there before
                left[path] = found.after(chance) if isinstance(found, File) else None
        return left

    def _surviving_names(self, chance: random.Random) -> Iterable[Name]:
        fate = chance.choice(["none", "all", "some", "some"])
        if fate in ("none", "all"):
            return self._pending if fate == "all" else ()
        return [name for name in self._pending if chance.random() < 0.5]


def _set(names: dict[str, File | bool], name: Name) -> None:
    if name.means is None:
        names.pop(name.path, None)
    else:
        names[name.path] = name.means


def write_out(left: Mapping[str, bytes | None], root: str, where: Path) -> None:
    """Makes the directory as the power loss left it."""
    for path, content in left.items():
        target = where / os.path.relpath(path, root)
        if content is None:
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.write_bytes(content)
