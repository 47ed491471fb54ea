"""Every fault in every mode, broken roots that the checker must catch, callers that leave, and a short campaign."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from collector import collecting
from faults.tables import LONG, Row
from support.scatter_faults.behaviour import Behaviour, Kind
from support.scatter_faults.campaign import Campaign
from support.scatter_faults.checks import check
from support.scatter_faults.history import Call, Fault, Story
from support.scatter_faults.matrix import Matrix, table
from support.scatter_faults.pools import STRICT, Policy, Pool
from support.scatter_faults.report import totals
from support.scatter_faults.scenes import DEADLINE_S, MODES, ROWS, Cells
from support.scatter_faults.stage import Stage
from support.scatter_faults.storm import MEMORY, Storm, more
from workers import eventually

pytestmark = pytest.mark.timeout(3_600 if LONG else 900)  # the first build of the Go leaf compiles what it stands on

SLACK_NS = int(DEADLINE_S * 1e9)
"""As much again as a request may take: an upper bound, on a machine that does much else."""

PATIENCE = 6
Seen = tuple[str, ...]
ALL, THREE = ("OK, 4 of 4",), ("OK, 3 of 4",)
LATE = ("DEADLINE_EXCEEDED, s1 DEADLINE_EXCEEDED",)
SHED = ("RESOURCE_EXHAUSTED (SCATTER_LIMIT)",)


def without(code: str) -> Seen:
    return (f"OK, 3 of 4, s1 {code}",)


def failed(code: str, of_leaf: str = "") -> Seen:
    return (f"{code}, s1 {of_leaf or code}",)


def modes(  # noqa: PLR0917 - a row of the table
    strict: Seen, partial: Seen, soft: Seen, hedged: Seen, once: Seen, first: Seen = THREE
) -> dict[str, Seen]:
    return {
        "strict": strict,
        "partial": partial,
        "soft deadline": soft,
        "hedged": hedged,
        "not idempotent": once,
        "first 3": first,
    }


def at_once(code: str, of_leaf: str = "", hedged: Seen = ALL) -> dict[str, Seen]:
    """The fault is known at once: who can do without the shard does, and others needn't wait."""
    gone, rest = failed(code, of_leaf), without(of_leaf or code)
    return modes(gone, rest, rest, hedged, gone)


FINE = modes(ALL, ALL, ALL, ALL, ALL)
HANGS = modes(LATE, without("DEADLINE_EXCEEDED"), without("CANCELLED"), ALL, LATE)
REFUSED = failed("INVALID_ARGUMENT (LEAF_REFUSED)", "INVALID_ARGUMENT")
OVERLOADED = failed("RESOURCE_EXHAUSTED")
HALF = failed("INTERNAL", "OK")
NOTHING = ("UNAVAILABLE",)

EXPECTED = {
    "none": FINE,
    "refused": at_once("UNAVAILABLE"),
    "stopped process": HANGS,
    "nothing passes": HANGS,
    "slow": modes(ALL, ALL, without("CANCELLED"), ALL, ALL),
    "first byte, then nothing": HANGS,
    "headers, then nothing": HANGS,
    "error at once": at_once("UNAVAILABLE"),
    "internal error": at_once("INTERNAL"),
    "flapping": at_once("UNAVAILABLE"),
    # A hedge that was sent already is waited for; without one, overload is no reason to ask another.
    "reply too large": at_once("RESOURCE_EXHAUSTED", hedged=OVERLOADED + ALL),
    "corrupt reply": at_once("INTERNAL", "DATA_LOSS"),
    "half an answer": modes(HALF, without("OK"), without("OK"), HALF + ALL, HALF, (*THREE, "OK, 2 of 4")),
    "overloaded leaf": at_once("RESOURCE_EXHAUSTED", hedged=OVERLOADED + ALL),
    "leaf refuses": modes(REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, (*THREE, "INVALID_ARGUMENT (LEAF_REFUSED)")),
    "late reply": modes(ALL, ALL, ALL + without("CANCELLED"), ALL, ALL),
    "killed under way": at_once("UNAVAILABLE")
    | {"soft deadline": without("UNAVAILABLE") + without("CANCELLED")},  # should it be killed late
    "pool file points elsewhere": at_once("UNAVAILABLE"),
    "name resolves elsewhere": at_once("UNAVAILABLE"),
    "name resolves no more": at_once("UNAVAILABLE"),
    "root overloaded": modes(SHED, SHED, SHED, SHED, SHED, SHED),
    "all down": modes(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING),
}


def test_each_fault_shows_in_each_mode_as_it_should_and_breaks_no_rule(tmp_path: Path) -> None:
    matrix, cells = played(tmp_path)
    assert not wrong(cells), "\n".join(table(cells))
    assert len(cells) == len(ROWS) * len(MODES)
    assert recovered(cells), "what is flapping answers when it can"
    assert check(matrix.stage.story(), SLACK_NS) == []
    assert matrix.stage.log_errors() == []
    assert_calls(matrix, matrix.stage.story())


def played(where: Path) -> tuple[Matrix, Cells]:
    """The table; once more if it is wrong and the machine has stood still meanwhile, as busy ones do."""
    for attempt in range(PATIENCE):
        (where / str(attempt)).mkdir()
        with Matrix(where / str(attempt)) as matrix:
            cells = matrix.play()
        if not ((wrong(cells) or not recovered(cells)) and matrix.stage.has_stalled):
            break
    return matrix, cells


def wrong(cells: Cells) -> dict[tuple[str, str], str]:
    """Cells that are not as expected. Whom the first three leave out is chance, and so it is with all down."""
    found = {}
    for (fault, mode), [cell, *_] in cells.items():
        text = str(cell._replace(hit="") if mode == "first 3" or fault == "all down" else cell)
        if text not in EXPECTED[fault][mode]:
            found[fault, mode] = text
    return found


def recovered(cells: Cells) -> bool:
    """Whether the second request to what is flapping got all."""
    again = {mode: str(more[1]) for (fault, mode), more in cells.items() if fault == "flapping" and mode != "first 3"}
    return again == dict.fromkeys(FINE.keys() - {"first 3"}, *ALL)


def assert_calls(matrix: Matrix, story: Story) -> None:
    """What leaves have got."""

    def calls(fault: str, mode: str) -> list[Call]:
        return story.by_request.get(matrix.asked[fault, mode][-1].asked.request, [])

    reached = [row.name for row in ROWS if row.reached and not row.holds]
    once = {
        fault: sum(call.got.leaf == matrix.scenes[fault].victim for call in calls(fault, "not idempotent"))
        for fault in reached
    }
    assert once == dict.fromkeys(reached, 1), "one call each, whatever became of it"
    both = [call for call in calls("late reply", "hedged") if call.got.shard == "s1"]
    assert [call.gave and call.gave.end for call in both] == ["answered"] * 2, "the loser of the hedge answered, too"
    told = matrix.asked["late reply", "hedged"][-1].told
    assert {piece.serial for piece in told.pieces if piece.shard == "s1"} == {
        call.got.serial for call in both if call.got.leaf == "twin"
    }
    assert not any(calls("root overloaded", mode.name) for mode in MODES), "who is refused by the root asks no leaf"


DEFECTS = {
    "merge_the_loser_too": "merged_once",
    "leak_losers": "ended",
    "call_complete_what_is_not": "truthful",
    "repeat_what_must_not_be_repeated": "bounded",
    "ask_the_same_again": "bounded",
    "spend_without_end": "bounded",
    "answer_without_the_minimum": "enough",
    "wait_too_long": "in_time",
    "go_on_without_the_caller": "ended",
    "expect_who_is_there": "truthful",
}
BROKEN_SLACK_NS = 1_500_000_000
LONG_S = 10.0
"""So long that what goes on is not ended by its deadline before it is seen."""


def test_a_root_that_breaks_a_rule_is_caught(tmp_path: Path) -> None:
    """Each pool breaks the rule that is its name, but for one."""
    with Stage(tmp_path, module="faults.broken_scatters") as stage:
        house = stage.village.build("good", "slow", "twin", "late", "stalls", "fails", "fails2", "gone")
        for kind, delay_s, names in (
            (Kind.ANSWER, 0.3, ["late"]),
            (Kind.ANSWER, 0.8, ["slow"]),
            (Kind.STALL, 0.0, ["stalls"]),
            (Kind.FAIL, 0.0, ["fails", "fails2"]),
        ):
            house.tell(Behaviour(kind, delay_s), *names)
        stage.open(*broken_pools(), connected=False)
        stage.village.links["gone"].refuse()
        stage.notes.add(Fault("ailing", 1, 0, ("late", "stalls", "fails", "fails2", "gone")))
        for _ in range(5):  # a machine that has no time for leaves lets nobody see what they would have shown
            ask_broken(stage)
            with suppress(AssertionError):
                eventually(lambda: caught(stage).items() >= DEFECTS.items(), "all are caught", patience=15)
                break
        found = caught(stage)
        assert found.items() >= DEFECTS.items()
        assert "right" not in found


def broken_pools() -> list[Pool]:
    hedged: dict[str, Any] = {"hedge_s": 0.1, "timeout_s": LONG_S}

    def pool(name: str, *hit: str, first: str = "good", **settings: Any) -> Pool:
        return Pool(name, {"s0": (first,), "s1": hit}, **{"timeout_s": 1.0} | settings)

    return [
        pool("right", "stalls", "twin", **hedged),
        pool("merge_the_loser_too", "late", "twin", first="slow", **hedged),
        pool("leak_losers", "stalls", "twin", **hedged),
        pool("call_complete_what_is_not", "gone"),
        pool("repeat_what_must_not_be_repeated", "fails", "good", idempotent=False),
        pool("ask_the_same_again", "fails"),
        pool("spend_without_end", "fails", "fails2", ratio=0.0, burst=1.0),
        pool("answer_without_the_minimum", "gone"),
        pool("wait_too_long", "stalls"),
        pool("go_on_without_the_caller", "stalls", timeout_s=LONG_S),
        pool("expect_who_is_there", "gone"),
    ]


def ask_broken(stage: Stage) -> None:
    """Two requests at once to each pool, so that of two replicas each is asked first by one."""
    caller = stage.caller()
    pending = {}
    for pool in stage.pools.values():
        policy = Policy(0.5) if pool.name == "call_complete_what_is_not" else STRICT
        pending[pool.name] = [caller.begin(pool, policy) for _ in (1, 2)]
    leaving = pending.pop("go_on_without_the_caller")
    wanted = {one.asked.request for one in leaving}
    eventually(lambda: wanted <= {call.got.request for call in stage.story().calls}, "the leaves are asked")
    for one in leaving:
        one.leave()
    for some in pending.values():
        for one in some:
            one.result()


def caught(stage: Stage) -> dict[str, str]:
    """What is found in each pool; where that is several, what is expected comes first."""
    story = stage.story()
    found: dict[str, str] = {}
    for one in check(story, BROKEN_SLACK_NS):
        pool = story.asked[one.request].pool if one.request in story.asked else one.request
        if found.get(pool) != DEFECTS.get(pool):
            found[pool] = one.check
    return found


ROUNDS, CALLERS = (5, 6_000) if LONG else (5, 480)
WARM = 2
"""Rounds that fill what is remembered."""
LOST_KIB = 0.2
"""Of memory for each call to a leaf: what a cancelled call once left behind was four times as much."""


def test_thousands_of_callers_that_leave_leave_nothing_behind(tmp_path: Path, leaves: Path | None, row: Row) -> None:
    """No task, timer, call, span or memory at the root, no call at a leaf; traces are on."""
    with collecting() as (_, endpoint):
        storm = Storm(tmp_path, random.SystemRandom().getrandbits(31), leaves)
        with storm.stage as stage:
            storm.open({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
            idle = storm.counts()
            found = []
            for _ in range(ROUNDS):
                storm.blow(CALLERS)
                found.append(storm.rest(idle) | {"asked": int(stage.metrics()["attempts_total"])})
            assert not [more(counts, idle) for counts in found if more(counts, idle)]
            grown = {name: found[-1][name] - found[WARM - 1][name] for name in ("asked", *MEMORY)}
            assert grown["malloc_kib"] < LOST_KIB * grown["asked"], found
            assert grown["blocks"] < 3 * grown["asked"], found
            story = stage.story()
            assert check(story, SLACK_NS) == []
            assert stage.log_errors() == []
    row(
        "cancel storms",
        callers=len(story.asked),
        calls_at_leaves=len(story.calls),
        cancelled=sum(call.gave is not None and call.gave.end == "cancelled" for call in story.calls),
        left_open=0,
        RSS_in_MiB=" ".join(str(counts["rss_kib"] // 1024) for counts in found),
    )


def test_random_faults_under_load_break_no_rule(tmp_path: Path, leaves: Path | None, row: Row) -> None:
    """Several at a time, on twelve shards of two replicas; `python -m support.scatter_faults` plays longer."""
    seed, began = random.SystemRandom().getrandbits(31), time.monotonic()
    with Campaign(tmp_path, seed, leaves) as campaign:
        campaign.run(30 if LONG else 6)
        story, findings = campaign.story(), campaign.findings()
    figures = totals(campaign, story, findings, time.monotonic() - began)
    assert findings == [], (seed, figures)
    row(
        "scatter/gather under random faults",
        seed=seed,
        **{name.replace(" ", "_"): n for name, n in figures.items() if n},
    )
