"""The endpoint policy: which addresses may be dialled, whatever names them.

Checked on numeric addresses, after each look-up, so that a name that resolves elsewhere the next time (rebinding) gains
nothing. An ambassador that dials whatever it is told is a way past every firewall (CVE-2021-32783).
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_FORBIDDEN: tuple[tuple[str, Network], ...] = tuple(
    (why, ipaddress.ip_network(text))
    for why, text in (
        ("it is loopback", "127.0.0.0/8"),
        ("it is loopback", "::1/128"),
        ("it is no address of a host", "0.0.0.0/8"),
        ("it is no address of a host", "::/128"),
        ("it is link-local, where metadata services are", "169.254.0.0/16"),
        ("it is link-local", "fe80::/10"),
        ("it is a metadata service", "fd00:ec2::254/128"),
        ("it is a metadata service", "100.100.100.200/32"),
        ("it is a metadata service", "168.63.129.16/32"),
        ("it is multicast", "224.0.0.0/4"),
        ("it is multicast", "ff00::/8"),
        ("it is reserved", "240.0.0.0/4"),
    )
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Addressed(Protocol):
    """Somebody with an address, `IP:PORT` or `unix:PATH`."""

    @property
    def address(self) -> str:
        """Where."""


Endpoint = TypeVar("Endpoint", bound=Addressed)


class RuleError(ValueError):
    """A rule that is none."""


class Rule(msgspec.Struct, frozen=True):
    """Addresses and ports, `CIDR[:PORT[-PORT]]` (IPv6 in brackets when there is a port); or `unix:PATH`, of which those
    beneath match if it ends in a slash."""

    network: Network | None
    first_port: int = 0
    last_port: int = 65535
    path: str = ""

    def matches(self, ip: Ip, port: int) -> bool:
        """Whether an address is among them."""
        network = self.network
        return (
            network is not None
            and ip.version == network.version
            and ip in network
            and self.first_port <= port <= self.last_port
        )

    def matches_path(self, path: str) -> bool:
        """Whether a socket is among them; a path that goes upwards never is."""
        if not self.path or ".." in path.split("/"):
            return False
        return path.startswith(self.path) if self.path.endswith("/") else path == self.path


def parse_rule(text: str) -> Rule:
    """Raises RuleError."""
    if text.startswith("unix:/"):
        return Rule(None, path=text.removeprefix("unix:"))
    cidr, ports = _cut(text)
    try:
        network = ipaddress.ip_network(cidr, strict=False)
        first, _, last = ports.partition("-")
        low, high = (int(first), int(last or first)) if ports else (0, 65535)
    except ValueError:
        raise RuleError(f"{text!r} is no CIDR, CIDR:PORT, CIDR:PORT-PORT or unix:/PATH") from None
    if not 0 <= low <= high <= 65535:  # noqa: PLR2004 - the last port
        raise RuleError(f"{text!r} has ports that are none")
    return Rule(network, low, high)


def _cut(text: str) -> tuple[str, str]:
    """The network and the ports."""
    if text.startswith("["):
        inner, _, rest = text[1:].partition("]")
        length, _, ports = rest.partition(":")
        return inner + length, ports
    if text.count(":") == 1:
        cidr, _, ports = text.partition(":")
        return cidr, ports
    return text, ""


class EndpointPolicy:
    """Forbids what is dangerous, but for the exceptions in `allow`; with `only`, everything else, too."""

    def __init__(
        self, allow: Iterable[Rule] = (), only: Iterable[Rule] = (), own: Iterable[tuple[Ip, int]] = ()
    ) -> None:
        self._allow, self._only, self._own = tuple(allow), tuple(only), frozenset(own)

    def objection(self, address: str) -> str:
        """Why an endpoint's address may not be dialled; empty = it may. The address is well-formed."""
        if address.startswith("unix:"):
            path = address.removeprefix("unix:")
            return "" if any(rule.matches_path(path) for rule in self._allow) else "it is a socket that is not allowed"
        ip, port = split(address)
        ip = embedded(ip)
        if (ip, port) in self._own:
            return "it is this server's own"
        if self._only and not any(rule.matches(ip, port) for rule in self._only):
            return "it is not among the addresses that are allowed"
        if any(rule.matches(ip, port) for rule in self._allow):
            return ""
        return next((why for why, network in _FORBIDDEN if ip.version == network.version and ip in network), "")

    def permitted(self, endpoints: Iterable[Endpoint]) -> tuple[tuple[Endpoint, ...], dict[str, str]]:
        """Those that may be dialled, and of the others why not, by address."""
        found = tuple(endpoints)
        objections = {one.address: self.objection(one.address) for one in found}
        return (
            tuple(one for one in found if not objections[one.address]),
            {address: why for address, why in objections.items() if why},
        )


def split(address: str) -> tuple[Ip, int]:
    """The parts of `IP:PORT` or `[IPV6]:PORT`; raises ValueError for anything else, names among it."""
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not (port.isascii() and port.isdecimal()) or not 0 < int(port) <= 65535:  # noqa: PLR2004 - the last port
        raise ValueError(address)
    ip = ipaddress.ip_address(bare)
    if (ip.version == 6) != (bare != host) or getattr(ip, "scope_id", None):  # noqa: PLR2004 - IPv6
        raise ValueError(address)
    return ip, int(port)


def embedded(ip: Ip) -> Ip:
    """The IPv4 address within an IPv6 one that leads to it (mapped, 6to4, NAT64); otherwise the address itself."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip
