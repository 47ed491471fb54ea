"""beanstalkd through greenstalk: a connection a thread, reserve and delete per job. The protocol has no batches; more
connections let its fsyncs overlap with our Python.
"""

import json
import os
import sys
import threading
from typing import Any

import greenstalk
from bench.adapters.protocol import Record, in_threads, produce, say, task, timed, when_due

CONNECTIONS = int(os.environ.get("BENCH_CONCURRENCY", "16"))
HOST, _, PORT = sys.argv[2].rpartition(":")


def connect(tube: str) -> greenstalk.Client:
    return greenstalk.Client((HOST, int(PORT)), use=tube, watch=tube)


def putter(tube: str) -> Any:
    client = connect(tube)
    return lambda number: client.put(json.dumps(task(number)))


def enqueue(queue: str, first: int, count: int, mode: str) -> dict[str, Any]:
    connections = 1 if mode == "one" else CONNECTIONS
    return timed(lambda: in_threads(connections, lambda: putter(queue), range(first, first + count)))


def open_loop(queue: str, times: list[float]) -> dict[str, Any]:
    return when_due(times, putter(queue))


def left(queue: str) -> dict[str, Any]:
    client = connect(queue)
    found = client.stats_tube(queue)
    client.close()
    return {"left": sum(int(found[f"current-jobs-{state}"]) for state in ("ready", "reserved", "delayed", "buried"))}


def work(queue: str, record: Record) -> None:
    def run() -> None:
        client = connect(queue)
        while True:
            job = client.reserve()
            record(json.loads(job.body)["id"])
            client.delete(job)

    for _ in range(CONNECTIONS):
        threading.Thread(target=run, daemon=True).start()
    say(event="ready")
    threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        produce({"enqueue": enqueue, "open": open_loop, "left": left})
    else:
        work(sys.argv[3], Record(int(sys.argv[4]), sys.argv[5]))
