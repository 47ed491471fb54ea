"""Runs a command per task: an input file in, an output file out.

Each attempt has a private directory: `input/NAME` (read-only), an empty `output/`, `task.json`. The command
finds them by the placeholders `{input}` `{output}` `{task}` `{dir}` and by the environment; without a
placeholder the input is its standard input and its standard output is the output. NAME is the last part of
the label `path`, so that tools that go by a file's suffix are served, or `data`.

The output is `output/NAME`, or else the only file in `output/`, or else nothing. It counts only after exit
code 0: it is synced, hashed, uploaded if it is large, published to the output directory, and then the task is
completed. Publishing comes before completing, so that a crash in between leaves a whole file that the next
attempt replaces, not a completed task without its file; a file is renamed into place, so that nobody sees a
part of one. A reader that must not see the output of an uncommitted attempt reads the result from the queue.

Whatever ends an attempt early (deadline, lost lease, cancellation, shutdown) ends the command's whole process
group: SIGTERM, then SIGKILL. A runner that is killed takes its commands and directories with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Literal, Self, TypeAlias, cast

from retinue.client import payload as payloads
from retinue.client import trace
from retinue.client.process import Command, Guard
from retinue.client.worker import Done, Failed, Job, Released
from retinue.workqueue.v1 import task_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from retinue.client.queue import Queue

Action: TypeAlias = Literal["complete", "retry", "final", "release"]

ACTIONS: tuple[Action, ...] = ("complete", "retry", "final", "release")
EXITS: Mapping[int, Action] = {0: "complete", os.EX_TEMPFAIL: "retry", os.EX_DATAERR: "final", 99: "release"}
"""What an exit code means; every other one is retried."""

PLACEHOLDERS = ("{input}", "{output}", "{task}", "{dir}")
_TAIL = 2048
_RELEASE_DELAY = 1.0
_SHELL_SIGNAL = 128
_STDERR = 2


@dataclass(frozen=True)
class Options:
    """How a runner runs its command."""

    command: Sequence[str]
    exits: Mapping[int, Action] = field(default_factory=lambda: dict(EXITS))
    then: str = ""
    """The queue that gets the output as input, in the same commit; empty = none."""
    then_labels: Mapping[str, str] = field(default_factory=dict)
    work_dir: Path = Path(tempfile.gettempdir())
    output_dir: Path | None = None
    kill_grace: float = 5.0
    keep_failed: bool = False
    forward: Callable[[bytes], None] | None = None
    """Gets what the commands write to their standard error."""


class Runner:
    """A handler for Worker: `async with Runner(queue, options) as run: await Worker(queue, run).run()`."""

    def __init__(self, queue: Queue, options: Options) -> None:
        self._queue = queue
        self._options = options
        self._commands: set[Command] = set()

    async def __aenter__(self) -> Self:
        self._dir = Path(tempfile.mkdtemp(prefix="retinue-work-", dir=self._options.work_dir))
        scratch = [self._dir]
        if self._options.output_dir is not None:
            self._options.output_dir.mkdir(parents=True, exist_ok=True)
            # Beside the outputs, because a rename does not cross file systems.
            self._unpublished = Path(tempfile.mkdtemp(prefix=".retinue-", dir=self._options.output_dir))
            scratch.append(self._unpublished)
        self._guard = Guard(scratch)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._guard.close)

    async def __call__(self, job: Job) -> Done:
        """One attempt. Raises Failed or Released as the command's end says."""
        attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=self._dir))
        succeeded = False
        try:
            files = await self._lay_out(attempt, job)
            await self._execute(files, job)
            done = await self._publish(files, job)
            succeeded = True
            return done
        finally:
            await asyncio.shield(asyncio.to_thread(self._discard, attempt, job, succeeded=succeeded))

    # Before: the files

    async def _lay_out(self, attempt: Path, job: Job) -> Files:
        files = Files(attempt, _name(job))
        files.input.parent.mkdir()
        files.output.parent.mkdir()
        files.task.write_text(json.dumps(_description(job), indent=2, ensure_ascii=False) + "\n")
        with files.input.open("xb") as file:
            await self._write_input(job, file)
        files.input.chmod(0o444)
        files.input.parent.chmod(0o555)
        return files

    async def _write_input(self, job: Job, file: BinaryIO) -> None:
        content = job.lease.input
        if content.WhichOneof("content") == "blob":
            await self._queue.blobs.get_file(content.blob.blob_id, file)
        else:
            file.write(payloads.raw(content))

    # During: the command

    async def _execute(self, files: Files, job: Job) -> None:
        arguments, piped = self._arguments(files)
        with files.streams(piped=piped) as (stdin, stdout):
            starting = asyncio.ensure_future(
                Command.start(
                    arguments,
                    guard=self._guard,
                    env=_environment(files, job),
                    stdin=stdin,
                    stdout=stdout,
                    keep=_TAIL,
                    forward=self._options.forward,
                )
            )
            command = await self._started(starting, arguments[0])
        code = await self._await_end(command)
        self._judge(code, command.tail)

    async def _started(self, starting: asyncio.Future[Command], program: str) -> Command:
        try:
            return await asyncio.shield(starting)
        except OSError as error:
            raise Failed("EXEC_FAILED", f"cannot run {program}: {error.strerror or error}") from error
        except asyncio.CancelledError:
            await asyncio.shield((await starting).end(0))
            raise

    def _arguments(self, files: Files) -> tuple[list[str], bool]:
        """The command with its placeholders filled in, and whether it is fed by standard input for want of
        any.
        """
        command = self._options.command
        if not any(placeholder in argument for placeholder in PLACEHOLDERS for argument in command):
            return list(command), True
        return [files.fill(argument) for argument in command], False

    async def _await_end(self, command: Command) -> int:
        self._commands.add(command)
        try:
            return await command.wait()
        except asyncio.CancelledError:
            await asyncio.shield(command.end(self._options.kill_grace))
            raise
        finally:
            self._commands.discard(command)

    def kill(self) -> None:
        """Ends every running command at once, without its grace. Stop the worker first, or they count as
        failed.
        """
        for command in self._commands:
            command.kill()

    def _judge(self, code: int, tail: bytearray) -> None:
        action, reason = judge(code, self._options.exits)
        message = tail.decode(errors="replace").strip()
        if action == "release":
            raise Released(_RELEASE_DELAY)
        if action != "complete":
            raise Failed(reason, message or f"the command ended with {reason}", final=action == "final")

    # After: the output

    async def _publish(self, files: Files, job: Job) -> Done:
        output = await asyncio.to_thread(files.find_output)
        result = await self._result(output) if output else pb.Payload()
        if output and self._options.output_dir:
            await asyncio.to_thread(self._put_out, output, job)
        return Done(result, [await self._follow_up(result, job)] if self._options.then else [])

    async def _result(self, output: Path) -> pb.Payload:
        with await asyncio.to_thread(output.open, "rb") as file:
            start = await asyncio.to_thread(file.read, payloads.INLINE_BYTES + 1)
            if len(start) <= payloads.INLINE_BYTES:
                return payloads.readable(start)
            return pb.Payload(blob=await self._queue.blobs.put_file(cast("BinaryIO", file)))

    async def _follow_up(self, result: pb.Payload, job: Job) -> pb.TaskSpec:
        labels = job.labels | dict(self._options.then_labels)
        return await self._queue.spec(result, queue_id=self._options.then, labels=labels)

    def _put_out(self, output: Path, job: Job) -> None:
        assert self._options.output_dir is not None
        target = published_path(self._options.output_dir, job)
        fresh = self._unpublished / output.parent.parent.name
        try:
            shutil.copyfile(output, fresh)
            _sync(fresh)
            target.parent.mkdir(parents=True, exist_ok=True)
            if job.stopping.is_set():
                return  # its outcome no longer counts, and the next attempt's may be there already
            fresh.replace(target)
            _sync(target.parent)
        except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
            raise Failed("OUTPUT_PATH", f"cannot publish {target}: {error}", final=True) from error
        finally:
            fresh.unlink(missing_ok=True)

    def _discard(self, attempt: Path, job: Job, *, succeeded: bool) -> None:
        with contextlib.suppress(OSError):  # read-only directories can't be emptied
            (attempt / "input").chmod(0o755)
        if self._options.keep_failed and not succeeded:
            kept = self._options.work_dir / "failed" / f"{job.task_id.replace('/', '_')}-{job.lease_epoch}"
            kept.parent.mkdir(exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            attempt.rename(kept)
        else:
            shutil.rmtree(attempt, ignore_errors=True)


@dataclass(frozen=True)
class Files:
    """Where the files of one attempt are."""

    directory: Path
    name: str

    @property
    def input(self) -> Path:
        return self.directory / "input" / self.name

    @property
    def output(self) -> Path:
        return self.directory / "output" / self.name

    @property
    def task(self) -> Path:
        return self.directory / "task.json"

    def fill(self, argument: str) -> str:
        paths = (self.input, self.output, self.task, self.directory)
        for placeholder, path in zip(PLACEHOLDERS, paths, strict=True):
            argument = argument.replace(placeholder, str(path))
        return argument

    @contextlib.contextmanager
    def streams(self, *, piped: bool) -> Iterator[tuple[IO[bytes] | int, IO[bytes] | int]]:
        """The command's standard input and output: the files if it is fed by them, else nothing and our log."""
        if not piped:
            yield subprocess.DEVNULL, _STDERR
            return
        with self.input.open("rb") as stdin, self.output.open("wb") as stdout:
            yield stdin, stdout

    def find_output(self) -> Path | None:
        """The output, synced; None if there is none. Raises Failed if it is not clear which file it is."""
        found = sorted(self.output.parent.iterdir())
        chosen = self.output if self.output in found else found[0] if len(found) == 1 else None
        if found and chosen is None:
            names = ", ".join(path.name for path in found[:5])
            raise Failed("OUTPUT_AMBIGUOUS", f"cannot tell the output among {names}: write {{output}}", final=True)
        if chosen is not None and not stat.S_ISREG(chosen.lstat().st_mode):
            raise Failed("OUTPUT_NOT_A_FILE", f"cannot publish {chosen.name}: it is not a plain file", final=True)
        if chosen is not None:
            _sync(chosen)
        return chosen


def judge(code: int, exits: Mapping[int, Action]) -> tuple[Action, str]:
    """What the end of a command means for its task, and the word for it: EXIT_n, or SIGNAL_n also by way
    of a shell.
    """
    if code < 0:
        return "retry", f"SIGNAL_{-code}"
    if code not in exits and code - _SHELL_SIGNAL in {number.value for number in signal.Signals}:
        return "retry", f"SIGNAL_{code - _SHELL_SIGNAL}"
    return exits.get(code, "retry"), f"EXIT_{code}"


def published_path(directory: Path, job: Job) -> Path:
    """Where a task's output goes: its label `path`, or else its id. Raises Failed for a path that leads
    elsewhere.
    """
    wanted = job.labels.get("path") or job.task_id
    root = directory.resolve()
    target = root if "\0" in wanted else (root / wanted).resolve()
    inside = target.is_relative_to(root) and target != root
    if not inside or target.relative_to(root).parts[0].startswith(".retinue-"):
        raise Failed("OUTPUT_PATH", f"cannot publish to {wanted!r}: it leads out of the output directory", final=True)
    return target


def _name(job: Job) -> str:
    name = job.labels.get("path", "").rpartition("/")[2]
    return name if name not in ("", ".", "..") and "\0" not in name and len(name.encode()) <= 255 else "data"  # noqa: PLR2004 - NAME_MAX


def _description(job: Job) -> dict[str, object]:
    lease = job.lease
    return {
        "task_id": lease.task_id,
        "queue_id": lease.queue_id,
        "task_type": lease.task_type,
        "attempt": lease.attempt,
        "max_attempts": lease.max_attempts,
        "lease_epoch": lease.lease_epoch,
        "labels": dict(lease.labels),
        "content_type": lease.input.content_type,
        "traceparent": trace.current(),
    }


def _environment(files: Files, job: Job) -> dict[str, str]:
    return os.environ | {
        "WORK_ITEM_FILE": str(files.input),
        "RETINUE_INPUT_FILE": str(files.input),
        "RETINUE_OUTPUT_FILE": str(files.output),
        "RETINUE_TASK_FILE": str(files.task),
        "RETINUE_TASK_ID": job.task_id,
        "RETINUE_ATTEMPT": str(job.attempt),
        "RETINUE_LEASE_EPOCH": str(job.lease_epoch),
        "RETINUE_LEASE_DURATION": f"{job.lease.lease_duration.ToTimedelta().total_seconds():g}",
        "TRACEPARENT": trace.current(),
    }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
