"""What went wrong, why, and what to do, in that order; and the exit code that says it to scripts."""

from __future__ import annotations

import sys

import click

from retinue.client import address
from retinue.client.channel import ConfigurationError
from retinue.client.errors import DeadlineExceeded, RetinueError, Unavailable

USAGE, UNREACHABLE, REFUSED, OUT_OF_TIME = 2, 3, 4, 5

_HINTS = {
    "ROLE_REQUIRED": "this is for operators: name the control socket in RETINUE_CONTROL_ADDRESS or with --address",
    "UNAUTHENTICATED": "name the file with the bearer token in RETINUE_TOKEN_FILE",
    "QUEUE_NOT_FOUND": "see `retinue queue ls`, or make it with `retinue queue create`",
    "TASK_NOT_FOUND": "see `retinue queue tasks QUEUE`; finished tasks are kept for the queue's retention only",
    "QUEUE_NOT_EMPTY": "add --force to delete its tasks with it, or let workers empty it: `retinue queue drain`",
    "QUEUE_DRAINING": "it takes tasks again after `retinue queue resume`",
    "QUEUE_FULL": "start more workers, or raise its limit: `retinue queue update --max-tasks`",
    "QUEUE_EXISTS": "change its settings with `retinue queue update`",
    "BLOB_NOT_FOUND": "upload it with `retinue blob put`; blobs no task refers to are kept for an hour",
    "DISK_FULL": "make room on the server's disk, for example with `retinue queue purge --finished`",
    "ILLEGAL_TRANSITION": "see where it stands with `retinue queue get`",
    "WATCH_TOKEN_EXPIRED": "watch anew without --resume",
    "ELECTION_NOT_FOUND": "this server serves named elections only: see leaderelection.elections in its configuration",
    "CANDIDATE_EXISTS": "another live candidate has that name: choose one with --candidate, or leave it to chance",
    "STALE_TOKEN": "the term is over: see `retinue election leader`",
}


def report(error: Exception) -> int:
    """Tells the user on standard error and returns the exit code. Raises what is not a failure but a
    defect.
    """
    if isinstance(error, ConfigurationError | ValueError | OSError):
        _tell("error", str(error))
        return USAGE
    if not isinstance(error, RetinueError):
        raise error
    _tell("error", error.message)
    for violation in error.violations:
        _tell("field", f"{violation.field}: {violation.description}")
    _tell("reason", " ".join([error.reason or error.code.name, *(f"{k}={v}" for k, v in error.metadata.items())]))
    if hint := _hint(error):
        _tell("to do", hint)
    return _exit_code(error)


def _hint(error: RetinueError) -> str:
    if isinstance(error, Unavailable) and not error.reason:
        elections = sys.argv[1:2] in (["elect"], ["election"])
        where = address.app_address("leaderelection" if elections else "workqueue")
        return f"start a server with `retinue-server`, or say where it is: RETINUE_ADDRESS (now {where}) or --address"
    return _HINTS.get(error.reason, "")


def _exit_code(error: RetinueError) -> int:
    match error:
        case Unavailable():
            return UNREACHABLE
        case DeadlineExceeded():
            return OUT_OF_TIME
    return REFUSED


def _tell(label: str, text: str) -> None:
    style = {"error": "red", "to do": "green"}.get(label, "bright_black")
    click.echo(f"{click.style(f'{label:>6}', fg=style)}  {text}", file=sys.stderr)
