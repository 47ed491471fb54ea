"""Where the server is, from the environment.

`RETINUE_<PATTERN>_ADDRESS`, then `RETINUE_ADDRESS`, then 127.0.0.1:7070. Operators dial the control socket:
`RETINUE_CONTROL_ADDRESS`, then `.retinue/control.sock` in the working directory or the nearest directory
above it. An address is `HOST:PORT`, `unix:PATH`, or the absolute path of a socket.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

DEFAULT_ADDRESS = "127.0.0.1:7070"
CONTROL_SOCKET = Path(".retinue/control.sock")


def app_address(pattern: str) -> str:
    """The address for apps of one pattern, such as `workqueue`."""
    found = os.environ.get(f"RETINUE_{pattern.upper()}_ADDRESS") or os.environ.get("RETINUE_ADDRESS")
    return target(found or DEFAULT_ADDRESS)


def control_address() -> str | None:
    """The address for operators; None if neither the environment nor a directory above has one."""
    named = os.environ.get("RETINUE_CONTROL_ADDRESS")
    return target(named) if named else _nearest_socket(Path.cwd())


def upstream_address(upstream_id: str) -> str | None:
    """Where an upstream of the ambassador is dialled, by `RETINUE_UPSTREAM_<NAME>_ADDRESS`; None if it is not set."""
    return os.environ.get(f"RETINUE_UPSTREAM_{upstream_id.upper().replace('-', '_')}_ADDRESS") or None


def _nearest_socket(start: Path) -> str | None:
    candidates = (directory / CONTROL_SOCKET for directory in (start, *start.parents))
    return next((f"unix:{path}" for path in candidates if path.is_socket()), None)


def target(address: str) -> str:
    """The address as gRPC wants it: a path gets its scheme, everything else stays."""
    return f"unix:{address}" if address.startswith("/") else address


def is_local(address: str) -> bool:
    """Whether bytes sent there stay on this machine: a Unix socket or a loopback address."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or _is_loopback(host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
