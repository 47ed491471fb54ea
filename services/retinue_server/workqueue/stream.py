"""StreamTasks: one worker's stream. Three tasks share it: one reads, one answers in order, one grants leases."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from retinue.workqueue.v1 import task_pb2
from retinue.workqueue.v1 import workqueue_service_pb2 as wq
from retinue_server.runtime import telemetry, wire
from retinue_server.runtime.errors import Reason, RetinueError, Violation
from retinue_server.workqueue import translate
from retinue_server.workqueue.core import limits
from retinue_server.workqueue.core.requests import Extend, LeaseAsk, LeaseRef

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from retinue_server.runtime.dispatch import Call
    from retinue_server.workqueue.core import steps
    from retinue_server.workqueue.core.queue import WorkQueue
    from retinue_server.workqueue.core.requests import Settlement

_BLOCK = 256
"""How many leases one message and one commit hold at most."""
_BLOCK_BYTES = 1024 * 1024
_ENDED = (Reason.LEASE_LOST, Reason.ALREADY_FINALIZED)
_IN_FLIGHT = 64
"""How many requests of one stream may wait for their commit; then reading waits."""


class WorkerStream:
    """The life of one stream."""

    def __init__(self, queue: WorkQueue, call: Call) -> None:
        self._queue, self._call = queue, call
        self._credit = 0
        self._has_credit = asyncio.Event()
        self._writing = asyncio.Lock()
        self._answers: asyncio.Queue[asyncio.Task[wq.StreamSettled] | None] = asyncio.Queue(_IN_FLIGHT)
        self._unanswered = 0
        """How many requests are in `_answers`, or were taken from it and are being answered."""
        self._held: dict[LeaseRef, None] = {}
        """The leases of this stream, in the order in which they were granted."""
        self._open: wq.StreamOpen
        self._lease_ms: int | None = None

    async def run(self) -> None:
        """Serves until the worker half-closes; what a bad request raises ends it."""
        first = await self._call.read() or wq.StreamTasksRequest()
        self._begin(first)
        try:
            async with asyncio.TaskGroup() as group:
                granting = group.create_task(self._grant())
                answering = group.create_task(self._answer())
                await self._take(first, group)
                await self._read(group)
                await self._answers.put(None)
                await answering
                granting.cancel()
        except* RetinueError as errors:
            raise _first(errors) from None

    def _begin(self, first: wq.StreamTasksRequest) -> None:
        read = translate.Reader()
        if not first.HasField("open"):
            limits.refuse("stream", [Violation("open", "is required in the first message")])
        self._open = first.open
        self._lease_ms = read.duration(first.open, "lease_duration", "open")
        _, found = self._found(first)
        limits.refuse("stream", [*read.violations, *limits.lease(self._ask(1), "open."), *found])

    def _ask(self, count: int) -> LeaseAsk:
        return LeaseAsk(self._open.queue_id, self._open.worker_id, count, self._lease_ms, max_bytes=_BLOCK_BYTES)

    # Reading

    async def _read(self, group: asyncio.TaskGroup) -> None:
        while (request := await self._call.read()) is not None:
            if request.HasField("open"):
                limits.refuse("stream", [Violation("open", "must come in the first message alone")])
            await self._take(request, group)

    async def _take(self, request: wq.StreamTasksRequest, group: asyncio.TaskGroup) -> None:
        settlements, found = self._found(request)
        limits.refuse("stream", found)
        if settlements or self._held or self._unanswered:
            if settlements or request.extend_all:
                settling = self._settle(request.sequence, settlements, extend_all=request.extend_all)
                self._unanswered += 1
                await self._answers.put(group.create_task(settling))
        elif request.extend_all:  # a sign of life without a lease, as idle workers send by the thousand
            await self._write(wq.StreamTasksResponse(settled=wq.StreamSettled(sequence=request.sequence)))
        if request.credit:
            self._credit += request.credit
            self._has_credit.set()

    def _found(self, request: wq.StreamTasksRequest) -> tuple[list[Settlement], list[Violation]]:
        """The outcomes of a request, and all that is wrong with it."""
        settlements, found = self._settlements(request)
        found += limits.within(request.credit, 0, limits.MAX_CREDIT, "credit")
        if self._credit + request.credit > limits.MAX_OUTSTANDING:
            found.append(Violation("credit", f"must not come to more than {limits.MAX_OUTSTANDING} outstanding"))
        if settlements:
            found += limits.settle(settlements, self._queue.now().wall_ms)
        return settlements, found

    def _settlements(self, request: wq.StreamTasksRequest) -> tuple[list[Settlement], list[Violation]]:
        if not (request.completions or request.failures or request.releases):
            return [], []
        read = translate.Reader()
        traceparent = telemetry.current()
        settlements: list[Settlement] = [
            *read.completions(request.completions, traceparent),
            *(read.failure(item, f"failures[{i}]") for i, item in enumerate(request.failures)),
            *(read.release(item, f"releases[{i}]") for i, item in enumerate(request.releases)),
        ]
        return settlements, read.violations

    # Settling

    async def _settle(self, sequence: int, settlements: Sequence[Settlement], *, extend_all: bool) -> wq.StreamSettled:
        answer = wq.StreamSettled(sequence=sequence)
        if settlements:
            for item, (_, _, error) in zip(settlements, await self._queue.settle(settlements), strict=True):
                if error is None or error.reason in _ENDED:
                    self._held.pop(item.lease, None)
                if error is not None:
                    token = item.lease.token()
                    answer.errors.append(wq.SettledError(lease_token=token, status=translate.status(error)))
        if extend_all:
            await self._extend_all(answer)
        return answer

    async def _extend_all(self, answer: wq.StreamSettled) -> None:
        held = list(self._held)
        for start in range(0, len(held), limits.MAX_BATCH):
            block = held[start : start + limits.MAX_BATCH]
            extended = await self._queue.extend([Extend(lease, self._lease_ms) for lease in block])
            for lease, result in zip(block, extended, strict=True):
                if result.error is not None:
                    self._held.pop(lease, None)
                    answer.lost_lease_tokens.append(lease.token())
                elif result.cancel_requested:
                    answer.cancel_requested_task_ids.append(result.task_id)

    async def _answer(self) -> None:
        while (settling := await self._answers.get()) is not None:
            await self._write(wq.StreamTasksResponse(settled=await settling))
            self._unanswered -= 1

    # Granting

    async def _grant(self) -> None:
        while not self._queue.stopping:
            if not self._credit:
                await self._first_of(self._has_credit.wait(), self._queue.stopped.wait())
                continue
            with self._queue.waiting_for_work(self._open.queue_id) as woken:
                granted = await self._queue.try_lease(self._ask(min(self._credit, _BLOCK)))
                if not granted and not self._queue.stopping:
                    await woken.wait()
                    woken.clear()
            if granted:
                await self._deliver(granted)
        grace = self._queue.drain_ms
        await self._write(wq.StreamTasksResponse(draining=wq.StreamDraining(grace_duration=wire.to_duration(grace))))

    @staticmethod
    async def _first_of(*waits: Awaitable[object]) -> None:
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _deliver(self, granted: list[steps.Granted]) -> None:
        self._credit -= len(granted)
        if not self._credit:
            self._has_credit.clear()
        leases: list[task_pb2.Lease] = [translate.lease(item) for item in granted]
        self._held.update(dict.fromkeys(LeaseRef.of(item.task.row) for item in granted))
        written = asyncio.Event()
        try:
            await self._write(wq.StreamTasksResponse(leases=wq.StreamLeases(leases=leases)), written)
        finally:
            if not written.is_set():
                await asyncio.shield(self._queue.give_back(granted))

    async def _write(self, response: wq.StreamTasksResponse, written: asyncio.Event | None = None) -> None:
        """Sends one message. A write that has begun is seen through: leaving it would jam the end of the stream."""
        async with self._writing:
            writing = asyncio.ensure_future(self._call.write(response))
            try:
                await asyncio.shield(writing)
            finally:
                while not writing.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([writing])
                failed = writing.cancelled() or writing.exception() is not None  # looked at, lest it be reported
                if written is not None and not failed:
                    written.set()


def _first(errors: BaseExceptionGroup[RetinueError]) -> RetinueError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, RetinueError)
    return error
