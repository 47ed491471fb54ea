"""`retinue queue`: tasks for producers, queues for operators."""

from __future__ import annotations

import sys
from datetime import UTC
from typing import TYPE_CHECKING, Any

import click

from retinue.cli import common
from retinue.cli.app import Branch
from retinue.cli.common import DURATION, INSTANT, PAIR, Server, asynchronous, server_options
from retinue.cli.failures import OUT_OF_TIME, REFUSED
from retinue.client.queue import TERMINAL, duration
from retinue.workqueue.v1 import queue_pb2
from retinue.workqueue.v1 import task_pb2 as pb
from retinue.workqueue.v1 import workqueue_admin_service_pb2 as api
from retinue.workqueue.v1 import workqueue_admin_service_pb2_grpc as rpc

if TYPE_CHECKING:
    from retinue.client.channel import Connection

queue = Branch(
    {
        "ls": ("queue:ls", "All queues with their counts."),
        "stats": ("queue:stats", "The counts of queues, in full."),
        "tasks": ("queue:tasks", "The tasks of a queue, newest first."),
        "get": ("queue:get", "One task with input and result."),
        "wait": ("queue:wait", "Wait until a task is finished, and print its result."),
        "enqueue": ("enqueue:enqueue", "Put tasks in: a text, files, a directory, standard input."),
        "cancel": ("queue:cancel", "Cancel tasks, or ask their workers to stop."),
        "reschedule": ("queue:reschedule", "Give a waiting task another time or priority."),
        "redrive": ("queue:redrive", "Make dead, cancelled or expired tasks ready again (operator)."),
        "watch": ("queue:watch", "What happens to tasks, as it happens."),
        "create": ("queue:create", "Make a queue with settings of its own (operator)."),
        "update": ("queue:update", "Change a queue's settings (operator)."),
        "pause": ("queue:pause", "Hand out no more tasks (operator)."),
        "resume": ("queue:resume", "End a pause or a drain (operator)."),
        "drain": ("queue:drain", "Take no more tasks, let workers empty the queue (operator)."),
        "purge": ("queue:purge", "Delete the tasks no worker has (operator)."),
        "delete": ("queue:delete", "Remove a queue (operator)."),
    },
    name="queue",
    help="""Tasks and queues.

    \b
    retinue queue enqueue mail '{"to": "ada"}' --json --label kind=welcome
    retinue queue enqueue images --from-dir photos/ --key import-7-
    retinue queue tasks mail --state dead
    retinue queue redrive --queue mail
    """,
    no_args_is_help=True,
)

STATES = [name.removeprefix("TASK_STATE_").lower() for name in pb.TaskState.keys()[1:]]
STATE = click.Choice(STATES, case_sensitive=False)
_COUNTS = ("ready", "leased", "scheduled", "retrying", "succeeded", "dead", "cancelled", "expired")


async def _admin(connection: Connection, method: str, request: Any, seconds: float) -> Any:
    try:
        stub = rpc.WorkQueueAdminServiceStub(connection.channel)
        return await connection.call(getattr(stub, method), request, timeout=seconds, repeatable=False)
    finally:
        await connection.close()


async def _operate(server: Server, method: str, request: Any) -> Any:
    return await _admin(server.for_operators(), method, request, server.timeout)


def _stats_row(stats: queue_pb2.QueueStats) -> common.Row:
    state = queue_pb2.QueueState.Name(stats.state).removeprefix("QUEUE_STATE_").lower()
    counts = {name: getattr(stats, name) for name in _COUNTS}
    oldest = stats.oldest_ready_duration.ToTimedelta().total_seconds()
    return {"queue": stats.queue_id, "state": state, **counts, "workers": stats.workers, "oldest_ready_seconds": oldest}


@click.command()
@server_options
@asynchronous
async def ls(server: Server) -> None:
    """All queues with their counts."""
    response = await _admin(server.for_apps(), "GetQueueStats", api.GetQueueStatsRequest(), server.timeout)
    columns = ["queue", "state", "ready", "leased", "scheduled", "retrying", "succeeded", "dead"]
    server.show([_stats_row(stats) for stats in response.stats], columns)


@click.command()
@click.argument("queues", nargs=-1, metavar="[QUEUE]...")
@server_options
@asynchronous
async def stats(server: Server, *, queues: tuple[str, ...]) -> None:
    """The counts of QUEUEs, or of all, in full."""
    request = api.GetQueueStatsRequest(queue_ids=queues)
    response = await _admin(server.for_apps(), "GetQueueStats", request, server.timeout)
    columns = ["queue", "state", *_COUNTS, "workers", "oldest_ready_seconds"]
    server.show([_stats_row(row) for row in response.stats], columns)


@click.command()
@click.argument("queue_id", metavar="QUEUE")
@click.option("--state", "states", type=STATE, multiple=True, help="Only in this state; may be repeated.")
@click.option("--label", "labels", type=PAIR, multiple=True, help="Only with this label; may be repeated.")
@click.option("--type", "task_type", default="", help="Only of this type.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many at most.")
@server_options
@asynchronous
async def tasks(
    server: Server,
    *,
    queue_id: str,
    states: tuple[str, ...],
    labels: tuple[tuple[str, str], ...],
    task_type: str,
    limit: int,
) -> None:
    """The tasks of QUEUE, newest first."""
    rows = []
    async with server.queue(queue_id) as queue_:
        numbers = [_state_number(name) for name in states]
        found = queue_.list(states=numbers, labels=dict(labels), task_type=task_type, page_size=min(limit, 500))
        async for task in found:
            rows.append(_task_line(task))
            if len(rows) == limit:
                break
    server.show(rows, ["task_id", "state", "attempt", "age", "labels", "last_failure"])


def _state_number(name: str) -> pb.TaskState.ValueType:
    return pb.TaskState.Value(f"TASK_STATE_{name.upper()}")


def _state_name(number: pb.TaskState.ValueType) -> str:
    return pb.TaskState.Name(number).removeprefix("TASK_STATE_").lower()


def _task_row(task: pb.Task) -> common.Row:
    """A task as a row: what it was told and what became of it, side by side."""
    row = common.plain(task)
    spec = row.pop("spec", {})
    row["state"] = _state_name(task.state)
    return {**row, **{key: value for key, value in spec.items() if key not in row}}


def _task_line(task: pb.Task) -> common.Row:
    row = _task_row(task)
    row["age"] = common.since(task.create_time.ToDatetime(tzinfo=UTC))
    if task.HasField("last_failure"):
        row["last_failure"] = f"{task.last_failure.reason}: {task.last_failure.message}"[:200]
    return row


@click.command()
@click.argument("task_id", metavar="TASK")
@server_options
@asynchronous
async def get(server: Server, *, task_id: str) -> None:
    """One task with input and result."""
    async with server.queue() as queue_:
        _show_task(await queue_.get(task_id), server)


def _show_task(task: pb.Task, server: Server) -> None:
    row = _task_row(task)
    if common.as_json(server.output):
        common.emit(row)
        return
    server.show([{"field": key, "value": value} for key, value in row.items()], ["field", "value"])


@click.command()
@click.argument("task_id", metavar="TASK")
@click.option("--for", "limit", type=DURATION, help="How long at most; default: as long as it takes.")
@server_options
@asynchronous
async def wait(server: Server, *, task_id: str, limit: float | None) -> int:
    """Wait until TASK is finished and print it.

    Ends with 0 if it succeeded, 4 if it did not, 5 if it is not finished in time.
    """
    async with server.queue() as queue_:
        task = await queue_.wait(task_id, timeout=limit)
    _show_task(task, server)
    if task.state not in TERMINAL:
        return OUT_OF_TIME
    return 0 if task.state == pb.TASK_STATE_SUCCEEDED else REFUSED


def _selection(function: Any) -> Any:
    for option in (
        click.option("--dry-run", is_flag=True, help="Only count."),
        click.option(
            "--max",
            "max_count",
            type=click.IntRange(1, 10_000),
            default=1_000,
            show_default=True,
            help="How many at most.",
        ),
        click.option("--type", "task_type", default="", help="With --queue: only of this type."),
        click.option("--label", "labels", type=PAIR, multiple=True, help="With --queue: only with this label."),
        click.option("--state", "states", type=STATE, multiple=True, help="With --queue: only in this state."),
        click.option("--queue", "queue_id", help="The queue's tasks that match, instead of named ones."),
        click.argument("task_ids", nargs=-1, metavar="[TASK]..."),
    ):
        function = option(function)
    return function


def _selected(options: dict[str, Any]) -> dict[str, Any]:
    """The fields that CancelTasks and RedriveTasks share."""
    if bool(options["task_ids"]) == bool(options["queue_id"]):
        raise click.UsageError("name tasks, or say which with --queue")
    if options["task_ids"]:
        return {"task_ids": options["task_ids"], "dry_run": options["dry_run"]}
    chosen = pb.TaskFilter(
        queue_id=options["queue_id"],
        states=[_state_number(name) for name in options["states"]],
        labels=dict(options["labels"]),
        task_type=options["task_type"],
    )
    return {"filter": chosen, "max_count": options["max_count"], "dry_run": options["dry_run"]}


def _report_counts(response: Any, server: Server) -> int:
    rows = [
        {"task_id": result.task_id, "reason": result.status.reason, "message": result.status.message}
        for result in response.results
        if result.status.code
    ]
    if common.as_json(server.output):
        common.emit({"count": response.count, "refused": rows})
    else:
        click.echo(f"{response.count} {'task' if response.count == 1 else 'tasks'}")
        if rows:
            server.show(rows, ["task_id", "reason", "message"])
    return REFUSED if rows else 0


@click.command()
@_selection
@server_options
@asynchronous
async def cancel(server: Server, **options: Any) -> int:
    """Cancel TASKs, or those of a queue that match. A worker that has one is asked to stop."""
    from retinue.workqueue.v1 import workqueue_service_pb2 as tasks_api  # noqa: PLC0415 - this command's own
    from retinue.workqueue.v1 import workqueue_service_pb2_grpc as tasks_rpc  # noqa: PLC0415 - the same

    connection = server.for_apps()
    try:
        stub = tasks_rpc.WorkQueueServiceStub(connection.channel)
        request = tasks_api.CancelTasksRequest(**_selected(options))
        return _report_counts(await connection.call(stub.CancelTasks, request, timeout=server.timeout), server)
    finally:
        await connection.close()


@click.command()
@_selection
@server_options
@asynchronous
async def redrive(server: Server, **options: Any) -> int:
    """Make dead, cancelled or expired TASKs ready again, or those of a queue that match."""
    request = api.RedriveTasksRequest(**_selected(options))
    return _report_counts(await _operate(server, "RedriveTasks", request), server)


@click.command()
@click.argument("task_id", metavar="TASK")
@click.option("--at", type=INSTANT, help="When it becomes ready.")
@click.option("--delay", type=DURATION, help="The same, from now; 0 = at once.")
@click.option("--priority", type=click.IntRange(-1000, 1000), help="Its new priority.")
@server_options
@asynchronous
async def reschedule(server: Server, *, task_id: str, at: Any, delay: float | None, priority: int | None) -> None:
    """Give TASK, which waits, another time or priority."""
    if at is None and delay is None and priority is None:
        raise click.UsageError("say what changes: --at, --delay or --priority")
    if at is not None and delay is not None:
        raise click.UsageError("--at and --delay say the same thing: give one")
    async with server.queue() as queue_:
        _show_task(await queue_.reschedule(task_id, at=at, delay=delay, priority=priority), server)


@click.command()
@click.argument("queue_id", metavar="[QUEUE]", default="")
@click.option("--resume", "resume_token", default="", help="Go on after the event with this resume_token.")
@server_options
@asynchronous
async def watch(server: Server, *, queue_id: str, resume_token: str) -> None:
    """What happens to the tasks of QUEUE, or of all queues, as it happens, until Ctrl-C."""
    import grpc  # noqa: PLC0415 - for its error alone

    from retinue.client.errors import from_rpc_error  # noqa: PLC0415 - the same

    connection = server.for_apps()
    request = api.WatchEventsRequest(queue_id=queue_id, resume_token=resume_token)
    try:
        stub = rpc.WorkQueueAdminServiceStub(connection.channel)
        async for event in stub.WatchEvents(request, metadata=connection.metadata()):
            _show_event(event, server)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    finally:
        await connection.close()


def _show_event(event: api.WatchEventsResponse, server: Server) -> None:
    if event.WhichOneof("event") != "task_event":
        return
    row = common.plain(event.task_event)
    row["type"] = api.TaskEventType.Name(event.task_event.type).removeprefix("TASK_EVENT_TYPE_").lower()
    row["resume_token"] = event.resume_token
    if common.as_json(server.output):
        common.emit(row)
    else:
        at = event.task_event.event_time.ToDatetime(tzinfo=UTC).astimezone()
        words = [f"{at:%H:%M:%S.%f}"[:-3], f"{row['type']:<13}", event.task_event.queue_id, event.task_event.task_id]
        click.echo("  ".join([*words, event.task_event.worker_id]).rstrip())
    sys.stdout.flush()


def _settings_options(function: Any) -> Any:
    for option in (
        click.option("--max-tasks", type=click.IntRange(min=0), help="Unfinished tasks it takes; 0 = no limit."),
        click.option("--dead-retention", type=DURATION, help="How long dead tasks are kept."),
        click.option("--retention", type=DURATION, help="How long other finished tasks are kept."),
        click.option(
            "--max-lease-expirations", type=click.IntRange(1, 1000), help="Expired leases before a task is dead."
        ),
        click.option("--backoff-multiplier", type=float, help="By what the wait grows with each failure."),
        click.option("--max-backoff", type=DURATION, help="The ceiling of every wait before a retry."),
        click.option("--initial-backoff", type=DURATION, help="The ceiling of the first wait before a retry."),
        click.option("--max-attempts", type=click.IntRange(1, 1000), help="Attempts before a task is dead."),
        click.option(
            "--attempt", "attempt_duration", type=DURATION, help="How long one attempt may take; 0 = no limit."
        ),
        click.option("--lease", "lease_duration", type=DURATION, help="How long a lease lasts."),
    ):
        function = option(function)
    return function


def _settings(options: dict[str, Any]) -> queue_pb2.QueueSettings:
    retry = pb.RetryPolicy(
        max_attempts=options["max_attempts"] or 0,
        initial_backoff_duration=duration(options["initial_backoff"]),
        max_backoff_duration=duration(options["max_backoff"]),
        backoff_multiplier=options["backoff_multiplier"] or 0,
    )
    return queue_pb2.QueueSettings(
        lease_duration=duration(options["lease_duration"]),
        attempt_duration=duration(options["attempt_duration"]),
        retry_policy=retry if retry.ByteSize() else None,
        max_lease_expirations=options["max_lease_expirations"] or 0,
        retention_duration=duration(options["retention"]),
        dead_retention_duration=duration(options["dead_retention"]),
        max_tasks=options["max_tasks"],
    )


def _show_queue(found: queue_pb2.Queue, server: Server) -> None:
    row = common.plain(found)
    row["state"] = queue_pb2.QueueState.Name(found.state).removeprefix("QUEUE_STATE_").lower()
    server.show([row], ["queue_id", "state", "settings"])


@click.command()
@click.argument("queue_id", metavar="QUEUE")
@_settings_options
@server_options
@asynchronous
async def create(server: Server, *, queue_id: str, **options: Any) -> None:
    """Make QUEUE with settings of its own. Repeating it with the same settings is safe."""
    request = api.CreateQueueRequest(queue_id=queue_id, settings=_settings(options))
    _show_queue((await _operate(server, "CreateQueue", request)).queue, server)


@click.command()
@click.argument("queue_id", metavar="QUEUE")
@_settings_options
@server_options
@asynchronous
async def update(server: Server, *, queue_id: str, **options: Any) -> None:
    """Change QUEUE's settings; what is not named stays."""
    request = api.UpdateQueueRequest(queue_id=queue_id, settings=_settings(options))
    _show_queue((await _operate(server, "UpdateQueue", request)).queue, server)


def _switch(name: str, method: str, help_: str) -> click.Command:
    @click.command(name, help=help_)
    @click.argument("queue_id", metavar="QUEUE")
    @server_options
    @asynchronous
    async def command(server: Server, *, queue_id: str) -> None:
        request = getattr(api, f"{method}Request")(queue_id=queue_id)
        _show_queue((await _operate(server, method, request)).queue, server)

    return command


pause = _switch("pause", "PauseQueue", "Hand out no more tasks of QUEUE; it goes on taking them.")
resume = _switch("resume", "ResumeQueue", "End a pause or a drain of QUEUE.")
drain = _switch("drain", "DrainQueue", "Take no more tasks for QUEUE and let workers empty it.")


def _confirm(question: str, *, yes: bool) -> None:
    if not yes and sys.stdin.isatty():
        click.confirm(question, abort=True, err=True)


@click.command()
@click.argument("queue_id", metavar="QUEUE")
@click.option("--finished", is_flag=True, help="Also the finished ones.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@server_options
@asynchronous
async def purge(server: Server, *, queue_id: str, finished: bool, yes: bool) -> None:
    """Delete QUEUE's tasks that no worker has."""
    _confirm(f"Delete the waiting {'and the finished ' if finished else ''}tasks of {queue_id}?", yes=yes)
    request = api.PurgeQueueRequest(queue_id=queue_id, include_finished=finished)
    response = await _operate(server, "PurgeQueue", request)
    server.show([{"queue": queue_id, "deleted_tasks": response.deleted_tasks}], ["queue", "deleted_tasks"])


@click.command()
@click.argument("queue_id", metavar="QUEUE")
@click.option("--force", is_flag=True, help="Also with tasks in it.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@server_options
@asynchronous
async def delete(server: Server, *, queue_id: str, force: bool, yes: bool) -> None:
    """Remove QUEUE; with --force also the tasks in it."""
    _confirm(f"Delete {queue_id}?", yes=yes or not force)
    request = api.DeleteQueueRequest(queue_id=queue_id, force=force)
    response = await _operate(server, "DeleteQueue", request)
    server.show([{"queue": queue_id, "deleted_tasks": response.deleted_tasks}], ["queue", "deleted_tasks"])
