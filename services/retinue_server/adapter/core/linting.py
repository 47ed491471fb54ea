"""What is wrong with a rule pack although it can be used: mostly names that nothing makes.

`packs.check` refuses what can't be used at all; this is for who writes one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.adapter.core import naming
from retinue_server.adapter.core.packs import Selector, tokens
from retinue_server.adapter.core.points import SIGNALS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from retinue_server.adapter.core.packs import Pack, Rule

_SUFFIXES = ("_total", "_bucket", "_count", "_sum", "_info")
_BRINGS_ITS_OWN = frozenset({"prometheus", "otlp", "report", "statsd"})
"""Kinds whose metrics come with names: a pack can't tell which there are."""


def findings(pack: Pack) -> Iterator[str]:
    """Each with its place in the pack."""
    yield from _rules(pack)
    yield from _queries(pack)
    for name in SIGNALS:
        if name not in pack.signals and pack.kind != "statsd":  # mapping files of statsd_exporter know no signals
            yield f"signals.{name} is missing: say how it is made, or why it is absent"
    if pack.kind not in _BRINGS_ITS_OWN:
        yield from _names(pack)
    if pack.body and not pack.path:
        yield "body is sent to the root of the app: say the path"


def _rules(pack: Pack) -> Iterator[str]:
    known: dict[str, tuple[str, str]] = {}
    for number, rule in enumerate(pack.metrics):
        at = f"metrics[{number}]"
        name, unit = _shown(rule)
        if not name:
            yield f"{at}.metric: nothing of {rule.metric!r} can be a name"
            continue
        if known.setdefault(name, (rule.type, unit)) != (rule.type, unit):
            yield f"{at}: {name} has another type or unit above; its points would be refused"
        if rule.metric.endswith(_SUFFIXES):
            yield f"{at}.metric: leave out _{rule.metric.rpartition('_')[2]}, /metrics adds what belongs there"
        if rule.unit and not unit and not rule.unit.startswith("{"):
            yield f"{at}.unit: {rule.unit} is none that is known; units are UCUM's or words, such as ms or By"
        if not rule.help:
            yield f"{at}.help is missing: say what {name} is"
        if "*" in tokens(rule.path) and not rule.labels and pack.kind != "postgresql":  # a query may give one row
            yield f"{at}.labels: several values would be one series; make a label of $1"


def _queries(pack: Pack) -> Iterator[str]:
    used = {tokens(rule.path)[0] for rule in pack.metrics if tokens(rule.path)}
    if pack.kind == "postgresql":
        for name in sorted(used - pack.queries.keys()):
            yield f"queries.{name} is missing, but a path begins with it"
        for name in sorted(pack.queries.keys() - used):
            yield f"queries.{name} is asked for nothing: no path begins with it"
    elif pack.queries:
        yield f"queries are for postgresql, not for {pack.kind}"


def _names(pack: Pack) -> Iterator[str]:
    """What signals are made of, by the names that metrics have in the end."""
    made = {_shown(rule)[0]: rule for rule in pack.metrics}
    for signal, rule in pack.signals.items():
        ratios = [text for ratio in rule.ratios for text in (ratio.used, ratio.of)]
        for text in (*(one for group in rule.sums for one in group), *rule.histograms, *ratios):
            selector = Selector.parse(text)
            if selector.name not in made:
                close = next((name for name in made if name.startswith(selector.name)), "")
                hint = f"; its name in the end is {close}" if close else ""
                yield f"signals.{signal}: no rule makes {selector.name}{hint}"
            elif selector.label and selector.label not in made[selector.name].labels:
                yield f"signals.{signal}: {selector.name} has no label {selector.label}"


def _shown(rule: Rule) -> tuple[str, str]:
    """The name and the unit in the end."""
    name, unit, _ = naming.based(naming.metric_name(rule.metric), rule.unit)
    return name, unit
