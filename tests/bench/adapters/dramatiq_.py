"""dramatiq on redis: `dramatiq_prefetch` high, which its guide names for many short messages; 8 worker threads; a
message is acknowledged after it was handled. Only the middleware that the guarantees need (retries). No bulk call.
"""

import os
import sys
import threading
from typing import Any

os.environ.setdefault("dramatiq_queue_prefetch", "1000")

import dramatiq
from bench.adapters.protocol import Record, in_threads, produce, say, task, timed, when_due
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import Retries
from dramatiq.worker import Worker

THREADS = int(os.environ.get("BENCH_CONCURRENCY", "8"))
broker = RedisBroker(url=sys.argv[2], middleware=[Retries()])
dramatiq.set_broker(broker)
record: Record


@dramatiq.actor(actor_name="handle", queue_name="none")  # type: ignore[untyped-decorator] # not installed where this is checked
def handle(body: dict[str, Any]) -> None:
    record(body["id"])


def send(queue: str) -> Any:
    broker.declare_queue(queue)
    return lambda number: broker.enqueue(handle.message(task(number)).copy(queue_name=queue))


def enqueue(queue: str, first: int, count: int, mode: str) -> dict[str, Any]:
    threads = 1 if mode == "one" else THREADS
    return timed(lambda: in_threads(threads, lambda: send(queue), range(first, first + count)))


def open_loop(queue: str, times: list[float]) -> dict[str, Any]:
    return when_due(times, send(queue))


def left(queue: str) -> dict[str, Any]:
    return {"left": broker.do_qsize(queue)}


def work(queue: str) -> None:
    broker.declare_queue(queue)
    Worker(broker, queues={queue}, worker_threads=THREADS).start()
    say(event="ready")
    threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        produce({"enqueue": enqueue, "open": open_loop, "left": left})
    else:
        record = Record(int(sys.argv[4]), sys.argv[5])
        work(sys.argv[3])
