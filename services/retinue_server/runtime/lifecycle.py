"""The life of the process: start in order, serve, drain on a signal, stop in reverse order."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from retinue_server.runtime import owners
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import RetinueError
from retinue_server.runtime.files import make_directory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from retinue_server.runtime.dispatch import Part, Pattern
    from retinue_server.runtime.health import HealthService

log = logging.getLogger(__name__)

FATAL_EXIT = 70
"""EX_SOFTWARE of sysexits.h."""


class Listener(Protocol):
    """What takes calls: a part whose stop can wait for those that are open."""

    name: str
    """Of the setting: listen, control, http, probe or metrics."""
    bound: list[str]
    """The addresses with their actual ports, once started."""

    async def start(self) -> None:
        """Listens; raises StartError."""

    async def stop(self, grace: float | None = None) -> None:
        """Takes no new calls, waits `grace` seconds for the open ones, then ends them."""


class Process:
    """Patterns behind listeners, with one life; `stop` before `start`, and a second `stop`, do nothing."""

    def __init__(
        self,
        patterns: Sequence[Pattern],
        listeners: Sequence[Listener],
        health: HealthService,
        *,
        drain_seconds: float,
        parts: Sequence[Part] = (),
        on_drain: Callable[[], None] = lambda: None,
    ) -> None:
        self._patterns = patterns
        self._parts = [*parts, *(part for pattern in patterns for part in pattern.parts)]
        self._listeners = listeners
        self._health = health
        self._drain_seconds = drain_seconds
        self._on_drain = on_drain
        self._started: list[Part] = []
        self._listening: list[Listener] = []
        self._stopping: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> dict[str, list[str]]:
        """Where it can be dialled, by the name of the listener."""
        return {listener.name: listener.bound for listener in self._listeners}

    async def start(self) -> None:
        """Parts in order, then listeners, then health; what fails stops what started before it."""
        try:
            for part in self._parts:
                self._started.append(part)
                await _start(part)
            for listener in self._listeners:
                self._listening.append(listener)
                await listener.start()
        except BaseException:
            await self.stop()
            raise
        self._health.open()

    async def stop(self) -> None:
        """Health first, then open calls within the drain's deadline, listeners, parts in reverse.

        Raises an ExceptionGroup of what could not be stopped, after everything else has been.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        self._health.close()
        self._on_drain()
        quiesces = [pattern.quiesce for pattern in self._patterns if pattern.quiesce]
        errors = await _attempt(*quiesces, within=self._drain_seconds)
        grace = max(0.0, deadline - asyncio.get_running_loop().time())
        errors += await _attempt(*(partial(one.stop, grace) for one in self._listening))
        for part in reversed(self._started):
            errors += await _attempt(part.stop)
        if errors:
            raise ExceptionGroup("cannot stop cleanly", errors)


async def _start(part: Part) -> None:
    try:
        await part.start()
    except RetinueError as error:
        raise StartError(f"{error.message}: {error.__cause__}" if error.__cause__ else error.message) from error


async def _attempt(*actions: Callable[[], Awaitable[None]], within: float | None = None) -> list[Exception]:
    """Does all at the same time and gives back what they raised."""
    try:
        async with asyncio.timeout(within):
            results = await asyncio.gather(*(action() for action in actions), return_exceptions=True)
    except TimeoutError:
        log.warning("patterns did not come to rest within %s s", within)
        return []
    return [result for result in results if isinstance(result, Exception)]


async def run(process: Process, on_ready: Callable[[], None]) -> None:
    """Starts, calls `on_ready`, serves until SIGTERM or SIGINT, stops.

    A second signal ends the process at once.
    """
    stop = asyncio.Event()
    _on_signals(stop)
    starting = asyncio.create_task(process.start())
    told = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            on_ready()
            await told
        else:
            starting.cancel()
            await asyncio.wait({starting})
    finally:
        told.cancel()
        await process.stop()


def _on_signals(stop: asyncio.Event) -> None:
    def handle(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)  # the shell's convention for death by a signal
        log.info("%s: draining; a second signal ends the process at once", signal.Signals(number).name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number)


def fatal(error: BaseException) -> None:
    """Ends the process at once, for what must not be tried again, such as a failed fsync. Never returns."""
    log.critical("cannot go on: %s; the process ends", error, exc_info=error)
    logging.shutdown()
    os._exit(FATAL_EXIT)


class DataDirLock:
    """A part that holds `<data-dir>/lock` for one process; the kernel frees it when the process dies."""

    def __init__(self, data_dir: Path) -> None:
        self._path = Path(data_dir) / "lock"
        self._descriptor: int | None = None

    async def start(self) -> None:
        """Makes the directory if need be; raises StartError naming the pid that has the lock."""
        self.acquire()

    async def stop(self) -> None:
        """Frees the lock; the file stays, since removing it would let two processes lock two files."""
        self.release()

    def acquire(self) -> None:
        """As `start`, for callers without a loop."""
        if self._descriptor is not None:
            return
        try:
            make_directory(self._path.parent, 0o700)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"cannot use the data directory {self._path.parent}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise StartError(_held(self._path.parent, owner)) from None
        self._descriptor = descriptor
        with suppress(OSError):  # on a full disk too the lock holds; the pid is for the message alone
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """As `stop`, for callers without a loop."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _held(directory: Path, owner: str) -> str:
    who = owners.describe(int(owner)) if owner.isdecimal() else "another process"
    return f"cannot use the data directory {directory}: {who} holds it; stop it, or choose another with --data-dir DIR"
