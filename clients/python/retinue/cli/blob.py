"""`retinue blob`: content that is too large for a message."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

import click

from retinue.cli import common
from retinue.cli.app import Branch
from retinue.cli.common import Server, asynchronous, server_options
from retinue.client.blobs import Blobs

blob = Branch(
    {
        "put": ("blob:put", "Keep a file's content, and print its id."),
        "get": ("blob:get", "Write a blob to a file or standard output."),
        "stat": ("blob:stat", "Whether a blob is there; prolongs its life by an hour."),
    },
    name="blob",
    help="Content too large for a message, named by its SHA-256. Kept while a task refers to it, and an hour.",
    no_args_is_help=True,
)


@click.command()
@click.argument("file", metavar="FILE|-", type=click.Path(allow_dash=True, path_type=str))
@server_options
@asynchronous
async def put(server: Server, *, file: str) -> None:
    """Keep the content of FILE, or of standard input, and print its id."""
    connection = server.for_apps()
    try:
        with BytesIO(sys.stdin.buffer.read()) if file == "-" else Path(file).open("rb") as source:  # noqa: ASYNC230 - a command may wait for its disk
            kept = await Blobs(connection).put_file(cast("BinaryIO", source))
    finally:
        await connection.close()
    server.show([{"blob_id": kept.blob_id, "size_bytes": kept.size_bytes}], ["blob_id", "size_bytes"])


@click.command()
@click.argument("blob_id", metavar="BLOB")
@click.argument("file", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@server_options
@asynchronous
async def get(server: Server, *, blob_id: str, file: Path | None) -> None:
    """Write BLOB to FILE or standard output. FILE appears when it is whole and checked."""
    connection = server.for_apps()
    try:
        await _fetch(Blobs(connection), blob_id, file)
    finally:
        await connection.close()


async def _fetch(blobs: Blobs, blob_id: str, file: Path | None) -> None:
    if file is None:
        await blobs.get_file(blob_id, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as target:
            await blobs.get_file(blob_id, target)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@click.command()
@click.argument("blob_id", metavar="BLOB")
@server_options
@asynchronous
async def stat(server: Server, *, blob_id: str) -> None:
    """Whether BLOB is there, its size and age; prolongs its life by an hour."""
    connection = server.for_apps()
    try:
        found = await Blobs(connection).stat(blob_id)
    finally:
        await connection.close()
    server.show([common.plain(found)], ["blob_id", "size_bytes", "create_time"])
