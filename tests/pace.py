"""For claims about time, on machines that stall: a failure counts only where the machine kept time."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
_TRIES = 10


def undisturbed(play: Callable[[], T], within_s: float) -> T:
    """What `play` gives. It is played anew after a failure, unless that came within so many seconds: by then nothing
    can have run out, however long the machine stood still. Of some tries one must be right."""
    for _ in range(_TRIES - 1):
        began = time.monotonic()
        try:
            return play()
        except Exception:
            if time.monotonic() - began <= within_s:
                raise
    return play()


async def undisturbed_async(play: Callable[[], Awaitable[T]], within_s: float) -> T:
    """The same of a coroutine."""
    for _ in range(_TRIES - 1):
        began = time.monotonic()
        try:
            return await play()
        except Exception:
            if time.monotonic() - began <= within_s:
                raise
    return await play()
