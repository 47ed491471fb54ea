"""Claims about who begins calls when, and about the latencies that hedges wait for."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as some
from support.scattergather_core import HeldClock, rest

from retinue_server.scattergather.core.rules import LatencyWindow
from retinue_server.scattergather.core.turns import Turns

BURST = 64


class Calls:
    """So many that a request is to make."""

    def __init__(self, name: str, count: int, log: list[str]) -> None:
        self.name, self.left, self._log = name, count, log

    def begin(self, most: int) -> int:
        begun = min(most, self.left)
        self.left -= begun
        self._log += [self.name] * begun
        return begun


@pytest.fixture
async def clock() -> HeldClock:
    return HeldClock()


@pytest.fixture
def log() -> list[str]:
    return []


async def test_a_request_that_is_alone_begins_at_once(clock: HeldClock, log: list[str]) -> None:
    Turns(clock).add(Calls("a", 10, log).begin)
    assert log == ["a"] * 10


async def test_after_a_burst_others_get_the_loop_first(clock: HeldClock, log: list[str]) -> None:
    turns = Turns(clock)
    turns.add(Calls("a", BURST + 1, log).begin)
    assert log == ["a"] * BURST
    await rest()
    assert log == ["a"] * (BURST + 1)


async def test_requests_begin_in_the_order_of_their_coming(clock: HeldClock, log: list[str]) -> None:
    turns = Turns(clock)
    for name in "abc":
        turns.add(Calls(name, BURST, log).begin)
    assert log == ["a"] * BURST
    for _ in range(3):
        await rest()
    assert log == ["a"] * BURST + ["b"] * BURST + ["c"] * BURST


async def test_while_more_come_the_next_burst_waits_but_not_for_ever(clock: HeldClock, log: list[str]) -> None:
    turns = Turns(clock)
    turns.add(Calls("a", BURST + 1, log).begin)
    began = clock.now()
    while len(log) == BURST:
        turns.refused()
        await asyncio.sleep(0)
    assert 0.02 - 1e-6 < clock.now() - began < 0.1


async def test_a_request_that_ended_begins_nothing_and_holds_nobody_up(clock: HeldClock, log: list[str]) -> None:
    turns = Turns(clock)
    ended = Calls("a", BURST * 2, log)
    turns.add(ended.begin)
    turns.add(Calls("b", 5, log).begin)
    ended.left = 0
    await rest()
    assert log == ["a"] * BURST + ["b"] * 5


@given(some.lists(some.floats(0.0001, 600), min_size=1, max_size=300), some.sampled_from([0.5, 0.9, 0.975, 0.99]))
def test_a_quantile_of_latencies_is_right_to_two_percent(latencies: list[float], q: float) -> None:
    window = LatencyWindow()
    for latency in latencies:
        window.add(latency)
    exact = sorted(latencies)[min(len(latencies) - 1, int(q * len(latencies)))]
    assert window.quantile(q) == pytest.approx(exact, rel=0.022)


def test_latencies_are_forgotten_when_newer_ones_have_come() -> None:
    window = LatencyWindow(10)
    assert window.quantile(0.9) == 0
    for latency in [5.0] * 10 + [0.01] * 10:
        window.add(latency)
    assert len(window) == 10
    assert window.quantile(0.99) == pytest.approx(0.01, rel=0.022)


def test_no_latency_is_too_short_or_too_long() -> None:
    window = LatencyWindow()
    for latency in (0.0, 1e-9, 3600.0):
        window.add(latency)
    assert window.quantile(0.99) == pytest.approx(3600, rel=0.022)
