"""What went wrong, why, and what to do, in that order; and the exit code that says it to scripts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from retinue.client import address
from retinue.client.channel import ConfigurationError
from retinue.client.errors import DeadlineExceeded, RetinueError, Unavailable

if TYPE_CHECKING:
    from retinue.client.pool import ShardFailure

USAGE, UNREACHABLE, REFUSED, OUT_OF_TIME, PARTIAL, FAILED = 2, 3, 4, 5, 6, 7

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
    "POOL_NOT_FOUND": "see `retinue topology ls`; pools stand in the root's pool file",
    "POOL_EMPTY": "give it shards in the root's pool file",
    "POOL_NOT_IDEMPOTENT": "its answers are never partial: leave out --min-coverage and --first-k",
    "COVERAGE_NOT_MET": "see `retinue scatter recent {scatter_id}`; --min-coverage takes a part for an answer",
    "LEAF_REFUSED": "the leaves don't take this question, or not from you: see what they expect",
    "SCATTER_LIMIT": "ask again later, or raise the pool's limits in the pool file",
    "GATHER_TOO_LARGE": "ask for less, or raise the pool's max_gathered_bytes",
    "TARGET_NOT_FOUND": "see `retinue adapter targets`, or make it with `retinue adapter create`",
    "TARGET_EXISTS": "add --replace to change it",
    "TARGET_IMMUTABLE": "`retinue adapter delete` it first: its kind stays what it is",
    "TARGET_FROM_FILE": "change it in the server's file of targets",
    "RULE_PACK_NOT_FOUND": "put it in the directory adapter.rule_packs of the server's settings",
    "ENDPOINT_FORBIDDEN": "only this pod is dialled, unless adapter.endpoints.allow of the server's settings has more",
    "METRICS_TOO_OLD": "see `retinue adapter targets`, or leave out --max-age",
    "MERGE_FAILED": "see what the leaves reply: the merge of the pool can't use it",
}


_PATTERNS = dict.fromkeys(("elect", "election"), "leaderelection")
_PATTERNS |= dict.fromkeys(("scatter", "topology"), "scattergather")
_PATTERNS |= {name: name for name in ("adapter", "ambassador")}


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
    for shard in getattr(error, "failures", ()):
        tell_missing(shard)
    _tell("reason", " ".join([error.reason or error.code.name, *(f"{k}={v}" for k, v in error.metadata.items())]))
    if hint := _hint(error):
        _tell("to do", hint)
    return _exit_code(error)


def tell_missing(shard: ShardFailure) -> None:
    """What became of a shard that is missing, or answered in part."""
    part = f"{shard.coverage} answered" if shard.coverage else shard.code.name
    if shard.code.name == "CANCELLED":
        part = "not waited for any more"
    _tell("shard", f"{shard.shard_id}: {part}" + (f", {shard.message}" if shard.message else ""))


def _hint(error: RetinueError) -> str:
    if isinstance(error, Unavailable) and not error.reason:
        where = address.app_address(_PATTERNS.get("".join(sys.argv[1:2]), "workqueue"))
        return f"start a server with `retinue-server`, or say where it is: RETINUE_ADDRESS (now {where}) or --address"
    return _HINTS.get(error.reason, "").format(scatter_id=error.metadata.get("scatter_id", ""))


def _exit_code(error: RetinueError) -> int:
    if hasattr(error, "failures") and error.reason != "LEAF_REFUSED":
        return FAILED
    match error:
        case Unavailable():
            return UNREACHABLE
        case DeadlineExceeded():
            return OUT_OF_TIME
    return REFUSED


def _tell(label: str, text: str) -> None:
    style = {"error": "red", "to do": "green"}.get(label, "bright_black")
    click.echo(f"{click.style(f'{label:>6}', fg=style)}  {text}", file=sys.stderr)
