"""One run: an engine under load from several processes in two languages, faults from a seed, and the history of it."""

from __future__ import annotations

import itertools
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import msgspec
from contract.client import Client as Api
from contract.line import seconds
from servers import RunningServer, start_server

from retinue.workqueue.v1 import task_pb2
from support.faults.clients import WORKERS, Client, Crew
from support.faults.engines import Engine
from support.faults.proxy import Mode, Proxy
from support.faults.schedule import Kind, Step, schedule
from support.history import Call, Item, Op, Outcome, Policy, Reply, Story, TaskRecord, read, read_file
from support.history.recorder import Recorder

QUEUE = "load"
POLICY = Policy(max_attempts=8, max_lease_expirations=4)
_MODES = {
    Kind.DELAY: Mode.DELAY,
    Kind.TRICKLE: Mode.TRICKLE,
    Kind.REPLIES_ONLY: Mode.REPLIES_ONLY,
    Kind.REQUESTS_ONLY: Mode.REQUESTS_ONLY,
    Kind.HALF_OPEN: Mode.HALF_OPEN,
}
_ERROR = re.compile(r'"level": "(error|critical)"|^Traceback')
_PAGE = 500
_SAMPLE = 500
_STUCK_S = 180.0


@dataclass(frozen=True)
class Size:
    """When a run has seen enough: at least so many kills of the server over at least so many tasks of producers."""

    kills: int
    tasks: int
    rate: float = 600.0
    """How many tasks a second each of two producers gives at most."""


class Campaign:
    """A server with clients, some of them behind a proxy; a context that ends them all."""

    def __init__(self, directory: Path, engine: Engine, seed: int, go_worker: Path, size: Size) -> None:
        self._size, self._seed = size, seed
        self._history = directory / "history"
        self._history.mkdir()
        self._engine = engine
        self._servers: list[RunningServer] = []
        self._where = directory
        self._recorder = Recorder(self._history, "harness")
        self._crew = Crew(QUEUE, seed, self._history, go_worker)
        self._turns = itertools.count()
        """Clients that dial coordinators dial one after the other; the proxy stands before the first."""
        self._undoing: list[threading.Timer] = []
        self._tasks, self._grew = 0, time.monotonic()
        self.faults: Counter[Kind] = Counter()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._end_servers)
            for number in range(self._engine.coordinators):
                self._start_server(number)
            self._proxy = stack.enter_context(Proxy(self._servers[0].address))
            self._api = stack.enter_context(Api(self._servers[0].control))
            stack.callback(self._crew.kill_all)
            self._create_queue()
            for kind, through_proxy in (("producer", False), ("producer", True), *_WORKERS):
                self._start(kind, through_proxy=through_proxy)
            self._await_load()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._undoing:
            timer.cancel()
        self._open.close()

    def _start_server(self, number: int) -> None:
        where = self._where / f"server-{number}"
        where.mkdir()
        self._recorder.fault("start", "server")
        self._servers.append(start_server(where, env=self._engine.env, module=self._engine.module))

    def _end_servers(self) -> None:
        for server in self._servers:
            server.kill()

    def _create_queue(self) -> None:
        self._api.CreateQueue(
            queue_id=QUEUE,
            settings={
                "max_lease_expirations": POLICY.max_lease_expirations,
                "retry_policy": {
                    "max_attempts": POLICY.max_attempts,
                    "initial_backoff_duration": seconds(0.05),
                    "max_backoff_duration": seconds(0.2),
                },
            },
        )

    def _start(self, kind: str, *, through_proxy: bool) -> None:
        address = (
            self._proxy.address if through_proxy else self._servers[next(self._turns) % len(self._servers)].address
        )
        more = ("--rate", str(self._size.rate)) if kind == "producer" else ()
        self._crew.start(kind, address, *more)

    def _await_load(self) -> None:
        """Faults before every worker has had work would hit nothing."""
        files = [self._history / f"{client.name}.jsonl" for client in self._crew.of(*WORKERS)]
        patience = time.monotonic() + _STUCK_S
        while not all(file.exists() and b'"leased"' in file.read_bytes() for file in files):
            assert time.monotonic() < patience, "not every worker gets work"
            time.sleep(0.05)

    def run(self, steps: Iterable[Step] | None = None) -> None:
        """Plays faults, those of the seed unless others are given, until there were enough of them and enough tasks."""
        for step in schedule(self._seed, self._engine.faults) if steps is None else steps:
            self.play(step)
            if self.faults[Kind.KILL_SERVER] >= self._size.kills and self._has_enough_tasks():
                return

    def play(self, *steps: Step) -> None:
        """Plays these faults."""
        for step in steps:
            time.sleep(step.pause_s)  # the load needs time to get hold of something; nothing waits for it
            self.faults[step.kind] += 1
            self._play(step)

    def _has_enough_tasks(self) -> bool:
        now = self._acknowledged()
        if now > self._tasks:
            self._tasks, self._grew = now, time.monotonic()
        assert time.monotonic() < self._grew + _STUCK_S, f"no more than {now} tasks are acknowledged"
        return now >= self._size.tasks

    def _acknowledged(self) -> int:
        return sum(acknowledged(file) for file in self._history.glob("producer-*.jsonl"))

    # Faults

    def _play(self, step: Step) -> None:
        match step.kind:
            case Kind.KILL_SERVER:
                self._kill_server(step)
            case Kind.STOP_SERVER:
                self._stop_server(step)
            case Kind.KILL_WORKER:
                self._replace(self._picked(step, *WORKERS))
            case Kind.KILL_PRODUCER:
                self._replace(self._picked(step, "producer"))
            case Kind.STOP_WORKER:
                self._stop(self._picked(step, *WORKERS), step.lasts_s)
            case Kind.CUT:
                self._recorder.fault("cut", "proxy")
                self._proxy.cut()
            case kind if play := self._engine.faults.get(kind):
                self._recorder.fault(kind, "engine")
                play()
            case _:
                self._disturb(_MODES[step.kind], step.lasts_s)

    def _kill_server(self, step: Step) -> None:
        number = int(step.pick * len(self._servers))
        self._servers[number].kill()
        self._recorder.fault("kill", "server")  # after its end: the old one writes nothing any more
        time.sleep(step.lasts_s)  # how long there is none
        self._recorder.fault("start", "server")
        self._servers[number] = self._servers[number].restart()

    def _stop_server(self, step: Step) -> None:
        process = self._servers[int(step.pick * len(self._servers))].process
        self._recorder.fault("stop", "server")
        process.send_signal(signal.SIGSTOP)
        time.sleep(step.lasts_s)  # how long it hangs
        process.send_signal(signal.SIGCONT)

    def _picked(self, step: Step, *kinds: str) -> Client:
        some = self._crew.of(*kinds)
        return some[int(step.pick * len(some))]

    def _replace(self, client: Client) -> None:
        self._crew.kill(client)
        self._recorder.fault("kill", client.name)
        self._start(client.kind, through_proxy=self.faults.total() % 2 == 0)

    def _stop(self, client: Client, lasts_s: float) -> None:
        self._recorder.fault("stop", client.name)
        client.signal(signal.SIGSTOP)
        self._later(lasts_s, lambda: client.signal(signal.SIGCONT))

    def _disturb(self, mode: Mode, lasts_s: float) -> None:
        self._recorder.fault(mode.value, "proxy")
        self._proxy.set(mode)
        self._later(lasts_s, lambda: self._proxy.set(Mode.PASS))

    def _later(self, delay_s: float, what: Callable[[], None]) -> None:
        timer = threading.Timer(delay_s, what)
        self._undoing.append(timer)
        timer.start()

    def completed(self) -> int:
        """How many tasks have succeeded."""
        return int(self._stats().succeeded)

    # The end

    def settle(self) -> None:
        """No more faults and no more tasks: what is left is worked off, what died is redriven once and worked off."""
        for timer in self._undoing:
            timer.join()
        self._crew.end("producer")
        self._drain()
        self._redrive()
        self._drain()
        self._crew.end(*WORKERS)
        assert not self._crew.failed, self._crew.failed
        assert not self._internal_errors(), self._internal_errors()[-1]

    def _internal_errors(self) -> list[str]:
        """What no server may ever write into its log."""
        logs = (log.read_text() for log in self._where.glob("server-*/server.log"))
        return [line for log in logs for line in log.splitlines() if _ERROR.search(line)]

    def _drain(self) -> None:
        left, since = self._unfinished(), time.monotonic()
        while left:
            time.sleep(0.1)  # counts are polled
            now = self._unfinished()
            if now < left:
                left, since = now, time.monotonic()
            elif not now:
                return
            assert time.monotonic() < since + _STUCK_S, f"{now} tasks are not worked off: {self._stats()}"

    def _stats(self) -> Any:
        return self._api.GetQueueStats(queue_ids=[QUEUE]).stats[0]

    def _unfinished(self) -> int:
        stats = self._stats()
        return int(stats.scheduled + stats.ready + stats.leased + stats.retrying)

    def _redrive(self) -> None:
        dead = [task.task_id for task in self._listed(states=[task_pb2.TASK_STATE_DEAD])]
        for start in range(0, len(dead), _PAGE):
            ids = dead[start : start + _PAGE]
            n = self._recorder.call(Op.REDRIVE, [Item(task) for task in ids])
            results = self._api.RedriveTasks(task_ids=ids).results
            self._recorder.ok(n, {i: r.status.reason for i, r in enumerate(results) if r.HasField("status")})

    def _listed(self, **wanted: Any) -> Iterator[task_pb2.Task]:
        filter_, token = task_pb2.TaskFilter(queue_id=QUEUE, **wanted), ""
        while True:
            page = self._api.ListTasks(filter=filter_, page_size=_PAGE, page_token=token)
            yield from page.tasks
            token = page.next_page_token
            if not token:
                return

    def story(self) -> Story:
        """What happened, and what it came to."""
        tasks = {task.task_id: record(task) for task in self._listed()}
        for task_id, result in self._results([name for name, task in tasks.items() if task.state == "SUCCEEDED"]):
            tasks[task_id] = msgspec.structs.replace(tasks[task_id], result=result)
        self._recorder.fault("read", "tasks")
        return Story(
            read(self._history), tasks.values(), replace(POLICY, renewed_at_start=self._engine.renewed_at_start)
        )

    def _results(self, task_ids: list[str]) -> Iterator[tuple[str, str]]:
        """What some of the tasks gave back."""
        some = random.Random(self._seed).sample(task_ids, min(_SAMPLE, len(task_ids)))
        for task_id, call in [(task_id, self._api.begin("GetTask", task_id=task_id)) for task_id in some]:
            yield task_id, call.result().task.result.text


_WORKERS = (("python", False), ("python", True), ("library", False), ("go", True))


def acknowledged(file: Path) -> int:
    """How many tasks a producer was told OK for, so far."""
    events = read_file(file)
    sizes = {event.n: len(event.items) for event in events if isinstance(event, Call)}
    return sum(sizes[e.n] for e in events if isinstance(e, Reply) and e.outcome == Outcome.OK)


def record(task: task_pb2.Task) -> TaskRecord:
    """A task for the history."""
    return TaskRecord(
        task.task_id,
        task_pb2.TaskState.Name(task.state).removeprefix("TASK_STATE_"),
        task.attempt,
        task.lease_expirations,
        task.lease_epoch,
        task.parent_task_id,
        int(task.spec.labels.get("epoch", 0)),
    )
