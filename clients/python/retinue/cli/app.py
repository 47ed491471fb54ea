"""The tree of commands, loaded branch by branch."""

from __future__ import annotations

from importlib import import_module

import click

EPILOG = """\b
Try it:
  retinue-server &                                  start a server on 127.0.0.1:7070
  retinue queue enqueue greetings hello             put a task in
  retinue work greetings --exit-when-empty -- tr a-z A-Z
  retinue queue tasks greetings                     see what became of it
  retinue elect backup -- ./backup.sh               one of all who run this runs the script
  retinue scatter search --json '{"text": "sea"}'   ask all shards of a pool, get one answer
  retinue ambassador wait db && ./app               start when localhost leads somewhere
  retinue adapter signals                           how all apps of the pod do, live

\b
Where the server is:
  RETINUE_WORKQUEUE_ADDRESS, RETINUE_LEADERELECTION_ADDRESS,
  RETINUE_SCATTERGATHER_ADDRESS, RETINUE_AMBASSADOR_ADDRESS
  or RETINUE_ADAPTER_ADDRESS,
  then RETINUE_ADDRESS, else 127.0.0.1:7070
  Operators' commands dial RETINUE_CONTROL_ADDRESS, else the nearest
  .retinue/control.sock here or in a directory above.
  RETINUE_TOKEN_FILE, RETINUE_TLS_CA_FILE: a token and the CA for servers elsewhere.

\b
Exit codes:
  0 done   1 a defect   2 wrong usage   3 the server can't be reached
  4 refused by the server   5 out of time, or not healthy
  6 a partial answer   7 too few shards answered   130 interrupted
"""


class Branch(click.Group):
    """A group whose commands are in modules that load when one is called. `table`: name ->
    (module:attribute, help).
    """

    def __init__(self, table: dict[str, tuple[str, str]], **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type] # click's own options, passed on
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in self._table:
            return None
        module, _, attribute = self._table[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f"retinue.cli.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._table.items()])


app = Branch(
    {
        "queue": ("queue:queue", "Tasks and queues: enqueue, look, wait, cancel, redrive, pause ..."),
        "work": ("work:work", "Run a command for each task of a queue: input file in, output file out."),
        "elect": ("elect:elect", "Run a command while we lead an election, and never longer."),
        "election": ("election:election", "Who leads: ls, leader, watch, check, history, step-down."),
        "scatter": ("scatter:scatter", "Ask all shards of a pool, get one answer; see what became of past requests."),
        "topology": ("topology:topology", "The pools of a root, their shards and who serves them: ls, show, watch."),
        "ambassador": ("ambassador:ambassador", "What stands behind localhost: wait, ls, stats, declare, drain ..."),
        "adapter": ("adapter:adapter", "What apps of any kind say, in one form: signals, watch, test, create ..."),
        "blob": ("blob:blob", "Content too large for a message: put, get, stat."),
        "call": ("call:call", "Call any method of any server by reflection, with JSON."),
        "status": ("status:status", "The health of every service."),
    },
    name="retinue",
    help="Queues, workers, elections, scatter/gather, the ambassador, the adapter and tools for Retinue's servers.",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
)
click.version_option(package_name="retinue")(app)
