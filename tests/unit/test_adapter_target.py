"""Claims about how a target does, on a played clock: its states, what is shown of it, how fast its signals grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from retinue_server.adapter.core.points import SIGNALS, Family, Series, Signal, Type
from retinue_server.adapter.core.spec import Kind, Spec, State
from retinue_server.adapter.core.target import Target

STALE_MS = 50_000


class Played:
    """A target whose collections the test makes, at times that it says."""

    def __init__(self) -> None:
        self.target = Target(Spec("shop", Kind.PROMETHEUS, "http://127.0.0.1:1"))

    def good(
        self, now_ms: int, *requests: float, rejected: dict[str, int] | None = None, limited: bool = False
    ) -> State:
        families = [Family("x", Type.GAUGE, "", "", [Series((), 1.0)], b"x 1.0\n")]
        self.target.succeeded(
            families,
            signals(*requests),
            now_ms=now_ms,
            took_ms=1,
            rejected=rejected or {},
            examples=dict.fromkeys(rejected or {}, "an example"),
            limited=limited,
        )
        return self.target.status.state

    def bad(self, now_ms: int, *, misconfigured: bool = False) -> State:
        self.target.failed("it is away", now_ms=now_ms, took_ms=1, misconfigured=misconfigured, stale_after_ms=STALE_MS)
        return self.target.status.state


def signals(*values: float) -> Sequence[Signal]:
    given: list[float | None] = [*values, *[None] * len(SIGNALS)]
    return [Signal(value, "" if value is not None else "absent", "") for value in given[: len(SIGNALS)]]


@pytest.fixture
def played() -> Played:
    return Played()


def test_it_is_pending_until_something_was_heard(played: Played) -> None:
    assert played.target.status.state is State.PENDING
    assert played.target.is_stale
    assert not played.target.collected.is_set()
    assert {one.absent for one in played.target.shown.signals} == {"nothing was collected yet"}


def test_it_is_up_when_all_was_taken(played: Played) -> None:
    assert played.good(1000) is State.UP
    assert played.target.status.message == ""
    assert played.target.collected.is_set()
    assert not played.target.is_stale


def test_refusals_make_it_degraded_while_there_are_new_ones(played: Played) -> None:
    assert played.good(1000, rejected={"bad_name": 2}) is State.DEGRADED
    assert played.target.status.message == "bad_name: 2, such as an example"
    assert played.good(2000, rejected={"bad_name": 2}) is State.UP
    assert played.good(3000, rejected={"bad_name": 3}) is State.DEGRADED


def test_refusals_of_a_new_worker_are_new_though_it_counts_anew(played: Played) -> None:
    played.good(1000, rejected={"bad_name": 5})
    assert played.good(2000, rejected={"bad_name": 1}) is State.DEGRADED


def test_more_than_the_limits_makes_it_limited(played: Played) -> None:
    assert played.good(1000, rejected={"series_limit": 1}, limited=True) is State.LIMITED


def test_what_was_good_stands_until_it_is_too_old(played: Played) -> None:
    played.good(1000)
    assert played.bad(1000 + STALE_MS - 1) is State.STALE
    assert played.target.shown.series == 1
    assert not played.target.is_stale
    assert played.bad(1000 + STALE_MS) is State.DOWN
    assert played.target.is_stale
    assert played.target.shown.series == 0
    assert [family.name for family in played.target.shown.families] == ["x"], "who asks for stale series gets them"
    assert played.target.shown.time_ms == 1000
    assert {one.absent for one in played.target.shown.signals} == {"it is not collected: it is away"}
    assert played.good(1000 + 2 * STALE_MS) is State.UP
    assert not played.target.is_stale


def test_it_is_down_at_once_if_nothing_was_ever_good(played: Played) -> None:
    assert played.bad(1000) is State.DOWN
    assert played.target.collected.is_set()


def test_misconfigured_shows_what_was_there_and_not_for_ever(played: Played) -> None:
    played.good(1000)
    assert played.bad(2000, misconfigured=True) is State.MISCONFIGURED
    assert played.target.shown.series == 1
    assert played.bad(1000 + STALE_MS, misconfigured=True) is State.MISCONFIGURED
    assert played.target.is_stale


def test_times_tell_the_last_collection_and_the_last_good_one(played: Played) -> None:
    played.good(1000)
    played.bad(3000)
    assert (played.target.status.last_ms, played.target.status.success_ms) == (3000, 1000)


@pytest.mark.parametrize(
    ("then", "now", "rate"),
    [
        ((10.0,), (40.0,), 15.0),
        ((10.0,), (10.0,), 0.0),
        ((40.0,), (10.0,), None),  # it was reset
        ((), (10.0,), None),
        ((10.0,), (), None),
    ],
)
def test_rates_are_of_the_last_two_collections(played: Played, then: Any, now: Any, rate: float | None) -> None:
    played.good(1000, *then)
    played.good(3000, *now)
    assert played.target.shown.rates[0] == rate


def test_the_first_collection_and_two_at_one_time_have_no_rate(played: Played) -> None:
    played.good(1000, 5.0)
    assert played.target.shown.rates[0] is None
    played.good(1000, 9.0)
    assert played.target.shown.rates[0] is None


def test_a_rate_spans_a_time_without_collections_and_none_of_being_down(played: Played) -> None:
    played.good(1000, 5.0)
    played.bad(2000)
    played.good(3000, 9.0)
    assert played.target.shown.rates[0] == 2.0
    played.bad(3000 + STALE_MS)
    played.good(3000 + 2 * STALE_MS, 9.0)
    assert played.target.shown.rates[0] is None
