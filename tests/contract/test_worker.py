"""The worker loop against a real server: leases live whatever handlers do, and outcomes are settled once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from collector import Collector, collecting
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from pace import undisturbed_async
from servers import RunningServer
from workers import Work

from retinue.client import errors, trace
from retinue.client.queue import Queue, duration
from retinue.client.sync import Queue as SyncQueue
from retinue.client.worker import Done, Failed, Job, Released, Worker, WorkerEvent
from retinue.workqueue.v1 import queue_pb2
from retinue.workqueue.v1 import task_pb2 as pb
from retinue.workqueue.v1 import workqueue_admin_service_pb2 as api
from retinue.workqueue.v1 import workqueue_admin_service_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path


@pytest.fixture
async def queue(server: RunningServer, request: pytest.FixtureRequest) -> AsyncIterator[Queue]:
    async with Queue(request.node.name[:120], address=server.address) as found:
        yield found


@pytest.fixture
async def start(queue: Queue) -> AsyncIterator[Callable[..., Worker]]:
    started: list[tuple[Worker, asyncio.Task[None]]] = []

    def start_worker(handler: Any, **options: Any) -> Worker:
        worker = Worker(queue, handler, **options)
        started.append((worker, asyncio.create_task(worker.run())))
        return worker

    yield start_worker
    for worker, task in started:
        worker.stop(0)
        await task


async def finished(queue: Queue, task_id: str) -> pb.Task:
    return await queue.wait(task_id, timeout=60)


async def test_a_thousand_tasks_are_each_done_once(queue: Queue, start: Any) -> None:
    seen: Counter[str] = Counter()

    async def count(job: Job) -> None:
        seen[job.task_id] += 1

    tasks = await asyncio.gather(*(queue.enqueue(str(number)) for number in range(1000)))
    start(count, concurrency=50, prefetch=50)
    for task in tasks:
        assert (await finished(queue, task.task_id)).state == pb.TASK_STATE_SUCCEEDED
    assert set(seen.values()) == {1}
    assert set(seen) == {task.task_id for task in tasks}


async def test_callers_of_one_turn_share_one_call(queue: Queue) -> None:
    calls: list[int] = []
    send = queue._enqueue_block

    async def counted(tasks: list[pb.TaskSpec], left: float) -> Any:
        calls.append(len(tasks))
        return await send(tasks, left)

    queue._outbox._send = counted
    await asyncio.gather(*(queue.enqueue(str(number)) for number in range(100)))
    assert calls == [100]


async def test_a_handler_that_blocks_the_loop_keeps_its_lease(queue: Queue, start: Any) -> None:
    async def block(job: Job) -> str:
        time.sleep(3)  # noqa: ASYNC251 - the offence under test
        return "done"

    async def kept() -> None:
        task = await queue.enqueue("x")
        done = await finished(queue, task.task_id)
        assert (done.state, done.lease_expirations, done.lease_epoch) == (pb.TASK_STATE_SUCCEEDED, 0, 1)

    start(block, lease_duration=2)
    await undisturbed_async(kept, within_s=2)


async def test_a_plain_function_runs_in_a_thread_and_its_result_is_kept(queue: Queue, start: Any) -> None:
    task = await queue.enqueue({"n": 20})
    main = threading.get_ident()
    start(lambda job: {"other": threading.get_ident() != main, "epoch": job.lease_epoch})
    assert await queue.load((await finished(queue, task.task_id)).result) == {"other": True, "epoch": 1}


async def test_a_cancelled_task_stops_its_thread_by_the_event(queue: Queue, start: Any) -> None:
    began, ended = threading.Event(), threading.Event()

    def until_told(job: Job) -> None:
        began.set()
        if job.stopping.wait(60):
            ended.set()

    task = await queue.enqueue("x")
    start(until_told, lease_duration=2)
    assert await asyncio.to_thread(began.wait, 60)
    assert await queue.cancel(task.task_id) == [None]
    assert (await finished(queue, task.task_id)).state == pb.TASK_STATE_CANCELLED
    assert await asyncio.to_thread(ended.wait, 60)


async def test_tasks_that_match_are_cancelled_and_a_dry_run_only_counts(queue: Queue) -> None:
    tasks = [await queue.enqueue("x", labels={"colour": colour}) for colour in ("red", "red", "blue")]
    assert await queue.cancel_matching(labels={"colour": "red"}, dry_run=True) == 2
    assert await queue.cancel_matching(labels={"colour": "red"}) == 2
    states = [(await queue.get(task.task_id)).state for task in tasks]
    assert states == [pb.TASK_STATE_CANCELLED, pb.TASK_STATE_CANCELLED, pb.TASK_STATE_READY]


async def test_handlers_say_how_they_failed(queue: Queue, start: Any) -> None:
    async def fail(job: Job) -> None:
        raise Failed("BAD_INPUT", "no such colour", final=True)

    task = await queue.enqueue("x")
    start(fail)
    done = await finished(queue, task.task_id)
    assert (done.state, done.last_failure.reason) == (pb.TASK_STATE_DEAD, "BAD_INPUT")
    assert done.last_failure.message == "no such colour"


async def test_an_exception_is_a_failure_that_is_retried(queue: Queue, start: Any) -> None:
    async def once(job: Job) -> str:
        if job.attempt == 1:
            raise KeyError("gone")
        return "second"

    task = await queue.enqueue("x", retry=pb.RetryPolicy(max_backoff_duration=duration(0.01)))
    start(once)
    done = await finished(queue, task.task_id)
    assert (done.state, done.attempt) == (pb.TASK_STATE_SUCCEEDED, 2)


async def test_a_released_task_is_not_counted(queue: Queue, start: Any) -> None:
    async def later(job: Job) -> None:
        if job.lease_epoch == 1:
            raise Released(delay=0.1)

    task = await queue.enqueue("x")
    start(later)
    done = await finished(queue, task.task_id)
    assert (done.state, done.attempt, done.lease_epoch) == (pb.TASK_STATE_SUCCEEDED, 1, 2)


async def test_follow_ups_are_committed_with_the_result_and_continue_the_trace(queue: Queue, start: Any) -> None:
    seen: list[str] = []

    async def twice(job: Job) -> Done:
        seen.append(trace.current())
        more = [await queue.spec("second")] if await job.load() == "first" else []
        return Done("ok", more)

    task = await queue.enqueue("first")
    start(twice)
    await finished(queue, task.task_id)
    [child] = [found async for found in queue.list(parent_task_id=task.task_id)]
    done = await finished(queue, child.task_id)
    sent = trace.parse((await queue.get(task.task_id)).spec.traceparent)
    first, second = (trace.parse(text) for text in seen)
    assert sent
    assert first
    assert second
    assert sent.trace_id == first.trace_id == second.trace_id
    assert done.spec.traceparent == seen[0], "the follow-up's parent is the handler's span"


async def test_a_follow_up_the_server_cannot_take_is_a_failure_not_a_hang(queue: Queue, start: Any) -> None:
    async def bad(job: Job) -> Done:
        return Done("ok", [pb.TaskSpec(queue_id="-not a queue-")])

    async def good(job: Job) -> str:
        return "ok"

    task = await queue.enqueue("x", task_type="bad")
    other = await queue.enqueue("x", task_type="good")
    start(_dispatch(bad, good), concurrency=2)
    done = await finished(queue, task.task_id)
    assert (done.state, done.last_failure.reason) == (pb.TASK_STATE_DEAD, "INVALID_FIELD")
    assert (await finished(queue, other.task_id)).state == pb.TASK_STATE_SUCCEEDED


def _dispatch(bad: Any, good: Any) -> Any:
    async def handler(job: Job) -> Any:
        return await (bad if job.lease.task_type == "bad" else good)(job)

    return handler


async def test_a_large_result_goes_through_the_blob_store(queue: Queue, start: Any) -> None:
    async def large(job: Job) -> str:
        return "ö" * 1_000_000

    task = await queue.enqueue("x")
    start(large)
    done = await finished(queue, task.task_id)
    assert done.result.blob.size_bytes == 2_000_000
    assert await queue.load(done.result) == "ö" * 1_000_000


async def test_a_worker_that_the_server_refuses_says_why(server: RunningServer) -> None:
    async with Queue("-not a queue-", address=server.address) as queue:
        with pytest.raises(errors.InvalidArgument) as caught:
            await Worker(queue, _nothing).run()
    assert caught.value.violations


async def _nothing(job: Job) -> None: ...


async def test_a_worker_with_max_tasks_returns_after_them(queue: Queue) -> None:
    tasks = [await queue.enqueue(text) for text in ("a", "b", "c")]
    await Worker(queue, _nothing, concurrency=2, max_tasks=2).run()
    states = sorted([(await queue.get(task.task_id)).state for task in tasks])
    assert states == [pb.TASK_STATE_READY, pb.TASK_STATE_SUCCEEDED, pb.TASK_STATE_SUCCEEDED]


async def test_stop_before_start_and_twice_is_legal(queue: Queue) -> None:
    worker = Worker(queue, _nothing)
    worker.stop()
    worker.stop(0)
    await asyncio.wait_for(worker.run(), 60)


async def test_a_cancelled_run_gives_its_tasks_back(queue: Queue) -> None:
    began = asyncio.Event()

    async def hang(job: Job) -> None:
        began.set()
        await asyncio.sleep(600)

    task = await queue.enqueue("x")
    running = asyncio.create_task(Worker(queue, hang).run())
    await asyncio.wait_for(began.wait(), 60)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    found = await queue.get(task.task_id)
    assert (found.state, found.attempt) == (pb.TASK_STATE_READY, 0)


async def test_a_result_for_a_full_queue_waits_for_room(queue: Queue, start: Any, server: RunningServer) -> None:
    full = f"{queue.queue_id}-full"
    async with Queue(full, address=server.control) as operator:
        stub = rpc.WorkQueueAdminServiceStub(operator.connection.channel)
        await stub.CreateQueue(api.CreateQueueRequest(queue_id=full, settings=queue_pb2.QueueSettings(max_tasks=1)))
        blocking = await operator.enqueue("in the way")
        calls = []
        finishing = asyncio.Event()

        async def chain(job: Job) -> Done:
            calls.append(job.task_id)
            finishing.set()
            return Done("ok", [await operator.spec("next")])

        task = await queue.enqueue("x")
        start(chain)
        await asyncio.wait_for(finishing.wait(), 60)
        await asyncio.sleep(0.3)  # so that it is refused a few times
        await operator.cancel(blocking.task_id)
        done = await finished(queue, task.task_id)
        assert (done.state, done.attempt, calls) == (pb.TASK_STATE_SUCCEEDED, 1, [task.task_id])


async def test_a_worker_reports_what_happens(queue: Queue) -> None:
    kinds: list[str] = []
    worker = Worker(queue, _nothing, max_tasks=1, listener=lambda event: _note(event, kinds, worker))
    await queue.enqueue("x")
    await asyncio.wait_for(worker.run(), 60)
    assert kinds == ["connected", "leased", "succeeded"]


def _note(event: WorkerEvent, kinds: list[str], worker: Worker) -> None:
    kinds.append(event.kind)
    if event.kind == "succeeded":
        worker.stop()


def test_the_blocking_face_does_what_the_asynchronous_one_does(server: RunningServer) -> None:
    with SyncQueue("blocking", address=server.address) as queue:
        task = queue.enqueue({"a": [1, 2.5, None, True, "x"]}, key="once")
        assert queue.enqueue({"a": [1, 2.5, None, True, "x"]}, key="once") == (task.task_id, True)
        [lease] = queue.lease("me", wait=50)
        assert queue.extend(lease, 20).lease_duration == pytest.approx(20, abs=1)
        assert queue.load(lease.input) == {"a": [1, 2.5, None, True, "x"]}
        queue.complete(lease, b"result")
        queue.complete(lease, b"result")  # repeating it is safe
        assert queue.load(queue.wait(task.task_id).result) == b"result"
        assert [found.task_id for found in queue.list()] == [task.task_id]
        with pytest.raises(errors.FailedPrecondition) as caught:
            queue.fail(lease, "TOO_LATE")
        assert caught.value.reason == "ALREADY_FINALIZED"
        with pytest.raises(errors.NotFound):
            queue.get("no-such-task")
    queue.close()


def test_a_lost_lease_is_its_own_error(server: RunningServer) -> None:
    with SyncQueue("lost", address=server.address) as queue:
        queue.enqueue("x")
        [first] = queue.lease("me", wait=50)
        queue.release(first)
        [second] = queue.lease("you", wait=50)
        assert second.lease_epoch > first.lease_epoch
        with pytest.raises(errors.LeaseLost):
            queue.complete(first, "late")
        queue.complete(second, "in time")


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    with collecting() as found:
        yield found


def test_a_handler_is_a_consumer_span_in_the_producers_trace(
    server: RunningServer, collector: tuple[Collector, str], tmp_path: Path
) -> None:
    found, endpoint = collector
    with SyncQueue("traced", address=server.address) as queue:
        task = queue.enqueue("x")
        sent = trace.parse(queue.get(task.task_id).spec.traceparent)
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_SERVICE_NAME": "upper"}
    work = Work(
        server, tmp_path, "traced", "--max-tasks", "1", "--then", "traced-2", "--", "printenv", "TRACEPARENT", **env
    )
    assert work.ended() == 0, work.log
    work.close()
    [(service, span)] = found.spans
    assert sent is not None
    assert (service, span.name) == ("upper", "process traced")
    assert span.kind == Span.SPAN_KIND_CONSUMER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (sent.trace_id, sent.span_id)
    assert [(link.trace_id.hex(), link.span_id.hex()) for link in span.links] == [(sent.trace_id, sent.span_id)]
    with SyncQueue("traced-2", address=server.address) as queue:
        [follow_up] = list(queue.list())
        follow_up = queue.get(follow_up.task_id)
    assert follow_up.spec.traceparent == f"00-{sent.trace_id}-{span.span_id.hex()}-01"
    assert follow_up.spec.input.text.strip() == follow_up.spec.traceparent, "the command saw the same"


def test_a_collector_that_is_away_costs_a_worker_nothing_but_a_warning(server: RunningServer, tmp_path: Path) -> None:
    with SyncQueue("untraced", address=server.address) as queue:
        task = queue.enqueue("x")
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
        work = Work(server, tmp_path, "untraced", "--max-tasks", "1", "--", "cat", **env)
        assert queue.wait(task.task_id, timeout=60).state == pb.TASK_STATE_SUCCEEDED
        assert work.ended() == 0
        work.close()
