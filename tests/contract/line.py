"""One queue of one test, with the calls that most tests make."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar

from contract.client import Refused
from google.protobuf.duration_pb2 import Duration

from retinue.workqueue.v1 import task_pb2
from retinue.workqueue.v1 import workqueue_admin_service_pb2 as admin

if TYPE_CHECKING:
    from contract.client import Client, Stream

T = TypeVar("T")
WORKER = "worker-1"
LONG = 50.0
"""Seconds of a wait that what is waited for ends; it must not last so long."""
SOON = 15.0
"""Seconds: much less than LONG, and more than a machine stalls for."""


def seconds(value: float) -> Duration:
    """A duration, to the microsecond."""
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=value))
    return duration


def text(value: str) -> task_pb2.Payload:
    """A payload for people."""
    return task_pb2.Payload(text=value)


def in_time(call: Callable[[], T]) -> T:
    """What it gives; it is called again when the machine was too slow for the deadline that it sets."""
    for _ in range(20):
        try:
            return call()
        except Refused as error:
            if error.code != "DEADLINE_EXCEEDED":
                raise
    return call()


class Line:
    """A queue with a name of its own."""

    def __init__(self, app: Client, queue_id: str) -> None:
        self.app, self.id = app, queue_id

    def spec(self, **fields: Any) -> task_pb2.TaskSpec:
        """A task for this queue."""
        return task_pb2.TaskSpec(**{"queue_id": self.id} | fields)

    def put(self, **fields: Any) -> str:
        """Enqueues one task; its id."""
        [result] = self.app.EnqueueTasks(tasks=[self.spec(**fields)]).results
        assert not result.HasField("status"), result
        return str(result.task_id)

    def put_many(self, count: int, **fields: Any) -> list[str]:
        """Enqueues equal tasks; their ids."""
        results = self.app.EnqueueTasks(tasks=[self.spec(**fields) for _ in range(count)]).results
        assert not any(result.HasField("status") for result in results)
        return [result.task_id for result in results]

    def take(self, count: int = 1, wait: float = 0, **fields: Any) -> list[task_pb2.Lease]:
        """Leases up to so many tasks."""
        fields = {"worker_id": WORKER} | fields
        if wait:
            fields["wait_duration"] = seconds(wait)
        return list(self.app.LeaseTasks(queue_id=self.id, max_tasks=count, **fields).leases)

    def take_one(self, wait: float = LONG, **fields: Any) -> task_pb2.Lease:
        """Leases one task, waiting for it."""
        [lease] = self.take(1, wait, **fields)
        return lease

    def lend(self, **fields: Any) -> task_pb2.Lease:
        """Enqueues a task and leases it."""
        self.put(**fields)
        return self.take_one()

    def complete(self, lease: task_pb2.Lease, **fields: Any) -> Any:
        """Completes one lease; how that fared."""
        [result] = self.app.CompleteTasks(completions=[{"lease_token": lease.lease_token, **fields}]).results
        return result

    def fail(self, lease: task_pb2.Lease, **fields: Any) -> Any:
        """Fails one lease; how that fared."""
        [result] = self.app.FailTasks(failures=[{"lease_token": lease.lease_token, **fields}]).results
        return result

    def release(self, lease: task_pb2.Lease, **fields: Any) -> Any:
        """Gives one task back; how that fared."""
        [result] = self.app.ReleaseTasks(releases=[{"lease_token": lease.lease_token, **fields}]).results
        return result

    def extend(self, lease: task_pb2.Lease, **fields: Any) -> Any:
        """Extends one lease; how that fared."""
        [result] = self.app.ExtendLeases(extensions=[{"lease_token": lease.lease_token, **fields}]).results
        return result

    def get(self, task_id: str) -> task_pb2.Task:
        """The task."""
        task: task_pb2.Task = self.app.GetTask(task_id=task_id).task
        return task

    def state(self, task_id: str) -> str:
        """Where it stands, without the prefix."""
        return task_pb2.TaskState.Name(self.get(task_id).state).removeprefix("TASK_STATE_")

    def ended(self, task_id: str, wait: float = LONG) -> task_pb2.Task:
        """The task once it is in a terminal state."""
        task: task_pb2.Task = self.app.WaitTask(task_id=task_id, wait_duration=seconds(wait)).task
        return task

    def tasks(self, **wanted: Any) -> list[task_pb2.Task]:
        """The queue's tasks that match, newest first, at most 500."""
        filter_ = task_pb2.TaskFilter(queue_id=self.id, **wanted)
        return list(self.app.ListTasks(filter=filter_, page_size=500).tasks)

    def watch(self, **fields: Any) -> Watch:
        """The queue's events from now on."""
        return Watch(self.app.stream("WatchEvents", queue_id=self.id, **fields))


class Watch:
    """A watch that has begun; a context that ends it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        first = stream.read()
        assert first.HasField("opened"), first
        self.token: str = first.resume_token

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.cancel()

    def next(self) -> admin.TaskEvent:
        """The next event of a task; raises Refused."""
        for message in self._stream:
            self.token = message.resume_token
            if message.HasField("task_event"):
                event: admin.TaskEvent = message.task_event
                return event
        raise AssertionError("the watch ended with OK")

    def until(self, kind: str, task_id: str = "") -> admin.TaskEvent:
        """The next event of this kind, of this task if one is named."""
        while True:
            event = self.next()
            if name(event) == kind and task_id in ("", event.task_id):
                return event

    def names(self, count: int) -> list[str]:
        """The kinds of the next events."""
        return [name(self.next()) for _ in range(count)]


def name(event: admin.TaskEvent) -> str:
    """What happened, without the prefix."""
    return admin.TaskEventType.Name(event.type).removeprefix("TASK_EVENT_TYPE_")
