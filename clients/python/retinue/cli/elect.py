"""`retinue elect`: any program as a leader that has ended before another can lead."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import click

from retinue.cli.common import DURATION
from retinue.client.candidate import APP_LEASE
from retinue.client.deadline import boot_seconds
from retinue.client.election import Election, ElectionEvent, NotElected, Term, TermLost
from retinue.client.process import Command, Guard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retinue.cli.common import Row

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
_SHELL_SIGNAL = 128
_LOOK = 0.1
_KILL_SHARE, _SLACK_SHARE = 4, 20
"""Of the app's lease: from SIGTERM to SIGKILL, and from SIGKILL to the deadline."""


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("name", metavar="NAME")
@click.argument("command", metavar="-- COMMAND [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--candidate", "candidate_id", default="", metavar="ID", help="Our name; default: host, process, chance.")
@click.option("--value", default="", help="What to proclaim while leading, such as an address.")
@click.option(
    "--lease", type=DURATION, help="How soon others take over when our server is gone; default: the server's."
)
@click.option(
    "--app-lease",
    type=DURATION,
    default=f"{APP_LEASE:g}s",
    show_default=True,
    help="How soon others take over when we are gone.",
)
@click.option("--release-delay", type=DURATION, help="How long others wait after a term that ended without resigning.")
@click.option("--kill-grace", type=DURATION, help="From SIGTERM to SIGKILL near the deadline; default: 1/4 app lease.")
@click.option(
    "--grace",
    type=DURATION,
    default="10s",
    show_default=True,
    help="From SIGTERM to SIGKILL when asked to step down: it leads that long.",
)
@click.option("--no-wait", is_flag=True, help="Give up, with 75, if somebody else leads now.")
@click.option("--once", is_flag=True, help="End, with 75, when leadership is lost, instead of standing by again.")
@click.option("--quiet", is_flag=True, help="Say nothing on standard error.")
@click.option("--address", metavar="ADDRESS", help="The server: HOST:PORT, unix:PATH or a socket's path.")
def elect(*, name: str, command: tuple[str, ...], **options: Any) -> int:
    """Run COMMAND while we lead NAME, and never longer.

    Waits until elected, then runs COMMAND in a process group of its own. Before leadership could be another's, the
    whole group is ended: SIGTERM, then SIGKILL; also if this process hangs, is stopped or killed. Then it stands by
    again. When COMMAND ends by itself it resigns, the next candidate takes over at once, and its exit code is ours.

    \b
    retinue elect nightly-report -- ./report.sh
    retinue elect db --value "$POD_IP:5432" --app-lease 10s --kill-grace 5s -- postgres -D data
    retinue elect migrate --no-wait -- ./migrate up

    \b
    COMMAND's environment:
      RETINUE_ELECTION_TOKEN         the fencing token: rises with every term; give it to what you write to,
      RETINUE_ELECTION_TOKEN_DOMAIN  which must refuse a lower one of the same domain
      RETINUE_ELECTION_ID, RETINUE_ELECTION_CANDIDATE_ID

    \b
    Exit codes: COMMAND's own, 128 + n if signal n ended it.
      75 with --no-wait: somebody else leads; with --once: leadership was lost.

    Signals (TERM, INT, HUP, QUIT, USR1, USR2) go to COMMAND; while standing by they end this. What happens is told on
    standard error, in JSON unless that is a terminal.
    """
    if shutil.which(command[0]) is None:
        raise click.UsageError(f"cannot run {command[0]}: there is no such program; check its name and PATH")
    timing = _timing(options)
    return asyncio.run(Elect(name, command, timing, options).run())


class Timing:
    """How long the command has to end, in seconds."""

    def __init__(self, app_lease: float, kill_grace: float | None, grace: float) -> None:
        self.app_lease, self.grace = app_lease, grace
        self.kill_grace = app_lease / _KILL_SHARE if kill_grace is None else kill_grace
        self.slack = app_lease / _SLACK_SHARE
        """From SIGKILL to the deadline."""
        self.margin = self.kill_grace + self.slack
        """From SIGTERM to the deadline."""


def _timing(options: dict[str, Any]) -> Timing:
    timing = Timing(options["app_lease"], options["kill_grace"], options["grace"])
    if timing.margin > timing.app_lease / 2:
        raise click.UsageError(
            f"--kill-grace {timing.kill_grace:g}s leaves no time to lead: at most 0.45 of --app-lease, "
            f"which is {timing.app_lease:g}s"
        )
    return timing


class Elect:
    """Candidate and command."""

    def __init__(self, name: str, command: Sequence[str], timing: Timing, options: dict[str, Any]) -> None:
        self._command, self._timing, self._options = list(command), timing, options
        self._election = Election(
            name,
            candidate_id=options["candidate_id"],
            value=options["value"],
            lease=options["lease"],
            app_lease=options["app_lease"],
            release_delay=options["release_delay"],
            margin=timing.margin,
            listener=None if options["quiet"] else _tell,
            address=options["address"],
        )
        self._running: Command | None = None
        self._ended_by: signal.Signals | None = None
        self._early: list[signal.Signals] = []
        """Signals that came while the command was being started."""

    async def run(self) -> int:
        """The exit code."""
        self._guard = Guard([])
        task = asyncio.current_task()
        assert task is not None
        for number in _FORWARDED:
            asyncio.get_running_loop().add_signal_handler(number, self._forward, number, task)
        try:
            async with self._election:
                return await self._stand()
        except asyncio.CancelledError:
            if self._ended_by is None:
                raise
            return _SHELL_SIGNAL + self._ended_by
        except (NotElected, TermLost) as gone:
            if not self._options["quiet"]:
                click.echo(str(gone), err=True)
            return os.EX_TEMPFAIL
        finally:
            await asyncio.to_thread(self._guard.close)

    def _forward(self, number: signal.Signals, task: asyncio.Task[Any]) -> None:
        if number in _ENDING:
            self._ended_by = number
        if self._running is not None:
            self._running.send(number)
        elif number in _ENDING:
            task.cancel()
        else:
            self._early.append(number)

    async def _stand(self) -> int:
        options: dict[str, Any] = {"wait": 0} if self._options["no_wait"] else {}
        if self._options["once"] or self._options["no_wait"]:
            async with self._election.campaign(**options) as term:
                return await self._lead(term)
        return await self._election.lead(self._lead)

    async def _lead(self, term: Term) -> int:
        """Runs the command; the guard keeps the deadline, too, for the case that this loop hangs."""
        term.on_renewed = lambda: self._guard.limit(boot_seconds() + term.remaining() - self._timing.slack)
        term.on_renewed()
        self._early.clear()
        starting = asyncio.ensure_future(self._start(term))
        try:
            self._running = await asyncio.shield(starting)
            for number in self._early:
                self._running.send(number)
            code = await self._running.wait()
        except asyncio.CancelledError:
            await asyncio.shield(self._end(await starting, term))
            if self._ended_by is not None:
                return _SHELL_SIGNAL + self._ended_by
            raise
        finally:
            self._running = None
        return code if code >= 0 else _SHELL_SIGNAL - code

    async def _start(self, term: Term) -> Command:
        return await Command.start(
            self._command,
            guard=self._guard,
            env=os.environ | _environment(term),
            stdin=subprocess.DEVNULL if sys.stdin.isatty() else 0,  # in a group of its own it may not read a terminal
            stdout=1,
            keep=0,
            pass_fds=() if term.proof is None else (term.proof,),
        )

    async def _end(self, command: Command, term: Term) -> None:
        """SIGTERM; SIGKILL when its grace is over or the deadline is near."""
        command.send(signal.SIGTERM)
        end = boot_seconds() + self._timing.grace
        while (left := min(end - boot_seconds(), term.remaining() - self._timing.slack)) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(command.wait(), min(left, _LOOK))
                return
        command.kill()
        await command.wait()


def _environment(term: Term) -> dict[str, str]:
    return {
        "RETINUE_ELECTION_ID": term.election_id,
        "RETINUE_ELECTION_CANDIDATE_ID": term.candidate_id,
        "RETINUE_ELECTION_TOKEN": str(term.token.value),
        "RETINUE_ELECTION_TOKEN_DOMAIN": term.token.domain,
    }


def _tell(event: ElectionEvent) -> None:
    row: Row = {"event": event.kind}
    if event.term is not None:
        row |= {"token": event.term.token.value, "candidate_id": event.term.candidate_id}
    if event.reason:
        row["reason"] = event.reason
    if event.leader is not None:
        row["leader"] = event.leader.candidate_id
    if event.kind == "at_risk":
        row["seconds"] = event.seconds
    if sys.stderr.isatty():
        text = "  ".join(str(value) if key == "event" else f"{key}={value}" for key, value in row.items())
    else:
        text = json.dumps(row)
    click.echo(text, err=True)
