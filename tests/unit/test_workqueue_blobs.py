"""What the work queue keeps and counts beside its tasks: blobs in a real directory, and metrics."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.workqueue_core import Bench

from retinue_server.workqueue import metrics
from retinue_server.workqueue.core.requests import Complete, NewTask
from retinue_server.workqueue.engine import TaskBody
from retinue_server.workqueue.engines.local_blobs import LocalBlobs
from retinue_server.workqueue.engines.memory import MemoryEngine

HOUR_MS = 3_600_000


def no_fatal(error: BaseException) -> None:
    raise AssertionError(error)


@pytest.fixture
async def blobs(tmp_path: Path) -> LocalBlobs:
    store = LocalBlobs(tmp_path / "blobs", 1 << 20, no_fatal)
    await store.start()
    return store


async def keep(blobs: LocalBlobs, content: bytes, *, idle_hours: int = 0) -> str:
    """Uploads, and makes it look as if nobody had asked since."""
    upload = blobs.upload()
    await upload.write(content)
    kept = await upload.commit("", 0)
    path = blobs.path(kept.blob_id)
    found = path.stat()
    os.utime(path, (found.st_atime - idle_hours * 3600 - 1, found.st_mtime))
    return kept.blob_id


async def test_a_blob_goes_when_it_is_idle_and_no_task_refers_to_it(blobs: LocalBlobs) -> None:
    bench = Bench(MemoryEngine())
    bench.queue.blobs = blobs
    used, result, young, idle = [
        await keep(blobs, name, idle_hours=0) for name in (b"used", b"result", b"young", b"idle")
    ]
    await bench.put(NewTask("q", TaskBody(b"ref", input_blob=used)))
    await bench.end(Complete(await bench.take_one(), b"ref", result))
    for blob_id in (used, result, idle):
        path = blobs.path(blob_id)
        os.utime(path, (path.stat().st_atime - 2 * 3600, path.stat().st_mtime))
    assert await bench.queue.collect_blobs(HOUR_MS) == 1
    left = {blob_id for blob_id in (used, result, young, idle) if blobs.path(blob_id).exists()}
    assert left == {used, result, young}


async def test_asking_for_a_blob_prolongs_its_life(blobs: LocalBlobs) -> None:
    blob_id = await keep(blobs, b"content", idle_hours=2)
    assert await blobs.idle(HOUR_MS, 10) == [blob_id]
    assert await blobs.stat(blob_id) is not None
    assert await blobs.idle(HOUR_MS, 10) == []
    await blobs.delete(blob_id, HOUR_MS)
    assert await blobs.stat(blob_id) is not None, "it was asked for after it had been found idle"


async def test_an_upload_that_a_crash_left_is_dropped_at_the_next_start(blobs: LocalBlobs, tmp_path: Path) -> None:
    upload = blobs.upload()
    await upload.write(b"half")
    uploads = tmp_path / "blobs" / "uploads"
    assert len(list(uploads.iterdir())) == 1
    await LocalBlobs(tmp_path / "blobs", 1, no_fatal).start()
    assert list(uploads.iterdir()) == []
    await upload.abort()


async def test_metrics_tell_depth_age_workers_and_what_happened() -> None:
    bench = Bench(MemoryEngine())
    await bench.put(NewTask("q"), NewTask("q"), NewTask("q"))
    await bench.complete(await bench.take_one())
    await bench.take_one()
    bench.clock.advance(5_000)
    await bench.queue.count()
    told = {
        (family.name, *sorted(sample.labels.values())): sample.value
        for family in metrics.families(bench.queue)
        for sample in family.samples
        if sample.value
    }
    assert told == {
        ("retinue_workqueue_tasks", "q", "ready"): 1,
        ("retinue_workqueue_tasks", "leased", "q"): 1,
        ("retinue_workqueue_tasks", "q", "succeeded"): 1,
        ("retinue_workqueue_oldest_ready_seconds", "q"): 5,
        ("retinue_workqueue_workers", "q"): 1,
        ("retinue_workqueue_events_total", "enqueued", "q"): 3,
        ("retinue_workqueue_events_total", "leased", "q"): 2,
        ("retinue_workqueue_events_total", "q", "succeeded"): 1,
    }
