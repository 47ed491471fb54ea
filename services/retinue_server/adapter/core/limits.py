"""What may be declared and asked: every violation is named, nothing is guessed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from retinue_server.adapter.core.spec import Kind
from retinue_server.runtime.errors import InvalidArgument, NotFound, Reason, Violation

if TYPE_CHECKING:
    from collections.abc import MutableSequence, Sequence

    from retinue_server.adapter.core.spec import Spec

TARGET_ID = re.compile(r"[a-z][a-z0-9-]{0,62}")
PACK = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
PAGE_SIZES = 100, 50
"""The largest and the usual, of ListTargets."""
MAX_MATCHES = 100
MAX_REPORTED = 1000
MAX_BYTES, MAX_SERIES, MAX_LABELS = 64 << 20, 100_000, 100
_MAX_TEXT = 1024
_HTTP = (Kind.PROMETHEUS, Kind.JSON, Kind.NGINX)


def check(spec: Spec, violations: MutableSequence[Violation], at: str = "target.") -> None:
    """A target, as far as it stands alone."""
    if not TARGET_ID.fullmatch(spec.target_id):
        violations.append(Violation(f"{at}target_id", "must be 1 to 63 of a-z 0-9 -, beginning with a letter"))
    if spec.rule_pack and not PACK.fullmatch(spec.rule_pack):
        violations.append(Violation(f"{at}rule_pack", "must be 1 to 63 of a-z 0-9 _ -"))
    if spec.kind is Kind.JSON and not spec.rule_pack:
        violations.append(Violation(f"{at}rule_pack", "must be given for JSON: it says where the numbers are"))
    for name in ("endpoint", "service", "credentials_file"):
        if len(getattr(spec, name)) > _MAX_TEXT or not getattr(spec, name).isprintable():
            violations.append(Violation(at + name, f"must be at most {_MAX_TEXT} printable characters"))
    wrong = _endpoint(spec)
    if wrong:
        violations.append(Violation(f"{at}endpoint", wrong))
    for name, most in (("max_bytes", MAX_BYTES), ("max_series", MAX_SERIES), ("max_labels", MAX_LABELS)):
        if not 1 <= getattr(spec.limits, name) <= most:
            violations.append(Violation(f"{at}limits.{name}", f"must be from 0 to {most}"))


def _endpoint(spec: Spec) -> str:
    text = spec.endpoint
    try:
        url = urlsplit(text)
        host, port, has_password = url.hostname, url.port, url.password is not None
    except ValueError:
        return "is not an address"
    if has_password:
        return "must have no password: use credentials_file"
    if spec.kind in _HTTP:
        return "" if url.scheme in ("http", "https") and host and not url.fragment else "must be http:// or https://"
    if spec.kind is Kind.POSTGRESQL:
        known = url.scheme in ("postgresql", "postgres") and host and not url.query
        return "" if known else "must be postgresql://[USER@]HOST[:PORT]/DATABASE"
    if spec.kind in (Kind.REDIS, Kind.MEMCACHED):
        return "" if _is_host_port(text) else "must be HOST:PORT"
    if spec.kind is Kind.STATSD:
        known = text.startswith("unixgram:/") or (text.startswith("udp:") and _is_host_port(text[4:], 0))
        return "" if known else "must be udp:HOST:PORT or unixgram:/PATH"
    del port
    return "must be empty" if text else ""


def _is_host_port(text: str, lowest: int = 1) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(colon and host) and port.isascii() and port.isdecimal() and lowest <= int(port) <= 65535  # noqa: PLR2004


def check_id(target_id: str, violations: MutableSequence[Violation], field: str = "target_id") -> None:
    """A name that a target can have."""
    if not TARGET_ID.fullmatch(target_id):
        violations.append(Violation(field, "must be 1 to 63 of a-z 0-9 -, beginning with a letter"))


def page_size(asked: int, sizes: tuple[int, int], violations: MutableSequence[Violation]) -> int:
    """The size of a page."""
    most, usual = sizes
    if not 0 <= asked <= most:
        violations.append(Violation("page_size", f"must be from 0 to {most}"))
    return asked or usual


def refuse(violations: Sequence[Violation], what: str) -> None:
    """Raises what is wrong."""
    if violations:
        raise InvalidArgument(f"cannot {what}: {violations[0].field} {violations[0].description}", list(violations))


def unknown(target_id: str) -> NotFound:
    """TARGET_NOT_FOUND."""
    return NotFound(
        f"cannot find target {target_id}: there is none of that name",
        reason=Reason.TARGET_NOT_FOUND,
        target_id=target_id,
    )
