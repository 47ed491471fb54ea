"""Claims about the sweeper: no failure ends it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from retinue_server.workqueue import sweeper

if TYPE_CHECKING:
    import pytest

    from retinue_server.workqueue.core.queue import WorkQueue


class Broken:
    """A queue whose sweep fails until it is mended."""

    def __init__(self) -> None:
        self.mended = False
        self.sweeps = 0

    async def recover(self) -> None: ...

    async def count(self) -> None: ...

    async def look_again(self) -> None: ...

    async def sweep(self) -> None:
        self.sweeps += 1
        if not self.mended:
            raise FileNotFoundError("a blob went away")

    async def sweep_is_due(self) -> None:
        await asyncio.sleep(0)


async def test_an_unexpected_failure_shows_in_health_once_in_the_log_and_passes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sweeper, "_PAUSE_AFTER_ERROR_S", 0)
    caplog.set_level(logging.WARNING)
    queue, states, changed = Broken(), list[bool](), asyncio.Event()

    def listen(healthy: bool) -> None:  # noqa: FBT001 - dispatch.Health calls it so
        states.append(healthy)
        changed.set()

    sweeping = sweeper.Sweeper(cast("WorkQueue", queue), 1000)
    await sweeping.start()
    sweeping.subscribe(listen)
    async with asyncio.timeout(60):
        while queue.sweeps < 3:
            await asyncio.sleep(0)
        queue.mended = True
        while states != [True, False, True]:
            changed.clear()
            await changed.wait()
    await sweeping.stop()
    assert len(caplog.records) == 1
