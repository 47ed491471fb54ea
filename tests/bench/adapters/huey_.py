"""huey on redis: its consumer with 4 threads, no results stored, no scheduler's work beyond its own loop. huey takes a
task off the list before it is handled: one whose worker dies is lost, unlike with all others here.
"""

import os
import sys
import threading
from typing import Any

from bench.adapters.protocol import Record, in_threads, produce, say, task, timed, when_due
from huey import RedisHuey
from huey.consumer import Consumer

THREADS = int(os.environ.get("BENCH_CONCURRENCY", "4"))
record: Record


def app(queue: str) -> tuple[RedisHuey, Any]:
    huey = RedisHuey(queue, url=sys.argv[2], results=False, store_none=False)

    def handle(body: dict[str, Any]) -> None:
        record(body["id"])

    return huey, huey.task()(handle)


def send(queue: str) -> Any:
    _, handle = app(queue)
    return lambda number: handle(task(number))


def enqueue(queue: str, first: int, count: int, mode: str) -> dict[str, Any]:
    threads = 1 if mode == "one" else 8
    return timed(lambda: in_threads(threads, lambda: send(queue), range(first, first + count)))


def open_loop(queue: str, times: list[float]) -> dict[str, Any]:
    return when_due(times, send(queue))


def left(queue: str) -> dict[str, Any]:
    return {"left": app(queue)[0].pending_count()}


def work(queue: str) -> None:
    consumer = Consumer(app(queue)[0], workers=THREADS, worker_type="thread", periodic=False, initial_delay=0.01)
    consumer.start()
    say(event="ready")
    threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        produce({"enqueue": enqueue, "open": open_loop, "left": left})
    else:
        record = Record(int(sys.argv[4]), sys.argv[5])
        work(sys.argv[3])
