"""What a request may hold. Every violation is named by its path in the contract."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from retinue_server.leaderelection.core.requests import Standing, Token  # noqa: TC001 - see engine.py
from retinue_server.runtime.errors import InvalidArgument, Reason, Unimplemented, Violation

if TYPE_CHECKING:
    from retinue_server.leaderelection.engine import Capabilities

MAX_VALUE = 4_096
MIN_LEASE_MS, MAX_LEASE_MS = 1_000, 600_000
MIN_APP_LEASE_MS = 100
MAX_DELAY_MS = 600_000
MAX_PAGE, DEFAULT_PAGE = 500, 50

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SESSION = re.compile(r"[0-9a-f]{32}")

Violations = Iterator[Violation]


def refuse(what: str, violations: Sequence[Violation]) -> None:
    """Raises InvalidArgument if there is any violation."""
    if violations:
        fields = ", ".join(sorted({v.field for v in violations})[:5])
        raise InvalidArgument(f"cannot {what}: see the violations of {fields}", list(violations))


def name(value: str, field: str) -> Violations:
    """An election's or a candidate's name."""
    if not IDENTIFIER.fullmatch(value):
        yield Violation(field, "must be 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit")


def session(value: str, field: str = "session_id", *, required: bool = False) -> Violations:
    """A session's name."""
    if (value or required) and not _SESSION.fullmatch(value):
        yield Violation(field, "must be a session_id that this service gave")


def value(text: str, field: str = "value") -> Violations:
    """What is proclaimed."""
    if len(text) > MAX_VALUE:
        yield Violation(field, f"must be at most {MAX_VALUE} characters; it has {len(text)}")


def token(given: Token | None, field: str = "token", *, required: bool = True) -> Violations:
    """A fencing token."""
    if given is None:
        if required:
            yield Violation(field, "is required")
        return
    if given.value < 1:
        yield Violation(f"{field}.value", "must be above 0")
    if not given.domain:
        yield Violation(f"{field}.domain", "is required")


def standing(asked: Standing, at: str = "") -> Violations:
    """A candidate."""
    yield from name(asked.election_id, f"{at}election_id")
    yield from name(asked.candidate_id, f"{at}candidate_id")
    yield from session(asked.session_id, f"{at}session_id")
    yield from value(asked.value, f"{at}value")
    yield from _duration(asked.lease_ms, MIN_LEASE_MS, MAX_LEASE_MS, f"{at}lease_duration")
    longest = max(asked.lease_ms // 2, MIN_APP_LEASE_MS)
    yield from _duration(asked.app_lease_ms, MIN_APP_LEASE_MS, longest, f"{at}app_lease_duration")
    yield from _duration(asked.release_delay_ms, 0, MAX_DELAY_MS, f"{at}release_delay_duration")
    if asked.proof_file:
        yield from name(asked.proof_file, f"{at}proof_file")


def able(asked: Standing, can: Capabilities) -> None:
    """Raises Unimplemented for what the engine can't do."""
    if asked.lease_ms < can.min_lease_ms:
        raise Unimplemented(
            f"cannot stand for an election with a lease of {asked.lease_ms / 1000:g} s: the shortest of engine "
            f"{can.engine} is {can.min_lease_ms / 1000:g} s",
            reason=Reason.ENGINE_CAPABILITY,
            engine=can.engine,
        )


def page_size(size: int) -> Violations:
    """The size of a page; 0 = the default."""
    if not 0 <= size <= MAX_PAGE:
        yield Violation("page_size", f"must be from 0 to {MAX_PAGE}")


def enum(number: int, known: Collection[int], field: str) -> Violations:
    """A number of an enum."""
    if number not in known:
        yield Violation(field, f"{number} is not a value of this enum")


def _duration(ms: int, low: int, high: int, field: str) -> Violations:
    if not low <= ms <= high:
        yield Violation(field, f"must be from {low / 1000:g} s to {high / 1000:g} s")
