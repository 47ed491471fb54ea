"""A hosts file of a process's own, which alone says what names resolve to: no name server is asked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class Hosts:
    """Names end with `.test`; what is not in the file stays unknown."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._switch = path.with_name("nsswitch.conf")
        self._known: dict[str, str] = {}
        path.write_text("127.0.0.1 localhost\n")
        self._switch.write_text("hosts: files\n")

    @property
    def before(self) -> tuple[str, ...]:
        """What stands before a command so that it sees this file as /etc/hosts: a mount namespace."""
        unshare = shutil.which("unshare")
        assert unshare, "unshare is missing: apt-get install util-linux"
        allowed = () if os.geteuid() == 0 else ("--user", "--map-root-user")
        mounts = f"mount --bind '{self._path}' /etc/hosts && mount --bind '{self._switch}' /etc/nsswitch.conf"
        script = f'{mounts} && exec "$@"'
        return (unshare, *allowed, "--mount", "sh", "-c", script, "sh")

    def name(self, leaf: str) -> str:
        return f"{leaf}.test"

    def resolved(self, source: str) -> str:
        """Of a source `dns:NAME:PORT` its address, empty if it has none; others are what they are."""
        scheme, _, rest = source.partition(":")
        name, _, port = rest.partition(":")
        if scheme != "dns":
            return source
        address = self._known.get(name.removesuffix(".test"), "")
        return f"{address}:{port}" if address else ""

    def move(self, leaf: str, address: str) -> None:
        """It resolves to this; to nothing, if that is empty."""
        self._known[leaf] = address
        lines = [f"{address} {self.name(leaf)}" for leaf, address in self._known.items() if address]
        # In place: the mount holds on to the file, not to its name.
        self._path.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
