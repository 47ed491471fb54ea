"""Values to payloads and back."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinue.client import payload as payloads
from retinue.client.queue import duration, failure, timestamp

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: not number.is_integer())
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(VALUES.filter(lambda value: isinstance(value, list | dict)))
def test_json_comes_back_as_it_was_whole_numbers_of_any_size_too(value: Any) -> None:
    assert payloads.value(payloads.payload(value)) == value


@given(st.text(st.characters(codec="utf-8")) | st.binary())
def test_text_and_bytes_come_back_as_they_were(value: str | bytes) -> None:
    assert payloads.value(payloads.payload(value)) == value


@given(VALUES.filter(lambda value: isinstance(value, list | dict)) | st.text(st.characters(codec="utf-8")))
def test_a_blob_loads_as_the_value_would_have_inline(value: Any) -> None:
    inline = payloads.payload(value)
    assert payloads.typed(payloads.raw(inline), payloads.blob_content_type(inline)) == payloads.value(inline)


@given(st.binary())
def test_a_files_bytes_survive_being_made_readable(content: bytes) -> None:
    assert payloads.raw(payloads.readable(content)) == content


def test_bytes_that_are_text_are_sent_as_text_and_others_are_not() -> None:
    assert payloads.readable("höhe".encode()).text == "höhe"
    assert payloads.readable(b"a\0b").data == b"a\0b"
    assert payloads.readable(b"\xff").data == b"\xff"


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}, {1, 2}, object()])
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        payloads.payload(value)


def test_text_that_says_it_is_json_is_parsed() -> None:
    content = payloads.payload(json.dumps({"a": 1}), "application/json; charset=utf-8")
    assert payloads.value(content) == {"a": 1}


def test_a_time_without_a_zone_is_refused_and_durations_keep_microseconds() -> None:
    with pytest.raises(ValueError, match="zone"):
        timestamp(datetime(2027, 1, 1))  # noqa: DTZ001 - the offence under test
    exact = timestamp(datetime(2027, 1, 1, tzinfo=UTC))
    assert exact is not None
    assert exact.ToJsonString() == "2027-01-01T00:00:00Z"
    span = duration(timedelta(microseconds=1_500_001))
    assert span is not None
    assert (span.seconds, span.nanos) == (1, 500_001_000)
    assert duration(None) is None


def test_a_failure_is_cut_to_what_the_contract_takes_keeping_the_end() -> None:
    found = failure(b"t", "R" * 500, "x" * 5000 + "end")
    assert len(found.failure.reason) == 128
    assert len(found.failure.message) == 4096
    assert found.failure.message.endswith("end")
