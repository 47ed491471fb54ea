"""Claims about rule packs: what rules find, what signals are made of it, and what is wrong with a pack is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinue_server.adapter import packfile
from retinue_server.adapter.core import packs
from retinue_server.adapter.core.packs import Pack, Ratio, Reject, Rule, SignalRule
from retinue_server.adapter.core.points import SIGNALS, Family, Histogram, Series, Type
from retinue_server.adapter.packfile import PackError

DOCUMENT = {
    "a": {"b": 1, "c": "2.5", "word": "up", "none": None, "yes": True},
    "rows": [{"name": "x", "n": 1}, {"name": "y", "n": 2}],
    "odd/name~": {"deep": {"p": {"n": 3}, "q": {"n": 4}}},
}


def found(*rules: Rule, document: Any = DOCUMENT) -> tuple[list[tuple[str, dict[str, str], Any]], dict[str, int]]:
    reject = Reject()
    families = packs.apply(Pack(kind="json", metrics=list(rules)), document, reject)
    return [(one.name, point.labels, point.value) for one in families for point in one.points], reject.counts


@pytest.mark.parametrize(
    ("rule", "points"),
    [
        (Rule(metric="m", path="/a/b"), [({}, 1.0)]),
        (Rule(metric="m", path="/a/c", scale=2.0), [({}, 5.0)]),
        (Rule(metric="m", path="/a/yes"), [({}, 1.0)]),
        (Rule(metric="m", path="/a/none"), []),
        (Rule(metric="m", path="/a/missing/deep"), []),
        (Rule(metric="m", path="/a/b/deeper"), []),
        (Rule(metric="m", path="/a/word", values={"up": 1.0, "down": 0.0}), [({}, 1.0)]),
        (Rule(metric="m", path="/rows/1/n"), [({}, 2.0)]),
        (Rule(metric="m", path="/rows/7/n"), []),
        (Rule(metric="m", path="/rows/*/n", labels={"place": "$1"}), [({"place": "0"}, 1.0), ({"place": "1"}, 2.0)]),
        (Rule(metric="m", path="/rows/*/n", labels={"name": "@name"}), [({"name": "x"}, 1.0), ({"name": "y"}, 2.0)]),
        (Rule(metric="m", path="/rows/0/n", labels={"top": "@/a/word"}), [({"top": "up"}, 1.0)]),
        (Rule(metric="m", path="/rows/0/n", labels={"no": "@gone", "map": "@/a"}), [({"no": "", "map": ""}, 1.0)]),
        (
            Rule(metric="m", path="/odd~1name~0/*/*/n", labels={"both": "$1-$2"}),
            [({"both": "deep-p"}, 3.0), ({"both": "deep-q"}, 4.0)],
        ),
        (Rule(metric="m", path="/a/word", type="info", labels={"is": "@word"}), [({"is": "up"}, 1.0)]),
        (Rule(metric="m", path="/a/b", type="info"), [({}, 1.0)]),
    ],
)
def test_a_rule_finds_values_and_labels_by_paths(rule: Rule, points: list[Any]) -> None:
    assert found(rule) == ([("m", labels, value) for labels, value in points], {})


@pytest.mark.parametrize("value", ["up", "1_0", "", {}, [], 10**400])
def test_what_is_no_number_is_refused_and_costs_itself(value: Any) -> None:
    rules = Rule(metric="m", path="/x"), Rule(metric="good", path="/y")
    assert found(*rules, document={"x": value, "y": 1}) == ([("good", {}, 1.0)], {"not_a_number": 1})


def test_rules_of_one_name_make_one_family() -> None:
    rules = [Rule(metric="m", path="/a/b", labels={"n": "b"}), Rule(metric="m", path="/a/c", labels={"n": "c"})]
    families = packs.apply(Pack(kind="json", metrics=rules), DOCUMENT, Reject())
    assert [len(one.points) for one in families] == [2]


_documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
)


@given(_documents, st.lists(st.sampled_from(["*", "a", "b", "0"]), min_size=1, max_size=4))
def test_whatever_the_document_is_a_rule_comes_to_an_end(document: Any, path: list[str]) -> None:
    rule = Rule(metric="m", path="/" + "/".join(path), labels={"l": "@a"})
    points, _ = found(rule, document=document)
    assert all(isinstance(value, float) for _, _, value in points)


# Signals


def family(name: str, *values: float, **labels: str) -> Family:
    series = [Series(tuple(sorted({**labels, "n": str(n)}.items())), value) for n, value in enumerate(values)]
    return Family(name, Type.COUNTER, "", "", series)


def signal(rule: SignalRule, *families: Family) -> Any:
    return packs.signals(Pack(kind="json", signals={"requests": rule}), {one.name: one for one in families})[0]


def test_signals_without_rules_are_absent_and_say_so() -> None:
    for pack in (None, Pack(kind="json")):
        assert {one.absent for one in packs.signals(pack, {})} == {"its rule pack says nothing of it"}
        assert len(packs.signals(pack, {})) == len(SIGNALS)


def test_a_sum_is_of_all_series_of_the_first_alternative_that_is_there() -> None:
    rule = SignalRule(absent="none", sums=[["gone"], ["a", "b"], ["c"]])
    one = signal(rule, family("a", 1.0, 2.0), family("b", 4.0), family("c", 100.0))
    assert (one.value, one.source, one.absent) == (7.0, "a + b", "")
    assert signal(rule).absent == "none"
    assert signal(rule, family("a", 1.0)).value == 1.0


def test_a_selector_takes_series_by_a_label_as_a_whole() -> None:
    rule = SignalRule(absent="none", sums=[["a{code=~5..}"]])
    good, bad = family("a", 7.0, code="200"), family("a", 3.0, code="503")
    both = Family("a", Type.COUNTER, "", "", good.series + bad.series)
    assert signal(rule, both).value == 3.0
    assert signal(rule, good).value == 0.0, "errors are counted, and there were none"
    assert signal(rule, family("a", 3.0, code="5031")).value == 0.0


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_what_counts_nothing_is_absent(value: float) -> None:
    one = signal(SignalRule(absent="none", sums=[["a"]]), family("a", value))
    assert one.value is None
    assert one.absent.startswith("a is ")


def test_saturation_is_that_of_the_fullest() -> None:
    rule = SignalRule(absent="none", ratios=[Ratio(used="a", of="b"), Ratio(used="c", of="d", unlimited="no limit")])
    full = signal(rule, family("a", 1.0), family("b", 4.0), family("c", 3.0), family("d", 4.0))
    assert (full.value, full.source) == (0.75, "c / d")
    assert signal(rule, family("c", 3.0), family("d", 0.0)).absent == "no limit"
    assert signal(rule, family("a", 9.0), family("b", 4.0)).value == 1.0
    assert signal(rule, family("b", 4.0)).absent == "none"
    assert signal(rule, family("a", math.nan), family("b", 4.0)).absent == "none"


def test_histograms_add_up_by_the_bounds_that_all_have() -> None:
    one = Histogram(((0.1, 1.0), (0.5, 2.0), (math.inf, 4.0)), 3.0, 4.0)
    other = Histogram(((0.5, 5.0), (1.0, 6.0), (math.inf, 7.0)), 2.0, 7.0)
    made = Family("h", Type.HISTOGRAM, "", "", [Series((("n", "1"),), one), Series((("n", "2"),), other)])
    found = signal(SignalRule(absent="none", histograms=["gone", "h"]), made)
    assert found.value == Histogram(((0.5, 7.0), (math.inf, 11.0)), 5.0, 11.0)
    assert found.source == "h"


# Files


def test_every_shipped_pack_is_one_and_says_of_every_signal_why_it_may_be_absent() -> None:
    shipped = packfile.shipped()
    assert {"redis", "memcached", "nginx", "postgresql", "prometheus", "expvar", "jolokia"} <= shipped.keys()
    for name, pack in shipped.items():
        assert pack.signals.keys() == set(SIGNALS), name
        for one in packs.signals(pack, {}):
            assert one.value is None
            assert one.absent not in ("", "its rule pack says nothing of it"), name


def test_metrics_that_shipped_packs_make_signals_of_are_those_that_they_make() -> None:
    """By the name after normalisation."""
    from retinue_server.adapter.core import naming  # noqa: PLC0415 - here alone

    for name, pack in packfile.shipped().items():
        made = {naming.based(rule.metric, rule.unit)[0] for rule in pack.metrics}
        if not made:
            continue
        for rule in pack.signals.values():
            names = [one for group in rule.sums for one in group] + [
                one for ratio in rule.ratios for one in (ratio.used, ratio.of)
            ]
            assert {packs.Selector.parse(one).name for one in names} <= made, name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: [", "while parsing"),
        ("a", "Expected `object`"),
        ("about: x", "missing required field `kind`"),
        ("kind: telex", "kind must be one of prometheus"),
        ("kind: json\nmetrix: []", "metrix"),
        ("kind: json\nkind: json", "a second time"),
        ("kind: json\nmetrics: [{metric: a, path: b}]", "metrics[0].path must begin with /"),
        ("kind: json\nmetrics: [{metric: a, path: /b, type: counted}]", "counted"),
        ("kind: json\nmetrics: [{metric: a, path: /*, labels: {x: $2}}]", "names $2, but the path has 1 *"),
        ("kind: json\nmetrics: [{metric: a, path: /*, labels: {x: $0}}]", "names $0"),
        (
            "kind: json\nmetrics: [{metric: a, path: /x}, {metric: a, path: /y, unit: s}]",
            "metrics[1]: a has another type or unit before",
        ),
        ("kind: json\nsignals: {speed: {absent: x}}", "speed"),
        ("kind: json\nsignals: {errors: {}}", "absent"),
        ("kind: json\nsignals: {errors: {absent: x, sums: [['a{b}']]}}", "is not NAME{label=~pattern}"),
        ("kind: json\nsignals: {errors: {absent: x, sums: [['a{b=~(}']]}}", "is no pattern"),
    ],
)
def test_what_is_wrong_with_a_pack_is_named(text: str, said: str) -> None:
    with pytest.raises(PackError) as error:
        packfile.read("mine.yaml", text.encode())
    assert str(error.value).startswith("mine.yaml: ")
    assert said in str(error.value)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_garbage_is_no_pack_and_nothing_worse(data: bytes) -> None:
    with pytest.raises(PackError):
        packfile.read("mine.yaml", data)
