"""What the work queue's disk adds to the history of a simulated world."""

from __future__ import annotations

from typing import NamedTuple

from retinue_server.workqueue.engine import Instant, QueueRow, TaskBody, TaskRow


class Booted(NamedTuple):
    """A server began, on a lease clock that shows `zero_ms` at the world's beginning."""

    at: float
    node: str
    zero_ms: int


class Serving(NamedTuple):
    """It has recovered, and takes calls from here on."""

    at: float
    node: str


class Ended(NamedTuple):
    """It crashed or was stopped."""

    at: float
    node: str
    how: str


class Stalled(NamedTuple):
    """It stopped for a while without dying."""

    at: float
    node: str


class Resumed(NamedTuple):
    """It goes on."""

    at: float
    node: str


class Changed(NamedTuple):
    """One change of one task became durable. Changes of one step have the same number, and its time."""

    at: float
    node: str
    step: int
    now: Instant
    before: TaskRow | None
    after: TaskRow | None
    body: TaskBody | None
    """Of a task that is new."""


class QueueChanged(NamedTuple):
    """A queue's row became durable."""

    at: float
    node: str
    step: int
    queue: QueueRow
