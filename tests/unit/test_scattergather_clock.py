"""The clock of scatter/gather on the loop that the server runs."""

import asyncio
import random
import time

import uvloop

from retinue_server.scattergather.core.clock import LoopClock


def test_nothing_is_done_before_its_time() -> None:
    early: list[float] = []

    async def play() -> None:
        clock = LoopClock()
        chance = random.Random(7)
        for _ in range(100):
            done = asyncio.Event()
            when = clock.now() + chance.random() * 0.005

            def do(when: float = when, done: asyncio.Event = done) -> None:
                early.append(max(when - clock.now(), 0))
                done.set()

            clock.at(when, do)
            await done.wait()
            time.sleep(chance.random() * 0.001)  # noqa: ASYNC251 - so that timers begin anywhere within a millisecond

    uvloop.run(play())
    assert len(early) == 100
    assert max(early) == 0
