"""The same names for code without an event loop: a loop on a thread of its own does the work.

    with Queue("thumbnails") as queue:
        task = queue.enqueue("cat.jpg")
        print(queue.load(queue.wait(task.task_id).result))

    run_worker("thumbnails", resize, concurrency=4)      # until SIGTERM or Ctrl-C, then drains

Every method takes and raises what that of `retinue.client.queue.Queue` does. A queue may be shared by
threads.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import signal
import threading
from typing import TYPE_CHECKING, Any, Self, TypeVar

from retinue.client import queue as asynchronous
from retinue.client.worker import DEFAULT_GRACE, Handler, Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

T = TypeVar("T")


class Queue:
    """The blocking face of a queue; see the module."""

    def __init__(self, queue_id: str, *, address: str | None = None, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="retinue-sync", daemon=True)
        self._thread.start()
        self._queue = self._await(_made(queue_id, address=address, **options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._queue, name)
        if inspect.isasyncgenfunction(method):
            return lambda *args, **kwargs: self._iterate(method(*args, **kwargs))
        if inspect.iscoroutinefunction(method):
            return functools.partial(self._blocking, method)
        return method

    def _blocking(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        return self._await(method(*args, **kwargs))

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        end = object()
        while (item := self._await(_next(items, end))) is not end:
            yield item  # type: ignore[misc] # the sentinel is excluded above

    def close(self) -> None:
        """Waits for enqueues under way, closes the connection and ends the thread. Safe to repeat."""
        if self._loop.is_closed():
            return
        self._await(self._queue.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _made(queue_id: str, **options: Any) -> asynchronous.Queue:
    return asynchronous.Queue(queue_id, **options)


async def _next(items: AsyncIterator[T], end: object) -> T | object:
    return await anext(items, end)


def run_worker(
    queue_id: str,
    handler: Handler,
    *,
    address: str | None = None,
    grace: float = DEFAULT_GRACE,
    **options: Any,
) -> None:
    """Works on a queue until SIGTERM or SIGINT, then drains; takes the options of Worker. For the main
    thread.
    """
    asyncio.run(_work(queue_id, handler, address, grace, options))


async def _work(queue_id: str, handler: Handler, address: str | None, grace: float, options: dict[str, Any]) -> None:
    async with asynchronous.Queue(queue_id, address=address) as queue:
        worker = Worker(queue, handler, **options)
        stop_on_signals(worker, grace)
        await worker.run()


def stop_on_signals(worker: Worker, grace: float) -> None:
    """The first SIGTERM or SIGINT drains the worker, the second ends its handlers at once. For the main
    thread's loop.
    """
    graces = iter((grace,))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: worker.stop(next(graces, 0)))
