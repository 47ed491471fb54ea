"""`retinue election`: who leads, who led, and asking a leader to step down."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from retinue.cli import common
from retinue.cli.app import Branch
from retinue.cli.common import Server, asynchronous, server_options
from retinue.client.election import PATTERN, Election
from retinue.leaderelection.v1 import election_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

NOBODY = 1

election = Branch(
    {
        "ls": ("election:ls", "All elections, and who leads them."),
        "leader": ("election:leader", "Who leads an election."),
        "check": ("election:check", "Exit code 0 if an election has a leader, or a certain one; else 1."),
        "watch": ("election:watch", "Who leads, as it changes."),
        "history": ("election:history", "The terms of an election, the latest first."),
        "step-down": ("election:step_down", "Ask a leader to step down (operator)."),
    },
    name="election",
    help="""Who leads, and who led.

    \b
    retinue election leader db --value                where the leader of db is
    retinue election check backup --candidate $HOSTNAME && echo "it is this one"
    retinue election step-down backup
    """,
    no_args_is_help=True,
)

_COLUMNS = ["election_id", "state", "candidate_id", "value", "token", "since"]


def _election(server: Server, name: str, *, operator: bool = False) -> Election:
    connection = server.for_operators() if operator else server.for_apps(PATTERN)
    return Election(name, connection=connection, timeout=server.timeout)


def _row(leader: pb.Leader) -> common.Row:
    row: common.Row = {"election_id": leader.election_id, "state": _state(leader)}
    if leader.candidate_id:
        row |= {"candidate_id": leader.candidate_id, "value": leader.value}
    if leader.HasField("token"):
        row |= {"token": leader.token.value, "domain": leader.token.domain}
    if leader.HasField("acquire_time"):
        row["acquire_time"] = _time(leader.acquire_time).isoformat()
        row["since"] = common.since(_time(leader.acquire_time))
    return row


def _state(leader: pb.Leader) -> str:
    if not leader.candidate_id:
        return "vacant"
    return "steps_down" if leader.step_down_requested else "leads"


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)


name_argument = click.argument("name", metavar="NAME")


@click.command()
@server_options
@asynchronous
async def ls(server: Server) -> None:
    """All elections, and who leads them."""
    one = _election(server, "")
    try:
        server.show([_row(leader) async for leader in one.list()], _COLUMNS)
    finally:
        await one.connection.close()


@click.command()
@name_argument
@click.option("--value", "value_only", is_flag=True, help="Print what the leader proclaimed and nothing else.")
@server_options
@asynchronous
async def leader(server: Server, *, name: str, value_only: bool) -> int:
    """Who leads NAME. With --value, ends with 1 if nobody does."""
    found = await _leader(server, name)
    if value_only:
        if found.candidate_id:
            click.echo(found.value)
        return 0 if found.candidate_id else NOBODY
    server.show([_row(found)], _COLUMNS)
    return 0


async def _leader(server: Server, name: str) -> pb.Leader:
    one = _election(server, name)
    try:
        return await one.leader()
    finally:
        await one.connection.close()


@click.command()
@name_argument
@click.option("--candidate", "candidate_id", default="", metavar="ID", help="Led by this one.")
@server_options
@asynchronous
async def check(server: Server, *, name: str, candidate_id: str) -> int:
    """Whether NAME has a leader, or the one with --candidate leads: exit code 0 if so, 1 if not. Prints nothing.

    It is a look, not a lock: the term may end right after.
    """
    found = await _leader(server, name)
    return 0 if found.candidate_id and candidate_id in ("", found.candidate_id) else NOBODY


@click.command()
@name_argument
@server_options
@asynchronous
async def watch(server: Server, *, name: str) -> None:
    """Who leads NAME now, and each change, until Ctrl-C."""
    one = _election(server, name)
    try:
        async for found in one.observe():
            _show_change(_row(found), server)
    finally:
        await one.connection.close()


def _show_change(row: common.Row, server: Server) -> None:
    if common.as_json(server.output):
        row.pop("since", None)
        common.emit(row)
    else:
        words = (row["state"], row.get("candidate_id", ""), row.get("value", ""), f"token {row.get('token', '-')}")
        click.echo("  ".join([f"{datetime.now():%H:%M:%S}", *(word for word in words if word)]))  # noqa: DTZ005 - local, for a person
    sys.stdout.flush()


@click.command()
@name_argument
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many at most.")
@server_options
@asynchronous
async def history(server: Server, *, name: str, limit: int) -> None:
    """The terms of NAME, the latest first, with why they ended."""
    one = _election(server, name)
    rows = []
    try:
        async for term in one.terms(page_size=min(limit, 500)):
            rows.append(_term_row(term))
            if len(rows) == limit:
                break
    finally:
        await one.connection.close()
    server.show(rows, ["token", "candidate_id", "acquire_time", "end_time", "lasted", "end_reason"])


def _term_row(term: pb.Term) -> common.Row:
    row: dict[str, Any] = {"token": term.token.value, "domain": term.token.domain, "candidate_id": term.candidate_id}
    row["acquire_time"] = _time(term.acquire_time).isoformat()
    if term.HasField("end_time"):
        row["end_time"] = _time(term.end_time).isoformat()
        seconds = (_time(term.end_time) - _time(term.acquire_time)).total_seconds()
        row["lasted"] = common.duration_text(max(seconds, 0))
        reason = pb.EndReason.Name(term.end_reason) if term.end_reason else "unknown"
        row["end_reason"] = reason.removeprefix("END_REASON_").lower()
    return row


@click.command("step-down")
@name_argument
@click.option("--token", type=click.IntRange(min=1), help="Only the term with this token; default: the present one.")
@server_options
@asynchronous
async def step_down(server: Server, *, name: str, token: int | None) -> int:
    """Ask the leader of NAME to stop its work and resign (operator). Ends with 1 if nobody leads.

    Nothing forces it; see with `retinue election watch` whether it did.
    """
    one = _election(server, name, operator=True)
    try:
        fence = None
        if token is not None:
            domain = (await one.leader()).token.domain
            fence = pb.FencingToken(domain=domain, value=token)
        answer = await one.request_step_down(fence)
    finally:
        await one.connection.close()
    server.show([_row(answer.leader)], _COLUMNS)
    return 0 if answer.requested else NOBODY
