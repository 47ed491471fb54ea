"""Many callers, one call: what awaits in one turn of the event loop, or while calls are under way, goes out together.

As with group commit, nobody lingers when nothing is under way, and batches grow with the load.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import grpc

from retinue.client import errors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

Item = TypeVar("Item")
Answer = TypeVar("Answer")

MAX_ITEMS = 1_000
MAX_BYTES = 3 << 20
IN_FLIGHT = 2
"""How many calls one coalescer has under way at most: one is served while the next is on its way."""


def blocks(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Cuts items, in order, into blocks of at most 1,000 and 3 MiB; a larger item is a block of its own."""
    block: list[Item] = []
    used = 0
    for item in items:
        length = size(item) + 8  # the field's tag and length
        if block and (len(block) == MAX_ITEMS or used + length > MAX_BYTES):
            yield block
            block, used = [], 0
        block.append(item)
        used += length
    if block:
        yield block


class _Waiting(NamedTuple, Generic[Item, Answer]):
    item: Item
    answer: asyncio.Future[Answer]
    end: float
    """By the loop's clock."""


class Coalescer(Generic[Item, Answer]):
    """Sends the items of all callers of one turn with one `send`, which answers item by item or raises for
    all, and is told for how many seconds anybody will wait.

    A caller that is cancelled or runs out of time before its item is sent takes it along; later the item is
    sent, its answer dropped.
    """

    def __init__(
        self,
        send: Callable[[list[Item], float], Awaitable[Sequence[Answer | Exception]]],
        size: Callable[[Item], int],
    ) -> None:
        self._send = send
        self._size = size
        self._waiting: list[_Waiting[Item, Answer]] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._flushing = False

    async def submit(self, item: Item, patience: float) -> Answer:
        """The item's answer. Raises DeadlineExceeded after `patience` seconds, be it sent by then or not."""
        loop = asyncio.get_running_loop()
        self._flush_soon(loop)
        answer: asyncio.Future[Answer] = loop.create_future()
        end = loop.time() + patience
        self._waiting.append(_Waiting(item, answer, end))
        timer = loop.call_at(end, _give_up, answer, patience)
        try:
            return await answer
        finally:
            timer.cancel()

    def _flush_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._flushing and len(self._sending) < IN_FLIGHT:
            self._flushing = True
            loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        live = [entry for entry in self._waiting if not entry.answer.done()]
        parts = blocks(live, lambda entry: self._size(entry.item))
        while len(self._sending) < IN_FLIGHT and (block := next(parts, None)):
            task = asyncio.create_task(self._deliver(block))
            self._sending.add(task)
            task.add_done_callback(self._sent)
            live = live[len(block) :]
        self._waiting = live

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if self._waiting:
            self._flush_soon(task.get_loop())

    async def _deliver(self, block: list[_Waiting[Item, Answer]]) -> None:
        answers: Sequence[Answer | Exception]
        left = max(entry.end for entry in block) - asyncio.get_running_loop().time()
        try:
            answers = await self._send([entry.item for entry in block], left)
        except Exception as error:  # noqa: BLE001 - it is the callers', who are waiting for it
            answers = [error] * len(block)
        except asyncio.CancelledError:
            for entry in block:
                entry.answer.cancel()
            raise
        for entry, answer in zip(block, answers, strict=True):
            _resolve(entry.answer, answer)

    async def idle(self) -> None:
        """Returns when everything submitted so far is answered."""
        while self._waiting or self._sending:
            await asyncio.sleep(0)
            await asyncio.gather(*self._sending, return_exceptions=True)


def _give_up(future: asyncio.Future[Answer], patience: float) -> None:
    message = f"cannot wait for an answer longer than {patience:g} s"
    _resolve(future, errors.DeadlineExceeded(grpc.StatusCode.DEADLINE_EXCEEDED, message))


def _resolve(future: asyncio.Future[Answer], answer: Answer | Exception) -> None:
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
