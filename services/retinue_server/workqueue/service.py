"""WorkQueueService: translate in, call the core, translate out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue.workqueue.v1 import task_pb2
from retinue.workqueue.v1 import workqueue_service_pb2 as wq
from retinue_server.runtime import telemetry, wire
from retinue_server.runtime.errors import Violation
from retinue_server.workqueue import translate
from retinue_server.workqueue.core.requests import Enqueue, LeaseAsk, Reschedule
from retinue_server.workqueue.stream import WorkerStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retinue_server.runtime.dispatch import Call
    from retinue_server.workqueue.core import steps
    from retinue_server.workqueue.core.queue import WorkQueue
    from retinue_server.workqueue.engine import Task

DESCRIPTOR = wq.DESCRIPTOR.services_by_name["WorkQueueService"]
REPLY_BYTES = 5 * 512 * 1024
"""Replies are cut here, well under the 3 MiB that no message exceeds."""

_PAGES: wire.PageTokens[tuple[str, int]] = wire.PageTokens("tasks", 1, tuple[str, wire.Int64])
"""Which filter, and below which task to go on."""


class WorkQueueService:
    """For producers and workers; see the contract."""

    def __init__(self, queue: WorkQueue) -> None:
        self._queue = queue

    async def EnqueueTasks(self, request: wq.EnqueueTasksRequest, call: Call) -> wq.EnqueueTasksResponse:
        read = translate.Reader()
        traceparent = telemetry.current()
        asked = Enqueue(
            read.tasks(request.tasks, "tasks", traceparent),
            request.atomic,
            request.request_id,
            translate.digest(request) if request.request_id else b"",
        )
        results = await self._queue.enqueue(asked, read.violations)
        self._tell_durability(call)
        return wq.EnqueueTasksResponse(
            results=[
                {"task_id": task_id}  # type: ignore[misc] # a dict makes the message with a third of the work
                if error is None and not existing
                else wq.EnqueueResult(task_id=task_id, existing=existing, status=translate.status(error))
                for task_id, existing, error in results
            ]
        )

    async def GetTask(self, request: wq.GetTaskRequest, call: Call) -> wq.GetTaskResponse:
        return wq.GetTaskResponse(task=translate.task(await self._queue.get(request.task_id)))

    async def ListTasks(self, request: wq.ListTasksRequest, call: Call) -> wq.ListTasksResponse:
        read = translate.Reader()
        wanted = read.filter(request.filter)
        before = read.page(_PAGES, request.page_token)
        mark = translate.digest(request.filter).hex()[:16]
        if before is not None and before[0] != mark:
            raise wire.page_token_expired("it belongs to another filter")
        below = before[1] if before else None
        found, more = await self._queue.page(wanted, below, request.page_size, read.violations)
        return _page(found, mark, more=more)

    async def WaitTask(self, request: wq.WaitTaskRequest, call: Call) -> wq.WaitTaskResponse:
        read = translate.Reader()
        wait_ms = read.duration(request, "wait_duration") or 0
        task = await self._queue.wait(request.task_id, wait_ms, _time_left_ms(call), read.violations)
        return wq.WaitTaskResponse(task=translate.task(task))

    async def CancelTasks(self, request: wq.CancelTasksRequest, call: Call) -> wq.CancelTasksResponse:
        read = translate.Reader()
        selected = await self._queue.cancel(read.selection(request), read.violations)
        self._tell_durability(call)
        return wq.CancelTasksResponse(count=selected.count, results=translate.task_results(request.task_ids, selected))

    async def RescheduleTask(self, request: wq.RescheduleTaskRequest, call: Call) -> wq.RescheduleTaskResponse:
        read = translate.Reader()
        asked = Reschedule(
            request.task_id,
            read.timestamp(request, "schedule_time"),
            read.duration(request, "delay_duration"),
            request.priority if request.HasField("priority") else None,
        )
        task = await self._queue.reschedule(asked, read.violations)
        self._tell_durability(call)
        message = translate.task(task)
        message.spec.ClearField("input")
        message.ClearField("result")
        return wq.RescheduleTaskResponse(task=message)

    async def LeaseTasks(self, request: wq.LeaseTasksRequest, call: Call) -> wq.LeaseTasksResponse:
        read = translate.Reader()
        asked = LeaseAsk(
            request.queue_id,
            request.worker_id,
            request.max_tasks or 1,
            read.duration(request, "lease_duration"),
            request.request_id,
            REPLY_BYTES,
        )
        wait_ms = read.duration(request, "wait_duration") or 0
        granted = await self._queue.lease(asked, wait_ms, _time_left_ms(call), read.violations)
        self._tell_durability(call)
        return wq.LeaseTasksResponse(leases=[translate.lease(lease) for lease in granted])

    async def StreamTasks(self, call: Call) -> None:
        await WorkerStream(self._queue, call).run()

    async def ExtendLeases(self, request: wq.ExtendLeasesRequest, call: Call) -> wq.ExtendLeasesResponse:
        read = translate.Reader()
        asked = [read.extension(item, f"extensions[{i}]") for i, item in enumerate(request.extensions)]
        extended = await self._queue.extend(asked, read.violations)
        self._tell_durability(call)
        return wq.ExtendLeasesResponse(results=[_extend_result(item) for item in extended])

    async def CompleteTasks(self, request: wq.CompleteTasksRequest, call: Call) -> wq.CompleteTasksResponse:
        read = translate.Reader()
        traceparent = telemetry.current()
        asked = read.completions(request.completions, traceparent)
        settled = await self._queue.settle(asked, [*read.violations, *_required(asked, "completions")])
        self._tell_durability(call)
        return wq.CompleteTasksResponse(
            results=[
                wq.CompleteResult(status=translate.status(s.error), follow_up_task_ids=s.follow_ups) for s in settled
            ]
        )

    async def FailTasks(self, request: wq.FailTasksRequest, call: Call) -> wq.FailTasksResponse:
        read = translate.Reader()
        asked = [read.failure(item, f"failures[{i}]") for i, item in enumerate(request.failures)]
        settled = await self._queue.settle(asked, [*read.violations, *_required(asked, "failures")])
        self._tell_durability(call)
        return wq.FailTasksResponse(results=[_fail_result(item) for item in settled])

    async def ReleaseTasks(self, request: wq.ReleaseTasksRequest, call: Call) -> wq.ReleaseTasksResponse:
        read = translate.Reader()
        asked = [read.release(item, f"releases[{i}]") for i, item in enumerate(request.releases)]
        settled = await self._queue.settle(asked, [*read.violations, *_required(asked, "releases")])
        self._tell_durability(call)
        return wq.ReleaseTasksResponse(
            results=[wq.ReleaseResult(status=translate.status(item.error)) for item in settled]
        )

    def _tell_durability(self, call: Call) -> None:
        call.set_trailing_metadata("retinue-durability", self._queue.engine.capabilities.durability.name.lower())


def _required(items: Sequence[object], field: str) -> Sequence[Violation]:
    return () if items else (Violation(field, "must hold 1 to 1000 items; it holds 0"),)


def _time_left_ms(call: Call) -> int | None:
    left = call.time_remaining()
    return None if left is None else int(left * 1000)


def _page(found: Sequence[Task], mark: str, *, more: bool) -> wq.ListTasksResponse:
    """One page, cut where the reply would grow too large."""
    response = wq.ListTasksResponse()
    room = REPLY_BYTES
    for task in found:
        message = translate.task(task)
        room -= message.ByteSize() + 8
        if room < 0:
            break
        response.tasks.append(message)
    if more or room < 0:
        response.next_page_token = _PAGES.encode((mark, found[len(response.tasks) - 1].row.seq))
    return response


def _extend_result(item: steps.Extended) -> wq.ExtendResult:
    if item.error is not None:
        return wq.ExtendResult(status=translate.status(item.error))
    return wq.ExtendResult(lease_duration=wire.to_duration(item.lease_ms), cancel_requested=item.cancel_requested)


def _fail_result(item: steps.Settled) -> wq.FailResult:
    state = task_pb2.TaskState.ValueType(item.state) if item.state is not None else task_pb2.TASK_STATE_UNSPECIFIED
    return wq.FailResult(status=translate.status(item.error), state=state)
