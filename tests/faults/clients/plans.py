"""What a worker does with a lease: drawn from the seed, the task and the epoch, so that a run can be repeated."""

from __future__ import annotations

import random
from enum import Enum

from retinue.workqueue.v1 import task_pb2

FOLLOW_UP = "follow-up"


class Plan(Enum):
    """What becomes of a lease."""

    COMPLETE = "complete"
    FOLLOW = "complete with a follow-up"
    EXTEND = "extend, then complete"
    LATE = "complete when the lease may be over"
    FAIL = "fail"
    DOOM = "fail for good"
    RELEASE = "release"
    ABANDON = "say nothing"


_WEIGHTS = {
    Plan.COMPLETE: 55.0,
    Plan.FOLLOW: 28.0,
    Plan.EXTEND: 4.0,
    Plan.LATE: 2.0,
    Plan.FAIL: 5.0,
    Plan.DOOM: 0.5,
    Plan.RELEASE: 4.0,
    Plan.ABANDON: 1.5,
}


def plan(seed: str, lease: task_pb2.Lease) -> Plan:
    """What becomes of this lease; a follow-up has none of its own."""
    chance = random.Random(f"{seed}/{lease.task_id}/{lease.lease_epoch}")
    [drawn] = chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
    return Plan.COMPLETE if drawn == Plan.FOLLOW and lease.task_type == FOLLOW_UP else drawn


def follow_up(lease: task_pb2.Lease) -> task_pb2.TaskSpec:
    """A task that says under which lease it came to be; the server names it."""
    return task_pb2.TaskSpec(queue_id=lease.queue_id, task_type=FOLLOW_UP, labels={"epoch": str(lease.lease_epoch)})
