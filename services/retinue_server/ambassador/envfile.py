"""A file of `RETINUE_UPSTREAM_<NAME>_ADDRESS=…` lines, kept up to date, for apps to source."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from retinue_server.ambassador.core.upstreams import Upstreams


def variable(upstream_id: str) -> str:
    """What the environment calls an upstream's address."""
    return f"RETINUE_UPSTREAM_{upstream_id.upper().replace('-', '_')}_ADDRESS"


class EnvFile:
    """A part; the file is replaced as a whole, so that nobody reads half of it."""

    def __init__(self, path: Path, upstreams: Upstreams) -> None:
        self._path, self._upstreams = path, upstreams
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._watching is None:
            await self._write({})
            self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            await asyncio.wait({watching})

    async def _watch(self) -> None:
        known: dict[str, str] = {}
        synced = False
        async with contextlib.aclosing(self._upstreams.watch(())) as events:
            async for event in events:
                if event is None:
                    synced = True
                elif event.view is not None:
                    known[event.view.spec.upstream_id] = event.view.address
                else:
                    known.pop(event.removed, None)
                if synced:
                    await self._write(known)

    async def _write(self, known: dict[str, str]) -> None:
        text = "".join(f"{variable(name)}={address}\n" for name, address in sorted(known.items()))
        await asyncio.to_thread(self._replace, text)

    def _replace(self, text: str) -> None:
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        beside.write_text(text)
        beside.replace(self._path)
