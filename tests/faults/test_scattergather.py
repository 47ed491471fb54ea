"""Every fault in every mode, broken roots that the checker must catch, callers that leave, and a short campaign."""

from __future__ import annotations

from pathlib import Path

from support.scatter_faults.checks import check
from support.scatter_faults.history import Call, Story
from support.scatter_faults.matrix import DEADLINE_S, MODES, ROWS, Cells, Matrix, table

SLACK_NS = int(DEADLINE_S * 1e9)
"""As much again as a request may take: an upper bound, on a machine that does much else."""

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
    "name resolves no more": FINE,
    "root overloaded": modes(SHED, SHED, SHED, SHED, SHED, SHED),
    "all down": modes(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING),
}


def test_each_fault_shows_in_each_mode_as_it_should_and_breaks_no_rule(tmp_path: Path) -> None:
    with Matrix(tmp_path) as matrix:
        cells = matrix.play()
        story, errors = matrix.stage.story(), matrix.stage.log_errors()
    assert not wrong(cells), "\n".join(table(cells))
    assert len(cells) == len(ROWS) * len(MODES)
    assert again(cells) == dict.fromkeys(FINE.keys() - {"first 3"}, *ALL), "what is flapping answers when it can"
    assert check(story, SLACK_NS) == []
    assert errors == []
    assert_calls(matrix, story)


def wrong(cells: Cells) -> dict[tuple[str, str], str]:
    """Cells that are not as expected. Whom the first three leave out is chance, and so it is with all down."""
    found = {}
    for (fault, mode), [cell, *_] in cells.items():
        text = str(cell._replace(hit="") if mode == "first 3" or fault == "all down" else cell)
        if text not in EXPECTED[fault][mode]:
            found[fault, mode] = text
    return found


def again(cells: Cells) -> dict[str, str]:
    """What came of the second request to what is flapping."""
    return {mode: str(more[1]) for (fault, mode), more in cells.items() if fault == "flapping" and mode != "first 3"}


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
