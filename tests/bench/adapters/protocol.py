"""What every Python adapter speaks; `protocol.mjs` and `protocol.go` say the same.

    ADAPTER produce URL              a command a line on stdin, its answer on stdout
        {"do": "enqueue", "queue": Q, "first": 0, "count": N, "mode": "one" | "pipelined" | "bulk"}  -> {"seconds": S}
        {"do": "open", "queue": Q, "times": [seconds from now, ...]}  -> {"start_ns": T}, each sent when due
        {"do": "left", "queue": Q}  -> {"left": tasks that are not finished}
    ADAPTER work URL QUEUE COUNT FILE
        {"event": "ready"}, then {"event": "done", ...} after COUNT tasks; on a line on stdin it writes all it handled
        to FILE, `number nanoseconds` a line, and ends

Tasks are JSON objects `{"id": number, "pad": text}`, 110 to 120 bytes. Times are CLOCK_MONOTONIC.
"""

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

BULK = 100
"""Tasks per call in mode `bulk`."""
WINDOW = 64
"""Calls in flight in mode `pipelined`."""
PAD = "x" * 96


def task(number: int) -> dict[str, Any]:
    return {"id": number, "pad": PAD}


def say(**message: Any) -> None:
    """Past what a peer makes of sys.stdout."""
    os.write(1, (json.dumps(message) + "\n").encode())


def produce(handlers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers commands until stdin ends; a command that fails is answered with its error."""
    say(event="ready")
    for line in sys.stdin:
        command = json.loads(line)
        try:
            say(**handlers[command.pop("do")](**command))
        except Exception as error:  # noqa: BLE001 - the harness shows it and voids the cell
            say(error=f"{type(error).__name__}: {error}")


def timed(work: Callable[[], object]) -> dict[str, Any]:
    start = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - start}


def in_threads(count: int, make: Callable[[], Callable[[int], object]], numbers: range) -> None:
    """Shares numbers out among threads, each with what `make` gave it (a connection)."""
    todo = iter(numbers)
    lock = threading.Lock()

    def run() -> None:
        send = make()
        while True:
            with lock:
                number = next(todo, None)
            if number is None:
                return
            send(number)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def when_due(times: list[float], send: Callable[[int], object]) -> dict[str, Any]:
    """Sends task i at times[i]; late senders send at once, and the lateness is the system's."""
    start = time.monotonic_ns()
    for number, due in enumerate(times):
        wait = due - (time.monotonic_ns() - start) / 1e9
        if wait > 0:
            time.sleep(wait)
        send(number)
    return {"start_ns": start}


async def shared(numbers: range, loops: int, send: Callable[[int], Awaitable[object]]) -> None:
    """Shares numbers out among loops that each await their send."""
    todo = iter(numbers)

    async def run() -> None:
        for number in todo:
            await send(number)

    await asyncio.gather(*(run() for _ in range(loops)))


async def when_due_async(times: list[float], send: Callable[[int], Coroutine[Any, Any, object]]) -> dict[str, Any]:
    """Sends task i at times[i], without waiting for the answers before.

    What is answered is let go of: a full collection over all of them would stop the sender for tens of milliseconds.
    """
    under_way: set[asyncio.Task[object]] = set()
    failed: list[BaseException] = []

    def answered(task: asyncio.Task[object]) -> None:
        under_way.discard(task)
        if error := task.exception():
            failed.append(error)

    start = time.monotonic_ns()
    for number, due in enumerate(times):
        wait = due - (time.monotonic_ns() - start) / 1e9
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(send(number))
        under_way.add(task)
        task.add_done_callback(answered)
    await asyncio.gather(*under_way, return_exceptions=True)
    if failed:
        raise failed[0]
    return {"start_ns": start}


def produce_async(set_up: Callable[[], Awaitable[object]], handlers: dict[str, Callable[..., Any]]) -> None:
    """produce() for coroutines, all on one loop."""
    runner = asyncio.Runner()

    async def start() -> None:
        await set_up()

    def command(function: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
        return lambda **arguments: runner.run(function(**arguments))

    runner.run(start())
    produce({name: command(function) for name, function in handlers.items()})


class Record:
    """Which tasks were handled and when; says so after the last, and writes it down when asked."""

    def __init__(self, count: int, path: str) -> None:
        self._count, self._path = count, path
        self._ids: list[int] = []
        self._times: list[int] = []
        self._cpu = 0.0
        threading.Thread(target=self._until_asked, daemon=True).start()

    def __call__(self, number: int) -> None:
        if not self._ids:
            self._cpu = time.process_time()
        self._times.append(time.monotonic_ns())
        self._ids.append(number)
        if len(self._ids) == self._count:
            cpu = time.process_time() - self._cpu
            say(event="done", first_ns=self._times[0], last_ns=self._times[-1], cpu_seconds=cpu)

    def _until_asked(self) -> None:
        with contextlib.suppress(ValueError):
            os.read(0, 1)
        rows = zip(self._ids, self._times, strict=False)  # the handler may be between the two
        Path(self._path).write_text("".join(f"{number} {at}\n" for number, at in rows))
        say(event="written")
        os._exit(0)
