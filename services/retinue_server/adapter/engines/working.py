"""The worker process as the server sees it: started when it is needed, and again when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from retinue_server.adapter.worker import Declare, Forget, Question, Request, Response, framed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

_PREFIX = 4
_PIPE_BYTES = 1 << 20
_PATIENCE_S = 300.0
"""Without any answer, while some are awaited: then it is stuck. On a busy machine 64 MiB take two minutes."""


class WorkerGone(Exception):
    """It ended before it answered."""


class Working:
    """Asks the worker. `declarations` are what a new one has to be told first."""

    def __init__(self, declarations: Callable[[], Mapping[str, Declare]], patience_s: float = _PATIENCE_S) -> None:
        self._declarations, self._patience_s = declarations, patience_s
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Response]] = {}
        self._numbers = itertools.count()
        self._heard = 0.0
        """When it answered last, or had nothing to answer."""
        self._starting = asyncio.Lock()
        self._decode = msgspec.msgpack.Decoder(Response).decode
        self.restarts = -1

    async def start(self) -> None:
        """It starts with the first target."""

    async def stop(self) -> None:
        """It keeps nothing that would have to be saved."""
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            await process.wait()
        if self._reading is not None:
            await self._reading

    @property
    def pid(self) -> int:
        """Of the process; 0 = there is none."""
        return self._process.pid if self._process is not None else 0

    def tell(self, told: Declare | Forget) -> None:
        """What it has to know; a worker that is not there is told when it starts."""
        self._write(told)

    async def ask(self, make: Callable[[int], Question]) -> Response:
        """Its answer to a question that is made with a number; raises WorkerGone."""
        async with self._starting:
            if self._process is None:
                await self._begin()
        process, number = self._process, next(self._numbers)
        if not self._waiting:
            self._heard = time.monotonic()
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._write(make(number))
            if process is not None and process.stdin is not None:
                with contextlib.suppress(OSError):  # the reader notices, too
                    await process.stdin.drain()
            while not (await asyncio.wait({answer}, timeout=self._patience_s))[0]:
                self._end_if_stuck()
            return answer.result()
        finally:
            self._waiting.pop(number, None)

    def _end_if_stuck(self) -> None:
        if self._process is not None and time.monotonic() - self._heard >= self._patience_s:
            log.error("the worker process does not answer for %g s; it is ended", self._patience_s)
            _kill(self._process)

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
            process.stdin.write(framed(msgspec.msgpack.encode(message)))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        try:
            await self._answers(process)
        except asyncio.IncompleteReadError:
            pass
        except Exception:
            log.exception("cannot understand the worker process")
            _kill(process)
        wanted = self._process is process
        if wanted:
            self._process = None
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(WorkerGone())
        code = await process.wait()
        if wanted:
            log.warning("the worker process ended with %s; the next collection starts another", code)

    async def _answers(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            length = await process.stdout.readexactly(_PREFIX)
            told = self._decode(await process.stdout.readexactly(int.from_bytes(length, "big")))
            self._heard = time.monotonic()
            answer = self._waiting.get(told.number)
            if answer is not None and not answer.done():
                answer.set_result(told)


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
