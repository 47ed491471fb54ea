"""Commands as process groups that never outlive us: ended gently, then for certain, and by the guard if we
are killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_PR_SET_PDEATHSIG = 1
_LINGER = 1.0
"""How long to read on after a command ended, if something it left behind holds its standard error open."""


class Guard:
    """The process that cleans up after us if we are killed; see guard.py. Started anew if it was killed
    itself.
    """

    def __init__(self, directories: Iterable[Path]) -> None:
        self._directories = [str(directory) for directory in directories]
        self._groups: set[int] = set()
        self._until: float | None = None
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("guard.py")
        command = [sys.executable, "-I", "-S", str(script), *self._directories]
        return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603 - our own file

    @property
    def inlet(self) -> int:
        """The descriptor to which a new process tells its own group, before anything else can happen to us."""
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    def prune(self) -> None:
        """Forgets the groups of processes that could not be started: their numbers will be others' one day."""
        self._tell("!\n")

    def watch(self, group: int) -> None:
        self._groups.add(group)
        self._tell(f"+{group}\n")

    def forget(self, group: int) -> None:
        self._groups.discard(group)
        self._tell(f"-{group}\n")

    def limit(self, until: float) -> None:
        """The groups are killed at that time on the boot clock, even if we hang or are stopped, unless it is moved."""
        self._until = until
        self._tell(f"@{until:.6f}\n")

    def _tell(self, line: str) -> None:
        try:
            self._write(line)
        except BrokenPipeError:
            self._process.wait()
            self._process = self._start()
            until = "" if self._until is None else f"@{self._until:.6f}\n"
            self._write("".join(f"+{group}\n" for group in self._groups) + until)

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def close(self) -> None:
        """Lets it kill what is left and remove the directories, and waits for that. Safe to repeat."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class Command:
    """A running command in a process group of its own."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        guard: Guard,
        errors: int | None,
        keep: int,
        forward: Callable[[bytes], None] | None,
    ) -> None:
        self._process = process
        self._guard = guard
        self.tail = bytearray()
        """The end of what it wrote to its standard error."""
        self._reading = None if errors is None else asyncio.create_task(self._read(errors, keep, forward))

    @classmethod
    async def start(
        cls,
        arguments: Sequence[str],
        *,
        guard: Guard,
        env: Mapping[str, str],
        stdin: IO[bytes] | int,
        stdout: IO[bytes] | int,
        keep: int,
        forward: Callable[[bytes], None] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Command:
        """Keeps the last `keep` bytes of its standard error and forwards them all; with 0 it has ours. Raises OSError
        if it can't be started.

        Call it on the main thread: the kernel ties a child to the thread that made it.
        """
        # Our own pipe: asyncio's would keep wait() waiting for whatever the command leaves behind.
        reader, writer = os.pipe() if keep else (None, None)
        try:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                env=env,
                stdin=stdin,
                stdout=stdout,
                stderr=writer,
                process_group=0,
                pass_fds=pass_fds,
                preexec_fn=_bind(guard.inlet),
            )
        except BaseException:
            if reader is not None:
                os.close(reader)
            guard.prune()
            raise
        finally:
            if writer is not None:
                os.close(writer)
        guard.watch(process.pid)
        return cls(process, guard, reader, keep, forward)

    async def wait(self) -> int:
        """Its exit code, negative for a signal, once it ended; what is left of its group is killed."""
        try:
            code = await self._process.wait()
            self.kill()
            if self._reading is not None:
                await asyncio.wait([self._reading], timeout=_LINGER)
            return code
        finally:
            if self._reading is not None:
                self._reading.cancel()
            if self._process.returncode is not None:
                self._guard.forget(self._process.pid)

    async def _read(self, errors: int, keep: int, forward: Callable[[bytes], None] | None) -> None:
        stream = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(stream)
        pipe = os.fdopen(errors, "rb", buffering=0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        try:
            while data := await stream.read(1 << 16):
                self.tail += data
                del self.tail[:-keep]
                if forward is not None:
                    forward(data)
        finally:
            transport.close()

    async def end(self, grace: float) -> None:
        """SIGTERM to the group; SIGKILL to what is left of it after `grace` seconds."""
        self.send(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), grace)
        self.kill()
        await self._process.wait()
        self._guard.forget(self._process.pid)

    def kill(self) -> None:
        """Ends the whole group at once."""
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the whole group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _bind(guard: int) -> Callable[[], None] | None:
    """What the new process runs before its command, so that the kernel kills it with us and the guard knows its
    group from the first; None where there is no such.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # resolved here: little is safe between fork and exec
    parent = os.getpid()

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(1)
        with contextlib.suppress(OSError):  # it was killed; the next word to it starts another
            os.write(guard, b"+%d\n" % os.getpid())

    return bind
