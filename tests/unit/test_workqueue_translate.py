"""Claims about reading tasks: those that say little are looked at once, and come out as all others do."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from retinue.workqueue.v1 import task_pb2 as pb
from retinue_server.workqueue.core import limits
from retinue_server.workqueue.core.requests import Enqueue, NewTask
from retinue_server.workqueue.translate import Reader

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TEXT = pb.Payload(text="grün", content_type="text/plain")


def read(spec: pb.TaskSpec, traceparent: str = "") -> NewTask:
    [task] = Reader().tasks([spec], "tasks", traceparent)
    return task


@pytest.mark.parametrize("traceparent", ["", TRACE])
@pytest.mark.parametrize(
    "payload", [TEXT, pb.Payload(data=b"\x00\xff"), pb.Payload(data=b"")], ids=["text", "bytes", "empty"]
)
def test_a_plain_task_is_read_as_one_that_says_more(payload: pb.Payload, traceparent: str) -> None:
    plain = read(pb.TaskSpec(queue_id="q", input=payload, traceparent=traceparent), "of the call")
    more = read(pb.TaskSpec(queue_id="q", input=payload, traceparent=traceparent, priority=1), "of the call")
    assert plain.plain
    assert not more.plain
    assert replace(more, priority=0, inline_bytes=0) == replace(plain, plain=False, inline_bytes=0)
    assert plain.body.traceparent == (traceparent or "of the call")


@pytest.mark.parametrize(
    "spec",
    [
        pb.TaskSpec(queue_id="q"),
        pb.TaskSpec(input=TEXT),
        pb.TaskSpec(task_id="t", input=TEXT),
        pb.TaskSpec(queue_id="q", input=TEXT, idempotency_key="k"),
        pb.TaskSpec(queue_id="q", input=TEXT, labels={"k": "v"}),
        pb.TaskSpec(queue_id="q", input=pb.Payload(blob=pb.BlobRef(blob_id="0" * 64))),
        pb.TaskSpec(queue_id="q", input=pb.Payload(content_type="text/plain")),
        pb.TaskSpec(queue_id="q", input=pb.Payload(text="", content_type="x" * 129)),
        pb.TaskSpec(queue_id="q", input=pb.Payload(data=bytes(limits.MAX_INLINE_BYTES))),
        pb.TaskSpec(queue_id="q", input=TEXT, traceparent="0" * 65),
    ],
    ids=["no input", "no queue", "id", "key", "labels", "blob", "empty", "long type", "at the limit", "long context"],
)
def test_what_says_more_or_could_be_wrong_is_looked_at_field_by_field(spec: pb.TaskSpec) -> None:
    assert not read(spec).plain


def test_a_plain_task_of_another_queue_than_the_one_before_is_looked_at() -> None:
    specs = [pb.TaskSpec(queue_id=name, input=TEXT) for name in ("q", "q", "-", "q", "-", "-")]
    tasks = Reader().tasks(specs, "tasks", "")
    assert [found.field for found in limits.enqueue(Enqueue(tasks), 0)] == [
        f"tasks[{index}].queue_id" for index in (2, 4, 5)
    ]
