"""The lines of a history of scatter/gather; all stamps are nanoseconds of the one kernel's boot clock.

Callers write `Asked` before they send and `Told` when the call has ended for them, leaves `Got` when a call arrives and
`Gave` when it has ended for them, and whoever disturbs writes `Fault` when it is over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

OK = 0
LEFT = -1
"""The code of a caller that did not wait for the answer."""


class Asked(Struct, frozen=True, omit_defaults=True, tag="asked"):
    """A request is about to be sent."""

    at: int
    request: str
    """Its name, which leaves get as payload."""
    mode: str
    pool: str
    shards: dict[str, int]
    """The weights of those that are selected."""
    timeout_ns: int
    """The earlier of the caller's deadline and the pool's."""
    min_coverage: float = 1.0
    first_k: int = 0
    soft_ns: int = 0
    """The soft deadline; 0 = none."""


class Piece(Struct, frozen=True):
    """One reply that entered an answer."""

    shard: str
    serial: int
    """The leaf's number of the call that it answered; -1 for what no leaf says."""


class Known(Struct, frozen=True):
    """A coverage."""

    expected: int
    answered: int
    complete: bool


class Told(Struct, frozen=True, omit_defaults=True, tag="told"):
    """The call has ended for the caller."""

    at: int
    request: str
    code: int
    """LEFT, or the canonical code."""
    reason: str = ""
    pieces: tuple[Piece, ...] = ()
    """What the answer is the merge of."""
    coverage: Known | None = None
    """None where nothing was said."""
    failures: dict[str, int] = {}
    """The codes of shards that are missing."""
    failed_by_code: dict[str, int] = {}
    attempts: int = 0
    hedges: int = 0
    retries: int = 0


class Got(Struct, frozen=True, omit_defaults=True, tag="got"):
    """A call came to a leaf; `serial` is unique to it among all leaves."""

    at: int
    leaf: str
    serial: int
    request: str
    shard: str
    attempt: int
    left_ns: int
    """Until its deadline."""


class Gave(Struct, frozen=True, omit_defaults=True, tag="gave"):
    """A call has ended at a leaf."""

    at: int
    serial: int
    end: str
    """answered, part (it answered for half of the shard), corrupt, cancelled, or the code that it failed with."""


class Fault(Struct, frozen=True, omit_defaults=True, tag="fault"):
    """What was done, from when to when; `end` 0 = to the end."""

    kind: str
    begin: int
    end: int
    leaves: tuple[str, ...]
    """Those that it hit."""
    holds: bool = False
    """What is sent to them meanwhile, or from them, comes later; and what they did then is not known at once."""
    kills: bool = False
    """They ended without a word."""


class Ran(Struct, frozen=True, omit_defaults=True, tag="ran"):
    """A pool as the file has it, and how often it was begun with: each root process has a budget of its own."""

    pool: str
    replicas: dict[str, tuple[str, ...]]
    """By shard."""
    idempotent: bool
    ratio: float
    burst: float
    max_retries: int
    hedged: bool
    roots: int = 1


Event = Asked | Told | Got | Gave | Fault | Ran
_decode = msgspec.json.Decoder(Event).decode


class Call(NamedTuple):
    """A leaf's call."""

    got: Got
    gave: Gave | None


class Story:
    """A history, put together."""

    def __init__(self, events: Iterable[Event], read_at: int) -> None:
        """`read_at` is when it was read: what had not happened by then had not happened."""
        kinds: dict[type[Event], list[Event]] = defaultdict(list)
        for event in events:
            kinds[type(event)].append(event)
        self.read_at = read_at
        self.asked: dict[str, Asked] = {one.request: one for one in kinds[Asked]}  # type: ignore[union-attr,misc] # of that kind
        self.told: dict[str, Told] = {one.request: one for one in kinds[Told]}  # type: ignore[union-attr,misc]
        self.faults: list[Fault] = kinds[Fault]  # type: ignore[assignment]
        self.pools: dict[str, Ran] = {one.pool: one for one in kinds[Ran]}  # type: ignore[union-attr,misc]
        gave: dict[int, Gave] = {one.serial: one for one in kinds[Gave]}  # type: ignore[union-attr,misc]
        self.calls = [Call(one, gave.get(one.serial)) for one in kinds[Got]]  # type: ignore[union-attr,arg-type]

    @cached_property
    def by_request(self) -> Mapping[str, list[Call]]:
        """The calls that leaves got for it."""
        found: dict[str, list[Call]] = defaultdict(list)
        for call in self.calls:
            found[call.got.request].append(call)
        return found

    @cached_property
    def by_serial(self) -> Mapping[int, Call]:
        return {call.got.serial: call for call in self.calls}

    def over_at(self, asked: Asked) -> int:
        """When the request was over, as far as its caller knows."""
        told = self.told.get(asked.request)
        return told.at if told else min(asked.at + asked.timeout_ns, self.read_at)

    def died(self, call: Call, by: int) -> bool:
        """Whether its leaf was killed by then, and could write nothing about it any more."""
        return any(
            fault.kills and call.got.leaf in fault.leaves and fault.begin <= by
            for fault in self.faults
            if call.got.at <= (fault.end or self.read_at)
        )

    def held_until(self, leaf: str, begin: int, end: int) -> int:
        """Up to when news from or to the leaf, of that time, may have been on its way."""
        for fault in sorted(self.faults, key=lambda fault: fault.begin):
            until = fault.end or self.read_at
            if leaf in fault.leaves and fault.holds and fault.begin <= end and until >= begin:
                end = max(end, until)
        return end


class Reader:
    """Reads the files `*.jsonl` of a directory, and what has been added to them since it last looked."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = defaultdict(int)
        self.events: list[Event] = []
        self.got: dict[str, set[int]] = defaultdict(set)
        """The calls that leaves got for a request."""
        self.ended: dict[int, Gave] = {}

    def look(self) -> list[Event]:
        """All events so far; half a line is left for later: one that a kill has cut short never happened."""
        for path in sorted(self._directory.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read[path])
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._read[path] += len(whole) + 1
                self._add([_decode(line) for line in whole.split(b"\n")])
        return self.events

    def _add(self, events: Iterable[Event]) -> None:
        for event in events:
            self.events.append(event)
            if isinstance(event, Got):
                self.got[event.request].add(event.serial)
            elif isinstance(event, Gave):
                self.ended[event.serial] = event
