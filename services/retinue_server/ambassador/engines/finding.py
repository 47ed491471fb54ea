"""Who serves an upstream: by DNS, by a file, by the EndpointSlices of a Service."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from retinue_server.ambassador.core.limits import endpoint_violations
from retinue_server.ambassador.core.spec import Dns, Endpoint, File, Kubernetes
from retinue_server.runtime.discovery.dns import DnsDiscovery

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from retinue_server.ambassador.engine import Found
    from retinue_server.runtime.discovery.kubernetes import KubernetesDiscovery

log = logging.getLogger(__name__)

_LOOK_S = 0.5
"""How often files are looked at."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One endpoint in a file; see Endpoint of the contract."""

    address: str
    weight: int = 1
    zone: str = ""
    shard_name: str = ""


class Finding:
    """A part."""

    def __init__(self, kubernetes: KubernetesDiscovery) -> None:
        self._dns, self._kubernetes = DnsDiscovery(5.0), kubernetes
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, where: Found, found: Callable[[Sequence[Endpoint]], None]) -> Callable[[], None]:
        def addresses(known: Sequence[str]) -> None:
            found([Endpoint(address) for address in known])

        match where:
            case Dns(hostname, port, refresh_s):
                return self._dns.watch(f"{hostname}:{port}", addresses, refresh_s)
            case Kubernetes(service, port, namespace):
                name = f"{service}.{namespace}" if namespace else service
                return self._kubernetes.watch(f"{name}:{port}", addresses)
            case File(path):
                return self._file(Path(path), found)

    def _file(self, path: Path, found: Callable[[Sequence[Endpoint]], None]) -> Callable[[], None]:
        task = asyncio.create_task(_follow(path, found))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def unwatch() -> None:
            task.cancel()

        return unwatch

    async def start(self) -> None:
        """Ready to watch."""
        await self._dns.start()
        await self._kubernetes.start()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await self._dns.stop()
        await self._kubernetes.stop()


async def _follow(path: Path, found: Callable[[Sequence[Endpoint]], None]) -> None:
    """Tells what the file says, at first and whenever it has changed to something that can be used."""
    before: object = ()
    known: Sequence[Endpoint] | None = None
    while True:
        stamp = await asyncio.to_thread(_stamp, path)
        if stamp != before:
            before = stamp
            try:
                now = await asyncio.to_thread(_read, path)
            except ValueError as error:
                log.warning("cannot use the endpoints in %s: %s; who was found last stands", path, error)
            else:
                if now != known:
                    known = now
                    found(now)
        await asyncio.sleep(_LOOK_S)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes with the content; None while there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> Sequence[Endpoint]:
    """Raises ValueError."""
    import yaml  # noqa: PLC0415 - most servers read none

    try:
        entries = msgspec.convert(yaml.safe_load(path.read_text()) or [], list[Entry])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise ValueError(str(error)) from None
    endpoints = [Endpoint(one.address, one.weight, one.zone, one.shard_name) for one in entries]
    for field, text in endpoint_violations(endpoints, "endpoints"):
        raise ValueError(f"{field} {text}")
    return endpoints
