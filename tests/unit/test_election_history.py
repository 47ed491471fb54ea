"""The rules of leadership: what they let pass, and above all what they must reject."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from support.election_faults import clocks
from support.election_faults.checks import check, take_overs
from support.election_faults.history import Belief, Fault, Interval, Reader, Recorder, Write, intervals
from support.election_faults.report import percentile
from support.election_faults.schedule import Kind, schedule
from support.history.recorder import boot_ns

MS = 1_000_000
BOUND = 1_000 * MS


class Tale:
    """A history made up by a test; times in milliseconds."""

    def __init__(self) -> None:
        self.beliefs: list[Belief] = []
        self.deaths: dict[str, int] = {}
        self.writes: list[Write] = []
        self.faults: list[Fault] = []

    def led(self, who: str, token: int, begin: int, until: int, *, done: int | None = None, domain: str = "d") -> None:
        self.beliefs.append(Belief(begin * MS, who, "elected", domain, token, until * MS))
        if done is not None:
            self.beliefs.append(Belief(done * MS, who, "done", domain, token))

    def renewed(self, who: str, token: int, at: int, until: int) -> None:
        self.beliefs.append(Belief(at * MS, who, "renewed", "d", token, until * MS))

    def died(self, who: str, at: int) -> None:
        self.deaths[who] = at * MS

    def wrote(self, who: str, token: int, at: int, *, decided: int | None = None, accepted: bool = True) -> None:
        self.writes.append(Write(at * MS, who, "d", token, (at if decided is None else decided) * MS, accepted))

    def fault(self, begin: int, end: int, token: int = 0, *, of_engine: bool = False) -> None:
        self.faults.append(Fault("fault", begin * MS, end * MS, token, of_engine))

    def terms(self) -> list[Interval]:
        return intervals(self.beliefs, self.deaths)

    def broken(self) -> list[str]:
        return [finding.check for finding in check(self.beliefs, self.deaths, self.writes, self.faults, BOUND)]


@pytest.fixture
def tale() -> Tale:
    return Tale()


def test_an_orderly_history_breaks_no_rule(tale: Tale) -> None:
    tale.led("a", 1, 0, 500, done=300)
    tale.led("b", 2, 301, 800)
    tale.renewed("b", 2, 600, 1_000)
    tale.wrote("a", 1, 200)
    tale.wrote("b", 2, 400)
    tale.fault(700, 900, token=2)
    tale.led("c", 3, 1_001, 1_500)
    assert tale.broken() == []


# Overlaps


def test_two_leaders_at_a_time_are_found(tale: Tale) -> None:
    tale.led("a", 1, 0, 500)
    tale.led("b", 2, 499, 900)
    assert tale.broken() == ["overlap"]


def test_a_deadline_that_was_moved_counts(tale: Tale) -> None:
    tale.led("a", 1, 0, 100)
    tale.renewed("a", 1, 90, 500)
    tale.led("b", 2, 400, 600)
    assert tale.broken() == ["overlap"]


def test_a_deadline_never_moves_back(tale: Tale) -> None:
    tale.led("a", 1, 0, 500)
    tale.renewed("a", 1, 90, 200)
    tale.led("b", 2, 400, 600)
    assert tale.broken() == ["overlap"]


def test_a_short_term_inside_a_long_one_and_the_next_after_it_are_both_found(tale: Tale) -> None:
    tale.led("a", 1, 0, 900)
    tale.led("b", 2, 100, 200)
    tale.led("c", 3, 300, 400)
    assert tale.broken() == ["overlap", "overlap"]


def test_leaders_of_different_domains_overlap_all_the_same(tale: Tale) -> None:
    tale.led("a", 1, 0, 500)
    tale.led("b", 2, 400, 900, domain="other")
    assert tale.broken() == ["overlap"]


def test_one_process_with_two_terms_at_a_time_is_found(tale: Tale) -> None:
    tale.led("a", 1, 0, 500)
    tale.led("a", 2, 400, 900)
    assert tale.broken() == ["overlap"]


def test_who_has_died_or_stopped_working_believes_nothing(tale: Tale) -> None:
    tale.led("a", 1, 0, 500)
    tale.died("a", 100)
    tale.led("b", 2, 101, 700, done=200)
    tale.led("c", 3, 201, 600)
    assert tale.broken() == []


def test_a_process_that_is_done_late_led_until_its_deadline_only(tale: Tale) -> None:
    tale.led("a", 1, 0, 500, done=5_000)
    tale.led("b", 2, 500, 900)
    assert tale.broken() == []


def test_touching_is_no_overlap(tale: Tale) -> None:
    tale.led("a", 1, 0, 500)
    tale.led("b", 2, 500, 900)
    assert tale.broken() == []


# Tokens


@pytest.mark.parametrize("token", [1, 2], ids=["lower", "the same"])
def test_a_token_that_does_not_rise_is_found(tale: Tale, token: int) -> None:
    tale.led("a", 2, 0, 100)
    tale.led("b", token, 200, 300)
    assert tale.broken() == ["token"]


def test_a_token_that_falls_behind_any_before_it_is_found(tale: Tale) -> None:
    tale.led("a", 5, 0, 100)
    tale.led("b", 2, 200, 300)
    tale.led("c", 4, 400, 500)
    assert tale.broken() == ["token", "token"]


def test_tokens_of_different_domains_are_not_compared(tale: Tale) -> None:
    tale.led("a", 5, 0, 100)
    tale.led("b", 1, 200, 300, domain="other")
    assert tale.broken() == []


# Writes


def test_a_stale_write_that_was_accepted_is_found(tale: Tale) -> None:
    tale.led("a", 1, 0, 100)
    tale.led("b", 2, 200, 300)
    tale.wrote("b", 2, 210)
    tale.wrote("a", 1, 220, decided=90)
    assert tale.broken() == ["stale write"]


def test_a_late_write_may_come_before_the_next_leader_s_or_be_refused(tale: Tale) -> None:
    tale.led("a", 1, 0, 100)
    tale.led("b", 2, 200, 300)
    tale.wrote("a", 1, 205, decided=90)
    tale.wrote("b", 2, 210)
    tale.wrote("a", 1, 220, decided=95, accepted=False)
    assert tale.broken() == []


@pytest.mark.parametrize(("who", "token", "decided"), [("a", 1, 101), ("b", 1, 50), ("a", 2, 50)])
def test_a_write_that_no_leader_decided_is_found(tale: Tale, who: str, token: int, decided: int) -> None:
    tale.led("a", 1, 0, 100)
    tale.wrote(who, token, 110, decided=decided)
    assert tale.broken() == ["undecided write"]


def test_what_a_process_decides_while_it_is_killed_is_its_own(tale: Tale) -> None:
    tale.led("a", 1, 0, 100)
    tale.died("a", 50)
    tale.wrote("a", 1, 52, decided=51)
    assert tale.broken() == []


# Liveness


def test_nobody_leading_for_too_long_after_a_fault_is_found(tale: Tale) -> None:
    tale.led("a", 1, 0, 100)
    tale.fault(50, 200)
    tale.led("b", 2, 1_201, 1_300)
    assert tale.broken() == ["stuck"]


def test_a_leader_that_stays_or_comes_in_time_is_alive(tale: Tale) -> None:
    tale.led("a", 1, 0, 300)
    tale.fault(50, 200)
    tale.fault(250, 400)
    tale.led("b", 2, 1_300, 1_400)
    assert tale.broken() == []


def test_a_take_over_counts_from_the_fault_and_from_the_return_of_an_engine(tale: Tale) -> None:
    tale.led("a", 1, 0, 100)
    tale.fault(50, 60, token=1)
    tale.led("b", 2, 130, 400)
    tale.fault(200, 500, token=2, of_engine=True)
    tale.led("c", 3, 520, 900)
    assert [ns // MS for _, ns in take_overs(tale.terms(), tale.faults)] == [80, 20]


def test_a_fault_that_ended_no_term_took_over_nothing(tale: Tale) -> None:
    tale.led("a", 1, 0, 1_000)
    tale.fault(50, 60, token=1)
    tale.fault(900, 950, token=1)
    tale.led("b", 2, 1_100, 1_200)
    tale.fault(1_110, 1_120)
    assert [ns // MS for _, ns in take_overs(tale.terms(), tale.faults)] == [200]


def test_percentiles_are_by_nearest_rank() -> None:
    some = [ms * MS for ms in range(1, 201)]
    assert (percentile(some, 50), percentile(some, 99), percentile(some[:3], 99)) == ("100 ms", "198 ms", "3 ms")
    assert percentile([], 50) == "-"


# What it is made of


def test_what_was_recorded_is_read_and_half_a_line_is_left_for_later(tmp_path: Path, tale: Tale) -> None:
    tale.led("a", 1, 0, 500, done=300)
    recorder, reader = Recorder(tmp_path / "a.jsonl"), Reader(tmp_path)
    for belief in tale.beliefs:
        recorder.note(belief)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"at":')
    assert reader.look() == tale.beliefs
    assert reader.look() == tale.beliefs


def test_a_schedule_is_its_seed_s_and_plays_every_kind_in_each_deck() -> None:
    first, again = (list(itertools.islice(schedule(7, set(Kind)), 60)) for _ in range(2))
    assert first == again
    assert first != list(itertools.islice(schedule(8, set(Kind)), 60))
    assert {step.kind for step in first[:30]} == set(Kind)
    assert not {step.kind for step in itertools.islice(schedule(7, {Kind.KILL_APP}), 5)} - {Kind.KILL_APP}


def test_the_true_clock_is_that_of_the_kernel() -> None:
    before = boot_ns()
    now = clocks.true_boot_ns()
    assert before <= now <= boot_ns()
    assert clocks.true_boot_ns(10) < now


def test_servers_of_one_kernel_are_not_given_boot_clocks_of_different_rates() -> None:
    chance = random.Random(1)
    given = [clocks.of_server(chance, one_kernel=True) for _ in range(50)]
    assert {clock.rate for clock in given} == {1.0}
    assert {clocks.of_server(chance, one_kernel=False).rate for _ in range(50)} == {0.96, 1.0, 1.04}
