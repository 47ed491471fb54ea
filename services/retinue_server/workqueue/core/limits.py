"""What a request may hold. Every violation is named by its path in the contract."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from retinue_server.runtime.errors import InvalidArgument, Reason, ResourceExhausted, RetinueError, Violation
from retinue_server.workqueue.core.requests import Complete, Fail, Release

if TYPE_CHECKING:
    from retinue_server.workqueue.core.requests import (
        Enqueue,
        Extend,
        LeaseAsk,
        NewTask,
        Reschedule,
        Selection,
        SettingsPatch,
        Settlement,
    )
    from retinue_server.workqueue.engine import RetryOverrides, TaskFilter

MAX_BATCH = 1_000
MAX_FOLLOW_UPS = 100
MAX_SELECTED = 10_000
MAX_INLINE_BYTES = 256 * 1024
MAX_CREDIT = 10_000
MAX_OUTSTANDING = 100_000
MAX_PAGE = 500
DEFAULT_PAGE = 50
MAX_WAIT_MS = 60_000
REPLY_MARGIN_MS = 200
MAX_LABELS = 16
MAX_MULTIPLIER = 100

SECOND_MS = 1_000
DAY_MS = 86_400 * SECOND_MS
MAX_AHEAD_MS = 3_653 * DAY_MS
MIN_LEASE_MS = SECOND_MS
MAX_LEASE_MS = DAY_MS // 2
MIN_ATTEMPT_MS = 100
MAX_DELAY_MS = 30 * DAY_MS

_QUEUE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TASK_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
_LABEL_KEY = re.compile(r"[A-Za-z0-9._/-]{1,64}")
_BLOB_ID = re.compile(r"[0-9a-f]{64}")

Violations = Iterator[Violation]


def refuse(what: str, violations: Sequence[Violation]) -> None:
    """Raises InvalidArgument if there is any violation."""
    if violations:
        fields = ", ".join(sorted({v.field for v in violations})[:5])
        raise InvalidArgument(f"cannot {what}: see the violations of {fields}", list(violations))


def queue_id(value: str, field: str = "queue_id") -> Violations:
    """A queue's name."""
    if not _QUEUE_ID.fullmatch(value):
        yield Violation(field, "must be 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit")


def task_id(value: str, field: str = "task_id") -> Violations:
    """A task's name."""
    if not _TASK_ID.fullmatch(value):
        yield Violation(field, "must be 1 to 128 of A-Z a-z 0-9 . _ : / -")


def blob_id(value: str, field: str = "blob_id") -> Violations:
    """A blob's name."""
    if not _BLOB_ID.fullmatch(value):
        yield Violation(field, "must be a SHA-256 in 64 lower-case hexadecimal digits")


def within(value: float | None, low: float, high: float, field: str, unit: str = "") -> Violations:
    """A number in [low, high]; None passes."""
    if value is not None and not low <= value <= high:
        yield Violation(field, f"must be from {low:g} to {high:g}{unit and ' ' + unit}")


def duration(value_ms: int | None, low_ms: int, high_ms: int, field: str) -> Violations:
    """A duration in [low, high]; None passes."""
    if value_ms is not None and not low_ms <= value_ms <= high_ms:
        yield Violation(field, f"must be from {low_ms / 1000:g} s to {high_ms / 1000:g} s")


def text(value: str, longest: int, field: str, *, required: bool = False) -> Violations:
    """A string of at most `longest` characters."""
    if len(value) > longest:
        yield Violation(field, f"must be at most {longest} characters; it has {len(value)}")
    if required and not value:
        yield Violation(field, "is required")


def batch(count: int, field: str, most: int = MAX_BATCH) -> Violations:
    """The size of a batch."""
    if not 1 <= count <= most:
        yield Violation(field, f"must hold 1 to {most} items; it holds {count}")


def enqueue(asked: Enqueue, now_ms: int) -> Violations:
    """A producer's batch."""
    yield from batch(len(asked.tasks), "tasks")
    yield from text(asked.request_id, 128, "request_id")
    passed = ""
    for index, task in enumerate(asked.tasks[:MAX_BATCH]):
        if task.plain and task.queue_id == passed:
            continue
        yield from new_task(task, f"tasks[{index}]", now_ms)
        passed = task.queue_id if _QUEUE_ID.fullmatch(task.queue_id) else ""


def new_task(task: NewTask, at: str, now_ms: int) -> Violations:  # noqa: C901 - one look per field, all alike
    """A task as a producer describes it. What it does not say needs no look: most tasks say little."""
    body = task.body
    yield from queue_id(task.queue_id, f"{at}.queue_id")
    if body.traceparent:
        yield from text(body.traceparent, 64, f"{at}.traceparent")
    if task.task_id:
        yield from task_id(task.task_id, f"{at}.task_id")
    if task.priority:
        yield from within(task.priority, -1000, 1000, f"{at}.priority")
    if task.start_ms is not None or task.delay_ms is not None:
        yield from _start(task.start_ms, task.delay_ms, now_ms, at)
    if task.expire_ms is not None or task.expire_delay_ms is not None:
        yield from _expiry(task, now_ms, at)
    if body.labels:
        yield from _labels(task, f"{at}.labels")
    if task.idempotency_key:
        yield from text(task.idempotency_key, 256, f"{at}.idempotency_key")
    if body.task_type:
        yield from text(body.task_type, 128, f"{at}.task_type")
    if task.attempt_ms is not None:
        yield from duration(task.attempt_ms, MIN_ATTEMPT_MS, MAX_DELAY_MS, f"{at}.attempt_duration")
    if body.retry is not None:
        yield from retry(body.retry, f"{at}.retry_policy")
    if body.input_blob:
        yield from blob_id(body.input_blob, f"{at}.input.blob.blob_id")


def payload_error(inline_bytes: int) -> RetinueError | None:
    """Over the inline limit is a refusal of the item, not of the batch: trying again won't help."""
    if inline_bytes <= MAX_INLINE_BYTES:
        return None
    return ResourceExhausted(
        f"cannot take an inline payload of {inline_bytes} bytes: the limit is {MAX_INLINE_BYTES}; upload it as a blob",
        reason=Reason.PAYLOAD_TOO_LARGE,
        limit=MAX_INLINE_BYTES,
    )


def retry(policy: RetryOverrides | None, at: str) -> Violations:
    """A retry policy, whole or in part."""
    if policy is None:
        return
    yield from within(policy.max_attempts, 1, 1000, f"{at}.max_attempts")
    yield from duration(policy.initial_backoff_ms, 0, 7 * DAY_MS, f"{at}.initial_backoff_duration")
    yield from duration(policy.max_backoff_ms, 0, MAX_DELAY_MS, f"{at}.max_backoff_duration")
    if policy.multiplier is not None and not (
        math.isfinite(policy.multiplier) and 1 <= policy.multiplier <= MAX_MULTIPLIER
    ):
        yield Violation(f"{at}.backoff_multiplier", "must be from 1 to 100")


def settings(patch: SettingsPatch, at: str = "settings") -> Violations:
    """A queue's settings, whole or in part."""
    yield from duration(patch.lease_ms, MIN_LEASE_MS, MAX_LEASE_MS, f"{at}.lease_duration")
    if patch.attempt_ms:
        yield from duration(patch.attempt_ms, MIN_ATTEMPT_MS, MAX_DELAY_MS, f"{at}.attempt_duration")
    yield from retry(patch.retry, f"{at}.retry_policy")
    yield from within(patch.max_lease_expirations, 1, 1000, f"{at}.max_lease_expirations")
    yield from duration(patch.retention_ms, 0, 365 * DAY_MS, f"{at}.retention_duration")
    yield from duration(patch.dead_retention_ms, 0, 365 * DAY_MS, f"{at}.dead_retention_duration")
    yield from within(patch.max_tasks, 0, 1 << 62, f"{at}.max_tasks")


def lease(asked: LeaseAsk, at: str = "") -> Violations:
    """A worker's request for tasks."""
    yield from queue_id(asked.queue_id, f"{at}queue_id")
    yield from text(asked.worker_id, 128, f"{at}worker_id", required=True)
    yield from within(asked.max_tasks, 1, MAX_BATCH, f"{at}max_tasks")
    yield from duration(asked.lease_ms, MIN_LEASE_MS, MAX_LEASE_MS, f"{at}lease_duration")
    yield from text(asked.request_id, 128, f"{at}request_id")


def wait(wait_ms: int) -> Violations:
    """How long a caller waits."""
    yield from duration(wait_ms, 0, MAX_WAIT_MS, "wait_duration")


def reply_in_time(wait_ms: int, time_left_ms: int | None) -> int:
    """The wait, cut so that the answer leaves 200 ms before the caller's deadline."""
    return wait_ms if time_left_ms is None else max(0, min(wait_ms, time_left_ms - REPLY_MARGIN_MS))


def settle(asked: Sequence[Settlement], now_ms: int) -> Violations:
    """Successes, failures and tasks given back; each kind is numbered by itself, as in its request."""
    if len(asked) <= MAX_BATCH and not any(map(_says_more, asked)):
        return
    completions = [item for item in asked if isinstance(item, Complete)]
    failures = [item for item in asked if isinstance(item, Fail)]
    releases = [item for item in asked if isinstance(item, Release)]
    for field, items in (("completions", completions), ("failures", failures), ("releases", releases)):
        if len(items) > MAX_BATCH:
            yield Violation(field, f"must hold at most {MAX_BATCH} items; it holds {len(items)}")
    follow_ups = sum(len(item.follow_ups) for item in completions)
    if follow_ups > MAX_BATCH:
        yield Violation("completions", f"must hold at most {MAX_BATCH} follow_ups in all; they hold {follow_ups}")
    for index, completion in enumerate(completions[:MAX_BATCH]):
        yield from complete(completion, f"completions[{index}]", now_ms)
    for index, failure in enumerate(failures[:MAX_BATCH]):
        yield from fail(failure, f"failures[{index}]")
    for index, given_back in enumerate(releases[:MAX_BATCH]):
        yield from release(given_back, f"releases[{index}]")


def _says_more(item: Settlement) -> bool:
    return not isinstance(item, Complete) or bool(item.follow_ups or item.result_blob)


def extend(asked: Sequence[Extend]) -> Violations:
    """Leases that shall last longer."""
    yield from batch(len(asked), "extensions")
    for index, item in enumerate(asked[:MAX_BATCH]):
        yield from duration(item.lease_ms, MIN_LEASE_MS, MAX_LEASE_MS, f"extensions[{index}].lease_duration")


def complete(asked: Complete, at: str, now_ms: int) -> Violations:
    """A success."""
    if asked.follow_ups:
        yield from batch(len(asked.follow_ups), f"{at}.follow_ups", MAX_FOLLOW_UPS)
    if asked.result_blob:
        yield from blob_id(asked.result_blob, f"{at}.result.blob.blob_id")
    for i, task in enumerate(asked.follow_ups[:MAX_FOLLOW_UPS]):
        yield from new_task(task, f"{at}.follow_ups[{i}]", now_ms)


def fail(asked: Fail, at: str) -> Violations:
    """A failure."""
    yield from text(asked.failure.reason, 128, f"{at}.failure.reason")
    yield from text(asked.failure.message, 4_096, f"{at}.failure.message")
    yield from duration(asked.delay_ms, 0, MAX_DELAY_MS, f"{at}.retry_delay_duration")


def release(asked: Release, at: str) -> Violations:
    """A task given back."""
    yield from duration(asked.delay_ms, 0, MAX_DELAY_MS, f"{at}.delay_duration")


def selection(asked: Selection) -> Violations:
    """Tasks by id or by filter."""
    if bool(asked.task_ids) == (asked.wanted is not None):
        yield Violation("task_ids", "give either task_ids or filter")
    if len(asked.task_ids) > MAX_BATCH:
        yield Violation("task_ids", f"must hold at most {MAX_BATCH} items; it holds {len(asked.task_ids)}")
    for index, name in enumerate(asked.task_ids[:MAX_BATCH]):
        yield from task_id(name, f"task_ids[{index}]")
    yield from within(asked.max_count, 1, MAX_SELECTED, "max_count")
    if asked.wanted is not None:
        yield from task_filter(asked.wanted)


def task_filter(wanted: TaskFilter) -> Violations:
    """A filter."""
    if wanted.queue_id:
        yield from queue_id(wanted.queue_id, "filter.queue_id")
    if wanted.parent_task_id:
        yield from task_id(wanted.parent_task_id, "filter.parent_task_id")
    if len(wanted.labels) > MAX_LABELS:
        yield Violation("filter.labels", f"must hold at most {MAX_LABELS} labels")
    for key in wanted.labels:
        if not _LABEL_KEY.fullmatch(key):
            yield _label_key(key, "filter.labels")


def reschedule(asked: Reschedule, now_ms: int) -> Violations:
    """Another time or priority."""
    yield from task_id(asked.task_id)
    yield from within(asked.priority, -1000, 1000, "priority")
    yield from _start(asked.start_ms, asked.delay_ms, now_ms, "")


def page_size(value: int) -> Violations:
    """The size of a page; 0 = the default."""
    yield from within(value, 0, MAX_PAGE, "page_size")


def _start(start_ms: int | None, delay_ms: int | None, now_ms: int, at: str) -> Violations:
    prefix = f"{at}." if at else ""
    if start_ms is not None and start_ms > now_ms + MAX_AHEAD_MS:
        yield Violation(f"{prefix}schedule_time", "must be at most 10 years ahead")
    yield from duration(delay_ms, 0, MAX_AHEAD_MS, f"{prefix}delay_duration")


def _expiry(task: NewTask, now_ms: int, at: str) -> Violations:
    start = task.start_ms if task.start_ms is not None else now_ms + (task.delay_ms or 0)
    if task.expire_ms is not None and task.expire_ms <= max(start, now_ms):
        yield Violation(f"{at}.expire_time", "must be later than now and than the start")
    if task.expire_delay_ms is not None:
        yield from duration(task.expire_delay_ms, 1, 2 * MAX_AHEAD_MS, f"{at}.expire_duration")
        if now_ms + task.expire_delay_ms <= start and start > now_ms:
            yield Violation(f"{at}.expire_duration", "must reach beyond the start")


def _labels(task: NewTask, at: str) -> Violations:
    if len(task.body.labels) > MAX_LABELS:
        yield Violation(at, f"must hold at most {MAX_LABELS} labels; it holds {len(task.body.labels)}")
        return
    for key, value in task.body.labels.items():
        if not _LABEL_KEY.fullmatch(key):
            yield _label_key(key, at)
        yield from text(value, 256, f"{at}[{key[:64]}]")


def _label_key(key: str, at: str) -> Violation:
    return Violation(f"{at}[{key[:64]}]", "a key must be 1 to 64 of A-Z a-z 0-9 . _ / -")
