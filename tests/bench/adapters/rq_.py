"""RQ on redis: `enqueue_many` in a pipeline for bulk; `SimpleWorker`, which its guide names where forking per job costs
too much; no results kept.
"""

import sys
from typing import Any

from bench.adapters.protocol import BULK, Record, in_threads, produce, say, task, timed, when_due
from redis import Redis
from rq import Queue, SimpleWorker

record: Record
KEEP = {"result_ttl": 0}


def handle(body: dict[str, Any]) -> None:
    import __main__  # noqa: PLC0415 - the worker imports this file by name, its record is in the program

    __main__.record(body["id"])


def send(name: str) -> Any:
    queue = Queue(name, connection=Redis.from_url(sys.argv[2]))
    return lambda number: queue.enqueue("rq_.handle", task(number), **KEEP)


def send_all(name: str, count: int) -> Any:
    queue = Queue(name, connection=Redis.from_url(sys.argv[2]))
    job = Queue.prepare_data
    return lambda first: queue.enqueue_many(
        [job("rq_.handle", (task(number),), **KEEP) for number in range(first, min(first + BULK, count))]
    )


def enqueue(queue: str, first: int, count: int, mode: str) -> dict[str, Any]:
    end = first + count
    if mode == "bulk":
        return timed(lambda: in_threads(1, lambda: send_all(queue, end), range(first, end, BULK)))
    return timed(lambda: in_threads(1 if mode == "one" else 8, lambda: send(queue), range(first, end)))


def open_loop(queue: str, times: list[float]) -> dict[str, Any]:
    return when_due(times, send(queue))


def left(queue: str) -> dict[str, Any]:
    found = Queue(queue, connection=Redis.from_url(sys.argv[2]))
    return {"left": found.count + found.started_job_registry.count}


def work(name: str) -> None:
    connection = Redis.from_url(sys.argv[2])
    worker = SimpleWorker([Queue(name, connection=connection)], connection=connection)
    say(event="ready")
    worker.work(logging_level="WARNING")


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        produce({"enqueue": enqueue, "open": open_loop, "left": left})
    else:
        record = Record(int(sys.argv[4]), sys.argv[5])
        work(sys.argv[3])
