"""The server, unchanged, which on SIGUSR1 writes what it holds to the file that COUNTS names: as JSON, in one go.

Counted from here, so that the product has no switch for it.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from grpc import aio

from retinue_server.__main__ import main
from retinue_server.scattergather.core.scatter import Attempt

_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024


class _Mallinfo2(ctypes.Structure):
    """glibc's; over all arenas."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        ("in_use", ctypes.c_size_t),
        *((name, ctypes.c_size_t) for name in ("fordblks", "keepcost")),
    )


_libc = ctypes.CDLL(None)
_libc.mallinfo2.restype = _Mallinfo2


def counts() -> dict[str, int]:
    """What there is at this moment, garbage left out."""
    gc.collect()
    objects: list[Any] = gc.get_objects()
    return {
        "tasks": len(asyncio.all_tasks(asyncio.get_running_loop())),
        "timers": sum(type(one).__name__ == "TimerHandle" and not one.cancelled() for one in objects),
        "calls": sum(isinstance(one, aio.Call) and not one.done() for one in objects),
        "attempts": sum(isinstance(one, Attempt) and one.end is None for one in objects),
        "spans": sum(type(one).__name__ == "_Span" and one.end_time is None for one in objects),
        "rss_kib": int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_KIB,
        "malloc_kib": _libc.mallinfo2().in_use // 1024,
        "blocks": sys.getallocatedblocks(),
        **Counter(f"requests {type(one).__name__}" for one in objects if type(one).__name__ in ("Scatter", "Ask")),
    }


def write(*_: object) -> None:
    path = Path(os.environ["COUNTS"])
    new = path.with_suffix(".new")
    new.write_text(json.dumps(counts()))
    new.rename(path)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, write)
    sys.exit(main())
