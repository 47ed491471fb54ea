"""A worker's stream whose caller behaves as networks let it."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from support.workqueue_core import Bench

from retinue.workqueue.v1 import workqueue_service_pb2 as wq
from retinue_server.workqueue.engines.memory import MemoryEngine
from retinue_server.workqueue.stream import WorkerStream


class GoneCaller:
    """Opens a stream, asks for an answer, and is gone while that is being written."""

    def __init__(self) -> None:
        self.writing, self.gone = asyncio.Event(), asyncio.Event()
        self._requests = [wq.StreamTasksRequest(open=wq.StreamOpen(queue_id="q", worker_id="w"), extend_all=True)]

    async def read(self) -> Any:
        if not self._requests:
            await self.gone.wait()
        return self._requests.pop()

    async def write(self, _: Any) -> None:
        self.writing.set()
        await self.gone.wait()
        raise ConnectionError


async def test_a_write_that_fails_after_its_stream_was_cancelled_is_nobodys_error() -> None:
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    caller: Any = GoneCaller()
    running = asyncio.create_task(WorkerStream(Bench(MemoryEngine()).queue, caller).run())
    await caller.writing.wait()
    running.cancel()
    for _ in range(10):  # the cancellation goes from task to task, one a turn of the loop
        await asyncio.sleep(0)
    caller.gone.set()
    await asyncio.wait([running])
    assert running.cancelled()
    del running, caller
    gc.collect()  # an exception that nobody looked at is reported when its task is collected
    assert errors == []
