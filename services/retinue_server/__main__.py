"""Where `retinue-server` begins: what has to be done before its modules load, which is most of its start."""

from __future__ import annotations

import gc
import os
import signal
import sys


def main() -> int:
    """The command; exit code 143 when a signal comes before it serves."""
    # First of all: the kernel keeps signals without a handler from the first process of a container.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    gc.disable()  # what modules make stays; `command.serve` has the collector look again
    from retinue_server import command  # noqa: PLC0415 - as said

    return command.main()


if __name__ == "__main__":
    sys.exit(main())
