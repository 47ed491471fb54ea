"""Enqueues tasks until SIGTERM, in batches, pausing while enough of them wait."""

from __future__ import annotations

import threading
import time

import grpc
from faults.clients.calls import Caller, arguments, until_told
from support.history import Item, Op
from support.history.recorder import Recorder

from retinue.workqueue.v1 import task_pb2, workqueue_admin_service_pb2_grpc
from retinue.workqueue.v1 import workqueue_admin_service_pb2 as admin
from retinue.workqueue.v1 import workqueue_service_pb2 as wq

_BATCHES = (1, 50, 500)
_PAYLOAD = "x" * 100


class Tap:
    """Open while few tasks wait, and while no more than `rate` a second have come."""

    def __init__(self, queue: str, enough: int, rate: float, told: threading.Event) -> None:
        self._queue, self._enough, self._rate, self._told = queue, enough, rate, told
        self._open = threading.Event()
        self._taken, self._began = 0, time.monotonic()

    def watch(self, caller: Caller) -> None:
        """Looks at the queue every so often."""
        stub = workqueue_admin_service_pb2_grpc.WorkQueueAdminServiceStub(caller.channel)
        while not self._told.wait(0.2):
            try:
                stats = stub.GetQueueStats(admin.GetQueueStatsRequest(queue_ids=[self._queue]), timeout=1).stats[0]
            except grpc.RpcError:
                continue
            (self._open.set if stats.ready < self._enough else self._open.clear)()

    def take(self, count: int) -> None:
        """Waits until so many may be enqueued."""
        while not self._told.is_set():
            due = self._taken / self._rate
            if self._open.wait(0.1) and time.monotonic() - self._began >= due:
                break
            self._told.wait(0.01)
        self._taken += count


def produce(caller: Caller, queue: str, name: str, tap: Tap, told: threading.Event) -> None:
    number = 0
    while not told.is_set():
        count = caller.chance.choice(_BATCHES)
        tap.take(count)
        ids = [f"{name}.{number + i}" for i in range(count)]
        number += count
        tasks = [task_pb2.TaskSpec(task_id=i, queue_id=queue, input=task_pb2.Payload(text=_PAYLOAD)) for i in ids]
        request = wq.EnqueueTasksRequest(tasks=tasks, request_id=ids[0])
        caller.insist(Op.ENQUEUE, [Item(i) for i in ids], caller.stub.EnqueueTasks, request)


def main() -> None:
    parser = arguments()
    parser.add_argument("--enough", type=int, default=3000, help="how many tasks may wait")
    parser.add_argument("--rate", type=float, default=1e9, help="tasks a second at most")
    flags = parser.parse_args()
    told = until_told()
    recorder = Recorder(flags.history, flags.name)
    tap = Tap(flags.queue, flags.enough, flags.rate, told)
    seeds = [f"{flags.seed}.{flags.name}.{i}" for i in range(flags.threads)]
    threads = [
        threading.Thread(target=produce, args=(Caller(recorder, seed), flags.queue, f"{flags.name}.{i}", tap, told))
        for i, seed in enumerate(seeds)
    ]
    for thread in threads:
        thread.start()
    tap.watch(Caller(recorder, "watch"))
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
