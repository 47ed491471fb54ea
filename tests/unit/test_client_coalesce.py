"""Many callers, one call."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinue.client.channel import Connection
from retinue.client.coalesce import IN_FLIGHT, MAX_BYTES, MAX_ITEMS, Coalescer, blocks
from retinue.client.errors import DeadlineExceeded
from retinue.client.queue import Queue

Answer = TypeVar("Answer")

LONG = 30.0
"""Seconds: nobody runs out of time unless the test says so."""


async def begun(call: Coroutine[Any, Any, Answer]) -> asyncio.Task[Answer]:
    """A caller whose item is under way, or waits because enough calls are."""
    caller = asyncio.create_task(call)
    for _ in range(3):  # a turn to submit, one to flush, one to send
        await asyncio.sleep(0)
    return caller


@given(st.lists(st.integers(0, MAX_BYTES + 10), max_size=30))
def test_blocks_keep_order_and_limits(sizes: list[int]) -> None:
    made = list(blocks(sizes, lambda size: size))
    assert [size for block in made for size in block] == sizes
    assert all(block for block in made)
    assert all(len(block) == 1 or sum(block) <= MAX_BYTES for block in made)


def test_a_block_holds_a_thousand_items() -> None:
    assert [len(block) for block in blocks(range(2500), lambda _: 1)] == [MAX_ITEMS, MAX_ITEMS, 500]


async def test_one_turn_is_one_call_and_each_caller_gets_its_answer() -> None:
    calls: list[list[int]] = []

    async def send(items: list[int], _: float) -> list[int | Exception]:
        calls.append(items)
        return [ValueError(item) if item % 2 else item * 10 for item in items]

    outbox: Coalescer[int, int] = Coalescer(send, lambda _: 1)
    answers = await asyncio.gather(*map(partial(outbox.submit, patience=LONG), range(4)), return_exceptions=True)
    assert calls == [[0, 1, 2, 3]]
    assert answers[::2] == [0, 20]
    assert [type(answer) for answer in answers[1::2]] == [ValueError, ValueError]


async def test_a_call_that_fails_fails_for_all() -> None:
    async def send(items: list[int], _: float) -> list[int | Exception]:
        raise ConnectionError("gone")

    outbox: Coalescer[int, int] = Coalescer(send, lambda _: 1)
    answers = await asyncio.gather(*map(partial(outbox.submit, patience=LONG), range(3)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ConnectionError] * 3


async def test_a_caller_that_leaves_before_the_turn_ends_takes_its_item_along() -> None:
    calls: list[list[int]] = []

    async def send(items: list[int], _: float) -> list[int | Exception]:
        calls.append(items)
        return list(items)

    outbox: Coalescer[int, int] = Coalescer(send, lambda _: 1)
    stays, leaves = asyncio.ensure_future(outbox.submit(1, LONG)), asyncio.ensure_future(outbox.submit(2, LONG))
    asyncio.get_running_loop().call_soon(leaves.cancel)
    assert await stays == 1
    with pytest.raises(asyncio.CancelledError):
        await leaves
    assert calls in ([[1]], [[1, 2]])


class Held:
    """A server that answers when it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.calls: list[list[int]] = []
        self.left: list[float] = []
        self.outbox: Coalescer[int, int] = Coalescer(self._send, lambda _: 1)

    async def _send(self, items: list[int], left: float) -> list[int | Exception]:
        self.calls.append(items)
        self.left.append(left)
        await self.go.wait()
        return list(items)

    async def submitted(self, *items: int, patience: float = LONG) -> list[asyncio.Task[int]]:
        """Callers that come one after the other."""
        return [await begun(self.outbox.submit(item, patience)) for item in items]


async def test_idle_waits_for_what_is_under_way() -> None:
    server = Held()
    [one] = await server.submitted(1)
    idle = await begun(server.outbox.idle())
    assert not idle.done()
    server.go.set()
    await asyncio.wait_for(idle, 60)
    assert one.result() == 1


async def test_what_comes_while_two_calls_are_under_way_goes_out_together() -> None:
    server = Held()
    callers = await server.submitted(*range(6))
    assert server.calls == [[0], [1]]
    server.go.set()
    assert await asyncio.gather(*callers) == list(range(6))
    assert server.calls == [[0], [1], [2, 3, 4, 5]]


async def test_who_runs_out_of_time_behind_hanging_calls_is_told_and_never_sent() -> None:
    server = Held()
    hanging = await server.submitted(*range(IN_FLIGHT))
    [late] = await server.submitted(2, patience=0.01)
    [patient] = await server.submitted(3)
    with pytest.raises(DeadlineExceeded):
        await late
    assert not any(caller.done() for caller in (*hanging, patient))
    server.go.set()
    assert await asyncio.gather(*hanging, patient) == [0, 1, 3]
    assert server.calls == [[0], [1], [3]]


async def test_who_runs_out_of_time_during_the_call_is_told() -> None:
    server = Held()
    [late] = await server.submitted(0, patience=0.01)
    assert server.calls == [[0]]
    with pytest.raises(DeadlineExceeded):
        await late
    server.go.set()
    await asyncio.wait_for(server.outbox.idle(), 60)


async def test_a_call_lasts_no_longer_than_its_callers_wait() -> None:
    server, loop = Held(), asyncio.get_running_loop()
    hanging = await server.submitted(*range(IN_FLIGHT))
    began = loop.time()
    callers = [caller for seconds in (50, 200, 100) for caller in await server.submitted(seconds, patience=seconds)]
    server.go.set()
    await asyncio.gather(*hanging, *callers)
    assert 200 - (loop.time() - began) <= server.left[IN_FLIGHT] <= 200 + (loop.time() - began)


async def test_a_queue_keeps_its_timeout_behind_calls_that_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        connection = Connection(f"{host}:{port}")
        queue = Queue("q", connection=connection, timeout=LONG)
        hanging = [await begun(queue.enqueue("x")) for _ in range(IN_FLIGHT)]
        queue.timeout = 0.1
        with pytest.raises(DeadlineExceeded):
            await queue.enqueue("y")
        assert not any(caller.done() for caller in hanging)
        await connection.close()
        await asyncio.gather(*hanging, return_exceptions=True)
