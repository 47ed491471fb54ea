"""Trace context without OpenTelemetry."""

from __future__ import annotations

import pytest

from retinue.client import trace

VALID = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        VALID[:-3],
        "ff" + VALID[2:],
        VALID.replace("b7ad6b7169203331", "0" * 16),
        "00-" + "0" * 32 + VALID[35:],
    ],
)
def test_what_is_not_a_traceparent_is_none(text: str) -> None:
    assert trace.parse(text) is None


def test_a_child_stays_in_the_trace_and_is_a_new_span() -> None:
    child = trace.child_of(VALID)
    parent = trace.parse(VALID)
    assert parent is not None
    assert (child.trace_id, child.flags) == (parent.trace_id, "01")
    assert child.span_id != parent.span_id
    assert trace.parse(str(child)) == child


def test_work_runs_in_the_producers_trace_and_what_it_enqueues_continues_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACEPARENT", raising=False)
    assert trace.current() == ""
    with trace.consuming("q", "t", VALID) as work:
        inside = trace.current()
        assert trace.outgoing() == inside == work.traceparent
        assert inside.split("-")[1] == VALID.split("-")[1]
    assert trace.current() == ""
    assert trace.parse(trace.outgoing()) is not None, "without a trace a new one begins"


def test_the_environment_carries_the_trace_into_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEPARENT", VALID)
    assert trace.outgoing() == VALID
    monkeypatch.setenv("TRACEPARENT", "nonsense")
    assert trace.current() == ""
