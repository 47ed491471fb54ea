"""Between the contract's messages and the core's records. What is malformed is named in `violations`, never guessed."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from retinue.workqueue.v1 import queue_pb2, task_pb2
from retinue.workqueue.v1 import workqueue_service_pb2 as wq
from retinue_server.runtime import wire
from retinue_server.runtime.errors import InvalidArgument, RetinueError, Violation
from retinue_server.workqueue.core.limits import MAX_INLINE_BYTES
from retinue_server.workqueue.core.requests import (
    Complete,
    Extend,
    Fail,
    LeaseRef,
    NewTask,
    Release,
    Selection,
    SettingsPatch,
)
from retinue_server.workqueue.engine import (
    Failure,
    QueueRow,
    RetryOverrides,
    State,
    Task,
    TaskBody,
    TaskFilter,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf import struct_pb2
    from google.protobuf.message import Message

    from retinue_server.workqueue.core import steps

T = TypeVar("T")

_NO_LEASE = LeaseRef(0, 0, 0)
_CONTENT_TYPE, _TRACEPARENT = 128, 64
"""How many characters they have at most."""


class Reader:
    """Reads the fields of one request and gathers what is wrong with them."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def duration(self, message: Message, field: str, at: str = "") -> int | None:
        """Milliseconds; None if unset."""
        if not message.HasField(field):
            return None
        return wire.duration_ms(getattr(message, field), _path(at, field), self.violations)

    def timestamp(self, message: Message, field: str, at: str = "") -> int | None:
        """Milliseconds since the epoch; None if unset."""
        if not message.HasField(field):
            return None
        return wire.timestamp_ms(getattr(message, field), _path(at, field), self.violations)

    def enum(self, value: int, known: object, field: str) -> None:
        """Refuses a number that the enum does not know."""
        if value not in known.values():  # type: ignore[attr-defined] # generated enum wrappers share no public type
            self.violations.append(Violation(field, f"{value} is not a value of this enum"))

    def page(self, tokens: wire.PageTokens[T], token: str, field: str = "page_token") -> T | None:
        """The position in a token; None for the first page."""
        try:
            return tokens.decode(token, field)
        except InvalidArgument as error:
            self.violations += error.violations
            return None

    def lease(self, token: bytes, at: str) -> LeaseRef:
        """The lease behind a token."""
        ref = LeaseRef.parse(token)
        if ref is None:
            self.violations.append(Violation(f"{at}lease_token", "must be a token that a lease came with"))
        return ref or _NO_LEASE

    def tasks(self, specs: Sequence[task_pb2.TaskSpec], at: str, traceparent: str) -> tuple[NewTask, ...]:
        """Tasks as producers describe them."""
        return tuple(
            [_plain(spec, traceparent) or self._task(spec, f"{at}[{i}]", traceparent) for i, spec in enumerate(specs)]
        )

    def _task(self, spec: task_pb2.TaskSpec, at: str, traceparent: str) -> NewTask:
        if spec.conflict_policy:
            self.enum(spec.conflict_policy, task_pb2.ConflictPolicy, f"{at}.conflict_policy")
        content = spec.input
        return NewTask(
            queue_id=spec.queue_id,
            body=TaskBody(
                input=_payload_bytes(content),
                task_type=spec.task_type,
                labels=dict(spec.labels) if spec.labels else {},
                retry=self.retry(spec.retry_policy, f"{at}.retry_policy") if spec.HasField("retry_policy") else None,
                traceparent=spec.traceparent or traceparent,
                input_blob=content.blob.blob_id if content.HasField("blob") else "",
            ),
            task_id=spec.task_id,
            priority=spec.priority,
            start_ms=self.timestamp(spec, "schedule_time", at),
            delay_ms=self.duration(spec, "delay_duration", at),
            expire_ms=self.timestamp(spec, "expire_time", at),
            expire_delay_ms=self.duration(spec, "expire_duration", at),
            attempt_ms=self.duration(spec, "attempt_duration", at),
            idempotency_key=spec.idempotency_key,
            reject_conflict=spec.conflict_policy == task_pb2.CONFLICT_POLICY_REJECT,
            inline_bytes=self.payload(content, f"{at}.input"),
        )

    def payload(self, payload: task_pb2.Payload, at: str) -> int:
        """The size of the inline content."""
        if len(payload.content_type) > _CONTENT_TYPE:
            self.violations.append(Violation(f"{at}.content_type", "must be at most 128 characters"))
        kind = payload.WhichOneof("content")
        if kind == "blob" and not payload.blob.blob_id:
            self.violations.append(Violation(f"{at}.blob.blob_id", "is required"))
        if kind == "json":
            if not _is_finite(payload.json):
                self.violations.append(Violation(f"{at}.json", "numbers must be finite: JSON has no others"))
            return payload.json.ByteSize()
        return len(payload.data) if kind == "data" else len(payload.text.encode())

    def retry(self, policy: task_pb2.RetryPolicy, at: str) -> RetryOverrides:
        """A policy; 0 and unset mean the queue's."""
        return RetryOverrides(
            policy.max_attempts or None,
            self.duration(policy, "initial_backoff_duration", at),
            self.duration(policy, "max_backoff_duration", at),
            policy.backoff_multiplier or None,
        )

    def settings(self, settings: queue_pb2.QueueSettings) -> SettingsPatch:
        """The settings that are named."""
        at = "settings"
        named_retry = settings.HasField("retry_policy")
        return SettingsPatch(
            lease_ms=self.duration(settings, "lease_duration", at),
            attempt_ms=self.duration(settings, "attempt_duration", at),
            retry=self.retry(settings.retry_policy, f"{at}.retry_policy") if named_retry else None,
            max_lease_expirations=settings.max_lease_expirations or None,
            retention_ms=self.duration(settings, "retention_duration", at),
            dead_retention_ms=self.duration(settings, "dead_retention_duration", at),
            max_tasks=settings.max_tasks if settings.HasField("max_tasks") else None,
        )

    def filter(self, wanted: task_pb2.TaskFilter) -> TaskFilter:
        """A filter."""
        for index, state in enumerate(wanted.states):
            if state not in State._value2member_map_:
                self.violations.append(Violation(f"filter.states[{index}]", f"{state} is not a task's state"))
        return TaskFilter(
            queue_id=wanted.queue_id,
            states=tuple(State(s) for s in wanted.states if s in State._value2member_map_),
            labels=dict(wanted.labels),
            task_type=wanted.task_type,
            created_after_ms=self.timestamp(wanted, "created_after_time", "filter"),
            created_before_ms=self.timestamp(wanted, "created_before_time", "filter"),
            parent_task_id=wanted.parent_task_id,
        )

    def selection(self, request: Any) -> Selection:
        """Tasks by id or by filter; the three bulk requests have the same fields."""
        wanted = self.filter(request.filter) if request.HasField("filter") else None
        return Selection(tuple(request.task_ids), wanted, request.max_count or 1_000, request.dry_run)

    def completions(self, items: Sequence[wq.Completion], traceparent: str) -> list[Complete]:
        """Successes."""
        return [self._completion(item, index, traceparent) for index, item in enumerate(items)]

    def _completion(self, item: wq.Completion, index: int, traceparent: str) -> Complete:
        lease = LeaseRef.parse(item.lease_token)
        if lease is not None and not item.follow_ups and not item.HasField("result"):
            return Complete(lease)
        at, result = f"completions[{index}]", item.result
        return Complete(
            lease or self.lease(item.lease_token, f"{at}."),
            _payload_bytes(result),
            result.blob.blob_id,
            self.tasks(item.follow_ups, f"{at}.follow_ups", traceparent),
            self.payload(result, f"{at}.result"),
        )

    def failure(self, item: wq.TaskFailure, at: str) -> Fail:
        """A failure."""
        return Fail(
            self.lease(item.lease_token, f"{at}."),
            Failure(item.failure.reason, item.failure.message),
            item.final,
            self.duration(item, "retry_delay_duration", at),
        )

    def release(self, item: wq.Release, at: str) -> Release:
        """A task given back."""
        return Release(self.lease(item.lease_token, f"{at}."), self.duration(item, "delay_duration", at) or 0)

    def extension(self, item: wq.Extension, at: str) -> Extend:
        """A lease that shall last longer."""
        return Extend(self.lease(item.lease_token, f"{at}."), self.duration(item, "lease_duration", at))


_QUEUE_ID, _INPUT = (task_pb2.TaskSpec.DESCRIPTOR.fields_by_name[name] for name in ("queue_id", "input"))


def _plain(spec: task_pb2.TaskSpec, traceparent: str) -> NewTask | None:
    """A task that says nothing beside queue and inline payload; None for others. One look instead of one per field."""
    said = spec.ListFields()
    if len(said) != 2 or said[0][0] is not _QUEUE_ID or said[1][0] is not _INPUT or len(traceparent) > _TRACEPARENT:  # noqa: PLR2004 - these two
        return None
    content = spec.input
    given = content.SerializeToString()
    if len(given) > MAX_INLINE_BYTES or content.WhichOneof("content") not in ("data", "text"):
        return None
    if len(content.content_type) > _CONTENT_TYPE:
        return None
    return NewTask(spec.queue_id, TaskBody(given, traceparent=traceparent), inline_bytes=len(given), plain=True)


def _path(at: str, field: str) -> str:
    return f"{at}.{field}" if at else field


def _is_finite(value: struct_pb2.Value) -> bool:
    """Whether it can be shown as JSON: protobuf takes any number, and every reader in JSON would fail."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return all(_is_finite(inner) for inner in value.struct_value.fields.values())
    if kind == "list_value":
        return all(_is_finite(inner) for inner in value.list_value.values)
    return kind != "number_value" or math.isfinite(value.number_value)


def _payload_bytes(payload: task_pb2.Payload) -> bytes:
    return payload.SerializeToString(deterministic=True)


def status(error: RetinueError | None) -> task_pb2.ItemStatus | None:
    """How an item went; None = OK."""
    if error is None:
        return None
    return task_pb2.ItemStatus(code=int(error.code), reason=error.reason.value, message=error.message)


def lease(granted: steps.Granted) -> task_pb2.Lease:
    """A task in a worker's hands."""
    row, body = granted.task
    message = task_pb2.Lease(
        lease_token=LeaseRef.of(row).token(),
        task_id=row.task_id,
        queue_id=row.queue_id,
        attempt=row.attempt,
        lease_epoch=row.lease_epoch,
        task_type=body.task_type,
        traceparent=body.traceparent,
        max_attempts=granted.max_attempts,
    )
    message.lease_duration.CopyFrom(_duration(granted.lease_left_ms))
    if body.input:
        message.input.MergeFromString(body.input)
    if granted.attempt_left_ms is not None:
        message.attempt_duration.CopyFrom(_duration(granted.attempt_left_ms))
    if body.labels:
        message.labels.update(body.labels)
    return message


_duration = lru_cache(1024)(wire.to_duration)
"""Most leases of a moment last equally long. For copying only: all who ask get the same message."""


def task(whole: Task) -> task_pb2.Task:
    """A task with its bookkeeping."""
    row, body = whole
    message = task_pb2.Task(
        task_id=row.task_id,
        queue_id=row.queue_id,
        state=row.state.value,  # type: ignore[arg-type] # numbered as in the contract
        spec=_spec(whole),
        attempt=row.attempt,
        lease_expirations=row.lease_expirations,
        lease_epoch=row.lease_epoch,
        result=task_pb2.Payload.FromString(body.result) if body.result else None,
        last_failure=_failure(body.failure) if body.failure else None,
        worker_id=row.worker_id,
        cancel_requested=row.cancel_requested,
        parent_task_id=row.parent_task_id,
    )
    times = {
        "create_time": row.create_ms,
        "ready_time": row.ready_ms,
        "start_time": row.start_ms,
        "end_time": row.end_ms,
    }
    for field, value in times.items():
        if value is not None:
            getattr(message, field).CopyFrom(wire.to_timestamp(value))
    return message


def _spec(whole: Task) -> task_pb2.TaskSpec:
    row, body = whole
    return task_pb2.TaskSpec(
        task_id=row.task_id,
        queue_id=row.queue_id,
        input=task_pb2.Payload.FromString(body.input) if body.input else None,
        priority=row.priority,
        expire_time=wire.to_timestamp(row.expire_ms) if row.expire_ms is not None else None,
        labels=body.labels,
        idempotency_key=row.idempotency_key,
        task_type=body.task_type,
        retry_policy=_retry(body.retry) if body.retry else None,
        attempt_duration=wire.to_duration(row.attempt_ms) if row.attempt_ms is not None else None,
        traceparent=body.traceparent,
    )


def _retry(policy: RetryOverrides) -> task_pb2.RetryPolicy:
    initial, longest = policy.initial_backoff_ms, policy.max_backoff_ms
    return task_pb2.RetryPolicy(
        max_attempts=policy.max_attempts or 0,
        initial_backoff_duration=wire.to_duration(initial) if initial is not None else None,
        max_backoff_duration=wire.to_duration(longest) if longest is not None else None,
        backoff_multiplier=policy.multiplier or 0,
    )


def _failure(failure: Failure) -> task_pb2.Failure:
    return task_pb2.Failure(
        reason=failure.reason,
        message=failure.message,
        record_time=wire.to_timestamp(failure.record_ms),
        attempt=failure.attempt,
    )


def queue(row: QueueRow) -> queue_pb2.Queue:
    """A queue."""
    said = row.settings
    return queue_pb2.Queue(
        queue_id=row.queue_id,
        state=row.state.value,  # type: ignore[arg-type] # numbered as in the contract
        settings=queue_pb2.QueueSettings(
            lease_duration=wire.to_duration(said.lease_ms),
            attempt_duration=wire.to_duration(said.attempt_ms),
            retry_policy=_retry(
                RetryOverrides(
                    said.retry.max_attempts,
                    said.retry.initial_backoff_ms,
                    said.retry.max_backoff_ms,
                    said.retry.multiplier,
                )
            ),
            max_lease_expirations=said.max_lease_expirations,
            retention_duration=wire.to_duration(said.retention_ms),
            dead_retention_duration=wire.to_duration(said.dead_retention_ms),
            max_tasks=said.max_tasks,
        ),
        create_time=wire.to_timestamp(row.create_ms),
    )


def digest(message: Message) -> bytes:
    """By which the same message is known again: 32 bytes."""
    import hashlib  # noqa: PLC0415 - loads slowly, and only callers who repeat themselves need it

    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()


def task_results(task_ids: Sequence[str], selected: steps.Selected) -> list[wq.TaskResult]:
    """How each named task fared."""
    return [wq.TaskResult(task_id=task_id, status=status(selected.errors.get(task_id))) for task_id in task_ids]
