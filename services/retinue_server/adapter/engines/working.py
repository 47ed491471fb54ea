"""The worker process as the server sees it: started when it is needed, and again when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from retinue_server.adapter.worker import Declare, Forget, Request, Take, Taken

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

_PREFIX = 4
_PIPE_BYTES = 1 << 20


class WorkerGone(Exception):
    """It ended before it answered."""


class Working:
    """Asks the worker, one question after the other. `declarations` are what a new one has to be told first."""

    def __init__(self, declarations: Callable[[], Mapping[str, Declare]]) -> None:
        self._declarations = declarations
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: deque[asyncio.Future[Taken]] = deque()
        self._starting = asyncio.Lock()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Taken).decode
        self.restarts = -1

    async def start(self) -> None:
        """It starts with the first target."""

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
        if self._reading is not None:
            await self._reading

    def tell(self, told: Declare | Forget) -> None:
        """What it has to know; a worker that is not there is told when it starts."""
        if self._process is not None:
            self._write(told)

    async def take(self, asked: Take) -> Taken:
        """Raises WorkerGone."""
        async with self._starting:
            if self._process is None:
                await self._begin()
        answer: asyncio.Future[Taken] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._write(asked)
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):  # the reader notices, too
                await process.stdin.drain()
        return await answer

    async def _begin(self) -> None:
        self.restarts += 1
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "retinue_server.adapter.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_PIPE_BYTES,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self._reading = asyncio.create_task(self._read(self._process))
        for declared in self._declarations().values():
            self._write(declared)

    def _write(self, message: Request) -> None:
        process = self._process
        if process is not None and process.stdin is not None and not process.stdin.is_closing():
            data = self._encode(message)
            process.stdin.write(len(data).to_bytes(_PREFIX, "big") + data)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            while True:
                length = await process.stdout.readexactly(_PREFIX)
                taken = self._decode(await process.stdout.readexactly(int.from_bytes(length, "big")))
                answer = self._waiting.popleft()
                if not answer.done():
                    answer.set_result(taken)
        except asyncio.IncompleteReadError:
            pass
        waiting, self._waiting = self._waiting, deque()
        for answer in waiting:
            if not answer.done():
                answer.set_exception(WorkerGone())
        if self._process is process:
            self._process = None
            code = await process.wait()
            log.warning("the worker process ended with %s; the next collection starts another", code)
