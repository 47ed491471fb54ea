"""Claims on the parts of the scoreboard that decide: statistics, exact delivery, goals, tables, arrivals."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import turns
from bench.adapter import cells as adapter_cells
from bench.adapter import page as adapter_page
from bench.adapter.apps import LINES
from bench.adapter.apps import page as app_page
from bench.adapter.collecting import OURS as ADAPTER
from bench.adapter.collecting import PARSER
from bench.ambassador import cells as ambassador_cells
from bench.ambassador import page as ambassador_page
from bench.ambassador.declaring import growth
from bench.ambassador.players import NUTCRACKER, in_turns
from bench.elections import cells, page
from bench.figures import Spread, percentile, ratio, spread, undelivered
from bench.goals import Goal, judged, outcome
from bench.open_loop import arrivals
from bench.processes import Failure
from bench.results import Played, PlayedCell, Results, load, store
from bench.scatter import cells as scatter_cells
from bench.scatter import page as scatter_page
from bench.scatter.overhead import BARE, NODE, OURS
from bench.scatter.players import pool
from bench.tables import number, render
from hypothesis import given
from hypothesis import strategies as some


def played(*rates: float, void: str = "") -> Played:
    return Played(100, [{"rate": rate, "server_cpu_us": 10.0} for rate in rates], void)


def results(**systems: Played) -> Results:
    return Results(cells={"process": PlayedCell("Processing", "pinned", systems)})


TWICE = Goal("processing", "process", 2, "bullmq")


def test_a_ratio_is_taken_within_each_round_before_its_median() -> None:
    # The machine was twice as slow in the second round; both suffered.
    assert ratio([100, 50, 90], [50, 25, 30]) == Spread(2, 2, 3)


def test_systems_with_different_numbers_of_rounds_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio([1, 2], [1])


def test_nothing_has_no_median_and_no_percentile() -> None:
    with pytest.raises(ValueError, match="nothing"):
        spread([])
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 0.5)


@given(some.lists(some.floats(0, 1e6), min_size=1), some.sampled_from([0.5, 0.99, 0.999]))
def test_a_percentile_is_the_smallest_value_that_its_share_does_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


def test_a_delivery_of_each_task_once_is_right_in_any_order() -> None:
    assert undelivered(range(4), [2, 0, 3, 1]) == ""


@pytest.mark.parametrize(
    ("handled", "wrong"),
    [
        ([0, 1], "1 missing"),
        ([0, 1, 2, 2, 2], "1 handled more than once"),
        ([0, 1, 2, 7], "1 foreign"),
        ([0, 0, 9], "2 missing, 1 foreign, 1 handled more than once"),
    ],
)
def test_a_delivery_says_what_is_wrong_with_it(handled: list[int], wrong: str) -> None:
    assert undelivered(range(3), handled) == wrong


def test_a_goal_is_met_or_missed_by_a_share_of_it() -> None:
    assert outcome(TWICE, results(retinue=played(200), bullmq=played(80))) == (Spread(2.5, 2.5, 2.5), "met")
    assert outcome(TWICE, results(retinue=played(150), bullmq=played(100)))[1] == "**missed** by 25%"
    most = Goal("idle", "idle", 0.002, figure="idle_share", at_most=True, unit="cores")
    assert judged(most, 0.002) == "met"
    assert judged(most, 0.003) == "**missed** by 50%"


def test_a_void_cell_meets_no_goal_and_says_why() -> None:
    found = results(retinue=played(200, void="3 missing"), bullmq=played(1))
    assert outcome(TWICE, found) == (None, "void: 3 missing")
    assert "void: 3 missing" in render(found)


def test_a_peer_that_did_not_play_is_no_victory() -> None:
    assert outcome(TWICE, results(retinue=played(200))) == (None, "not played")


def test_a_table_has_a_row_for_each_system_with_its_ratio() -> None:
    table = render(results(retinue=played(30_000, 40_000), bullmq=played(10_000, 10_000)))
    assert "| retinue | 100 | 35,000 (30,000-40,000) | 1× (1-1) | 10 |" in table
    assert "| bullmq | 100 | 10,000 (10,000-10,000) | 3.5× (3-4) | 10 |" in table


def test_figures_have_three_significant_digits() -> None:
    assert [number(value) for value in (12_345, 999.6, 12.345, 0.0012345, 0)] == [
        "12,300",
        "1,000",
        "12.3",
        "0.00123",
        "0",
    ]


def test_results_are_read_back_as_they_were_stored(tmp_path: Path) -> None:
    stored = results(retinue=played(1.5, 2.25), bullmq=played(void="not built: why"))
    store(tmp_path / "some" / "results.json", stored)
    assert load(tmp_path / "some" / "results.json") == stored
    assert load(tmp_path / "none.json") == Results()


def test_arrivals_are_drawn_again_alike_and_come_at_their_rate() -> None:
    times = list(arrivals(1_000, 5, seed=1))
    assert times == list(arrivals(1_000, 5, seed=1)) != list(arrivals(1_000, 5, seed=2))
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 5
    assert 4_500 < len(times) < 5_500


@pytest.mark.parametrize("goal", page.GOALS, ids=lambda goal: goal.what)
def test_every_goal_of_leader_election_is_about_a_system_that_plays(goal: Goal) -> None:
    assert goal.system in cells.CELLS[goal.cell].systems
    assert goal.figure in page.FIGURES


@pytest.mark.parametrize("goal", scatter_page.GOALS, ids=lambda goal: goal.what)
def test_every_goal_of_scatter_gather_is_about_a_cell_and_a_figure_that_is_shown(goal: Goal) -> None:
    assert goal.cell in scatter_cells.CELLS
    assert goal.figure in scatter_page.FIGURES


def test_the_page_of_scatter_gather_says_what_was_met_in_the_rounds_that_were_played_together() -> None:
    costs = {OURS: (80.0, 90.0), BARE: (60.0, 60.0), NODE: (120.0, 120.0)}
    rates = {OURS: 400.0, BARE: 500.0, NODE: 300.0}
    systems = {name: Played(4, [{"cpu_us": c, "rate": rates[name]} for c in each]) for name, each in costs.items()}
    text = scatter_page.page(Results(cells={"overhead_32": PlayedCell("What it costs", "4 callers", systems, "now")}))
    assert "| CPU per leaf, fan-out 32 | ≤ 1.5× bare loop | 1.42× (1.33-1.5) | met |" in text
    assert "| requests/s, fan-out 32 | ≥ 1.5× root on Node | 1.33× (1.33-1.33) | **missed** by 11% |" in text
    assert "overload: goodput" not in text, "what was not played is no goal that was met or missed"


@pytest.mark.parametrize("goal", ambassador_page.GOALS, ids=lambda goal: goal.what)
def test_every_goal_of_the_ambassador_is_about_a_cell_and_a_figure_that_is_shown(goal: Goal) -> None:
    assert goal.cell in ambassador_cells.CELLS
    assert goal.figure in ambassador_page.FIGURES


def test_the_page_of_the_ambassador_compares_what_was_played_together() -> None:
    rates = {OURS: (90.0, 60.0), NUTCRACKER: (100.0, 50.0)}
    systems = {name: Played(2, [{"rate": rate, "p99_us": 5.0} for rate in each]) for name, each in rates.items()}
    cell = PlayedCell("memcached", "8 clients", systems, "now")
    text = ambassador_page.page(Results(cells={"memcached_get_8": cell}))
    assert "| memcached get, 8 clients: requests/s | ≥ 1× nutcracker | 1.05× (0.9-1.2) | met |" in text
    assert "HTTP: p99" not in text, "what was not played is no goal that was met or missed"


def test_each_is_measured_in_its_turn_and_the_median_counts() -> None:
    told = {"a": iter([1.0, 9.0, 2.0]), "b": iter([3.0, 3.0, 4.0])}
    order = []

    def measure(name: str) -> dict[str, float]:
        order.append(name)
        return {"rate": next(told[name])}

    assert in_turns(["a", "b"], measure, 3) == {"a": {"rate": 2.0}, "b": {"rate": 3.0}}
    assert order == ["a", "b"] * 3


def test_what_an_upstream_costs_among_500_is_compared_with_what_it_costs_among_100() -> None:
    sizes = [{"server_mib": 40.0, "envoy_mib": 60.0}, {"server_mib": 44.0, "envoy_mib": 64.0}]
    found = growth([5.0, 2.0, 3.0], [*sizes, {"server_mib": 74.0, "envoy_mib": 94.0}])
    assert found["declare_of_100"] == 1.5
    assert found["upstream_kib"] == 60 / 400 * 1024
    assert found["memory_of_100"] == (60 / 400) / (8 / 80)
    assert (found["server_mib"], found["envoy_mib"]) == (74.0, 94.0)


@pytest.mark.parametrize("goal", adapter_page.GOALS, ids=lambda goal: goal.what)
def test_every_goal_of_the_adapter_is_about_a_cell_and_a_figure_that_is_shown(goal: Goal) -> None:
    assert goal.cell in adapter_cells.CELLS
    assert goal.figure in adapter_page.FIGURES


def test_the_page_of_the_adapter_says_what_was_met_in_the_rounds_that_were_played_together() -> None:
    costs = {ADAPTER: (26.0, 10.0), PARSER: (20.0, 20.0)}
    systems = {name: Played(3, [{"cpu_us": cost} for cost in each]) for name, each in costs.items()}
    text = adapter_page.page(Results(cells={"cost": PlayedCell("What it costs", "five apps", systems, "now")}))
    assert "| CPU per collected series | ≤ 1.3× prometheus_client | 0.9× (0.5-1.3) | met |" in text
    assert "watchers of 100 series" not in text, "what was not played is no goal that was met or missed"


def test_an_app_of_the_adapter_shows_so_many_lines_and_all_values_change() -> None:
    before, after = (
        dict(line.rsplit(" ", 1) for line in app_page(1, version).decode().splitlines() if not line.startswith("#"))
        for version in (0, 1)
    )
    assert len(before) == LINES
    assert before.keys() == after.keys()
    same = [line for line, value in before.items() if after[line] == value]
    assert len(same) < LINES / 100


def test_a_system_that_fails_is_void_and_the_others_play_on() -> None:
    def works(name: str, count: int) -> dict[str, dict[str, float]]:
        return {name: {"rate": float(count)}}

    def fails(name: str, count: int) -> dict[str, dict[str, float]]:
        raise Failure("it | broke")

    cell = turns.Cell("a cell", "", {"a": turns.Player(works, 3), "b": turns.Player(fails, 3)})
    played = turns.play(cell, ["a", "b"], 2)
    assert (played["a"].values("rate"), played["a"].void) == ([3.0, 3.0], "")
    assert (played["b"].rounds, played["b"].void) == ([], "it / broke")


def test_shards_of_the_bench_have_the_endpoints_that_they_are_given() -> None:
    made = pool([["a:1", "b:1"], ["c:1"]], transport="stream")
    assert made["shards"] == [
        {"shard_id": "s0", "endpoints": ["a:1", "b:1"]},
        {"shard_id": "s1", "endpoints": ["c:1"]},
    ]
    assert (made["merge"], made["transport"]) == ("concat", "stream")
