"""`retinue work`: the worker for any program that reads a file and writes one."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retinue.cli import common
from retinue.cli.common import DURATION, PAIR
from retinue.client import errors
from retinue.client.payload import size
from retinue.client.queue import Queue
from retinue.client.runner import ACTIONS, EXITS, Action, Options, Runner
from retinue.client.worker import Worker, WorkerEvent
from retinue.workqueue.v1 import workqueue_admin_service_pb2 as api
from retinue.workqueue.v1 import workqueue_admin_service_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL = 0.5


class ExitType(click.ParamType[tuple[int, Action]]):
    """What an exit code means: `3=final`."""

    name = "code=action"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, Action]:
        code, _, action = value.partition("=")
        if not code.isdecimal() or int(code) > 255 or action not in ACTIONS:  # noqa: PLR2004 - of a process
            self.fail(f"{value!r} is not of the form CODE=ACTION; actions: {', '.join(ACTIONS)}", param, ctx)
        return int(code), action


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("queue_id", metavar="QUEUE")
@click.argument("command", metavar="-- COMMAND [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--concurrency", type=click.IntRange(1, 1000), help="Commands at once; default: the cores we may use.")
@click.option("--lease", type=DURATION, help="How long leases last, renewed at a third; default: the queue's.")
@click.option("--then", "then", default="", metavar="QUEUE", help="Enqueue the output there, in the same commit.")
@click.option(
    "--then-label", "then_labels", type=PAIR, multiple=True, help="A label for that task, with those it inherits."
)
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Publish outputs there, under the label `path` or the task's id.",
)
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(tempfile.gettempdir()),
    help="Where attempts have their private directories.",
)
@click.option(
    "--keep-failed", is_flag=True, help="Keep the directories of failed attempts, in failed/ under the work dir."
)
@click.option(
    "--exit", "exits", type=ExitType(), multiple=True, help="What an exit code means: 3=final; may be repeated."
)
@click.option(
    "--kill-grace",
    type=DURATION,
    default="5s",
    show_default=True,
    help="From SIGTERM to SIGKILL for a command that must end.",
)
@click.option(
    "--grace",
    type=DURATION,
    default="30s",
    show_default=True,
    help="How long commands may go on after SIGTERM or Ctrl-C.",
)
@click.option("--exit-when-empty", is_flag=True, help="Leave when the queue has no unfinished tasks.")
@click.option("--max-tasks", type=click.IntRange(min=1), help="Leave after that many tasks.")
@click.option(
    "--logs/--no-logs", default=None, help="Pass the commands' standard error on; default: unless on a terminal."
)
@click.option("--json", "json_lines", is_flag=True, help="JSON lines also on a terminal.")
@click.option("--address", metavar="ADDRESS", help="The server: HOST:PORT, unix:PATH or a socket's path.")
def work(*, queue_id: str, command: tuple[str, ...], address: str | None, json_lines: bool, **options: Any) -> int:
    """Run COMMAND for each task of QUEUE.

    The task's input is a file, and so is the output. COMMAND finds them by the placeholders {input} {output}
    {task} {dir}, or by RETINUE_INPUT_FILE (also WORK_ITEM_FILE), RETINUE_OUTPUT_FILE, RETINUE_TASK_FILE.
    Without a placeholder the input is its standard input and its standard output is the output.

    \b
    retinue work upper -- tr a-z A-Z
    retinue work images --then thumbs -- convert {input} -resize 200 {output}
    retinue work videos --concurrency 2 --output-dir done/ -- ./encode.sh {input} {output}

    \b
    Exit codes of COMMAND:
       0 done       75 retry        65 fail for good       99 give back, not counted
      others and signals: retry. Change them with --exit 3=final.
      The end of its standard error becomes the failure's message.

    SIGTERM or Ctrl-C: no more tasks, --grace for the running ones, then they are given back. Again: at once.
    """
    if shutil.which(command[0]) is None and not any(char in command[0] for char in "{}"):
        raise click.UsageError(f"cannot run {command[0]}: there is no such program; check its name and PATH")
    terminal = sys.stdout.isatty() and not json_lines
    forward = options["logs"] if options["logs"] is not None else not terminal
    runner = Options(
        command=command,
        exits=dict(EXITS) | dict(options["exits"]),
        then=options["then"],
        then_labels=dict(options["then_labels"]),
        work_dir=options["work_dir"].resolve(),
        output_dir=options["output_dir"] and options["output_dir"].resolve(),
        kill_grace=options["kill_grace"],
        keep_failed=options["keep_failed"],
        forward=_forward if forward else None,
    )
    runner.work_dir.mkdir(parents=True, exist_ok=True)
    return asyncio.run(_work(queue_id, address, runner, options, terminal=terminal))


def _forward(data: bytes) -> None:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


async def _work(
    queue_id: str, address: str | None, runner_options: Options, options: dict[str, Any], *, terminal: bool
) -> int:
    async with Queue(queue_id, address=address) as queue, Runner(queue, runner_options) as runner:
        tally = Tally(queue_id)
        display: Callable[[WorkerEvent], None] = _emit
        if terminal:
            from retinue.cli.live import Live  # noqa: PLC0415 - needs rich, for terminals only

            live = Live(tally)
            display = live.show

        def listen(event: WorkerEvent) -> None:
            tally.count(event)
            display(event)

        worker = Worker(
            queue,
            runner,
            concurrency=options["concurrency"] or _cores(),
            lease_duration=options["lease"],
            max_tasks=options["max_tasks"],
            listener=listen,
        )
        _stop_on_signals(worker, runner, options["grace"])
        watcher = asyncio.create_task(_stop_when_done(worker, queue, tally, options))
        try:
            await worker.run()
        finally:
            watcher.cancel()
            if terminal:
                live.close()
            else:
                common.emit({"event": "stopped", **tally.counts, "seconds": round(tally.seconds, 3)})
    return 0


def _stop_on_signals(worker: Worker, runner: Runner, grace: float) -> None:
    signals = 0

    def stop() -> None:
        nonlocal signals
        signals += 1
        worker.stop(grace if signals == 1 else 0)
        if signals > 1:
            asyncio.get_running_loop().call_later(_LINGER, runner.kill)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)


_LINGER = 0.05
"""So that the worker has taken the outcomes away before the commands die."""


async def _stop_when_done(worker: Worker, queue: Queue, tally: Tally, options: dict[str, Any]) -> None:
    """Stops the worker after --max-tasks, or when the queue has nothing unfinished."""
    if not (options["exit_when_empty"] or options["max_tasks"]):
        return
    while True:
        await asyncio.sleep(_POLL if not tally.ended else _POLL / 5)
        if options["max_tasks"] and tally.ended >= options["max_tasks"]:
            worker.stop(options["grace"])
            return
        if options["exit_when_empty"] and worker.idle and await _is_empty(queue):
            worker.stop(options["grace"])
            return


async def _is_empty(queue: Queue) -> bool:
    stub = rpc.WorkQueueAdminServiceStub(queue.connection.channel)
    request = api.GetQueueStatsRequest(queue_ids=[queue.queue_id])
    try:
        response = await queue.connection.call(stub.GetQueueStats, request, timeout=5, repeatable=False)
    except errors.NotFound:
        return True  # no task has ever been put in
    except errors.RetinueError:
        return False  # the server is away: it may come back with tasks
    stats = response.stats[0]
    return not (stats.scheduled or stats.ready or stats.leased or stats.retrying)


class Tally:
    """What has happened so far."""

    def __init__(self, queue_id: str) -> None:
        self.queue_id = queue_id
        self.counts = dict.fromkeys(("succeeded", "retrying", "dead", "released", "cancelled", "lost"), 0)
        self.running = 0
        self.connected = False
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def ended(self) -> int:
        return sum(self.counts.values())

    def count(self, event: WorkerEvent) -> None:
        if event.kind in self.counts:
            self.counts[event.kind] += 1
            self.running -= 1
        elif event.kind == "leased":
            self.running += 1
        elif event.kind in ("connected", "disconnected"):
            self.connected = event.kind == "connected"


def _emit(event: WorkerEvent) -> None:
    row: dict[str, Any] = {"event": event.kind}
    if event.job is not None:
        row |= {"task_id": event.job.task_id, "attempt": event.job.attempt}
        if event.kind != "leased":
            row["seconds"] = round(time.monotonic() - event.job.received, 3)
    if event.reason:
        row |= {"reason": event.reason, "message": event.message}
    if event.result is not None:
        row["result_bytes"] = event.result.blob.size_bytes or size(event.result)
    common.emit(row)
    sys.stdout.flush()
