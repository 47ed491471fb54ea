"""Celery on redis, tuned by its guide "Optimizing": short tasks, so a high prefetch multiplier; results ignored; no
gossip, no mingle, no events, no rate limits. `acks_late`, since what is fetched must survive the worker, as with the
others. The pool is threads: its prefork pool would be several processes. There is no bulk call.
"""

import os
import sys
import threading
from typing import Any

from bench.adapters.protocol import Record, in_threads, produce, say, task, timed, when_due
from celery import Celery, signals

THREADS = int(os.environ.get("BENCH_CONCURRENCY", "8"))

app = Celery("bench", broker=sys.argv[2])
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    task_store_errors_even_if_ignored=False,
    worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH", "64")),
    worker_disable_rate_limits=True,
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    worker_redirect_stdouts=False,
    broker_connection_retry_on_startup=True,
    broker_pool_limit=THREADS,
)
record: Record


@app.task(name="handle")  # type: ignore[untyped-decorator] # celery has no types here
def handle(body: dict[str, Any]) -> None:
    record(body["id"])


def send(queue: str) -> Any:
    return lambda number: handle.apply_async((task(number),), queue=queue)


def enqueue(queue: str, first: int, count: int, mode: str) -> dict[str, Any]:
    threads = 1 if mode == "one" else THREADS
    return timed(lambda: in_threads(threads, lambda: send(queue), range(first, first + count)))


def open_loop(queue: str, times: list[float]) -> dict[str, Any]:
    return when_due(times, send(queue))


def left(queue: str) -> dict[str, Any]:
    with app.connection_for_read() as connection:
        redis = connection.default_channel.client
        return {"left": redis.llen(queue) + redis.zcard("unacked_index")}


def work(queue: str) -> None:
    signals.worker_ready.connect(lambda **_: say(event="ready"), weak=False)
    pool = ["--pool", os.environ.get("BENCH_POOL", "threads"), "--concurrency", str(THREADS)]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING"]
    app.worker_main(["--quiet", "worker", "-Q", queue, *pool, *quiet])


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        produce({"enqueue": enqueue, "open": open_loop, "left": left})
    else:
        record = Record(int(sys.argv[4]), sys.argv[5])
        assert threading.current_thread() is threading.main_thread()
        work(sys.argv[3])
