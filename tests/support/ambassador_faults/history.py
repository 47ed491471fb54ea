"""The lines of a history of the ambassador; all stamps are nanoseconds of the one kernel's boot clock.

Callers write `Sent` before they ask and `Told` when they have an answer, or know that none will come. Whoever changes
something writes `Served` once the change has been acknowledged, and whoever disturbs writes `Fault` when it is over.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct


class Sent(Struct, frozen=True, omit_defaults=True, tag="sent"):
    """A caller asks."""

    at: int
    call: int
    """Its number."""
    upstream: str
    connection: str = ""
    """The name of one that stays open; empty = a new one, for this call alone."""
    pinned: bool = False
    """The connection goes to one server as long as it lives: raw TCP."""
    key: str = ""
    """Whose value it asks for."""


class Told(Struct, frozen=True, omit_defaults=True, tag="told"):
    """It has an answer, or knows that there is none."""

    at: int
    call: int
    failure: str = ""
    """Why it failed; empty = it did not."""
    refused: bool = False
    """Nobody accepted its connection: nothing of it has been taken."""
    server: str = ""
    """Who answered, where that is known."""
    value: str = ""
    """Of the key; empty = there was none."""


class Served(Struct, frozen=True, tag="served"):
    """These servers serve an upstream: some from `begin` on, when that was asked for, and none but these from `end`."""

    begin: int
    end: int
    upstream: str
    servers: tuple[str, ...]


class Fault(Struct, frozen=True, omit_defaults=True, tag="fault"):
    """What was done, and to whom; calls to no other upstream may fail because of it."""

    kind: str
    begin: int
    upstreams: tuple[str, ...] = ()
    """Whose calls may fail; empty = nobody's."""
    end: int = 0
    """From when on they may not fail any more; 0 = it goes on to the end."""
    spares: bool = False
    """Calls that were under way when it began may not fail either, and later ones only by being refused."""


class Kept(Struct, frozen=True, tag="kept"):
    """What a data plane had before its control plane went, and when the next one had declared the same."""

    at: int
    before: dict[str, str]
    after: dict[str, str]


Event = Sent | Told | Served | Fault | Kept
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Event).decode


class Recorder:
    """Appends events to a file; each is handed to the kernel before the method returns."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, event: Event) -> None:
        os.write(self._file, _encode(event) + b"\n")

    def close(self) -> None:
        os.close(self._file)


class Call(NamedTuple):
    """A question and what came of it."""

    sent: Sent
    told: Told | None


class Story:
    """A history, put together."""

    def __init__(self, events: Iterable[Event], read_at: int) -> None:
        """`read_at` is when it was read: what had not happened by then had not happened."""
        kinds: dict[type[Event], list[Event]] = defaultdict(list)
        for event in events:
            kinds[type(event)].append(event)
        self.read_at = read_at
        told: dict[int, Told] = {one.call: one for one in kinds[Told]}  # type: ignore[union-attr,misc] # of that kind
        self.calls = [Call(one, told.get(one.call)) for one in kinds[Sent]]  # type: ignore[union-attr,arg-type]
        self.faults: list[Fault] = kinds[Fault]  # type: ignore[assignment]
        self.kept: list[Kept] = kinds[Kept]  # type: ignore[assignment]
        self._served: list[Served] = kinds[Served]  # type: ignore[assignment]

    @cached_property
    def served(self) -> Mapping[str, list[Served]]:
        """By upstream, in their order."""
        found: dict[str, list[Served]] = defaultdict(list)
        for one in sorted(self._served, key=lambda one: one.begin):
            found[one.upstream].append(one)
        return found

    def servers(self, upstream: str, begin: int, end: int) -> set[str]:
        """Who may have served it at some time between."""
        changes = self.served.get(upstream, [])
        return {
            server for one, until in _spans(changes) if one.begin <= end and until >= begin for server in one.servers
        }

    def excused(self, call: Call) -> bool:
        """Whether it may fail because of a fault that hit its upstream."""
        return any(call.sent.upstream in fault.upstreams and self._hit(fault, call) for fault in self.faults)

    def _hit(self, fault: Fault, call: Call) -> bool:
        end, over = fault.end or self.read_at, call.told.at if call.told else self.read_at
        if fault.spares:
            return fault.begin <= call.sent.at <= end and call.told is not None and call.told.refused
        return call.sent.at <= end and over >= fault.begin


def _spans(changes: list[Served]) -> Iterator[tuple[Served, int]]:
    """Each with when it was over for certain."""
    for one, after in itertools.pairwise(changes):
        yield one, after.end
    for one in changes[-1:]:
        yield one, 1 << 63


def read(path: Path) -> list[Event]:
    """All events so far; half a line never happened."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [_decode(line) for line in whole.split(b"\n")] if whole else []
