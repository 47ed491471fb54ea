"""What sources bring, and what is made of it: families of series, as records that cross a pipe."""

from __future__ import annotations

from enum import IntEnum
from functools import cached_property

import msgspec

Labels = tuple[tuple[str, str], ...]
"""Names and values, by name."""


class Type(IntEnum):
    """What values mean; as in the contract."""

    COUNTER = 1
    GAUGE = 2
    HISTOGRAM = 3
    SUMMARY = 4
    INFO = 5
    UNKNOWN = 6


CUMULATIVE = frozenset({Type.COUNTER, Type.HISTOGRAM, Type.SUMMARY})


class Histogram(msgspec.Struct, frozen=True, array_like=True, tag="h"):
    """Cumulative counts by inclusive bound; the last bound is infinite."""

    buckets: tuple[tuple[float, float], ...]
    sum: float
    count: float


class Summary(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """Quantiles as the app computed them."""

    quantiles: tuple[tuple[float, float], ...]
    sum: float
    count: float


Value = float | Histogram | Summary


class Raw(msgspec.Struct, array_like=True):
    """A value as it came: its name and unit are still the source's."""

    labels: dict[str, str]
    value: Value
    start_ms: int = 0
    """Since when it counts, where the source says it; 0 = it does not."""


class RawFamily(msgspec.Struct, array_like=True):
    """Values that the source gave one name."""

    name: str
    type: Type
    points: list[Raw]
    unit: str = ""
    help: str = ""


class Series(msgspec.Struct, array_like=True):
    """A normalised series."""

    labels: Labels
    value: Value
    start_ms: int = 0
    """Since when it counts: since the epoch; 0 where that means nothing."""


class Family(msgspec.Struct, array_like=True):
    """Normalised series of one name; `text` has their lines as `/metrics` shows them."""

    name: str
    type: Type
    unit: str
    help: str
    series: list[Series]
    text: bytes = b""

    @property
    def count(self) -> int:
        """Of series."""
        return len(self.series)

    def packed(self) -> Packed:
        """For the pipe."""
        series = msgspec.Raw(msgspec.msgpack.encode(self.series))
        return Packed(self.name, self.type, self.unit, self.help, self.count, series, self.text)


class Packed(msgspec.Struct, array_like=True, dict=True):
    """A family that has crossed the pipe: `/metrics` needs its lines alone, and whoever needs its series unpacks
    them."""

    name: str
    type: Type
    unit: str
    help: str
    count: int
    packed_series: msgspec.Raw
    text: bytes

    @cached_property
    def series(self) -> list[Series]:
        """Unpacked once."""
        return _unpack(self.packed_series)


_unpack = msgspec.msgpack.Decoder(list[Series]).decode
AnyFamily = Family | Packed
"""As it was made, or as it came."""


class Signal(msgspec.Struct, array_like=True):
    """A golden signal: a value, or a reason why there is none."""

    value: float | Histogram | None
    absent: str
    source: str


SIGNALS = ("requests", "errors", "duration", "saturation")
"""In the order of the contract's enum, whose first value is 1."""
