"""The file of targets: YAML, read again when it changes; a wrong one leaves the last good one.

    targets:
      - target_id: cache
        kind: REDIS
        endpoint: 127.0.0.1:6379

Its entries are messages `retinue.adapter.v1.Target` as JSON has them, with the field names of the proto; kinds may go
without their prefix.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from retinue.adapter.v1 import target_pb2 as pb
from retinue_server.adapter import translate
from retinue_server.runtime import strict_yaml
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import RetinueError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from retinue_server.adapter.core.spec import Spec
    from retinue_server.adapter.core.targets import Targets

log = logging.getLogger(__name__)

_LOOK_S = 0.5


class TargetFileError(Exception):
    """A file that can't be used; the message has all that is wrong with it."""


class TargetFile:
    """A part: declares what the file has when it starts, and again when it changes."""

    def __init__(self, path: Path, targets: Targets, *, must_exist: bool) -> None:
        self._path, self._targets, self._must_exist = path, targets, must_exist
        self._stamp: tuple[int, int, int] | None = None
        self._declared: set[str] = set()
        self._looking: asyncio.Task[None] | None = None
        self._wrong = ""

    @property
    def ok(self) -> bool:
        """Whether the file, as it is now, is what is declared."""
        return not self._wrong

    async def start(self) -> None:
        """Raises StartError for a file that is wrong, or is missing although it was named."""
        if self._looking is not None:
            return
        self._stamp = await asyncio.to_thread(_stamp, self._path)
        if self._stamp is not None or self._must_exist:
            try:
                await self._declare(await asyncio.to_thread(read, self._path))
            except TargetFileError as error:
                raise StartError(f"cannot use {self._path}: {error}") from None
        self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.cancel()
            await asyncio.wait({looking})

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            stamp = await asyncio.to_thread(_stamp, self._path)
            if stamp == self._stamp and not self._wrong:
                continue
            self._stamp = stamp
            try:
                specs = await asyncio.to_thread(read, self._path)
                await self._declare(specs)
            except TargetFileError as error:
                if str(error) != self._wrong:
                    log.error("cannot use %s: %s; what it does not change stays", self._path, error)  # noqa: TRY400 - said
                self._wrong = str(error)
                continue
            self._wrong = ""
            log.info("read %d targets from %s", len(specs), self._path)

    async def _declare(self, specs: Sequence[Spec]) -> None:
        """One that is refused keeps no other from being collected. Raises TargetFileError with all that were."""
        wrong: list[str] = []
        for target_id in self._declared - {spec.target_id for spec in specs}:
            await self._targets.delete(target_id, from_file=True)
            self._declared.discard(target_id)
        for spec in specs:
            try:
                if self._targets.find(spec.target_id) is None:
                    await self._targets.create(spec, from_file=True)
                else:
                    await self._targets.update(spec, from_file=True)
                self._declared.add(spec.target_id)
            except RetinueError as error:
                wrong.append(str(error))
        if wrong:
            raise TargetFileError("; ".join(wrong))


def read(path: Path) -> list[Spec]:
    """Raises TargetFileError."""
    try:
        said = strict_yaml.load(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TargetFileError(str(error)) from None
    if said is None:
        return []
    if not isinstance(said, dict) or set(said) != {"targets"} or not isinstance(said["targets"], list | None):
        raise TargetFileError("it must have `targets:`, a list, and nothing else")
    found = [_spec(index, entry) for index, entry in enumerate(said["targets"] or [])]
    known: set[str] = set()
    for index, spec in enumerate(found):
        if spec.target_id in known:
            raise TargetFileError(f"targets[{index}]: {spec.target_id} is there twice")
        known.add(spec.target_id)
    return found


def _spec(index: int, entry: Any) -> Spec:
    if isinstance(entry, dict) and isinstance(entry.get("kind"), str):
        entry = {**entry, "kind": f"TARGET_KIND_{entry['kind'].removeprefix('TARGET_KIND_')}"}
    try:
        message = json_format.ParseDict(entry, pb.Target())
        return translate.Reader().target(message, f"use targets[{index}]")
    except (json_format.ParseError, RetinueError, TypeError, AttributeError) as error:
        raise TargetFileError(f"targets[{index}]: {error}") from None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes with the content: time, size and file number; None while there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
