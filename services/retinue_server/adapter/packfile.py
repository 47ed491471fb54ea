"""Rule packs as files: the shipped ones, and those of a directory, which are read again when they change."""

from __future__ import annotations

import asyncio
import logging
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from retinue_server.adapter.core import limits, packs
from retinue_server.adapter.core.packs import Pack
from retinue_server.adapter.core.spec import Kind
from retinue_server.runtime import strict_yaml
from retinue_server.runtime.addresses import StartError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_MAX_BYTES = 1 << 20


class PackError(ValueError):
    """A rule pack that is none; the message has all that is wrong with it."""


def read(name: str, data: bytes) -> Pack:
    """Raises PackError."""
    try:
        said = strict_yaml.load(data)
        if isinstance(said, dict) and "mappings" in said:
            said.setdefault("kind", "statsd")  # a mapping file of statsd_exporter, as it is
        pack = msgspec.convert(said, Pack)
    except (ValueError, msgspec.ValidationError) as error:
        raise PackError(f"{name}: {error}") from None
    faults: list[str] = []
    if pack.kind.upper() not in Kind.__members__:
        faults.append(f"kind must be one of {', '.join(kind.name.lower() for kind in Kind)}")
    packs.check(pack, faults)
    if faults:
        raise PackError(f"{name}: {'; '.join(faults)}")
    return pack


def shipped() -> dict[str, Pack]:
    """Those that come with the server."""
    found = {}
    for file in resources.files("retinue_server.adapter").joinpath("packs").iterdir():
        if file.name.endswith(".yaml"):
            found[file.name.removesuffix(".yaml")] = read(file.name, file.read_bytes())
    return found


def of_directory(path: Path) -> dict[str, Pack]:
    """Those of a directory; raises PackError."""
    found = {}
    if not path.is_dir():
        raise PackError("it is no directory")
    for file in sorted(path.glob("*.yaml")):
        if not limits.PACK.fullmatch(file.stem):
            raise PackError(f"{file.name}: a pack's name must be 1 to 63 of a-z 0-9 _ -")
        data = file.read_bytes()
        if len(data) > _MAX_BYTES:
            raise PackError(f"{file.name}: it is longer than {_MAX_BYTES} bytes")
        found[file.stem] = read(file.name, data)
    return found


class PackFiles:
    """A part: all packs, as they are now. `changed` is called after a change."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self.packs: dict[str, Pack] = {}
        self.ok = True
        self._stamp: object = None
        self._looking: asyncio.Task[None] | None = None
        self.changed: Callable[[], Awaitable[None]] | None = None

    def load(self) -> Mapping[str, Pack]:
        """At the start; raises StartError."""
        try:
            self._use(self._read())
        except (OSError, PackError) as error:
            raise StartError(f"cannot use the rule packs in {self._directory}: {error}") from None
        return self.packs

    async def start(self) -> None:
        if self._directory is not None and self._looking is None:
            self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.cancel()
            await asyncio.wait({looking})

    def _read(self) -> Mapping[str, Pack]:
        found = shipped()
        if self._directory is not None:
            self._stamp = self._stamped()
            found |= of_directory(self._directory)
        return found

    def _use(self, found: Mapping[str, Pack]) -> None:
        self.packs.clear()
        self.packs.update(found)

    def _stamped(self) -> object:
        assert self._directory is not None
        stats = [(file.name, file.stat()) for file in sorted(self._directory.glob("*.yaml"))]
        return [(name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in stats]

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                if await asyncio.to_thread(self._stamped) == self._stamp:
                    continue
                found = await asyncio.to_thread(self._read)
            except (OSError, PackError) as error:
                if self.ok:
                    log.error("cannot use the rule packs in %s: %s; the former stand", self._directory, error)  # noqa: TRY400
                self.ok = False
                continue
            self.ok = True
            self._use(found)
            log.info("read %d rule packs", len(self.packs))
            if self.changed is not None:
                await self.changed()
