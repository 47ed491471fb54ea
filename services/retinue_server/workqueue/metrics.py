"""What the work queue counts, in Prometheus' terms; names and labels are part of the product (deploy/workqueue)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.runtime.metrics import Family, Sample
from retinue_server.workqueue.engine import State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from retinue_server.workqueue.core.queue import WorkQueue


def families(queue: WorkQueue) -> Iterable[Family]:
    """Depths and ages as of the last count, and every event since the start."""
    now_ms = queue.now().wall_ms
    depths, ages, workers = [], [], []
    for report in queue.counted:
        name = report.queue.queue_id
        depths += [Sample({"queue": name, "state": state.name.lower()}, report.counts.get(state, 0)) for state in State]
        oldest = report.totals.oldest_ready_ms
        ages.append(Sample({"queue": name}, max(0, now_ms - oldest) / 1000 if oldest is not None else 0))
        workers.append(Sample({"queue": name}, report.totals.workers))
    events = [
        Sample({"queue": name, "event": event.name.lower()}, count)
        for (name, event), count in list(queue.happened.items())
    ]
    free = [Sample({"for": what}, room.free_bytes) for what, room in queue.rooms.items()]
    admitting = [Sample({"for": what}, int(room.admitting)) for what, room in queue.rooms.items()]
    return (
        Family("retinue_workqueue_disk_free_bytes", "What is free on disk, the reserve included.", "gauge", free),
        Family("retinue_workqueue_admitting", "1 while new data is taken in, 0 while refused.", "gauge", admitting),
        Family("retinue_workqueue_tasks", "Tasks by queue and state.", "gauge", depths),
        Family("retinue_workqueue_oldest_ready_seconds", "How long the first in line has been ready.", "gauge", ages),
        Family("retinue_workqueue_workers", "Workers that have leases.", "gauge", workers),
        Family("retinue_workqueue_events_total", "What happened to tasks since the start.", "counter", events),
    )
