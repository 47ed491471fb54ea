"""Works until SIGTERM by unary calls, each thread batch after batch."""

from __future__ import annotations

import argparse
import heapq
import itertools
import threading
import time
from typing import Any

import grpc
from faults.clients.calls import TIMEOUT_S, Caller, arguments, lasting, until_told
from faults.clients.plans import Plan, follow_up, plan
from support.history import Grant, Item, Op
from support.history.recorder import Recorder, boot_ns

from retinue.workqueue.v1 import task_pb2
from retinue.workqueue.v1 import workqueue_service_pb2 as wq

_BATCH = 200
_COMPLETES = (Plan.COMPLETE, Plan.FOLLOW, Plan.EXTEND, Plan.LATE)


def grant(lease: task_pb2.Lease) -> Grant:
    """A lease for the history."""
    return Grant(lease.task_id, lease.lease_epoch, lease.attempt, lease.lease_duration.ToMilliseconds())


def item(lease: task_pb2.Lease, **more: Any) -> Item:
    """A lease that something is asked of."""
    return Item(lease.task_id, lease.lease_epoch, **more)


def completion(lease: task_pb2.Lease, what: Plan) -> wq.Completion:
    """Success, with a follow-up where that is the plan."""
    result = task_pb2.Payload(text=str(lease.lease_epoch))
    children = [follow_up(lease)] if what == Plan.FOLLOW else []
    return wq.Completion(lease_token=lease.lease_token, result=result, follow_ups=children)


def failure(lease: task_pb2.Lease, what: Plan) -> wq.TaskFailure:
    """A failure that is soon tried again, or final."""
    return wq.TaskFailure(
        lease_token=lease.lease_token,
        failure=task_pb2.Failure(reason="PLANNED"),
        final=what == Plan.DOOM,
        retry_delay_duration=lasting(0.1),
    )


class Worker:
    """One thread's loop."""

    def __init__(self, caller: Caller, flags: argparse.Namespace, told: threading.Event) -> None:
        self._caller, self._told = caller, told
        self._queue, self._seed = flags.queue, flags.seed
        self._lease_s, self._hold_s = flags.lease, flags.hold
        self._numbers = itertools.count()
        self._later: list[tuple[float, int, task_pb2.Lease]] = []
        self._name = f"{caller.recorder.who}.{caller.chance.getrandbits(32):x}"

    def run(self) -> None:
        while not self._told.is_set():
            leases = self._lease()
            if self._hold_s is None:
                self.settle([(lease, plan(self._seed, lease)) for lease in leases])
            else:
                self._put_off(leases, self._hold_s)
            self.settle([(lease, Plan.COMPLETE) for lease in self._due()])

    def _lease(self) -> list[task_pb2.Lease]:
        """A batch; where the answer is lost, it is asked for again by request_id or left to expire."""
        request = wq.LeaseTasksRequest(
            queue_id=self._queue,
            worker_id=self._caller.recorder.who,
            max_tasks=_BATCH,
            wait_duration=lasting(0.3),
            lease_duration=lasting(self._lease_s),
            request_id=f"{self._name}.{next(self._numbers)}",
        )
        while not self._told.is_set():
            since, n = boot_ns(), self._caller.recorder.call(Op.LEASE)
            try:
                leases = list(self._caller.stub.LeaseTasks(request, timeout=TIMEOUT_S).leases)
            except grpc.RpcError as error:
                self._caller.lost(n, error)
                if self._caller.chance.random() < 0.5:
                    break
                continue
            if leases:
                self._caller.recorder.leased(n, since, map(grant, leases))
            self._caller.recorder.ok(n)
            return leases
        return []

    def _put_off(self, leases: list[task_pb2.Lease], delay_s: float) -> None:
        for lease in leases:
            heapq.heappush(self._later, (time.monotonic() + delay_s, next(self._numbers), lease))

    def _due(self) -> list[task_pb2.Lease]:
        due = []
        while self._later and self._later[0][0] <= time.monotonic():
            due.append(heapq.heappop(self._later)[2])
        return due

    def settle(self, plans: list[tuple[task_pb2.Lease, Plan]]) -> None:
        """Carries the plans out, kind by kind."""
        late = [lease for lease, what in plans if what == Plan.LATE]
        self._put_off(late, self._lease_s * self._caller.chance.uniform(0.8, 1.3))
        self._extend([lease for lease, what in plans if what == Plan.EXTEND])
        self._complete([one for one in plans if one[1] in _COMPLETES and one[1] != Plan.LATE])
        self._fail([one for one in plans if one[1] in (Plan.FAIL, Plan.DOOM)])
        self._release([lease for lease, what in plans if what == Plan.RELEASE])

    def _extend(self, leases: list[task_pb2.Lease]) -> None:
        if not leases:
            return
        items = [item(lease, lasts_ms=round(self._lease_s * 1000)) for lease in leases]
        extensions = [wq.Extension(lease_token=x.lease_token, lease_duration=lasting(self._lease_s)) for x in leases]
        request = wq.ExtendLeasesRequest(extensions=extensions)
        self._caller.insist(Op.EXTEND, items, self._caller.stub.ExtendLeases, request)

    def _complete(self, plans: list[tuple[task_pb2.Lease, Plan]]) -> None:
        if not plans:
            return
        items = [item(lease, follow_ups=int(what == Plan.FOLLOW)) for lease, what in plans]
        request = wq.CompleteTasksRequest(completions=[completion(*one) for one in plans])
        self._caller.insist(Op.COMPLETE, items, self._caller.stub.CompleteTasks, request)

    def _fail(self, plans: list[tuple[task_pb2.Lease, Plan]]) -> None:
        if not plans:
            return
        items = [item(lease, final=what == Plan.DOOM) for lease, what in plans]
        request = wq.FailTasksRequest(failures=[failure(*one) for one in plans])
        self._caller.insist(Op.FAIL, items, self._caller.stub.FailTasks, request)

    def _release(self, leases: list[task_pb2.Lease]) -> None:
        if not leases:
            return
        request = wq.ReleaseTasksRequest(releases=[wq.Release(lease_token=lease.lease_token) for lease in leases])
        self._caller.insist(Op.RELEASE, [item(lease) for lease in leases], self._caller.stub.ReleaseTasks, request)


def main() -> None:
    parser = arguments()
    parser.add_argument("--lease", type=float, default=1.5, help="seconds")
    parser.add_argument("--hold", type=float, help="seconds: complete all, after so long")
    flags = parser.parse_args()
    told = until_told()
    recorder = Recorder(flags.history, flags.name)
    callers = [Caller(recorder, f"{flags.seed}.{flags.name}.{i}") for i in range(flags.threads)]
    workers = [Worker(caller, flags, told) for caller in callers]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
