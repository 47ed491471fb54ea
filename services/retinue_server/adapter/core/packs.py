"""Rule packs: how metrics and golden signals are made of what a source says.

What is not Prometheus' already comes as a document, nested names and lists as in JSON. A rule finds values in it by a
path of names with `/` between them (JSON Pointer, RFC 6901, with `~0` for `~` and `~1` for `/`), of which `*` stands
for every name or index in its place; `$1`, `$2` ... are what they stood for, and make labels.
"""

from __future__ import annotations

import contextlib
import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from retinue_server.adapter.core import mappings
from retinue_server.adapter.core.points import SIGNALS, Histogram, Raw, RawFamily, Signal, Type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence

    from retinue_server.adapter.core.points import Family, Series

_KINDS = {kind.name.lower(): kind for kind in Type}
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
_ANY = "*"
_EXAMPLE = 200
"""Characters of one, at most."""
_PLACE = re.compile(r"\$(\d)")


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`metrics:` of a pack, one entry: a metric, and where its values are."""

    metric: str
    """Its name, without `_total`."""
    path: str
    """Where its values are; none are no error."""
    type: Literal["counter", "gauge", "info", "unknown"] = "gauge"
    unit: str = ""
    """Of the source's values, as UCUM or in words; what is not a base unit is turned into one."""
    scale: float = 1.0
    """Values are multiplied by it before their unit is looked at."""
    labels: dict[str, str] = {}
    """By name: a text in which `$1` is what the first `*` stood for; `@PATH` is the value at a path from the same
    place."""
    values: dict[str, float] = {}
    """What words stand for: `{up: 1, down: 0}`."""
    help: str = ""


class Ratio(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How full something is: the sum of some metrics by that of others."""

    used: str
    of: str
    unlimited: str = ""
    """Why it says nothing where `of` is 0 or not there."""


class SignalRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`signals:` of a pack, one entry: the first of these that has a value; else `absent`."""

    absent: str
    """Why there is none; shown to people."""
    sums: list[list[str]] = []
    """Alternatives: metrics whose series are added up. `NAME{label=~pattern}` takes those whose label matches as a
    whole."""
    ratios: list[Ratio] = []
    """The greatest of these."""
    histograms: list[str] = []
    """Alternatives: a histogram whose series are added up."""


class Pack(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rule pack; its name is its file's."""

    kind: str
    """The kind of target that it is for, in lower case."""
    about: str = ""
    metrics: list[Rule] = []
    queries: dict[str, str] = {}
    """POSTGRESQL: SQL by name; the rows of each are in the document under that name."""
    defaults: dict[str, Any] = {}
    """STATSD: as in a mapping file of statsd_exporter, as are `mappings`; see `mappings.py`."""
    mappings: list[dict[str, Any]] = []
    path: str = ""
    """JSON: what to ask for where the target's endpoint has no path; with `body`, by POST."""
    body: Annotated[str, msgspec.Meta(max_length=100_000)] = ""
    signals: dict[Literal["requests", "errors", "duration", "saturation"], SignalRule] = {}


def check(pack: Pack, faults: MutableSequence[str]) -> None:
    """What the schema does not say."""
    meanings: dict[str, tuple[str, str]] = {}
    for number, rule in enumerate(pack.metrics):
        at = f"metrics[{number}]"
        if meanings.setdefault(rule.metric, (rule.type, rule.unit)) != (rule.type, rule.unit):
            faults.append(f"{at}: {rule.metric} has another type or unit before")
        if not rule.path.startswith("/"):
            faults.append(f"{at}.path must begin with /")
        stars = tokens(rule.path).count(_ANY)
        for name, text in rule.labels.items():
            places = [int(place) for place in _PLACE.findall(text)]
            if any(place > stars or not place for place in places):
                faults.append(f"{at}.labels.{name} names ${max(places)}, but the path has {stars} *")
    mappings.check(pack.defaults, pack.mappings, faults)
    if pack.mappings and pack.kind != "statsd":
        faults.append("mappings are for kind statsd")
    for name, signal in pack.signals.items():
        for text in (*(one for group in signal.sums for one in group), *signal.histograms):
            _check_selector(text, f"signals.{name}", faults)
        for ratio in signal.ratios:
            _check_selector(ratio.used, f"signals.{name}", faults)
            _check_selector(ratio.of, f"signals.{name}", faults)


def _check_selector(text: str, at: str, faults: MutableSequence[str]) -> None:
    try:
        Selector.parse(text)
    except ValueError as error:
        faults.append(f"{at}: {error}")


# Documents to families


def tokens(path: str) -> list[str]:
    """Of a path."""
    return [token.replace("~1", "/").replace("~0", "~") for token in path.split("/")[1:]]


def apply(pack: Pack, document: Any, rejected: Reject) -> list[RawFamily]:
    """The families that a pack makes of a document; rules of one name make one."""
    families: dict[str, RawFamily] = {}
    for rule in pack.metrics:
        for places, value, parents in _find(document, tokens(rule.path), ()):
            number = _number(rule, value)
            if number is None:
                rejected("not_a_number", f"{rule.path}: {value!r}"[:200])
                continue
            family = families.get(rule.metric)
            if family is None:
                family = RawFamily(rule.metric, _KINDS[rule.type], [], rule.unit, rule.help)
                families[rule.metric] = family
            labels = {name: _label(text, places, document, parents) for name, text in rule.labels.items()}
            family.points.append(Raw(labels, number * rule.scale))
    return list(families.values())


def _find(at: Any, path: Sequence[str], places: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """What stood for `*`, the value, and what it is in."""
    inside = None
    for index, token in enumerate(path):
        inside = at
        if token == _ANY:
            for name, one in _children(at):
                if index + 1 == len(path):
                    yield (*places, name), one, at
                else:
                    yield from _find(one, path[index + 1 :], (*places, name))
            return
        at = _child(at, token)
        if at is None:
            return
    yield places, at, inside


def _children(at: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(at, dict):
        return at.items()
    return ((str(index), one) for index, one in enumerate(at)) if isinstance(at, list) else ()


def _child(at: Any, token: str) -> Any:
    if isinstance(at, dict):
        return at.get(token)
    if isinstance(at, list) and token.isdecimal() and int(token) < len(at):
        return at[int(token)]
    return None


def _number(rule: Rule, value: Any) -> float | None:
    if isinstance(value, str) and value in rule.values:
        return rule.values[value]
    if rule.type == "info":
        return 1.0
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value) else None
    if isinstance(value, bool | int | float):
        with contextlib.suppress(OverflowError):  # an integer of more than 308 digits
            return float(value)
    return None


def _label(text: str, places: Sequence[str], document: Any, inside: Any) -> str:
    if text.startswith("@"):
        found = inside if not text.startswith("@/") else document
        for name in tokens("/" + text.removeprefix("@").removeprefix("/")):
            found = _child(found, name)
        return "" if found is None or isinstance(found, dict | list) else str(found)
    return _PLACE.sub(lambda place: places[int(place[1]) - 1], text)


class Reject:
    """Counts what is refused, by reason, with an example each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, str] = {}

    def __call__(self, reason: str, example: str, points: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + points
        self.examples[reason] = example[:_EXAMPLE]

    def add(self, other: Reject) -> None:
        """What another has counted, too."""
        for reason, count in other.counts.items():
            self(reason, other.examples[reason], count)


# Families to signals


class Selector(msgspec.Struct, frozen=True):
    """`NAME`, or `NAME{label=~pattern}`."""

    name: str
    label: str = ""
    pattern: re.Pattern[str] | None = None

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Raises ValueError."""
        name, brace, rest = text.partition("{")
        if not brace:
            return cls(name)
        label, equals, pattern = rest.removesuffix("}").partition("=~")
        if not equals or not rest.endswith("}"):
            raise ValueError(f"{text!r} is not NAME{{label=~pattern}}")
        try:
            return cls(name, label, re.compile(pattern))
        except re.error as error:
            raise ValueError(f"{pattern!r} is no pattern: {error}") from None

    def of(self, families: Mapping[str, Family]) -> list[Series]:
        """The series that it takes."""
        family = families.get(self.name)
        if family is None:
            return []
        if self.pattern is None:
            return family.series
        return [one for one in family.series if self.pattern.fullmatch(dict(one.labels).get(self.label, ""))]


def signals(pack: Pack | None, families: Mapping[str, Family]) -> list[Signal]:
    """One for each of SIGNALS."""
    return [_signal(pack.signals.get(name) if pack else None, families) for name in SIGNALS]  # type: ignore[call-overload]


def _signal(rule: SignalRule | None, families: Mapping[str, Family]) -> Signal:
    if rule is None:
        return Signal(None, "its rule pack says nothing of it", "")
    for names in rule.sums:
        numbers = [one for name in names for one in _plain(name, families)]
        if numbers or all(Selector.parse(name).name in families for name in names):
            total = sum(numbers)
            if 0 <= total < math.inf:
                return Signal(total, "", " + ".join(names))
            return Signal(None, f"{' + '.join(names)} is {total:g}, which counts nothing", "")
    for name in rule.histograms:
        found = [one.value for one in Selector.parse(name).of(families) if isinstance(one.value, Histogram)]
        if found:
            return Signal(_added(found), "", name)
    return _fullest(rule, families)


def _plain(selector: str, families: Mapping[str, Family]) -> list[float]:
    """The numbers of its series; of a histogram or a summary, how many it has counted."""
    found = [one.value for one in Selector.parse(selector).of(families)]
    return [one if isinstance(one, float | int) else one.count for one in found]


def _fullest(rule: SignalRule, families: Mapping[str, Family]) -> Signal:
    found: list[tuple[float, str]] = []
    why = rule.absent
    for ratio in rule.ratios:
        used, of = _plain(ratio.used, families), _plain(ratio.of, families)
        total = sum(of)
        if not used:
            continue
        if total <= 0:
            why = ratio.unlimited or why
            continue
        share = sum(used) / total
        if not math.isfinite(share):
            continue
        found.append((min(max(share, 0.0), 1.0), f"{ratio.used} / {ratio.of}"))
    if not found:
        return Signal(None, why, "")
    value, source = max(found)
    return Signal(value, "", source)


def _added(found: Sequence[Histogram]) -> Histogram:
    """By the bounds that all of them have, at which cumulative counts add up exactly; the last is one."""
    counts = [dict(one.buckets) for one in found]
    bounds = [bound for bound, _ in found[0].buckets if all(bound in one for one in counts)]
    return Histogram(
        tuple((bound, sum(one[bound] for one in counts)) for bound in bounds),
        sum(one.sum for one in found),
        sum(one.count for one in found),
    )
