"""A queue, from the side of producers and of workers that lease by hand. `worker.py` has the loop for the
others.

    async with Queue("thumbnails") as queue:
        task = await queue.enqueue("cat.jpg", labels={"owner": "ada"})
        done = await queue.wait(task.task_id)
        print(await queue.load(done.result))

Times are seconds or `timedelta`, instants are aware `datetime`s. Calls that are safe to repeat are repeated
for up to `timeout` seconds while the server can't be reached; then they raise `Unavailable`. Everything
raises `RetinueError`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from retinue.client import errors, trace
from retinue.client import payload as payloads
from retinue.client.blobs import Blobs
from retinue.client.channel import DEFAULT_TIMEOUT, Connection
from retinue.client.coalesce import MAX_ITEMS, Coalescer, blocks
from retinue.workqueue.v1 import task_pb2 as pb
from retinue.workqueue.v1 import workqueue_service_pb2 as api
from retinue.workqueue.v1 import workqueue_service_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from retinue.client.payload import Content

Seconds: TypeAlias = float | timedelta
Token: TypeAlias = pb.Lease | bytes
"""A lease, or its token."""

TERMINAL = frozenset({pb.TASK_STATE_SUCCEEDED, pb.TASK_STATE_DEAD, pb.TASK_STATE_CANCELLED, pb.TASK_STATE_EXPIRED})
_LONGEST_POLL = 60.0
_MAX_REASON, _MAX_MESSAGE = 128, 4096


class Enqueued(NamedTuple):
    """A task that was taken, or was there already under the same idempotency key."""

    task_id: str
    existing: bool


class Extension(NamedTuple):
    """How long a lease lasts from now, in seconds, and whether its task was asked to stop."""

    lease_duration: float
    cancel_requested: bool


class Queue:
    """One queue on one server. Cheap; a connection given by the caller is shared and stays open."""

    def __init__(
        self,
        queue_id: str,
        *,
        address: str | None = None,
        connection: Connection | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        patient: bool = True,
    ) -> None:
        self.queue_id = queue_id
        self.timeout = timeout
        self._owned = connection is None
        self.connection = connection or Connection(address, patient=patient)
        self.blobs = Blobs(self.connection)
        self._outbox: Coalescer[pb.TaskSpec, Enqueued] = Coalescer(self._enqueue_block, pb.TaskSpec.ByteSize)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Waits for enqueues under way, then closes the connection if this queue opened it. Safe to
        repeat.
        """
        await self._outbox.idle()
        if self._owned:
            await self.connection.close()

    @property
    def _stub(self) -> rpc.WorkQueueServiceAsyncStub:
        return rpc.WorkQueueServiceStub(self.connection.channel)

    # Payloads

    async def store(self, content: Content, content_type: str = "") -> pb.Payload:
        """The payload of a value, uploaded if it is over 256 KiB."""
        inline = payloads.payload(content, content_type)
        if payloads.size(inline) <= payloads.INLINE_BYTES:
            return inline
        blob = await self.blobs.put(payloads.raw(inline))
        return pb.Payload(blob=blob, content_type=payloads.blob_content_type(inline))

    async def load(self, content: pb.Payload) -> Any:
        """The Python value of a payload, read from the blob store if it is there; None if it is empty."""
        if content.WhichOneof("content") != "blob":
            return payloads.value(content)
        return payloads.typed(await self.blobs.get(content.blob.blob_id), content.content_type)

    # Producers

    async def spec(
        self,
        content: Content = None,
        *,
        content_type: str = "",
        task_id: str = "",
        task_type: str = "",
        priority: int = 0,
        delay: Seconds | None = None,
        at: datetime | None = None,
        expire_after: Seconds | None = None,
        expire_at: datetime | None = None,
        labels: Mapping[str, str] | None = None,
        key: str = "",
        conflict: pb.ConflictPolicy.ValueType = pb.CONFLICT_POLICY_UNSPECIFIED,
        retry: pb.RetryPolicy | None = None,
        attempt_duration: Seconds | None = None,
        queue_id: str = "",
    ) -> pb.TaskSpec:
        """A task for enqueue_many() or as a follow-up; uploads the content if it is large. `key` =
        idempotency key.
        """
        return pb.TaskSpec(
            queue_id=queue_id or self.queue_id,
            task_id=task_id,
            task_type=task_type,
            priority=priority,
            idempotency_key=key,
            conflict_policy=conflict,
            traceparent=trace.outgoing(),
            schedule_time=timestamp(at),
            delay_duration=duration(delay),
            expire_time=timestamp(expire_at),
            expire_duration=duration(expire_after),
            labels=labels,
            retry_policy=retry,
            attempt_duration=duration(attempt_duration),
            input=await self.store(content, content_type),
        )

    async def enqueue(self, content: Content = None, **options: Any) -> Enqueued:
        """Enqueues one task, with the options of spec(); it is durable when this returns.

        Callers that await in the same turn of the loop share one call. Repeated while the server can't be
        reached, but never enqueued twice. Raises DeadlineExceeded after `timeout` seconds, also if other
        callers' calls were in the way all the while.
        """
        return await self._outbox.submit(await self.spec(content, **options), self.timeout)

    async def enqueue_many(self, tasks: Iterable[pb.TaskSpec], *, atomic: bool = False) -> list[Enqueued | Exception]:
        """Enqueues tasks in blocks, item by item: the answer has the error where a task was refused.

        With `atomic` all are taken or the call raises: at most 1,000 and 3 MiB.
        """
        parts = list(blocks(tasks, pb.TaskSpec.ByteSize))
        if atomic and len(parts) > 1:
            raise ValueError("cannot enqueue atomically: more than 1,000 tasks or 3 MiB; drop atomic or send less")
        return [answer for part in parts for answer in await self._enqueue_block(part, self.timeout, atomic=atomic)]

    async def _enqueue_block(
        self,
        tasks: list[pb.TaskSpec],
        timeout: float,  # noqa: ASYNC109 - gRPC sends it along
        *,
        atomic: bool = False,
    ) -> Sequence[Enqueued | Exception]:
        request = api.EnqueueTasksRequest(tasks=tasks, atomic=atomic, request_id=_request_id())
        response = await self.connection.call(self._stub.EnqueueTasks, request, timeout=timeout)
        return [_enqueued(result) for result in response.results]

    async def get(self, task_id: str) -> pb.Task:
        """One task with input and result. Raises NotFound."""
        request = api.GetTaskRequest(task_id=task_id)
        return (await self.connection.call(self._stub.GetTask, request, timeout=self.timeout)).task

    async def list(
        self,
        *,
        states: Iterable[pb.TaskState.ValueType] = (),
        labels: Mapping[str, str] | None = None,
        task_type: str = "",
        parent_task_id: str = "",
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        page_size: int = 0,
    ) -> AsyncIterator[pb.Task]:
        """The queue's tasks that match, newest first, page by page, without inputs and results."""
        chosen = task_filter(
            self.queue_id,
            states=states,
            labels=labels,
            task_type=task_type,
            parent_task_id=parent_task_id,
            created_after=created_after,
            created_before=created_before,
        )
        token = ""
        while True:
            request = api.ListTasksRequest(filter=chosen, page_size=page_size, page_token=token)
            page = await self.connection.call(self._stub.ListTasks, request, timeout=self.timeout)
            for task in page.tasks:
                yield task
            if not (token := page.next_page_token):
                return

    async def wait(self, task_id: str, *, timeout: float | None = None) -> pb.Task:  # noqa: ASYNC109 - polls need the number
        """A task as soon as it is in a terminal state, or as it stands after `timeout` seconds (None =
        however long).
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout if timeout is not None else float("inf")
        while True:
            poll = max(min(end - loop.time(), _LONGEST_POLL), 0)
            request = api.WaitTaskRequest(task_id=task_id, wait_duration=duration(poll))
            task = (await self.connection.call(self._stub.WaitTask, request, timeout=poll + self.timeout)).task
            if task.state in TERMINAL or loop.time() >= end:
                return task

    async def cancel(self, *task_ids: str) -> Sequence[errors.RetinueError | None]:
        """Cancels tasks, or asks their workers to stop; the error for each that was refused, in order."""
        found: list[errors.RetinueError | None] = []
        for start in range(0, len(task_ids), MAX_ITEMS):
            request = api.CancelTasksRequest(task_ids=task_ids[start : start + MAX_ITEMS])
            response = await self.connection.call(self._stub.CancelTasks, request, timeout=self.timeout)
            found += [_refused(result) for result in response.results]
        return found

    async def cancel_matching(
        self,
        *,
        states: Iterable[pb.TaskState.ValueType] = (),
        labels: Mapping[str, str] | None = None,
        task_type: str = "",
        max_count: int = 0,
        dry_run: bool = False,
    ) -> int:
        """Cancels the queue's unfinished tasks that match, oldest first; how many. 0 for `max_count` =
        1,000.
        """
        chosen = task_filter(self.queue_id, states=states, labels=labels, task_type=task_type)
        request = api.CancelTasksRequest(filter=chosen, max_count=max_count, dry_run=dry_run)
        return (await self.connection.call(self._stub.CancelTasks, request, timeout=self.timeout)).count

    async def reschedule(
        self,
        task_id: str,
        *,
        at: datetime | None = None,
        delay: Seconds | None = None,
        priority: int | None = None,
    ) -> pb.Task:
        """Gives a task that waits another time or priority; what is None stays."""
        request = api.RescheduleTaskRequest(
            task_id=task_id, schedule_time=timestamp(at), delay_duration=duration(delay), priority=priority
        )
        return (await self.connection.call(self._stub.RescheduleTask, request, timeout=self.timeout)).task

    # Workers

    async def lease(
        self,
        worker_id: str,
        *,
        max_tasks: int = 1,
        wait: Seconds = 0,
        lease_duration: Seconds | None = None,
    ) -> Sequence[pb.Lease]:
        """Leases up to `max_tasks`; waits up to `wait` (60 s at most) for the first. Empty when there was
        none.
        """
        poll = duration(wait)
        request = api.LeaseTasksRequest(
            queue_id=self.queue_id,
            worker_id=worker_id,
            max_tasks=max_tasks,
            wait_duration=poll,
            lease_duration=duration(lease_duration),
            request_id=_request_id(),
        )
        seconds = _seconds(wait) + self.timeout
        return list((await self.connection.call(self._stub.LeaseTasks, request, timeout=seconds)).leases)

    async def complete(
        self, lease: Token, result: Content = None, *, follow_ups: Iterable[pb.TaskSpec] = ()
    ) -> Sequence[str]:
        """Ends a lease with success, follow-ups enqueued in the same commit; their ids. Raises LeaseLost."""
        done = completion(lease, await self.store(result), follow_ups)
        request = api.CompleteTasksRequest(completions=[done])
        response = await self.connection.call(self._stub.CompleteTasks, request, timeout=self.timeout)
        _raise_if_refused(response.results[0])
        return list(response.results[0].follow_up_task_ids)

    async def fail(
        self,
        lease: Token,
        reason: str,
        message: str = "",
        *,
        final: bool = False,
        retry_delay: Seconds | None = None,
    ) -> pb.TaskState.ValueType:
        """Ends a lease with failure; what became of the task: RETRYING, DEAD or CANCELLED. Raises
        LeaseLost.
        """
        request = api.FailTasksRequest(failures=[failure(lease, reason, message, final=final, retry_delay=retry_delay)])
        response = await self.connection.call(self._stub.FailTasks, request, timeout=self.timeout)
        _raise_if_refused(response.results[0])
        return response.results[0].state

    async def release(self, lease: Token, *, delay: Seconds | None = None) -> None:
        """Gives a task back unworked; the attempt is not counted. Raises LeaseLost."""
        request = api.ReleaseTasksRequest(releases=[release(lease, delay)])
        response = await self.connection.call(self._stub.ReleaseTasks, request, timeout=self.timeout)
        _raise_if_refused(response.results[0])

    async def extend(self, lease: Token, lease_duration: Seconds | None = None) -> Extension:
        """Makes a lease last longer, counted from now; None = as it was granted. Raises LeaseLost."""
        item = api.Extension(lease_token=token_of(lease), lease_duration=duration(lease_duration))
        request = api.ExtendLeasesRequest(extensions=[item])
        response = await self.connection.call(self._stub.ExtendLeases, request, timeout=self.timeout)
        result = response.results[0]
        _raise_if_refused(result)
        return Extension(result.lease_duration.ToTimedelta().total_seconds(), result.cancel_requested)


def token_of(lease: Token) -> bytes:
    return lease if isinstance(lease, bytes) else lease.lease_token


def completion(lease: Token, result: pb.Payload | None, follow_ups: Iterable[pb.TaskSpec] = ()) -> api.Completion:
    return api.Completion(lease_token=token_of(lease), result=result, follow_ups=follow_ups)


def failure(
    lease: Token, reason: str, message: str = "", *, final: bool = False, retry_delay: Seconds | None = None
) -> api.TaskFailure:
    """A failed attempt; reason and message are cut to what the contract takes."""
    return api.TaskFailure(
        lease_token=token_of(lease),
        failure=pb.Failure(reason=reason[:_MAX_REASON], message=message[-_MAX_MESSAGE:]),
        final=final,
        retry_delay_duration=duration(retry_delay),
    )


def release(lease: Token, delay: Seconds | None = None) -> api.Release:
    return api.Release(lease_token=token_of(lease), delay_duration=duration(delay))


def task_filter(
    queue_id: str,
    *,
    states: Iterable[pb.TaskState.ValueType] = (),
    labels: Mapping[str, str] | None = None,
    task_type: str = "",
    parent_task_id: str = "",
    created_after: datetime | None = None,
    created_before: datetime | None = None,
) -> pb.TaskFilter:
    return pb.TaskFilter(
        queue_id=queue_id,
        states=states,
        labels=labels,
        task_type=task_type,
        parent_task_id=parent_task_id,
        created_after_time=timestamp(created_after),
        created_before_time=timestamp(created_before),
    )


def duration(value: Seconds | None) -> Duration | None:
    """Seconds for the wire, to the microsecond."""
    if value is None:
        return None
    found = Duration()
    found.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
    return found


def timestamp(value: datetime | None) -> Timestamp | None:
    """An instant for the wire. Raises ValueError without a time zone, rather than guess one."""
    if value is None:
        return None
    if value.tzinfo is None:
        raise ValueError("cannot send a time without a zone: give datetime(..., tzinfo=UTC) or .astimezone()")
    found = Timestamp()
    found.FromDatetime(value.astimezone(UTC))
    return found


def _seconds(value: Seconds) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else value


def _enqueued(result: api.EnqueueResult) -> Enqueued | Exception:
    if result.status.code:
        error = errors.from_item_status(result.status)
        error.metadata["task_id"] = result.task_id
        return error
    return Enqueued(result.task_id, result.existing)


def _refused(result: Any) -> errors.RetinueError | None:
    return errors.from_item_status(result.status) if result.status.code else None


def _raise_if_refused(result: Any) -> None:
    if error := _refused(result):
        raise error


def _request_id() -> str:
    """A name that no other call has. It begins with the time: what a server remembers of calls then grows at one end
    of its index, not all over it.
    """
    return f"{time.time_ns():016x}{secrets.token_hex(8)}"
