"""What the linter of rule packs finds, and that it finds nothing in those that are shipped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pytest

from retinue_server.adapter import packfile
from retinue_server.adapter.core import linting
from retinue_server.adapter.core.packs import Pack
from retinue_server.adapter.core.points import SIGNALS

ABSENT = {name: {"absent": "none"} for name in SIGNALS}


def findings(
    kind: str = "json", metrics: Sequence[object] = (), signals: Mapping[str, object] | None = None, **more: object
) -> list[str]:
    """Of a pack, which is written as JSON: that is YAML, too."""
    text = json.dumps({"kind": kind, "metrics": metrics, "signals": {**ABSENT, **(signals or {})}, **more})
    return list(linting.findings(packfile.read("pack.yaml", text.encode())))


def rule(metric: str = "a", path: str = "/a", **more: object) -> dict[str, object]:
    return {"metric": metric, "path": path, "help": "What it is.", **more}


@pytest.mark.parametrize(("name", "pack"), packfile.shipped().items())
def test_nothing_is_wrong_with_what_is_shipped(name: str, pack: Pack) -> None:
    assert list(linting.findings(pack)) == [], name


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ([rule()], []),
        ([rule(unit="{requests}")], []),
        ([rule("!!!")], ["metrics[0].metric: nothing of '!!!' can be a name"]),
        ([rule("a_total")], ["metrics[0].metric: leave out _total, /metrics adds what belongs there"]),
        (
            [rule(unit="furlongs")],
            ["metrics[0].unit: furlongs is none that is known; units are UCUM's or words, such as ms or By"],
        ),
        ([{"metric": "a", "path": "/a"}], ["metrics[0].help is missing: say what a is"]),
        (
            [rule("a_ms"), rule("a", "/b", unit="s", type="counter")],
            ["metrics[1]: a_seconds has another type or unit above; its points would be refused"],
        ),
        ([rule(path="/a/*/n")], ["metrics[0].labels: several values would be one series; make a label of $1"]),
        ([rule(path="/a/*/n", labels={"x": "$1"})], []),
    ],
)
def test_rules_are_looked_over(rules: list[object], found: list[str]) -> None:
    assert findings(metrics=rules) == found


@pytest.mark.parametrize(
    ("signal", "found"),
    [
        ({"ratios": [{"used": "a_bytes", "of": "b"}]}, []),
        ({"ratios": [{"used": "a", "of": "b"}]}, ["no rule makes a; its name in the end is a_bytes"]),
        ({"ratios": [{"used": "a_bytes", "of": "c"}]}, ["no rule makes c"]),
        ({"sums": [["b{x=~5..}"]]}, []),
        ({"sums": [["b{y=~5..}"]]}, ["b has no label y"]),
        ({"histograms": ["h"]}, ["no rule makes h"]),
    ],
)
def test_signals_are_made_of_names_as_they_are_in_the_end(signal: dict[str, object], found: list[str]) -> None:
    rules = [rule("a", unit="By"), rule("b", "/b/*", labels={"x": "$1"})]
    said = findings(metrics=rules, signals={"saturation": {"absent": "none", **signal}})
    assert said == [f"signals.saturation: {one}" for one in found]


def test_names_of_a_kind_that_brings_its_own_are_not_known() -> None:
    signals = {"requests": {"absent": "none", "sums": [["whatever"]]}}
    assert findings(kind="prometheus", signals=signals) == []


def test_each_query_is_used_and_there() -> None:
    said = findings(kind="postgresql", metrics=[rule(path="/rows/*/n")], queries={"raws": "SELECT 1 AS n"})
    assert said == [
        "queries.rows is missing, but a path begins with it",
        "queries.raws is asked for nothing: no path begins with it",
    ]
    assert findings(queries={"x": "SELECT 1"}) == ["queries are for postgresql, not for json"]


def test_every_signal_is_said_or_said_to_be_absent() -> None:
    pack = packfile.read("pack.yaml", b"kind: json\nbody: '{}'\n")
    said = list(linting.findings(pack))
    assert [one for one in said if "is missing" in one] == [
        f"signals.{name} is missing: say how it is made, or why it is absent" for name in SIGNALS
    ]
    assert list(linting.findings(packfile.read("pack.yaml", b"kind: statsd"))) == []
    assert said[-1] == "body is sent to the root of the app: say the path"
