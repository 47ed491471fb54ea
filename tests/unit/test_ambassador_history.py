"""The rules of the ambassador's histories: what they let pass, and above all what they must reject."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ambassador_faults.checks import PATIENCE_NS, Finding, check
from support.ambassador_faults.history import Event, Fault, Kept, Recorder, Sent, Served, Story, Told, read
from support.ambassador_faults.schedule import Kind, schedule

MS = 1_000_000
SLACK = 100 * MS


class Tale:
    """A history made up by a test; times in milliseconds. Upstream `u` is served by `a` from the beginning."""

    def __init__(self) -> None:
        self.events: list[Event] = [Served(0, 0, "u", ("a",))]
        self.read_at = 1_000_000
        self._calls = 0

    def call(self, at: int, server: str = "a", *, takes: int = 5, upstream: str = "u", **more: str | bool) -> None:
        """Asked and answered, or `failure`."""
        self._calls += 1
        told = {key: more.pop(key) for key in ("failure", "refused", "value") if key in more}
        self.events.append(Sent(at * MS, self._calls, upstream, **more))  # type: ignore[arg-type]
        server = "" if "failure" in told else server
        self.events.append(Told((at + takes) * MS, self._calls, server=server, **told))  # type: ignore[arg-type]

    def served(self, begin: int, end: int, *servers: str) -> None:
        self.events.append(Served(begin * MS, end * MS, "u", servers))

    def fault(self, begin: int, end: int, *upstreams: str, spares: bool = False) -> None:
        self.events.append(Fault("made up", begin * MS, upstreams, end * MS, spares))

    def found(self) -> list[Finding]:
        return check(Story(self.events, self.read_at * MS), SLACK)

    def broken(self) -> list[str]:
        return [one.check for one in self.found()]


@pytest.fixture
def tale() -> Tale:
    return Tale()


def test_calls_that_are_answered_by_who_is_declared_break_no_rule(tale: Tale) -> None:
    tale.call(10)
    tale.served(100, 120, "b", "c")
    for server in ("a", "b", "c"):
        tale.call(110, server)
    tale.call(150, "a", takes=300)
    tale.call(500, "c")
    assert tale.broken() == []


# served


def test_a_call_that_fails_for_no_reason_is_found(tale: Tale) -> None:
    tale.call(10, failure="HTTP 503")
    assert tale.found() == [Finding("served", 1, "u: HTTP 503")]


def test_a_fault_excuses_calls_to_its_own_upstream_while_it_lasts(tale: Tale) -> None:
    tale.fault(100, 200, "u")
    tale.call(50, takes=100, failure="cut")
    tale.call(150, failure="refused")
    tale.call(199, takes=500, failure="refused")
    tale.call(300)
    assert tale.broken() == []


@pytest.mark.parametrize(("at", "takes", "upstream"), [(90, 5, "u"), (201, 5, "u"), (150, 5, "v")])
def test_a_fault_excuses_nobody_before_or_after_it_nor_other_upstreams(
    tale: Tale, at: int, takes: int, upstream: str
) -> None:
    tale.fault(100, 200, "u")
    tale.call(at, takes=takes, upstream=upstream, failure="cut")
    tale.call(300)
    assert tale.broken() == ["served"]


def test_a_fault_without_an_end_excuses_to_the_end(tale: Tale) -> None:
    tale.fault(100, 0, "u")
    tale.call(900_000, failure="refused")
    assert tale.broken() == []


def test_whom_a_drain_spares_must_be_answered_or_refused(tale: Tale) -> None:
    tale.fault(100, 0, "u", spares=True)
    tale.call(90, takes=500)
    tale.call(110, failure="nobody there", refused=True)
    assert tale.broken() == []
    tale.call(90, takes=500, failure="cut")
    tale.call(110, takes=300, failure="cut")
    tale.call(95, failure="nobody there", refused=True)
    assert tale.broken() == ["served"] * 3


# answered


def test_a_call_of_which_nothing_is_heard_is_found_when_its_time_is_over(tale: Tale) -> None:
    tale.events.append(Sent(10 * MS, 1, "u"))
    tale.read_at = 10 + PATIENCE_NS // MS
    assert tale.broken() == []
    tale.read_at += 2 * SLACK // MS
    assert tale.broken() == ["answered"]


# right_server


def test_an_answer_of_a_server_that_is_gone_is_found_after_the_slack(tale: Tale) -> None:
    tale.served(100, 120, "b")
    tale.call(119 + SLACK // MS, "a")
    assert tale.broken() == []
    tale.call(121 + SLACK // MS, "a")
    assert tale.broken() == ["right_server"]


def test_an_answer_of_a_server_that_is_not_declared_yet_is_found(tale: Tale) -> None:
    tale.served(100, 120, "b")
    tale.call(90, "b")
    assert tale.broken() == ["right_server"]


def test_a_pinned_connection_stays_with_its_server_and_moves_to_no_other(tale: Tale) -> None:
    tale.call(10, "a", connection="1", pinned=True)
    tale.served(100, 120, "b")
    tale.call(5_000, "a", connection="1", pinned=True)
    assert tale.broken() == []
    tale.call(5_010, "b", connection="1", pinned=True)
    assert tale.broken() == ["right_server"]


def test_a_pinned_connection_begins_with_a_server_that_is_declared(tale: Tale) -> None:
    tale.served(100, 120, "b")
    tale.call(5_000, "a", connection="2", pinned=True)
    assert tale.broken() == ["right_server"]


def test_a_connection_that_is_not_pinned_goes_with_the_declaration(tale: Tale) -> None:
    tale.served(100, 120, "b")
    tale.call(10, "a", connection="1")
    tale.call(5_000, "a", connection="1")
    assert tale.broken() == ["right_server"]


# own_value


def test_a_value_of_another_key_is_found(tale: Tale) -> None:
    tale.call(10, key="k1", value="k1=7")
    tale.call(20, key="k1", value="")
    assert tale.broken() == []
    tale.call(30, key="k1", value="k11=7")
    assert tale.broken() == ["own_value"]


# unchanged


@pytest.mark.parametrize("after", [{"a": "2"}, {}, {"a": "1", "b": "1"}])
def test_whatever_a_new_control_plane_changes_is_found(tale: Tale, after: dict[str, str]) -> None:
    tale.events.append(Kept(0, {"a": "1"}, {"a": "1"}))
    assert tale.broken() == []
    tale.events.append(Kept(0, {"a": "1"}, after))
    assert tale.broken() == ["unchanged"]


# recovered


def test_an_upstream_that_nobody_gets_an_answer_of_any_more_is_found(tale: Tale) -> None:
    tale.call(10)
    tale.fault(100, 200, "u")
    tale.call(150, failure="cut")
    assert tale.broken() == ["recovered"]
    tale.call(300)
    assert tale.broken() == []


# The file and the schedule


def test_a_history_is_read_as_it_was_written_and_half_a_line_never_happened(tmp_path: Path) -> None:
    events: list[Event] = [Sent(1, 1, "u", "c", pinned=True, key="k"), Told(2, 1, value="k=1"), Kept(3, {"a": "b"}, {})]
    path = tmp_path / "history.jsonl"
    recorder = Recorder(path)
    for event in events:
        recorder.add(event)
    recorder.close()
    with path.open("ab") as file:
        file.write(b'{"type":"sent","at":')
    assert read(path) == events


def test_a_schedule_is_that_of_its_seed_and_plays_each_kind_in_each_deck() -> None:
    first, again = schedule(7, list(Kind)), schedule(7, reversed(Kind))
    steps = [next(first) for _ in range(2 * len(Kind))]
    assert steps == [next(again) for _ in steps]
    assert {step.kind for step in steps[: len(Kind)]} == {step.kind for step in steps[len(Kind) :]} == set(Kind)
