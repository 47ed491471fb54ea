"""Built-in merges: how replies become one answer. Each takes replies as they come and gives the answer at the end."""

from __future__ import annotations

import heapq
import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from retinue_server.scattergather.core.requests import Malformed
from retinue_server.scattergather.core.topology import MergeKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.scattergather.core.topology import Merging


MAX_DEPTH = 30
"""Of JSON that callers get as google.protobuf.Value: protobuf reads 100 levels of messages, an object takes three."""
_LONG = re.compile(rb"[0-9]{309}")
"""What is shorter fits in a double."""


class Merge(Protocol):
    """Gathers the replies of one request."""

    def add(self, index: int, payload: bytes) -> None:
        """Takes the reply of the shard at this place in the pool's order; raises Malformed, having taken nothing."""

    def result(self) -> Any:
        """The answer: bytes, a JSON value, or pairs of place and payload, as the kind has it."""


class Collect:
    """Every reply, in the pool's order; pairs of place and payload."""

    def __init__(self) -> None:
        self._replies: list[tuple[int, bytes]] = []

    def add(self, index: int, payload: bytes) -> None:
        self._replies.append((index, payload))

    def result(self) -> list[tuple[int, bytes]]:
        return sorted(self._replies)


class CollectJson(Collect):
    """As Collect, with replies that must be JSON which a message can hold."""

    def add(self, index: int, payload: bytes) -> None:
        _any(payload)
        _check_fits(payload)
        super().add(index, payload)


class Concat(Collect):
    """The bytes one after the other, in the pool's order."""

    def result(self) -> bytes:  # type: ignore[override] # the same replies, joined
        return b"".join(payload for _, payload in super().result())


class First:
    """The first that comes; empty if none did."""

    def __init__(self) -> None:
        self._first: bytes | None = None

    def add(self, index: int, payload: bytes) -> None:  # noqa: ARG002 - Merge has it
        if self._first is None:
            self._first = payload

    def result(self) -> bytes:
        return self._first or b""


class Numbers:
    """Sums, minima, maxima and counts; null for none."""

    def __init__(self, combine: Callable[[list[float]], float]) -> None:
        self._combine = combine
        self._numbers: list[float] = []

    def add(self, index: int, payload: bytes) -> None:  # noqa: ARG002 - Merge has it
        number = _decoded(_number, payload, "a number or null")
        if number is not None:
            self._numbers.append(_finite(number))

    def result(self) -> float | None:
        return self._combine(self._numbers) if self._numbers else None


class Count:
    """A sum of whole numbers; exact."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, index: int, payload: bytes) -> None:  # noqa: ARG002 - Merge has it
        number = _decoded(_number, payload, "a whole number, 0 or more")
        if number is None or number < 0 or number != int(_finite(number)):
            raise Malformed("must be a whole number, 0 or more")
        _finite(self._count + int(number))
        self._count += int(number)

    def result(self) -> int:
        return self._count


class GroupSum:
    """Sums by key; keys sorted. Each is added at the end, at full precision, so that the order does not count."""

    def __init__(self) -> None:
        self._groups: dict[str, list[float]] = {}

    def add(self, index: int, payload: bytes) -> None:  # noqa: ARG002 - Merge has it
        groups = _decoded(_groups, payload, "an object of numbers")
        for number in groups.values():
            _finite(number)
        for key, number in groups.items():
            self._groups.setdefault(key, []).append(number)

    def result(self) -> dict[str, float]:
        return {key: _total(numbers) for key, numbers in sorted(self._groups.items())}


class Union:
    """Each once, numbers before strings, sorted."""

    def __init__(self) -> None:
        self._seen: set[str | int | float] = set()

    def add(self, index: int, payload: bytes) -> None:  # noqa: ARG002 - Merge has it
        items = _decoded(_items, payload, "an array of strings and numbers")
        for item in items:
            if not isinstance(item, str):
                _finite(item)
        self._seen.update(items)

    def result(self) -> list[str | int | float]:
        return sorted(self._seen, key=lambda item: (isinstance(item, str), item))


class _Hit(msgspec.Struct):
    score: int | float
    id: int | str


class TopK:
    """The k best by score; ties by the pool's order of shards, then each shard's own.

    Only scores are looked at; the hits go through as they are, so that whatever else they have stays.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._hits: list[tuple[float, int, int, msgspec.Raw]] = []
        """A heap with the worst in front: score, and place and rank negated."""

    def add(self, index: int, payload: bytes) -> None:
        raws = _decoded(_raws, payload, "an array of objects with score and id")
        hits = [_decoded(_hit, raw, "an array of objects with a number `score` and an `id`") for raw in raws]
        for hit, raw in zip(hits, raws, strict=True):
            _finite(hit.score)
            _check_fits(bytes(raw), within=1)
        heap = self._hits
        for rank, (hit, raw) in enumerate(zip(hits, raws, strict=True)):
            entry = (hit.score, -index, -rank, raw)  # place and rank are no other's: raw is never compared
            if len(heap) < self._k:
                heapq.heappush(heap, entry)
            elif heap[0] < entry:
                heapq.heapreplace(heap, entry)

    def result(self) -> list[Any]:
        return [_any(bytes(entry[3])) for entry in sorted(self._hits, reverse=True)]


class _Bars(msgspec.Struct):
    bounds: list[float]
    counts: list[int]
    sum: float = 0.0


class Histogram:
    """Adds by bucket; the bounds must be those of the first reply."""

    def __init__(self) -> None:
        self._bounds: list[float] | None = None
        self._counts: list[int] = []
        self._sums: list[float] = []

    def add(self, index: int, payload: bytes) -> None:  # noqa: ARG002 - Merge has it
        bars = _decoded(_bars, payload, "an object with bounds, counts and sum")
        _check_bars(bars, self._bounds)
        counts = [a + b for a, b in zip(self._counts or [0] * len(bars.counts), bars.counts, strict=True)]
        _finite(max(counts))
        self._counts = counts
        self._bounds = bars.bounds
        self._sums.append(bars.sum)

    def result(self) -> dict[str, Any]:
        return {"bounds": self._bounds or [], "counts": self._counts or [0], "sum": _total(self._sums)}


def _check_bars(bars: _Bars, bounds: list[float] | None) -> None:
    if any(not low < high for low, high in pairwise(bars.bounds)) or not all(
        map(math.isfinite, (*bars.bounds, bars.sum))
    ):
        raise Malformed("bounds must be finite and rise")
    if len(bars.counts) != len(bars.bounds) + 1 or any(count < 0 for count in bars.counts):
        raise Malformed("counts must be one more than bounds, 0 or more each")
    if bounds is not None and bars.bounds != bounds:
        raise Malformed("bounds must be the same in every shard")


def make(merging: Merging) -> Merge:
    """A merge for one request. SERVICE is gathered as COLLECT; who calls the service has the replies."""
    match merging.kind:
        case MergeKind.COLLECT:
            return CollectJson() if merging.json_replies else Collect()
        case MergeKind.TOP_K:
            return TopK(merging.top_k)
        case kind:
            return _MAKERS[kind]()


def encode(result: Any) -> bytes:
    """A JSON result as text."""
    return _encode(result)


def parsed(payload: bytes) -> Any:
    """A JSON reply as a value; raises Malformed."""
    return _any(payload)


def _decoded(decode: Callable[[Any], Any], payload: Any, wanted: str) -> Any:
    try:
        return decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise Malformed(f"must be JSON: {wanted}") from None


def _any(payload: bytes) -> Any:
    return _decoded(_value, payload, "any value")


def _finite(number: float) -> float:
    try:
        whole = float(number)
    except OverflowError:
        raise Malformed("numbers must fit in a double") from None
    if not math.isfinite(whole):
        raise Malformed("numbers must be finite")
    return number


def _total(numbers: list[float]) -> float:
    """Correctly rounded, whatever the order; whole while all are and it fits."""
    if all(isinstance(number, int) for number in numbers):
        return _finite(sum(numbers))
    try:
        return math.fsum(numbers)
    except OverflowError:
        raise Malformed("the sum must fit in a double") from None


def _check_fits(payload: bytes, within: int = 0) -> None:
    """Raises Malformed for JSON that no message holds; it is looked at closely only where its bytes give reason to."""
    if payload.count(b"[") + payload.count(b"{") + within > MAX_DEPTH or _LONG.search(payload):
        _check_value(_any(payload), within)


def _check_value(plain: Any, depth: int) -> None:
    if isinstance(plain, int):
        _finite(plain)
    elif isinstance(plain, (list, dict)):
        if depth >= MAX_DEPTH:
            raise Malformed(f"must be JSON that is nested at most {MAX_DEPTH} deep")
        for inner in plain.values() if isinstance(plain, dict) else plain:
            _check_value(inner, depth + 1)


_encode = msgspec.json.Encoder().encode
_value = msgspec.json.Decoder().decode
_number = msgspec.json.Decoder(int | float | None).decode
_groups = msgspec.json.Decoder(dict[str, int | float]).decode
_items = msgspec.json.Decoder(list[str | int | float]).decode
_raws = msgspec.json.Decoder(list[msgspec.Raw]).decode
_hit = msgspec.json.Decoder(_Hit).decode
_bars = msgspec.json.Decoder(_Bars).decode
_MAKERS: dict[MergeKind, Callable[[], Merge]] = {
    MergeKind.CONCAT: Concat,
    MergeKind.FIRST: First,
    MergeKind.SERVICE: Collect,
    MergeKind.SUM: lambda: Numbers(_total),
    MergeKind.MIN: lambda: Numbers(min),
    MergeKind.MAX: lambda: Numbers(max),
    MergeKind.COUNT: Count,
    MergeKind.GROUP_SUM: GroupSum,
    MergeKind.UNION: Union,
    MergeKind.HISTOGRAM: Histogram,
}
