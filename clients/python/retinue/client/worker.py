"""The worker loop: a handler per task, leases kept alive whatever the handler does.

    async def resize(job: Job) -> bytes:
        return make_thumbnail(await job.load())

    await Worker(Queue("images"), resize, concurrency=8).run()

What the handler returns is the result (`Done` adds follow-up tasks, committed with it). It raises `Failed` or
`Released` to say more; any other exception is a failure that is retried. A coroutine handler runs on the
caller's loop and is cancelled when its lease is lost, its task cancelled, its attempt's time over, or the
worker's grace; a plain function runs in a thread and may look at `job.stopping`. Its outcome then no longer
counts, but it keeps its place until it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from retinue.client import errors, trace
from retinue.client.channel import backoff
from retinue.client.queue import completion, failure, release
from retinue.client.stream import Answer, Outcome, TaskStream
from retinue.workqueue.v1 import task_pb2 as pb
from retinue.workqueue.v1 import workqueue_service_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from google.protobuf.duration_pb2 import Duration

    from retinue.client.payload import Content
    from retinue.client.queue import Queue, Seconds

log = logging.getLogger(__name__)

DEFAULT_GRACE = 30.0
_SETTLE_TIMEOUT = 10.0
_LAST_WORDS = 1.0
_REFUSALS = 8
_GONE = {"LEASE_LOST", "ALREADY_FINALIZED"}


@dataclass(frozen=True)
class Done:
    """Success: the result, and tasks to enqueue in the same commit (up to 100; Queue.spec makes them)."""

    result: Content = None
    follow_ups: Sequence[pb.TaskSpec] = ()


class Failed(Exception):
    """The attempt failed. `final` = no other attempt can help; `retry_delay` replaces the policy's
    backoff.
    """

    def __init__(
        self, reason: str, message: str = "", *, final: bool = False, retry_delay: Seconds | None = None
    ) -> None:
        super().__init__(message or reason)
        self.reason = reason
        self.message = message
        self.final = final
        self.retry_delay = retry_delay


class Released(Exception):
    """The task goes back unworked, uncounted, not to be leased again before `delay` has passed."""

    def __init__(self, delay: Seconds | None = None) -> None:
        super().__init__("released")
        self.delay = delay


@dataclass(slots=True)
class Job:
    """One attempt at a task."""

    lease: pb.Lease
    queue: Queue
    received: float
    """When it came, by the monotonic clock."""
    _stopping: threading.Event | None = None

    @property
    def stopping(self) -> threading.Event:
        """Set when the outcome no longer counts: a plain function looks at it and returns."""
        if self._stopping is None:
            self._stopping = threading.Event()
        return self._stopping

    @property
    def task_id(self) -> str:
        return self.lease.task_id

    @property
    def attempt(self) -> int:
        return self.lease.attempt

    @property
    def lease_epoch(self) -> int:
        """A fencing token for what the handler writes to."""
        return self.lease.lease_epoch

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.lease.labels)

    async def load(self) -> Any:
        """The input's value, read from the blob store if it is there."""
        return await self.queue.load(self.lease.input)


Kind = Literal[
    "connected",
    "disconnected",
    "leased",
    "succeeded",
    "retrying",
    "dead",
    "released",
    "cancelled",
    "lost",
    "refused",
]


class WorkerEvent(NamedTuple):
    """What happened: to the connection, or to a job; `reason` and `message` say why."""

    kind: Kind
    job: Job | None = None
    reason: str = ""
    message: str = ""
    result: pb.Payload | None = None


Handler: TypeAlias = "Callable[[Job], Awaitable[Done | Content]] | Callable[[Job], Done | Content]"
_Stop = Literal["", "cancelled", "lost", "expired", "deadline", "shutdown"]


@dataclass(slots=True, eq=False)
class _Attempt:
    job: Job
    task: asyncio.Task[None] | None = None
    begun: bool = False
    """Whether the task runs; what is cancelled before that would never end."""
    stop: _Stop = ""
    refusals: int = 0
    outcome: Outcome | None = None
    """What is or was settled; once there is one, the handler is over."""
    timer: asyncio.TimerHandle | None = None

    def end(self, why: _Stop) -> None:
        """Takes the handler's outcome away and cancels it; the first reason counts."""
        if self.stop or self.outcome is not None:
            return
        self.stop = why
        self.job.stopping.set()
        if self.begun and self.task is not None:
            self.task.cancel(why)


class Worker:
    """Works on a queue with up to `concurrency` handlers at once.

    `prefetch` more tasks are leased ahead: for handlers that take less than a round trip; their attempt's
    time runs. `max_tasks` leases at most that many, then stops. run() may be called once.
    """

    def __init__(
        self,
        queue: Queue,
        handler: Handler,
        *,
        concurrency: int = 1,
        prefetch: int = 0,
        lease_duration: Seconds | None = None,
        max_tasks: int | None = None,
        worker_id: str = "",
        listener: Callable[[WorkerEvent], None] | None = None,
    ) -> None:
        self.queue = queue
        self.worker_id = worker_id or default_worker_id()
        self._handler: Callable[[Job], Any] = handler
        self._asynchronous = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)
        self._concurrency = concurrency
        self._credit = concurrency + prefetch
        self._left = max_tasks
        self._awaited = max_tasks
        self._lease_duration = lease_duration
        self._listener = listener
        self._ready: deque[_Attempt] = deque()
        self._attempts: dict[bytes, _Attempt] = {}
        self._outbox: list[Outcome] = []
        self._credit_back = 0
        self._busy = 0
        self._stopping = False
        self._connected: bool | None = None
        self._changed = asyncio.Event()
        self._fatal: errors.RetinueError | None = None
        self._stream: TaskStream | None = None
        self._grace: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing in hand and nothing left to settle."""
        return not self._attempts and not self._busy

    async def run(self) -> None:
        """Works until stop() and the drain that follows. Raises RetinueError if the server will never take
        this worker.
        """
        loop = asyncio.get_running_loop()
        stream = TaskStream(
            self.queue.connection,
            self,
            loop,
            queue_id=self.queue.queue_id,
            worker_id=self.worker_id,
            lease_duration=self._lease_duration,
        )
        self._stream = stream
        stream.start()
        try:
            self._grant(self._allowed(self._credit))
            if self._stopping:
                stream.stop_leasing()
            await self._until(lambda: self._fatal is not None or self._exhausted() or self._drained())
            await self._settled(_SETTLE_TIMEOUT)
        finally:
            await self._shut_down(stream)
        if self._fatal is not None:
            raise self._fatal

    def stop(self, grace: float = DEFAULT_GRACE) -> None:
        """Takes no more tasks, gives handlers `grace` seconds, then cancels them and releases their tasks.

        Safe to repeat; a shorter grace counts. Call it on the loop of run().
        """
        self._stopping = True
        if self._stream is not None:
            self._stream.stop_leasing()
        while self._ready:
            self._give_back(self._ready.popleft())
        if self._grace is not None:
            self._grace.cancel()
        self._grace = asyncio.get_running_loop().call_later(grace, self._abandon)
        self._changed.set()

    def _abandon(self) -> None:
        for attempt in list(self._attempts.values()):
            attempt.end("shutdown")

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _drained(self) -> bool:
        return self._stopping and not self._working()

    def _exhausted(self) -> bool:
        """Whether the last of `max_tasks` has come and gone."""
        return self._awaited is not None and self._awaited <= 0 and self.idle

    def _working(self) -> list[_Attempt]:
        return [attempt for attempt in self._attempts.values() if attempt.outcome is None]

    async def _settled(self, seconds: float) -> None:
        if self._fatal is not None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._until(lambda: not self._attempts)

    async def _shut_down(self, stream: TaskStream) -> None:
        if self._grace is not None:
            self._grace.cancel()
        self._stopping = True
        stream.stop_leasing()
        self._abandon()
        await self._until(lambda: not self._working())
        await self._settled(_LAST_WORDS)
        stream.close()
        await asyncio.to_thread(stream.join)

    def _allowed(self, credit: int) -> int:
        """How much of a credit may be granted: none while stopping, no more than `max_tasks` in all."""
        if self._stopping:
            return 0
        if self._left is not None:
            credit = min(credit, self._left)
            self._left -= credit
        return credit

    def _grant(self, credit: int) -> None:
        if self._stream is not None and credit:
            self._stream.grant(credit)

    # What the stream tells

    def leased(self, leases: Sequence[pb.Lease], received: float) -> None:
        if self._awaited is not None:
            self._awaited -= len(leases)
        for lease in leases:
            attempt = _Attempt(Job(lease, self.queue, received))
            self._attempts[lease.lease_token] = attempt
            self._emit("leased", attempt.job)
            if self._stopping:
                self._give_back(attempt)
            else:
                self._ready.append(attempt)
        self._fill()

    def cancel_requested(self, token: bytes) -> None:
        if attempt := self._attempts.get(token):
            self._stop_attempt(attempt, "cancelled")

    def lost(self, token: bytes, *, told: bool) -> None:
        if attempt := self._attempts.get(token):
            self._stop_attempt(attempt, "lost" if told else "expired")

    def settled(self, answers: Sequence[Answer]) -> None:
        for outcome, status in answers:
            attempt = self._attempts.get(outcome.lease_token)
            if attempt is None:
                continue
            if status is not None and status.reason not in _GONE and isinstance(outcome, api.Completion):
                self._refused_completion(attempt, status)
            else:
                self._ended(attempt, status)

    def connected(self) -> None:
        self._connected = True
        self._emit("connected")

    def disconnected(self, error: errors.RetinueError) -> None:
        if self._connected is False:
            return  # told already
        self._connected = False
        self._emit("disconnected", reason=error.reason or error.code.name, message=error.message)

    def refused(self, error: errors.RetinueError) -> None:
        self._fatal = error
        self._changed.set()

    # An attempt's life

    def _fill(self) -> None:
        while self._ready and self._busy < self._concurrency:
            attempt = self._ready.popleft()
            self._busy += 1
            attempt.task = asyncio.create_task(self._attempt(attempt))

    def _stop_attempt(self, attempt: _Attempt, why: _Stop) -> None:
        if attempt.task is None and attempt.outcome is None:  # not begun
            if attempt in self._ready:
                self._ready.remove(attempt)
            attempt.stop = why
            self._conclude(attempt, None)
        attempt.end(why)

    def _give_back(self, attempt: _Attempt) -> None:
        attempt.stop = "shutdown"
        self._conclude(attempt, None)

    async def _attempt(self, attempt: _Attempt) -> None:
        job = attempt.job
        attempt.begun = True
        if job.lease.HasField("attempt_duration"):
            left = job.received + _seconds(job.lease.attempt_duration) - time.monotonic()
            attempt.timer = asyncio.get_running_loop().call_later(max(left, 0), attempt.end, "deadline")
        thread: asyncio.Future[Any] | None = None
        outcome: Outcome | None = None
        try:
            if not attempt.stop:  # it may have ended before it began
                with trace.consuming(job.lease.queue_id, job.task_id, job.lease.traceparent):
                    if self._asynchronous:
                        outcome = await self._finish(job, self._handler(job))
                    else:
                        thread = _in_thread(self._handler, job)
                        outcome = await self._finish(job, asyncio.shield(thread))
        except asyncio.CancelledError:
            if not attempt.stop:
                attempt.stop = "shutdown"
        if attempt.timer is not None:
            attempt.timer.cancel()
        free = thread is None or thread.done()
        self._conclude(attempt, outcome, credit=self._allowed(1) if free else 0)
        if thread is not None and not free:
            await asyncio.wait([thread], timeout=0 if attempt.stop == "shutdown" else None)
            self._grant(self._allowed(1))
        self._busy -= 1
        self._fill()
        self._changed.set()

    async def _finish(self, job: Job, work: Awaitable[Any]) -> Outcome:
        """The handler's word as an outcome, its result stored."""
        try:
            answer = await work
            done = answer if isinstance(answer, Done) else Done(answer)
            result = None if done.result is None else await self.queue.store(done.result)
            return completion(job.lease, result, done.follow_ups)
        except Failed as error:
            return failure(job.lease, error.reason, error.message, final=error.final, retry_delay=error.retry_delay)
        except Released as error:
            return release(job.lease, error.delay)
        except errors.RetinueError as error:
            return failure(job.lease, error.reason or error.code.name, str(error))
        except Exception as error:
            log.exception("the handler failed on task %s, attempt %d", job.task_id, job.attempt)
            return failure(job.lease, type(error).__name__, str(error))

    def _conclude(self, attempt: _Attempt, outcome: Outcome | None, credit: int = 0) -> None:
        lease = attempt.job.lease
        if attempt.stop == "deadline":
            limit = _seconds(lease.attempt_duration)
            outcome = failure(lease, "ATTEMPT_DEADLINE", f"the attempt took longer than {limit:g} s")
        elif outcome is None or attempt.stop in ("lost", "expired"):
            outcome = release(lease)
        attempt.outcome = outcome
        self._changed.set()
        if attempt.stop == "lost":
            self._grant(credit)
            self._ended(attempt, None)
        else:
            self._send(outcome, credit)

    def _send(self, outcome: Outcome, credit: int = 0) -> None:
        """Settles with all that ends in the same turn of the loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(outcome)
        self._credit_back += credit

    def _flush(self) -> None:
        outcomes, self._outbox = self._outbox, []
        credit, self._credit_back = self._credit_back, 0
        if self._stream is not None:
            self._stream.settle(outcomes, credit)

    def _refused_completion(self, attempt: _Attempt, status: pb.ItemStatus) -> None:
        """The lease is still held: try again while waiting helps (a full queue, a full disk), else it is a
        failure.
        """
        attempt.refusals += 1
        busy = status.reason in {"QUEUE_FULL", "DISK_FULL", "CONCURRENCY_LIMIT"} or status.code == 14  # noqa: PLR2004 - UNAVAILABLE
        if busy and attempt.refusals < _REFUSALS and attempt.outcome is not None and not self._stopping:
            waits = backoff()
            seconds = [next(waits) for _ in range(attempt.refusals)][-1]
            asyncio.get_running_loop().call_later(seconds, self._settle_again, attempt)
            return
        attempt.outcome = failure(attempt.job.lease, status.reason, status.message, final=status.code == 3)  # noqa: PLR2004 - INVALID_ARGUMENT
        self._settle_again(attempt)

    def _settle_again(self, attempt: _Attempt) -> None:
        if attempt.outcome is not None:
            self._send(attempt.outcome)

    def _ended(self, attempt: _Attempt, status: pb.ItemStatus | None) -> None:
        self._attempts.pop(attempt.job.lease.lease_token, None)
        self._report(attempt, status)
        if attempt.task is None:  # never begun: its place is free
            self._grant(self._allowed(1))
        self._changed.set()

    def _report(self, attempt: _Attempt, status: pb.ItemStatus | None) -> None:
        if self._listener is None:
            return
        job, outcome = attempt.job, attempt.outcome
        gone = attempt.stop in ("lost", "expired") or (status is not None and attempt.stop != "deadline")
        if attempt.stop == "cancelled" and not isinstance(outcome, api.Completion):
            self._emit("cancelled", job, "CANCELLED", "the task was cancelled")
        elif gone:
            reason = status.reason if status else "LEASE_LOST"
            self._emit("lost", job, reason, status.message if status else "the lease was lost")
        elif isinstance(outcome, api.TaskFailure):
            last = outcome.final or job.attempt >= job.lease.max_attempts > 0
            self._emit("dead" if last else "retrying", job, outcome.failure.reason, outcome.failure.message)
        elif isinstance(outcome, api.Completion):
            self._emit("succeeded", job, result=outcome.result)
        else:
            self._emit("released", job, "SHUTDOWN" if attempt.stop == "shutdown" else "RELEASED")

    def _emit(
        self,
        kind: Kind,
        job: Job | None = None,
        reason: str = "",
        message: str = "",
        result: pb.Payload | None = None,
    ) -> None:
        if self._listener is not None:
            self._listener(WorkerEvent(kind, job, reason, message, result))


def _seconds(value: Duration) -> float:
    return value.seconds + value.nanos / 1e9


def default_worker_id() -> str:
    """Unique per process, also when a restarted pod has its old name and pid."""
    return f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"


def _in_thread(handler: Callable[[Job], Any], job: Job) -> asyncio.Future[Any]:
    """Runs a plain function in a thread that does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    future.add_done_callback(
        lambda done: done.cancelled() or done.exception()
    )  # also when nobody waits for it any more
    context = contextvars.copy_context()

    def work() -> None:
        try:
            answer = context.run(handler, job)
        except BaseException as error:  # noqa: BLE001 - it is the attempt's outcome, whatever it is
            ordinary = isinstance(error, Exception) and not isinstance(error, StopIteration)
            _tell(loop, future, future.set_exception, error if ordinary else RuntimeError(repr(error)))
        else:
            _tell(loop, future, future.set_result, answer)

    threading.Thread(target=work, name=f"retinue-{job.task_id}", daemon=True).start()
    return future


def _tell(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], method: Callable[[Any], None], value: object
) -> None:
    def tell() -> None:
        if not future.done():
            method(value)

    try:
        loop.call_soon_threadsafe(tell)
    except RuntimeError:
        log.debug("the loop ended before the handler did")
