"""Claims about `wire.py`: milliseconds and page tokens."""

from __future__ import annotations

import base64

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from retinue_server.runtime import wire
from retinue_server.runtime.errors import InvalidArgument, OutOfRange, Reason, Violation


@given(st.integers(wire.MIN_TIMESTAMP_MS, wire.MAX_TIMESTAMP_MS))
def test_an_instant_survives_the_wire(ms: int) -> None:
    violations: list[Violation] = []
    assert wire.timestamp_ms(wire.to_timestamp(ms), "t", violations) == ms
    assert not violations


@given(st.integers(-wire.MAX_DURATION_MS, wire.MAX_DURATION_MS))
def test_a_duration_survives_the_wire(ms: int) -> None:
    violations: list[Violation] = []
    low = -wire.MAX_DURATION_MS
    assert wire.duration_ms(wire.to_duration(ms), "d", violations, low=low) == ms
    assert not violations


def test_parts_of_a_millisecond_round_up() -> None:
    none: list[Violation] = []
    assert wire.duration_ms(Duration(nanos=1), "d", none) == 1
    assert wire.duration_ms(Duration(nanos=-1), "d", none, low=-5) == 0
    assert wire.timestamp_ms(Timestamp(seconds=-1, nanos=1), "t", none) == -999
    assert not none


def test_what_is_out_of_range_is_named_with_its_limits() -> None:
    found: list[Violation] = []
    assert wire.duration_ms(Duration(seconds=61), "wait_duration", found, high=60_000) == 0
    assert wire.timestamp_ms(Timestamp(seconds=5), "start_time", found, low=6_000) == 6_000
    assert wire.duration_ms(Duration(seconds=1, nanos=-1), "mixed", found) == 0
    assert wire.timestamp_ms(Timestamp(nanos=-1), "below", found, low=7) == 7
    assert [v.field for v in found] == ["wait_duration", "start_time", "mixed", "below"]
    assert "0 s to 60 s" in found[0].description
    assert "1970-01-01T00:00:06Z" in found[1].description


def test_a_page_token_gives_its_position_back_and_the_empty_one_none() -> None:
    tokens = wire.PageTokens("tasks", 1, tuple[int, str])
    assert tokens.decode(tokens.encode((5, "x"))) == (5, "x")
    assert tokens.decode("") is None


@pytest.mark.parametrize(
    "token",
    [
        "!",
        "AAAA",
        "a",
        "é",
        base64.urlsafe_b64encode(b"[" * 1500).decode(),
        "A" * 100_000,
        base64.urlsafe_b64encode(b'["tasks",1,["no",5]]').decode(),
    ],
)
def test_a_malformed_page_token_is_an_invalid_argument_that_names_its_field(token: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        wire.PageTokens("tasks", 1, tuple[int, str]).decode(token)
    assert [v.field for v in caught.value.violations] == ["page_token"]


@pytest.mark.parametrize(("kind", "version"), [("tasks", 1), ("queues", 2)])
def test_a_page_token_of_another_list_or_version_is_out_of_range(kind: str, version: int) -> None:
    old = wire.PageTokens(kind, version, int).encode(5)
    with pytest.raises(OutOfRange) as caught:
        wire.PageTokens("tasks", 2, int).decode(old)
    assert caught.value.reason is Reason.PAGE_TOKEN_EXPIRED


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, 10**30])
def test_a_number_that_no_store_takes_makes_a_page_token_malformed(number: int) -> None:
    made_up = base64.urlsafe_b64encode(f'["tasks",1,["a",{number}]]'.encode()).rstrip(b"=").decode()
    with pytest.raises(InvalidArgument):
        wire.PageTokens("tasks", 1, tuple[str, wire.Int64]).decode(made_up)
