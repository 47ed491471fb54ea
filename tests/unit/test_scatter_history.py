"""The rules of scatter/gather's histories: what they let pass, and above all what they must reject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import json
from support.scatter_faults.callers import answer, metrics, pieces
from support.scatter_faults.checks import ROOT, check
from support.scatter_faults.history import LEFT, Asked, Event, Fault, Gave, Got, Known, Piece, Ran, Reader, Story, Told

from retinue.scattergather.v1 import scattergather_service_pb2 as api

MS = 1_000_000
SLACK = 100 * MS
TIMEOUT = 1_000


class Tale:
    """A history made up by a test; times in milliseconds. Two shards of weight 2, each with two leaves."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.read_at = 100_000
        self.pool()

    def pool(self, **settings: Any) -> None:
        usual = {"idempotent": True, "ratio": 0.0, "burst": 2.0, "max_retries": 2, "hedged": True}
        replicas: dict[str, tuple[str, ...]] = {"s0": ("a", "b"), "s1": ("c", "d")}
        self.events = [event for event in self.events if not isinstance(event, Ran)]
        self.events.append(Ran("p", replicas, **usual | settings))

    def asked(self, request: str = "r", at: int = 0, **settings: Any) -> None:
        ms = {key: value * MS for key, value in settings.items() if key == "soft_ns"}
        self.events.append(Asked(at * MS, request, "", "p", {"s0": 2, "s1": 2}, TIMEOUT * MS, **settings | ms))

    def got(self, serial: int, leaf: str, at: int = 1, request: str = "r", left: int = TIMEOUT - 50) -> None:
        shard = "s0" if leaf in "ab" else "s1"
        self.events.append(Got(at * MS, leaf, serial, request, shard, 1, left * MS))

    def gave(self, serial: int, at: int = 2, end: str = "answered") -> None:
        self.events.append(Gave(at * MS, serial, end))

    def served(self, serial: int, leaf: str, at: int = 1, end: str = "answered", request: str = "r") -> None:
        """Got and gave."""
        self.got(serial, leaf, at, request)
        self.gave(serial, at + 1, end)

    def ok(self, *merged: tuple[str, int], at: int = 5, request: str = "r", **said: Any) -> None:
        """An answer that tells the truth, but for what is given."""
        found = tuple(Piece(*one) for one in merged)
        missing = {"s0", "s1"} - {shard for shard, _ in merged}
        true: dict[str, Any] = {
            "coverage": Known(4, 4 - 2 * len(missing), not missing),
            "failures": dict.fromkeys(missing, 14),
            "failed_by_code": {"UNAVAILABLE": len(missing)} if missing else {},
        }
        self.events.append(Told(at * MS, request, 0, pieces=found, **true | said))

    def error(self, code: int, *missing: str, at: int = 5, reason: str = "COVERAGE_NOT_MET", **said: Any) -> None:
        true: dict[str, Any] = {
            "coverage": Known(4, 4 - 2 * len(missing), complete=False),
            "failures": dict.fromkeys(missing, code),
            "failed_by_code": {"CODE": len(missing)},
        }
        self.events.append(Told(at * MS, "r", code, reason, **true | said))

    def fault(self, leaf: str, begin: int = 0, end: int = 10, **kind: bool) -> None:
        self.events.append(Fault("fault", begin * MS, end * MS, (leaf,), **kind))

    def both(self) -> None:
        """Each shard answers."""
        self.served(1, "a")
        self.served(2, "c")

    def broken(self) -> set[str]:
        return {finding.check for finding in check(Story(self.events, self.read_at * MS), SLACK)}


@pytest.fixture
def tale() -> Tale:
    return Tale()


def test_an_orderly_history_breaks_no_rule(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.ok(("s0", 1), ("s1", 2), attempts=2)
    tale.asked("q", at=10, min_coverage=0.5)
    tale.served(3, "b", at=11, request="q")
    tale.served(4, "d", at=11, end="UNAVAILABLE", request="q")
    tale.fault("d", 10, 20)
    tale.ok(("s0", 3), at=15, request="q")
    assert tale.broken() == set()


# What was merged


def test_two_replies_of_a_shard_in_one_answer_are_rejected(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.served(3, "b")
    tale.ok(("s0", 1), ("s0", 3), ("s1", 2), coverage=Known(4, 4, complete=True))
    assert "merged_once" in tale.broken()


def test_a_reply_of_nobody_is_rejected(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.ok(("s0", 1), ("s1", 3))
    assert "merged_once" in tale.broken()


def test_a_reply_of_another_shard_is_rejected(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.ok(("s0", 2), ("s1", 1))
    assert "merged_once" in tale.broken()


def test_a_reply_to_another_request_is_rejected(tale: Tale) -> None:
    tale.asked()
    tale.asked("q")
    tale.both()
    tale.served(3, "c", request="q")
    tale.ok(("s0", 1), ("s1", 3))
    assert "merged_once" in tale.broken()


def test_a_call_that_was_cancelled_gave_no_reply(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.served(3, "b", end="cancelled")
    tale.ok(("s0", 3), ("s1", 2))
    assert "merged_once" in tale.broken()


# What was said of it


def test_complete_although_a_shard_is_missing_is_rejected(tale: Tale) -> None:
    tale.asked(min_coverage=0.5)
    tale.both()
    tale.fault("c")
    tale.ok(("s0", 1), coverage=Known(4, 4, complete=True))
    assert "truthful" in tale.broken()


def test_incomplete_although_nothing_is_missing_is_rejected(tale: Tale) -> None:
    tale.asked(min_coverage=0.5)
    tale.both()
    tale.ok(("s0", 1), ("s1", 2), coverage=Known(4, 4, complete=False))
    assert "truthful" in tale.broken()


def test_weights_count(tale: Tale) -> None:
    tale.asked(min_coverage=0.5)
    tale.both()
    tale.fault("c")
    tale.ok(("s0", 1), coverage=Known(4, 1, complete=False))
    assert "truthful" in tale.broken()


def test_half_a_shard_counts_for_half_and_is_not_complete(tale: Tale) -> None:
    tale.asked(min_coverage=0.5)
    tale.served(1, "a", end="part")
    tale.served(2, "c")
    tale.ok(("s0", 1), ("s1", 2), coverage=Known(4, 3, complete=False), failures={"s0": 0})
    assert tale.broken() == set()
    tale.asked("q", min_coverage=0.5)
    tale.served(3, "a", end="part", request="q")
    tale.served(4, "c", request="q")
    tale.ok(("s0", 3), ("s1", 4), request="q")
    assert "truthful" in tale.broken()


def test_another_shard_is_said_to_be_missing(tale: Tale) -> None:
    tale.asked(min_coverage=0.5)
    tale.both()
    tale.fault("c")
    tale.ok(("s0", 1), failures={"s0": 14})
    assert "truthful" in tale.broken()


def test_missing_shards_that_are_not_counted_are_rejected(tale: Tale) -> None:
    tale.asked(min_coverage=0.5)
    tale.both()
    tale.fault("c")
    tale.ok(("s0", 1), failed_by_code={})
    assert "truthful" in tale.broken()


def test_an_error_whose_coverage_contradicts_its_shards_is_rejected(tale: Tale) -> None:
    tale.asked()
    tale.fault("c")
    tale.error(14, "s1", coverage=Known(4, 0, complete=False))
    assert "truthful" in tale.broken()


def test_a_refusal_without_the_shard_that_refused_is_rejected(tale: Tale) -> None:
    tale.asked()
    tale.error(3, "s1", reason="LEAF_REFUSED", failures={"s1": 1})
    assert "truthful" in tale.broken()


# What is enough


def test_a_strict_request_is_not_answered_in_part(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.fault("c")
    tale.ok(("s0", 1))
    assert tale.broken() == {"enough"}


def test_less_than_the_minimum_is_not_enough(tale: Tale) -> None:
    tale.asked(min_coverage=0.6)
    tale.both()
    tale.fault("c")
    tale.ok(("s0", 1))
    assert tale.broken() == {"enough"}


def test_nothing_is_no_answer_unless_it_was_asked_for(tale: Tale) -> None:
    tale.asked(min_coverage=0.0)
    tale.fault("a")
    tale.fault("c")
    tale.ok()
    assert tale.broken() == set()
    tale.asked("q", min_coverage=0.1)
    tale.ok(request="q")
    assert tale.broken() == {"enough"}


def test_an_error_although_the_minimum_is_met_is_rejected(tale: Tale) -> None:
    tale.asked(min_coverage=0.5)
    tale.fault("c")
    tale.error(14, "s1")
    assert tale.broken() == {"enough"}


def test_a_shard_is_waited_for_unless_the_policy_says_otherwise(tale: Tale) -> None:
    gone: dict[str, Any] = {"failures": {"s1": 1}, "failed_by_code": {"CANCELLED": 1}}
    for request, policy in (("k", {"first_k": 1}), ("s", {"soft_ns": 3}), ("r", {"soft_ns": 7})):
        tale.asked(request, min_coverage=0.5, **policy)
        assert tale.broken() <= {"in_time"}
        tale.served(ord(request), "a", request=request)
        tale.ok(("s0", ord(request)), request=request, **gone)
    assert tale.broken() == {"enough"}, "r is over before its soft deadline"


# Time


def test_an_answer_after_the_deadline_is_rejected(tale: Tale) -> None:
    tale.asked()
    tale.fault("c", 0, 3000)
    tale.error(4, "s1", at=TIMEOUT + 90)
    assert tale.broken() == set()
    tale.events.pop()
    tale.error(4, "s1", at=TIMEOUT + 110)
    assert tale.broken() == {"in_time"}


def test_a_request_that_is_never_answered_is_rejected(tale: Tale) -> None:
    tale.asked()
    assert tale.broken() == {"in_time"}


def test_a_call_that_goes_on_after_its_request_is_rejected(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.got(3, "b")
    tale.gave(3, at=90, end="cancelled")
    tale.ok(("s0", 1), ("s1", 2))
    assert tale.broken() == set()
    tale.got(4, "d")
    tale.gave(4, at=120, end="cancelled")
    assert tale.broken() == {"ended"}


def test_a_call_that_never_ends_is_rejected_unless_its_leaf_was_killed(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.got(3, "b")
    tale.ok(("s0", 1), ("s1", 2))
    assert tale.broken() == {"ended"}
    tale.fault("b", 3, 4, kills=True)
    assert tale.broken() == set()


def test_a_call_after_the_end_of_its_request_is_rejected_unless_it_was_held(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.ok(("s0", 1), ("s1", 2))
    tale.got(3, "b", at=300)
    tale.gave(3, at=301, end="cancelled")
    assert tale.broken() == {"ended"}
    tale.fault("b", 1, 250, holds=True)
    assert tale.broken() == set()


def test_a_call_that_has_no_less_time_than_its_request_is_rejected(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.ok(("s0", 1), ("s1", 2))
    tale.got(3, "b", left=TIMEOUT)
    tale.gave(3)
    assert tale.broken() == {"ended"}


def test_a_caller_that_leaves_takes_its_calls_along(tale: Tale) -> None:
    tale.asked()
    tale.got(1, "a")
    tale.gave(1, at=50, end="cancelled")
    tale.events.append(Told(5 * MS, "r", LEFT))
    assert tale.broken() == set()
    tale.got(2, "c")
    tale.gave(2, at=900, end="cancelled")
    assert tale.broken() == {"ended"}


# How many


def test_one_leaf_is_not_asked_twice_for_a_shard(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.served(3, "a")
    tale.ok(("s0", 1), ("s1", 2))
    assert tale.broken() == set(), "a second hedge goes to who was asked first"
    tale.pool(hedged=False)
    assert tale.broken() == {"bounded"}
    tale.pool()
    tale.served(4, "a")
    assert tale.broken() == {"bounded"}


def test_what_is_not_idempotent_is_asked_once(tale: Tale) -> None:
    tale.pool(idempotent=False, hedged=False)
    tale.asked()
    tale.both()
    tale.served(3, "b")
    tale.ok(("s0", 1), ("s1", 2))
    assert tale.broken() == {"bounded"}


def test_hedges_and_retries_stay_within_the_budget(tale: Tale) -> None:
    for number in range(3):
        request = f"r{number}"
        tale.asked(request)
        for serial, leaf in enumerate("abc", 10 * number):
            tale.served(serial, leaf, request=request)
        tale.ok(("s0", 10 * number), ("s1", 10 * number + 2), request=request)
    assert tale.broken() == {"bounded"}
    tale.pool(ratio=0.2)
    assert tale.broken() == set()
    tale.pool(roots=2)
    assert tale.broken() == set()


def test_what_the_root_says_of_its_hedges_counts_too(tale: Tale) -> None:
    tale.asked()
    tale.both()
    tale.ok(("s0", 1), ("s1", 2), hedges=2, retries=1)
    assert tale.broken() == {"bounded"}


# Why


def test_a_shard_that_nothing_ailed_is_not_missing(tale: Tale) -> None:
    tale.asked(min_coverage=0.5)
    tale.both()
    tale.ok(("s0", 1))
    assert tale.broken() == {"explained"}
    tale.fault("d", 4000, 5000)
    assert tale.broken() == {"explained"}, "it came later"
    tale.fault("d")
    assert tale.broken() == set()


def test_a_shard_with_a_healthy_replica_is_not_missing_while_there_is_budget(tale: Tale) -> None:
    tale.asked(min_coverage=0.5)
    tale.both()
    tale.ok(("s0", 1))
    tale.fault("c")
    assert tale.broken() == set()
    tale.pool(burst=8.0)
    assert tale.broken() == {"explained"}
    tale.fault("d")
    assert tale.broken() == set()


def test_time_is_not_over_before_it_is(tale: Tale) -> None:
    tale.asked()
    tale.fault("c")
    tale.error(4, "s1", at=500)
    assert tale.broken() == {"explained"}


def test_an_error_that_says_nothing_is_rejected_unless_the_root_was_hit(tale: Tale) -> None:
    tale.asked()
    tale.events.append(Told(5 * MS, "r", 13, "INTERNAL"))
    assert tale.broken() == {"explained"}
    tale.fault(ROOT)
    assert tale.broken() == set()


def test_a_root_may_have_too_much_to_do(tale: Tale) -> None:
    tale.asked()
    tale.events.append(Told(5 * MS, "r", 8, "SCATTER_LIMIT"))
    assert tale.broken() == set()


# How it is read


def test_what_an_answer_was_made_of_is_read_from_each_form_of_it() -> None:
    whole = api.ScatterResponse(payload=b"r s0 7\nr s1 8\n")
    assert list(pieces("r", whole)) == [Piece("s0", 7), Piece("s1", 8)]
    groups = api.ScatterResponse()
    groups.json.struct_value.update({"s0": 7.0})
    assert list(pieces("r", groups)) == [Piece("s0", 7)]
    each = api.ScatterResponse(collected={"replies": [{"shard_id": "s0", "payload": b"r s0 7\n"}]})  # type: ignore[arg-type] # as a dict
    assert list(pieces("r", each)) == [Piece("s0", 7)]


@pytest.mark.parametrize("payload", [b"q s0 7\n", b"r s1 7\n", b"r s0 7\nr s0 8\n", b"", b"r s0 x\n", b"\xff"])
def test_what_is_no_reply_to_the_request_has_no_number(payload: bytes) -> None:
    said = api.ScatterResponse(collected={"replies": [{"shard_id": "s0", "payload": payload}]})  # type: ignore[arg-type] # as a dict
    assert list(pieces("r", said)) == [Piece("s0", -1)]


def test_a_history_is_read_as_it_grows_and_outlives_half_a_line(tmp_path: Path) -> None:
    told, got, gave = (
        answer(1, "r", api.ScatterResponse(payload=b"r s0 7\n")),
        Got(1, "a", 2, "r", "s0", 1, 9),
        Gave(1, 2, "x"),
    )
    line = json.encode(told) + b"\n"
    path, reader = tmp_path / "a.jsonl", Reader(tmp_path)
    path.write_bytes(line[:20])
    assert reader.look() == []
    path.write_bytes(line + json.encode(got)[:20])
    (tmp_path / "b.jsonl").write_bytes(json.encode(gave) + b"\n")
    assert reader.look() == [told, gave]
    path.write_bytes(line + json.encode(got) + b"\n")
    assert reader.look() == [told, gave, got]
    assert (reader.got, reader.ended) == ({"r": {2}}, {2: gave})


def test_metrics_are_read_by_name_and_pool() -> None:
    text = 'retinue_scattergather_running{pool="a"} 2.0\nretinue_scattergather_running{pool="b"} 3.0\nother 1\n'
    assert metrics(text) == {"running": 5.0}
    assert metrics(text, "b") == {"running": 3.0}
