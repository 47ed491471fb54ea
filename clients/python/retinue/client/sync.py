"""The same names for code without an event loop: a loop on a thread of its own does the work.

    with Queue("thumbnails") as queue:
        task = queue.enqueue("cat.jpg")
        print(queue.load(queue.wait(task.task_id).result))

    run_worker("thumbnails", resize, concurrency=4)      # until SIGTERM or Ctrl-C, then drains

    with Election("nightly-report") as election, election.campaign() as term:
        for part in parts:
            term.check()                                 # raises TermLost: nothing can interrupt a thread
            write(part, fencing_token=term.token.value)

    run_leader("nightly-report", lead)                   # lead(term), each time it leads, until SIGTERM or Ctrl-C

    with Pool("search") as pool:
        answer = pool.scatter(json={"text": "sea"}, min_coverage=0.9)

    with Ambassador() as ambassador:
        ambassador.wait("db", "cache", timeout=30)

    with Adapter() as adapter:
        adapter.report("shop", gauge("cart_size", 3))

Every method takes and raises what that of `retinue.client.queue.Queue`, `retinue.client.election.Election`,
`retinue.client.pool.Pool`, `retinue.client.ambassador.Ambassador` or `retinue.client.adapter.Adapter` does. Each may be
shared by threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import signal
import threading
from typing import TYPE_CHECKING, Any, Self, TypeVar

from retinue.client import election as asynchronous_election
from retinue.client import queue as asynchronous
from retinue.client.deadline import boot_seconds
from retinue.client.worker import DEFAULT_GRACE, Handler, Worker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator

    from retinue.client.election import Campaign, Seconds, Term

T = TypeVar("T")


class _Blocking:
    """The blocking face of something asynchronous, which lives on a loop of its own."""

    def __init__(self, make: Callable[..., Any], name: str | None, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="retinue-sync", daemon=True)
        self._thread.start()
        self._inner = self._await(_made(make, name, **options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if inspect.isasyncgenfunction(method):
            return lambda *args, **kwargs: self._iterate(method(*args, **kwargs))
        if inspect.iscoroutinefunction(method):
            return functools.partial(self._blocking, method)
        return method

    def _blocking(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        return self._await(method(*args, **kwargs))

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # the caller was interrupted
            raise

    def _iterate(self, items: AsyncGenerator[T]) -> Iterator[T]:
        end = object()
        try:
            while (item := self._await(_next(items, end))) is not end:
                yield item  # type: ignore[misc] # the sentinel is excluded above
        finally:
            if not self._loop.is_closed():
                self._await(items.aclose())

    def close(self) -> None:
        """Waits for what is under way, closes the connection and ends the thread. Safe to repeat."""
        if self._loop.is_closed():
            return
        self._await(self._inner.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Queue(_Blocking):
    """The blocking face of a queue; see the module."""

    def __init__(self, queue_id: str, *, address: str | None = None, **options: Any) -> None:
        super().__init__(asynchronous.Queue, queue_id, address=address, **options)


class Election(_Blocking):
    """The blocking face of an election; see the module."""

    def __init__(self, election_id: str, *, address: str | None = None, **options: Any) -> None:
        super().__init__(asynchronous_election.Election, election_id, address=address, **options)

    @contextlib.contextmanager
    def campaign(self, *, wait: Seconds | None = None, patience: float | None = None) -> Iterator[Term]:
        """Stands for the election, and leads while the block runs.

        Nothing can interrupt a thread: the block must call `term.check()`, or look at `term.is_leader()`, before each
        step, and raises TermLost when it ends after the leadership did. Heartbeats come from another thread as long as
        the one that entered lives and, with `patience`, as long as it has called `check()` within so many seconds: give
        it, or a block that hangs leads for ever.
        """
        watch = _Watch(patience)
        campaign: Campaign = self._inner.campaign(wait=wait, alive=watch.alive)
        term = self._await(campaign.begin(lambda: None))
        term.on_check = watch.seen
        watch.seen()
        try:
            yield term
        finally:
            self._await(campaign.end())
        if term.lost:
            raise campaign.loss()


class Pool(_Blocking):
    """The blocking face of a pool; see the module."""

    def __init__(self, pool_id: str, *, address: str | None = None, **options: Any) -> None:
        from retinue.client.pool import Pool as Asynchronous  # noqa: PLC0415 - workers and leaders need none of it

        super().__init__(Asynchronous, pool_id, address=address, **options)


class Ambassador(_Blocking):
    """The blocking face of the ambassador; see the module."""

    def __init__(self, address: str | None = None, **options: Any) -> None:
        from retinue.client.ambassador import Ambassador as Asynchronous  # noqa: PLC0415 - as above

        super().__init__(Asynchronous, address, **options)


class Adapter(_Blocking):
    """The blocking face of the adapter; see the module."""

    def __init__(self, address: str | None = None, **options: Any) -> None:
        from retinue.client.adapter import Adapter as Asynchronous  # noqa: PLC0415 - as above

        super().__init__(Asynchronous, address, **options)


class _Watch:
    """Whether the thread that made it lives, and has been seen to work."""

    def __init__(self, patience: float | None) -> None:
        self._thread = threading.current_thread()
        self._patience = patience
        self._seen: float | None = None

    def seen(self) -> None:
        self._seen = boot_seconds()

    def alive(self) -> bool:
        if self._patience is None or self._seen is None:
            return self._thread.is_alive()
        return self._thread.is_alive() and boot_seconds() - self._seen < self._patience


async def _made(make: Callable[..., T], name: str | None, **options: Any) -> T:
    return make(name, **options)


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


def run_leader(election_id: str, function: Callable[[Term], Any], **options: Any) -> Any:
    """Campaigns until SIGTERM or SIGINT and runs `function(term)` each time it leads; what it returns ends that.

    Takes the options of Election. A plain function must return soon after `term.check()` raises. For the main thread.
    """
    return asyncio.run(_lead(election_id, function, options))


async def _lead(election_id: str, function: Callable[[Term], Any], options: dict[str, Any]) -> Any:
    async with asynchronous_election.Election(election_id, **options) as election:
        leading = asyncio.ensure_future(election.lead(function))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, leading.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            return await leading
