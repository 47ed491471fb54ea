"""The `retinue` command. Modules load on use: `retinue --help` needs neither grpc nor rich."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Runs the command and ends the process with its exit code."""
    # First of all: the kernel keeps signals without a handler from the first process of a container.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    try:
        import click  # noqa: PLC0415 - an extra, and its absence is told below
    except ImportError:
        sys.exit("cannot run retinue: its command line is an extra; pip install 'retinue[cli]'")
    from retinue.cli.app import app  # noqa: PLC0415 - needs click

    # gRPC would log a line for every command that `retinue work` forks; those commands exec at once and don't
    # need it.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        code = app.main(prog_name="retinue", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:  # the reader had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except Exception as error:  # noqa: BLE001 - told to the user with an exit code, or raised again there
        from retinue.cli.failures import report  # noqa: PLC0415 - only where there is a failure

        code = report(error)
    sys.exit(code if isinstance(code, int) else 0)
