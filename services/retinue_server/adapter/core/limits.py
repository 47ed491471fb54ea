"""What may be declared and asked: every violation is named, nothing is guessed."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from retinue_server.adapter.core.spec import TOLD, Kind
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
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "postgres": 5432}


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
    try:
        url = urlsplit(spec.endpoint)
        has_password = url.password is not None
        _ = url.port
    except ValueError:
        return "is not an address"
    if has_password or ("@" in spec.endpoint and spec.kind is not Kind.POSTGRESQL):
        return "must have no password: use credentials_file"
    well_formed, form = _FORMS[spec.kind]
    return "" if well_formed(spec.endpoint, url) else f"must be {form}"


def _is_http(text: str, url: SplitResult) -> bool:
    plain = text.isascii() and " " not in text
    return plain and url.scheme in ("http", "https") and bool(url.hostname) and not url.fragment and url.port != 0


def _is_database(_: str, url: SplitResult) -> bool:
    return url.scheme in ("postgresql", "postgres") and bool(url.hostname) and not url.query


def _is_socket(text: str, _: SplitResult) -> bool:
    return text.startswith("unixgram:/") or (text.startswith("udp:") and _is_host_port(text[4:], 0))


_HTTP = (_is_http, "http:// or https://")
_HOST_PORT = (lambda text, _: _is_host_port(text), "HOST:PORT")
_EMPTY = (lambda text, _: not text, "empty")
_FORMS: dict[Kind, tuple[Callable[[str, SplitResult], bool], str]] = {
    Kind.PROMETHEUS: _HTTP,
    Kind.JSON: _HTTP,
    Kind.NGINX: _HTTP,
    Kind.REDIS: _HOST_PORT,
    Kind.MEMCACHED: _HOST_PORT,
    Kind.POSTGRESQL: (_is_database, "postgresql://[USER@]HOST[:PORT]/DATABASE"),
    Kind.STATSD: (_is_socket, "udp:HOST:PORT or unixgram:/PATH"),
    Kind.REPORT: _EMPTY,
    Kind.OTLP: _EMPTY,
}
"""What endpoints look like, by kind."""


def _is_host_port(text: str, lowest: int = 1) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(colon and host) and port.isascii() and port.isdecimal() and lowest <= int(port) <= 65535  # noqa: PLR2004


def address(spec: Spec) -> str:
    """Of an endpoint, `IP:PORT`, or `[IP]:PORT`; empty where it has a name, or is not dialled."""
    if spec.kind in TOLD:
        return ""
    url = urlsplit(spec.endpoint if "//" in spec.endpoint else f"//{spec.endpoint}")
    try:
        ip = ipaddress.ip_address(url.hostname or "")
    except ValueError:
        return ""
    port = url.port or _PORTS.get(url.scheme, 0)
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"  # noqa: PLR2004 - IPv6


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
