"""WorkQueueAdminService: translate in, call the core, translate out."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from retinue.workqueue.v1 import queue_pb2
from retinue.workqueue.v1 import workqueue_admin_service_pb2 as admin
from retinue_server import __version__
from retinue_server.runtime import wire
from retinue_server.runtime.dispatch import Role
from retinue_server.runtime.errors import OutOfRange, Reason
from retinue_server.workqueue import translate
from retinue_server.workqueue.core import limits
from retinue_server.workqueue.engine import QueueState, State

if TYPE_CHECKING:
    from retinue_server.runtime.dispatch import Call
    from retinue_server.workqueue.core.events import Event
    from retinue_server.workqueue.core.queue import QueueReport, WorkQueue

DESCRIPTOR = admin.DESCRIPTOR.services_by_name["WorkQueueAdminService"]
OPEN_TO_APPS = frozenset({"GetQueue", "ListQueues", "GetQueueStats", "WatchEvents", "GetCapabilities"})
ROLES = {method.name: Role.OPERATOR for method in DESCRIPTOR.methods if method.name not in OPEN_TO_APPS}
KEEP_ALIVE_S = 15.0

_PAGES: wire.PageTokens[str] = wire.PageTokens("queues", 1, str)
_RESUME: wire.PageTokens[tuple[str, int]] = wire.PageTokens("watch", 1, tuple[str, wire.Int64])


class WorkQueueAdminService:
    """For people and tools that run queues; see the contract."""

    def __init__(self, queue: WorkQueue, max_blob_bytes: int) -> None:
        self._queue = queue
        self._max_blob_bytes = max_blob_bytes
        self._process = os.urandom(8).hex()
        """Resume tokens of another process are not ours."""

    async def CreateQueue(self, request: admin.CreateQueueRequest, call: Call) -> admin.CreateQueueResponse:
        read = translate.Reader()
        patch = read.settings(request.settings)
        queue = await self._queue.create_queue(request.queue_id, patch, read.violations)
        self._tell_durability(call)
        return admin.CreateQueueResponse(queue=translate.queue(queue))

    async def UpdateQueue(self, request: admin.UpdateQueueRequest, call: Call) -> admin.UpdateQueueResponse:
        read = translate.Reader()
        patch = read.settings(request.settings)
        queue = await self._queue.update_queue(request.queue_id, patch, read.violations)
        self._tell_durability(call)
        return admin.UpdateQueueResponse(queue=translate.queue(queue))

    async def GetQueue(self, request: admin.GetQueueRequest, call: Call) -> admin.GetQueueResponse:
        return admin.GetQueueResponse(queue=translate.queue(await self._queue.queue(request.queue_id)))

    async def ListQueues(self, request: admin.ListQueuesRequest, call: Call) -> admin.ListQueuesResponse:
        read = translate.Reader()
        after = read.page(_PAGES, request.page_token) or ""
        found, more = await self._queue.queues(after, request.page_size, read.violations)
        return admin.ListQueuesResponse(
            queues=[translate.queue(queue) for queue in found],
            next_page_token=_PAGES.encode(found[-1].queue_id) if more else "",
        )

    async def DeleteQueue(self, request: admin.DeleteQueueRequest, call: Call) -> admin.DeleteQueueResponse:
        count = await self._queue.delete_queue(request.queue_id, force=request.force)
        self._tell_durability(call)
        return admin.DeleteQueueResponse(deleted_tasks=count)

    async def PauseQueue(self, request: admin.PauseQueueRequest, call: Call) -> admin.PauseQueueResponse:
        queue = await self._queue.set_queue_state(request.queue_id, QueueState.PAUSED)
        self._tell_durability(call)
        return admin.PauseQueueResponse(queue=translate.queue(queue))

    async def ResumeQueue(self, request: admin.ResumeQueueRequest, call: Call) -> admin.ResumeQueueResponse:
        queue = await self._queue.set_queue_state(request.queue_id, QueueState.ACTIVE)
        self._tell_durability(call)
        return admin.ResumeQueueResponse(queue=translate.queue(queue))

    async def DrainQueue(self, request: admin.DrainQueueRequest, call: Call) -> admin.DrainQueueResponse:
        queue = await self._queue.set_queue_state(request.queue_id, QueueState.DRAINING)
        self._tell_durability(call)
        return admin.DrainQueueResponse(queue=translate.queue(queue))

    async def PurgeQueue(self, request: admin.PurgeQueueRequest, call: Call) -> admin.PurgeQueueResponse:
        count = await self._queue.purge(request.queue_id, include_finished=request.include_finished)
        self._tell_durability(call)
        return admin.PurgeQueueResponse(deleted_tasks=count)

    async def GetQueueStats(self, request: admin.GetQueueStatsRequest, call: Call) -> admin.GetQueueStatsResponse:
        reports = await self._queue.reports(request.queue_ids)
        now_ms = self._queue.now().wall_ms
        return admin.GetQueueStatsResponse(stats=[_stats(report, now_ms) for report in reports])

    async def RedriveTasks(self, request: admin.RedriveTasksRequest, call: Call) -> admin.RedriveTasksResponse:
        read = translate.Reader()
        selected = await self._queue.redrive(read.selection(request), read.violations)
        self._tell_durability(call)
        return admin.RedriveTasksResponse(
            count=selected.count, results=translate.task_results(request.task_ids, selected)
        )

    async def DeleteTasks(self, request: admin.DeleteTasksRequest, call: Call) -> admin.DeleteTasksResponse:
        read = translate.Reader()
        selected = await self._queue.delete(read.selection(request), read.violations)
        self._tell_durability(call)
        return admin.DeleteTasksResponse(
            count=selected.count, results=translate.task_results(request.task_ids, selected)
        )

    async def WatchEvents(self, request: admin.WatchEventsRequest, call: Call) -> None:
        read = translate.Reader()
        position = read.page(_RESUME, request.resume_token, "resume_token")
        limits.refuse("watch", [*read.violations, *(limits.queue_id(request.queue_id) if request.queue_id else ())])
        number = self._resume(position)
        await call.write(self._message(number, opened=admin.WatchOpened()))
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    events = await self._queue.events.after(number)
            except TimeoutError:
                await call.write(self._message(number, keep_alive=admin.WatchKeepAlive()))
                continue
            for event in events:
                number += 1
                if request.queue_id in ("", event.row.queue_id):
                    await call.write(self._message(number, task_event=_event(event)))

    async def GetCapabilities(self, request: admin.GetCapabilitiesRequest, call: Call) -> admin.GetCapabilitiesResponse:
        can = self._queue.engine.capabilities
        return admin.GetCapabilitiesResponse(
            engine=can.engine,
            durability=can.durability.value,  # type: ignore[arg-type] # numbered as in the contract
            many_coordinators=can.many_coordinators,
            max_batch_items=limits.MAX_BATCH,
            max_payload_bytes=limits.MAX_INLINE_BYTES,
            max_blob_bytes=self._max_blob_bytes,
            server_version=__version__,
            strict_queues=self._queue.strict_queues,
            drain_duration=wire.to_duration(self._queue.drain_ms),
        )

    def _tell_durability(self, call: Call) -> None:
        call.set_trailing_metadata("retinue-durability", self._queue.engine.capabilities.durability.name.lower())

    def _resume(self, position: tuple[str, int] | None) -> int:
        if position is None:
            return self._queue.events.last
        if position[0] != self._process:
            raise OutOfRange(
                "cannot go on watching: the server was restarted; list the tasks, then watch anew",
                reason=Reason.WATCH_TOKEN_EXPIRED,
            )
        return position[1]

    def _message(self, number: int, **event: object) -> admin.WatchEventsResponse:
        message = admin.WatchEventsResponse(**event)  # type: ignore[arg-type] # one field of the oneof
        message.resume_token = _RESUME.encode((self._process, number))
        return message


def _event(event: Event) -> admin.TaskEvent:
    return admin.TaskEvent(
        type=event.type.value,  # type: ignore[arg-type] # numbered as in the contract
        task_id=event.row.task_id,
        queue_id=event.row.queue_id,
        event_time=wire.to_timestamp(event.wall_ms),
        attempt=event.row.attempt,
        worker_id=event.row.worker_id,
    )


def _stats(report: QueueReport, now_ms: int) -> queue_pb2.QueueStats:
    counts = {state.name.lower(): report.counts.get(state, 0) for state in State}
    oldest = report.totals.oldest_ready_ms
    return queue_pb2.QueueStats(
        queue_id=report.queue.queue_id,
        **counts,
        oldest_ready_duration=wire.to_duration(max(0, now_ms - oldest) if oldest is not None else 0),
        workers=report.totals.workers,
        state=report.queue.state.value,  # type: ignore[arg-type] # numbered as in the contract
    )
