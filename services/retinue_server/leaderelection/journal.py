"""Every transition of a term that this server holds: a line in the log and, where traces go out, a span of its own."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from retinue_server.runtime import telemetry

if TYPE_CHECKING:
    from retinue_server.leaderelection.core.requests import Transition

_log = logging.getLogger(__name__)


def note(transition: Transition) -> None:
    """Tells of one."""
    kind, election, candidate, token, reason = transition
    why = f", {reason.name.lower()}" if kind == "ended" else ""
    _log.info("election %s: %s %s, token %d%s", election, candidate, kind, token.value, why)
    attributes: dict[str, str | int] = {
        "retinue.election.id": election,
        "retinue.election.candidate": candidate,
        "retinue.election.token": token.value,
        "retinue.election.token_domain": token.domain,
    }
    if kind == "ended":
        attributes["retinue.election.end_reason"] = reason.name.lower()
    with telemetry.tracer().span(f"leaderelection {kind}", "", attributes=attributes):
        pass  # it has no length
