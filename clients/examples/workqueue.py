"""A queue from end to end; prints clients/transcripts/workqueue.txt. Give a queue of your own to run it twice."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct, Value

from retinue.client import Job, Queue, RetinueError, Worker
from retinue.client.address import app_address
from retinue.client.errors import from_item_status, from_rpc_error
from retinue.workqueue.v1 import task_pb2 as task
from retinue.workqueue.v1 import workqueue_admin_service_pb2 as admin_pb
from retinue.workqueue.v1 import workqueue_admin_service_pb2_grpc as admin_rpc
from retinue.workqueue.v1 import workqueue_service_pb2 as pb
from retinue.workqueue.v1 import workqueue_service_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import Callable

WORKER = "example-python"


def main(queue_id: str) -> None:
    with grpc.insecure_channel(app_address("workqueue")) as channel:
        tasks, admin = rpc.WorkQueueServiceStub(channel), admin_rpc.WorkQueueAdminServiceStub(channel)
        connect(admin)
        enqueue(tasks, queue_id)
        refuse(tasks, queue_id)
        cancel(tasks, queue_id)
        invoice, thumbnail, report = lease(tasks, queue_id, 3)
        receipt_id = complete(tasks, queue_id, invoice)
        release_and_fail(tasks, queue_id, thumbnail)
        print(f"completed report: {completed(tasks, pb.Completion(lease_token=report.lease_token))}")
        asyncio.run(work(queue_id))
        count(tasks, admin, queue_id, receipt_id, invoice.task_id)


def connect(admin: admin_rpc.WorkQueueAdminServiceStub) -> None:
    limits = admin.GetCapabilities(admin_pb.GetCapabilitiesRequest())
    print(f"connected: up to {limits.max_batch_items} items a batch, {limits.max_payload_bytes} bytes a payload")


def enqueue(tasks: rpc.WorkQueueServiceStub, queue_id: str) -> None:
    number = Value(struct_value=Struct(fields={"number": Value(number_value=7)}))
    report = task.TaskSpec(
        queue_id=queue_id, task_type="report", input=task.Payload(text="October"), idempotency_key="report-10"
    )
    thumbnail = task.TaskSpec(queue_id=queue_id, task_type="thumbnail", input=task.Payload(data=b"\x89PNG"), priority=5)
    invoice = task.TaskSpec(queue_id=queue_id, task_type="invoice", input=task.Payload(json=number), priority=10)
    first = tasks.EnqueueTasks(pb.EnqueueTasksRequest(tasks=[report, thumbnail, invoice])).results
    old = sum(result.existing for result in first)
    print(f"enqueued: {len(first) - old} new, {old} existing")

    again = tasks.EnqueueTasks(pb.EnqueueTasksRequest(tasks=[report])).results
    old = sum(result.existing for result in again)
    print(f"enqueued again: {old} existing, the same task: {yes(again[0].task_id == first[0].task_id)}")

    report.input.text = "November"
    other = tasks.EnqueueTasks(pb.EnqueueTasksRequest(tasks=[report])).results
    print(f"enqueued with another input: {told(other[0].status)}")


def refuse(tasks: rpc.WorkQueueServiceStub, queue_id: str) -> None:
    nonsense = [
        task.TaskSpec(queue_id=queue_id, priority=9999),
        task.TaskSpec(queue_id="no spaces, please"),
    ]
    refusal = refused(lambda: tasks.EnqueueTasks(pb.EnqueueTasksRequest(tasks=nonsense)))
    print(f"enqueued nonsense: {refusal.code.name} {refusal.reason}")
    for field in sorted(violation.field for violation in refusal.violations):
        print(f"  {field}")
    missing = refused(lambda: tasks.GetTask(pb.GetTaskRequest(task_id="nobody-knows")))
    print(f"asked for a task that nobody knows: {missing.code.name} {missing.reason}")


def cancel(tasks: rpc.WorkQueueServiceStub, queue_id: str) -> None:
    tomorrow = task.TaskSpec(queue_id=queue_id, delay_duration=Duration(seconds=86400))
    task_id = tasks.EnqueueTasks(pb.EnqueueTasksRequest(tasks=[tomorrow])).results[0].task_id
    print(f"enqueued for tomorrow: {state(get(tasks, task_id))}")
    tasks.CancelTasks(pb.CancelTasksRequest(task_ids=[task_id]))
    print(f"cancelled: {state(get(tasks, task_id))}")


def lease(tasks: rpc.WorkQueueServiceStub, queue_id: str, count: int) -> list[task.Lease]:
    wait = Duration(seconds=5)
    request = pb.LeaseTasksRequest(queue_id=queue_id, worker_id=WORKER, max_tasks=count, wait_duration=wait)
    leases = list(tasks.LeaseTasks(request).leases)
    for one in leases:
        print(f"leased {one.task_type}: {shown(one.input)}, attempt {one.attempt} of {one.max_attempts}")
    return leases


def complete(tasks: rpc.WorkQueueServiceStub, queue_id: str, invoice: task.Lease) -> str:
    receipt = task.TaskSpec(queue_id=queue_id, task_type="receipt", input=task.Payload(text="invoice 7 is paid"))
    paid = pb.Completion(lease_token=invoice.lease_token, result=task.Payload(text="paid"), follow_ups=[receipt])
    result = tasks.CompleteTasks(pb.CompleteTasksRequest(completions=[paid])).results[0]
    print(f"completed invoice: {outcome(result)}")
    print(f"completed invoice again: {completed(tasks, paid)}")
    failure = pb.TaskFailure(lease_token=invoice.lease_token, failure=task.Failure(reason="TOO_LATE"))
    refused = tasks.FailTasks(pb.FailTasksRequest(failures=[failure])).results[0]
    print(f"failed invoice after that: {told(refused.status)}")
    invoice_now = get(tasks, invoice.task_id)
    print(f"invoice is {state(invoice_now)}: {invoice_now.result.text}")
    return result.follow_up_task_ids[0]


def release_and_fail(tasks: rpc.WorkQueueServiceStub, queue_id: str, old: task.Lease) -> None:
    releases = [pb.Release(lease_token=old.lease_token)]
    released = tasks.ReleaseTasks(pb.ReleaseTasksRequest(releases=releases)).results[0]
    print(f"released thumbnail: {told(released.status)}")
    [new] = lease(tasks, queue_id, 1)
    print(f"its epoch grew: {yes(new.lease_epoch > old.lease_epoch)}")
    print(f"completed thumbnail with the old lease: {completed(tasks, pb.Completion(lease_token=old.lease_token))}")
    extensions = [pb.Extension(lease_token=new.lease_token, lease_duration=Duration(seconds=60))]
    extended = tasks.ExtendLeases(pb.ExtendLeasesRequest(extensions=extensions)).results[0]
    print(f"extended the new lease: {told(extended.status)}")
    failure = task.Failure(reason="CORRUPT_IMAGE", message="cannot decode it")
    final = pb.TaskFailure(lease_token=new.lease_token, failure=failure, final=True)
    failed = tasks.FailTasks(pb.FailTasksRequest(failures=[final])).results[0]
    print(f"failed thumbnail for good: {short(task.TaskState.Name(failed.state))}")
    dead = get(tasks, new.task_id)
    print(f"thumbnail is {state(dead)}: {dead.last_failure.reason} in attempt {dead.last_failure.attempt}")


async def work(queue_id: str) -> None:
    """One task by stream; the worker renews leases, reconnects, and stops gracefully."""

    async def handle(job: Job) -> str:
        print(f"worked on {job.lease.task_type}: {shown(job.lease.input)}")
        worker.stop()
        return "mailed"

    async with Queue(queue_id) as queue:
        worker = Worker(queue, handle, worker_id=WORKER)
        await worker.run()


def count(
    tasks: rpc.WorkQueueServiceStub,
    admin: admin_rpc.WorkQueueAdminServiceStub,
    queue_id: str,
    receipt_id: str,
    invoice_id: str,
) -> None:
    wait = pb.WaitTaskRequest(task_id=receipt_id, wait_duration=Duration(seconds=5))
    receipt = tasks.WaitTask(wait).task
    print(
        f"receipt is {state(receipt)}: {receipt.result.text}, "
        f"a follow-up of the invoice: {yes(receipt.parent_task_id == invoice_id)}"
    )
    stats = admin.GetQueueStats(admin_pb.GetQueueStatsRequest(queue_ids=[queue_id])).stats[0]
    print(
        f"counted: {stats.ready} ready, {stats.leased} leased, {stats.succeeded} succeeded, "
        f"{stats.dead} dead, {stats.cancelled} cancelled"
    )


def get(tasks: rpc.WorkQueueServiceStub, task_id: str) -> task.Task:
    return tasks.GetTask(pb.GetTaskRequest(task_id=task_id)).task


def refused(call: Callable[[], object]) -> RetinueError:
    try:
        call()
    except grpc.RpcError as error:
        return from_rpc_error(error)
    raise AssertionError("it was not refused")


def completed(tasks: rpc.WorkQueueServiceStub, completion: pb.Completion) -> str:
    return outcome(tasks.CompleteTasks(pb.CompleteTasksRequest(completions=[completion])).results[0])


def outcome(result: pb.CompleteResult) -> str:
    ids = len(result.follow_up_task_ids)
    follow_ups = f", {ids} follow-up{'' if ids == 1 else 's'}"
    return told(result.status) + ("" if result.status.code else follow_ups)


def told(status: task.ItemStatus) -> str:
    if not status.code:
        return "OK"
    refusal = from_item_status(status)
    return f"{refusal.code.name} {refusal.reason}"


def shown(payload: task.Payload) -> str:
    match payload.WhichOneof("content"):
        case "json":
            return f"number {payload.json.struct_value.fields['number'].number_value:.0f}"
        case "data":
            return f"{len(payload.data)} bytes"
    return payload.text


def state(one: task.Task) -> str:
    return short(task.TaskState.Name(one.state))


def short(name: str) -> str:
    return name.removeprefix("TASK_STATE_")


def yes(value: object) -> str:
    return "true" if value else "false"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "transcript")
