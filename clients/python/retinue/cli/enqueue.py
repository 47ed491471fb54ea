"""`retinue queue enqueue`: one task from a text, a file or standard input, or one per file of a directory."""

from __future__ import annotations

import asyncio
import json
import mimetypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retinue.cli import common
from retinue.cli.common import DURATION, PAIR, Server, asynchronous, server_options
from retinue.cli.failures import REFUSED
from retinue.client import payload as payloads
from retinue.client.queue import Enqueued, Queue
from retinue.workqueue.v1 import task_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

_BLOCK, _BLOCK_BYTES = 500, 2 << 20
_UPLOADS = 8


@click.command()
@click.argument("queue_id", metavar="QUEUE")
@click.argument("content", metavar="[TEXT|@FILE|-]", required=False)
@click.option("--json", "is_json", is_flag=True, help="The content is JSON, and is sent as such.")
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="As @FILE.")
@click.option(
    "--from-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="One task per file below, its path in the label `path`.",
)
@click.option("--label", "labels", type=PAIR, multiple=True, help="A label; may be repeated.")
@click.option("--type", "task_type", default="", help="What the task is.")
@click.option("--priority", type=click.IntRange(-1000, 1000), default=0, help="Higher goes first.")
@click.option("--delay", type=DURATION, help="Not before this has passed.")
@click.option(
    "--key",
    default="",
    help="Idempotency key: enqueues once however often repeated. With --from-dir: put before each path.",
)
@click.option("--task-id", default="", help="A name of your choice, unique in the server.")
@click.option("--max-attempts", type=click.IntRange(1, 1000), help="Attempts before the task is dead.")
@click.option("--attempt", "attempt_duration", type=DURATION, help="How long one attempt may take.")
@click.option("--content-type", default="", help="The media type; guessed for files.")
@server_options
@asynchronous
async def enqueue(
    server: Server,
    *,
    queue_id: str,
    content: str | None,
    file: Path | None,
    from_dir: Path | None,
    is_json: bool,
    **options: Any,
) -> int:
    """Put tasks into QUEUE; they are durable when this returns.

    \b
    retinue queue enqueue mail hello
    retinue queue enqueue mail '{"to": "ada"}' --json
    retinue queue enqueue images @cat.png --label owner=ada
    date | retinue queue enqueue clock -
    retinue queue enqueue images --from-dir photos/ --key import-7-
    """
    if sum(source is not None for source in (content, file, from_dir)) > 1:
        raise click.UsageError("give one of TEXT, --file and --from-dir")
    async with server.queue(queue_id) as queue:
        if from_dir is not None:
            return await _enqueue_directory(queue, from_dir, options, server)
        source = f"@{file}" if file else content
        return await _enqueue_one(queue, source, options, server, is_json=is_json)


async def _enqueue_one(
    queue: Queue, source: str | None, options: dict[str, Any], server: Server, *, is_json: bool
) -> int:
    content, guessed = _read(source)
    if is_json:
        content = _parsed(content)
    elif isinstance(content, bytes):
        content = payloads.readable(content, options["content_type"] or guessed)
    if isinstance(content, pb.Payload):
        content = await _stored(queue, content)
    found = await queue.enqueue(content, **_options(options))
    server.show([_row(found)], ["task_id", "existing"])
    return 0


def _read(source: str | None) -> tuple[Any, str]:
    """The content, and the media type if a file's name tells it."""
    if source == "-":
        return sys.stdin.buffer.read(), ""
    if source is not None and source.startswith("@"):
        return Path(source[1:]).read_bytes(), _media_type(source)
    return source, ""


def _media_type(path: str) -> str:
    return mimetypes.guess_type(path)[0] or ""


def _parsed(content: str | bytes | None) -> Any:
    try:
        return json.loads(content or "")
    except ValueError as error:
        raise click.UsageError(f"the content is not JSON: {error}") from error


async def _stored(queue: Queue, content: pb.Payload) -> pb.Payload:
    if payloads.size(content) <= payloads.INLINE_BYTES:
        return content
    return pb.Payload(blob=await queue.blobs.put(payloads.raw(content)), content_type=content.content_type)


def _options(options: dict[str, Any]) -> dict[str, Any]:
    attempts = options["max_attempts"]
    return {
        "labels": dict(options["labels"]),
        "task_type": options["task_type"],
        "priority": options["priority"],
        "delay": options["delay"],
        "key": options["key"],
        "task_id": options["task_id"],
        "retry": pb.RetryPolicy(max_attempts=attempts) if attempts else None,
        "attempt_duration": options["attempt_duration"],
        "content_type": options["content_type"],
    }


def _row(found: Enqueued | Exception, path: str = "") -> common.Row:
    where = {"path": path} if path else {}
    if isinstance(found, Enqueued):
        return where | {"task_id": found.task_id, "existing": found.existing}
    return where | {"task_id": None, "reason": getattr(found, "reason", ""), "message": str(found)}


async def _enqueue_directory(queue: Queue, root: Path, options: dict[str, Any], server: Server) -> int:
    if options["task_id"]:
        raise click.UsageError("--task-id names one task; with --from-dir give --key")
    refused = taken = existing = 0
    async for block in _blocks(queue, root, options):
        answers = await queue.enqueue_many(block)
        for spec, answer in zip(block, answers, strict=True):
            taken += isinstance(answer, Enqueued)
            existing += isinstance(answer, Enqueued) and answer.existing
            refused += not isinstance(answer, Enqueued)
            if common.as_json(server.output):
                common.emit(_row(answer, spec.labels["path"]))
            elif not isinstance(answer, Enqueued):
                click.echo(f"{spec.labels['path']}: {answer}", err=True)
        _progress(f"{taken:,} enqueued")
    _progress(f"{taken:,} enqueued, {existing:,} of them there already, {refused:,} refused\n")
    return REFUSED if refused else 0


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


async def _blocks(queue: Queue, root: Path, options: dict[str, Any]) -> AsyncIterator[list[pb.TaskSpec]]:
    gate = asyncio.Semaphore(_UPLOADS)
    files = _files(root)
    while paths := _next_block(files):
        specs = (_spec(queue, root, path, options, gate) for path in paths)
        yield list(await asyncio.gather(*specs))


def _files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file())


def _next_block(files: Iterator[Path]) -> list[Path]:
    """So many files that memory stays small: their inline parts make a few MiB."""
    block, used = [], 0
    for path in files:
        block.append(path)
        size = path.stat().st_size
        used += size if size <= payloads.INLINE_BYTES else 0
        if len(block) == _BLOCK or used >= _BLOCK_BYTES:
            break
    return block


async def _spec(queue: Queue, root: Path, path: Path, options: dict[str, Any], gate: asyncio.Semaphore) -> pb.TaskSpec:
    name = path.relative_to(root).as_posix()
    chosen = _options(options)
    chosen["labels"] |= {"path": name}
    chosen["key"] = chosen["key"] and chosen["key"] + name
    media_type = options["content_type"] or _media_type(name)
    async with gate:
        content = await _file_payload(queue, path, media_type)
    return await queue.spec(content, **chosen)


async def _file_payload(queue: Queue, path: Path, media_type: str) -> pb.Payload:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > payloads.INLINE_BYTES:
            return pb.Payload(blob=await queue.blobs.put_file(file), content_type=media_type)
        return payloads.readable(file.read(), media_type)
