"""The clocks that processes can be given, and the true one.

libfaketime shifts and rates what a process reads of *all* clocks, the boot clock among them, and its waits; with
DONT_FAKE_MONOTONIC the wall clock alone. Under it the boot clock shows the wall's time, so it is shifted by decades. It
does not reach the system call itself, by which histories are stamped. A time namespace shifts boot and monotonic
clock in the kernel, the system call included, so that its offset is taken off again.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_CLOCK_GETTIME = {"x86_64": 228, "aarch64": 113}[os.uname().machine]
_BOOTTIME = 7
_S = 1_000_000_000
_HOUR_S = 3_600


class Clock(NamedTuple):
    """How a process sees the time."""

    name: str = "true"
    env: Mapping[str, str] = {}
    prefix: Sequence[str] = ()
    """What stands before its command."""
    rate: float = 1.0
    """How many of its seconds pass in a true one."""
    offset_s: int = 0
    """By how much the kernel shifts its boot clock."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None)


def true_boot_ns(offset_s: int = 0) -> int:
    """The kernel's boot clock, past a library that shows another one; less the offset of a time namespace."""
    now = _Timespec()
    _libc.syscall(_CLOCK_GETTIME, _BOOTTIME, ctypes.byref(now))
    return int(now.seconds - offset_s) * _S + int(now.nanoseconds)


def wall(offset_s: int) -> Clock:
    """The wall clock is wrong, as one that nobody has set."""
    return Clock(f"wall {offset_s:+}s", {**_faketime(f"{offset_s:+}"), "DONT_FAKE_MONOTONIC": "1"})


def rated(rate: float) -> Clock:
    """All clocks are too fast or too slow."""
    return Clock(f"rate {rate}", _faketime(f"+0 x{rate}"), rate=rate)


def shifted(offset_s: int) -> Clock:
    """In a time namespace: boot and monotonic clock show another time."""
    program = shutil.which("unshare")
    assert program, "unshare is missing: apt-get install util-linux"
    allowed = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    prefix = (program, *allowed, "--time", f"--boottime={offset_s}", f"--monotonic={offset_s}")
    return Clock(f"boot {offset_s:+}s", prefix=prefix, offset_s=offset_s)


def _faketime(said: str) -> dict[str, str]:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    assert library, "libfaketime is missing: apt-get install libfaketime"
    return {"LD_PRELOAD": str(library), "FAKETIME": said}


def of_server(chance: random.Random, *, one_kernel: bool) -> Clock:
    """A wrong clock for a server. Where the engine compares the boot clocks of one kernel, these cannot run at
    different rates."""
    some = [wall(_HOUR_S), wall(-_HOUR_S), shifted(_HOUR_S), shifted(24 * _HOUR_S)]
    return chance.choice(some if one_kernel else [*some, rated(0.96), rated(1.04)])


def of_app(chance: random.Random) -> Clock:
    """A wrong clock for an app, which reads no wall clock."""
    return chance.choice([shifted(_HOUR_S), shifted(24 * _HOUR_S), rated(0.96), rated(1.04)])
