"""Ports of 127.0.0.1 and sockets: which are free, told by trying to bind them."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retinue_server.ambassador.core.spec import Listen


class HostPorts:
    """This host's."""

    def pick(self) -> int:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    def objection(self, listen: Listen) -> str:
        return _of_path(Path(listen.path)) if listen.path else _of_port(listen.port)


def _of_port(port: int) -> str:
    """As a listener would find it: connections that are just ending don't hold a port."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError as error:
            return f"127.0.0.1:{port} can't be had: {error.strerror}"
    return ""


def _of_path(path: Path) -> str:
    """A socket that nobody answers on is a leftover, and may be replaced."""
    if not path.parent.is_dir():
        return f"unix:{path} can't be had: there is no directory {path.parent}"
    if not path.exists():
        return ""
    if not path.is_socket():
        return f"unix:{path} can't be had: there is a file that is no socket"
    with closing(socket.socket(socket.AF_UNIX)) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            return ""
    return f"unix:{path} can't be had: somebody answers on it"
