"""What the work queue's disk adds to the history of a simulated world."""

from __future__ import annotations

from typing import NamedTuple

from retinue_server.workqueue.engine import Instant, QueueRow, TaskBody, TaskRow
from support.simulation.records import brief

REFUSED = "the disk refuses a group"


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

    def told(self) -> str:
        """As it stands in a trace."""
        where = f"{self.node}  step {self.step} at {self.now.wall_ms}/{self.now.lease_ms}  "
        if self.before is None or self.after is None:
            return where + ("new " if self.before is None else "deleted ") + brief(self.after or self.before)
        return where + difference(self.before, self.after)


def difference(before: TaskRow, after: TaskRow) -> str:
    """What of a task is another now."""
    changes = [
        f"{name} {brief(old)} -> {brief(new)}"
        for name in before.__struct_fields__
        if (old := getattr(before, name)) != (new := getattr(after, name))
    ]
    return f"{before.task_id} (seq {before.seq}, epoch {before.lease_epoch}): {', '.join(changes)}"


class QueueChanged(NamedTuple):
    """A queue's row became durable."""

    at: float
    node: str
    step: int
    queue: QueueRow
