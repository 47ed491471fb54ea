"""What apps believed, what came to the register, and what was done to them; all stamps are nanoseconds of the one
kernel's boot clock."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from msgspec import Struct


class Belief(Struct, frozen=True):
    """A line of an app's file."""

    at: int
    who: str
    """The process; each has a name of its own."""
    kind: Literal["elected", "renewed", "done"]
    """It saw that it leads; its deadline moved; its work has stopped, and it does not act as the leader any more."""
    domain: str
    token: int
    until: int = 0
    """Its deadline as it knows it."""


class Write(Struct, frozen=True):
    """An effect that came to the register, in the order in which they came."""

    at: int
    who: str
    domain: str
    token: int
    decided: int
    """When the app looked whether it leads, and decided to write."""
    accepted: bool


class Fault(Struct, frozen=True):
    """What was done, from when to when."""

    kind: str
    begin: int
    end: int
    token: int = 0
    """Of the term that it hit; 0 = of none."""
    of_engine: bool = False
    """Meanwhile nobody can be elected."""


class Interval(NamedTuple):
    """A time in which a process took itself for the leader, and might act."""

    begin: int
    end: int
    who: str
    domain: str
    token: int


def intervals(beliefs: Iterable[Belief], deaths: Mapping[str, int]) -> list[Interval]:
    """From election to the last deadline, unless the work has stopped, or its process was killed, before; by their
    beginning. A process that is merely stopped goes on believing."""
    terms: dict[tuple[str, str, int], list[Belief]] = defaultdict(list)
    for belief in beliefs:
        terms[belief.who, belief.domain, belief.token].append(belief)
    found = []
    for (who, domain, token), told in terms.items():
        ends = [belief.at for belief in told if belief.kind == "done"]
        ends += [deaths[who]] if who in deaths else []
        end = min([max(belief.until for belief in told if belief.kind != "done"), *ends])
        found.append(Interval(min(belief.at for belief in told), end, who, domain, token))
    return sorted(found)


class Recorder:
    """Appends an app's beliefs to a file; each is handed to the kernel before the method returns, so that it outlives a
    SIGKILL. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._writing = threading.Lock()

    def note(self, belief: Belief) -> None:
        with self._writing:
            os.write(self._file, msgspec.json.encode(belief) + b"\n")


_decoder = msgspec.json.Decoder(Belief)


class Reader:
    """Reads what has been added to the files of a directory since it last looked."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = defaultdict(int)
        self.beliefs: list[Belief] = []

    def look(self) -> list[Belief]:
        """All beliefs so far; half a line is left for later."""
        for path in sorted(self._directory.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read[path])
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._read[path] += len(whole) + 1
                self.beliefs += map(_decoder.decode, whole.splitlines())
        return self.beliefs
