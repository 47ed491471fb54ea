"""Writes one process's part of a history."""

from __future__ import annotations

import itertools
import os
import threading
import time
from typing import TYPE_CHECKING

from support.history.records import Call, Event, Fault, Grant, Item, Leased, Op, Outcome, Reply, encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


def boot_ns() -> int:
    """Now on the clock of histories."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Recorder:
    """Appends lines to DIRECTORY/WHO.jsonl; each is handed to the kernel before the method returns, so that it
    outlives a SIGKILL. Threads may share it."""

    def __init__(self, directory: Path, who: str) -> None:
        self.who = who
        self._file = os.open(directory / f"{who}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._numbers = itertools.count(1)
        self._writing = threading.Lock()

    def call(self, op: Op, items: Iterable[Item] = (), stream: int = 0) -> int:
        """Before it is sent; the number of the call."""
        n = next(self._numbers)
        self._write(Call(boot_ns(), self.who, n, op, tuple(items), stream))
        return n

    def ok(self, n: int, refused: Mapping[int, str] | None = None) -> None:
        """The call was answered, or the stream came to an orderly end."""
        self._write(Reply(boot_ns(), self.who, n, Outcome.OK, dict(refused or {})))

    def unknown(self, n: int, reason: str) -> None:
        """The answer was lost or says nothing."""
        self._write(Reply(boot_ns(), self.who, n, Outcome.UNKNOWN, reason=reason))

    def leased(self, n: int, since: int, leases: Iterable[Grant]) -> None:
        """Leases came on the call or stream `n`, granted at `since` at the earliest."""
        self._write(Leased(boot_ns(), self.who, n, since, tuple(leases)))

    def fault(self, kind: str, target: str) -> None:
        """Something was done to a process or a connection."""
        self._write(Fault(boot_ns(), self.who, kind, target))

    def _write(self, event: Event) -> None:
        with self._writing:
            os.write(self._file, encode(event) + b"\n")
