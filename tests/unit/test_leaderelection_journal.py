"""What is told of every transition of a term."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pytest
from support.leaderelection_core import HeldClock, Server, Store

from retinue_server.leaderelection import journal
from retinue_server.leaderelection.core.requests import Token, Transition
from retinue_server.leaderelection.engine import EndReason
from retinue_server.runtime import telemetry


async def test_every_transition_is_told_with_its_reason() -> None:
    clock = HeldClock()
    told: list[Transition] = []
    server = Server(Store(clock), journal=told.append)
    await server.elections.start()
    app = server.app("a", lease_ms=6_000).start()
    await app.read()
    server.engine.cut = True
    for _ in range(14):
        await clock.advance(250)
        app.beat()
    server.engine.cut = False
    for _ in range(8):
        await clock.advance(250)
        app.beat()
    await server.elections.leave(app.session)
    await server.elections.stop()
    assert [(one.kind, one.reason) for one in told] == [
        ("elected", EndReason.UNKNOWN),
        ("at risk", EndReason.UNKNOWN),
        ("renewed", EndReason.UNKNOWN),
        ("ended", EndReason.RESIGNED),
    ]
    assert {(one.election_id, one.candidate_id, one.token.value) for one in told} == {("e", "a", 1)}


class Tracer:
    """Keeps what it is asked for."""

    on = True

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []

    def span(self, name: str, parent: str | None = None, **options: Any) -> Any:
        assert parent == "", "it starts a trace of its own"
        self.spans.append((name, options["attributes"]))
        return nullcontext()


def test_it_is_a_line_in_the_log_and_a_span(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer()
    monkeypatch.setattr(telemetry, "_tracer", tracer)
    with caplog.at_level(logging.INFO):
        journal.note(Transition("elected", "e", "a", Token("d", 7)))
        journal.note(Transition("ended", "e", "a", Token("d", 7), EndReason.APP_SILENT))
    assert caplog.messages == ["election e: a elected, token 7", "election e: a ended, token 7, app_silent"]
    known = {
        "retinue.election.id": "e",
        "retinue.election.candidate": "a",
        "retinue.election.token": 7,
        "retinue.election.token_domain": "d",
    }
    assert tracer.spans == [
        ("leaderelection elected", known),
        ("leaderelection ended", known | {"retinue.election.end_reason": "app_silent"}),
    ]
