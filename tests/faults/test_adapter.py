"""An adapter while its worker, its sources and itself are ended: what is collected goes on, nothing hangs or grows."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from contract.client import ADAPTER, Client, Refused
from contract.conftest import Serve
from contract.line import seconds
from servers import RunningServer
from sources import Source, page
from workers import eventually

from retinue.adapter.v1 import target_pb2

UP, STALE, DOWN = (getattr(target_pb2, f"TARGET_STATE_{name}") for name in ("UP", "STALE", "DOWN"))
FLAT_MIB = 24
"""By how much server and worker may grow once they have seen everything: what the allocator keeps."""


class World:
    """A server, an operator, and targets that are collected every second."""

    def __init__(self, server: RunningServer, operator: Client) -> None:
        self.server, self.operator = server, operator

    def create(self, target_id: str, source: Source, **fields: Any) -> None:
        said = {"kind": "TARGET_KIND_PROMETHEUS", "endpoint": source.endpoint, "interval_duration": seconds(1)}
        target = {"target_id": target_id, **said, **fields}
        self.operator.CreateTarget(target=target, wait_duration=seconds(15))

    def state(self, target_id: str) -> int:
        return int(self.operator.GetTarget(target_id=target_id).target.status.state)

    def becomes(self, target_id: str, *states: int) -> None:
        eventually(lambda: self.state(target_id) in states, f"{target_id} is in {states}")

    def value(self, line: str) -> float:
        """Of a line of /metrics that begins so."""
        text = page(self.server.ready["metrics"])[2]
        return next(float(one.rpartition(" ")[2]) for one in text.splitlines() if one.startswith(line))

    def worker(self) -> int:
        """The process id of the worker; 0 = there is none now."""
        children = Path(f"/proc/{self.server.process.pid}/task/{self.server.process.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        return next((pid for pid, command in commands.items() if b"retinue_server.adapter.worker" in command), 0)

    def memory_mib(self) -> float:
        """Of server and worker together."""
        found = 0.0
        for pid in (self.server.process.pid, self.worker()):
            [line] = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("VmRSS:")]
            found += int(line.split()[1]) / 1024
        return found


@pytest.fixture
def world(serve: Serve) -> Iterator[World]:
    server = serve("adapter", "--metrics", "127.0.0.1:0")
    with Client(server.control, services=ADAPTER) as operator:
        yield World(server, operator)
    log = (server.data_dir.parent / "server.log").read_text()
    assert "Traceback" not in log


@pytest.fixture
def sources() -> Iterator[list[Source]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Source("# TYPE jobs_total counter\njobs_total 5\n")) for _ in range(5)]


def test_a_worker_that_is_killed_under_load_costs_collections_and_no_target(
    world: World, sources: list[Source]
) -> None:
    for number, source in enumerate(sources):
        world.create(f"t-{number}", source)
    for turn in range(1, 4):
        pid = world.worker()
        assert pid
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: world.worker() not in (0, pid), "another one is started")
        for number in range(len(sources)):
            world.becomes(f"t-{number}", UP)
        assert world.value("retinue_adapter_worker_restarts_total") == turn
    assert world.value('retinue_adapter_collections_total{outcome="succeeded"}') >= 2 * len(sources)


def test_targets_that_flap_are_told_as_they_are_and_disturb_no_other(world: World, sources: list[Source]) -> None:
    steady, flapping = sources[0], sources[1]
    world.create("steady", steady)
    world.create("flapping", flapping)
    for _ in range(2):
        flapping.status = 500
        world.becomes("flapping", STALE)
        flapping.status = 200
        world.becomes("flapping", UP)
    assert world.state("steady") == UP
    flapping.status = 500
    world.becomes("flapping", DOWN)
    assert 'target="flapping"' not in page(world.server.ready["metrics"], "/metrics/flapping")[2]
    assert world.state("steady") == UP


def test_a_source_that_restarts_is_one_reset(world: World, sources: list[Source]) -> None:
    """Seen by its start time, once, though it goes on to be collected."""
    source = sources[0]
    world.create("t", source)
    starts: list[int] = []
    values: list[float] = []
    with world.operator.stream("WatchMetrics", matches=[{"target_ids": ["t"]}]) as stream:
        for said in (None, 9.0, 1.0, 3.0, 12.0):
            if said is not None:
                source.text = f"# TYPE jobs_total counter\njobs_total {said}\n"
            [series] = stream.read().metrics[0].series
            starts.append(series.start_time.ToMilliseconds())
            values.append(series.number)
    assert values == [5.0, 9.0, 1.0, 3.0, 12.0]
    assert starts[0] == starts[1] < starts[2] == starts[3] == starts[4]


def test_a_server_that_is_asked_to_end_ends_its_watchers_with_a_reason(world: World, sources: list[Source]) -> None:
    world.create("t", sources[0])
    ended: list[Refused] = []
    watching = [threading.Event() for _ in range(4)]

    def watch(method: str, begun: threading.Event) -> None:
        with Client(world.server.address, services=ADAPTER) as client, client.stream(method) as stream:
            try:
                for _ in stream:
                    begun.set()
            except Refused as error:
                ended.append(error)

    threads = [
        threading.Thread(target=watch, args=(method, begun))
        for method, begun in zip(["WatchMetrics", "WatchSignals"] * 2, watching, strict=True)
    ]
    for thread in threads:
        thread.start()
    assert all(begun.wait(60) for begun in watching)
    assert world.server.stop() == 0
    for thread in threads:
        thread.join(60)
    assert [(one.code, one.reason) for one in ended] == [("UNAVAILABLE", "SHUTTING_DOWN")] * 4


def test_a_server_that_is_killed_leaves_no_worker_behind(world: World, sources: list[Source]) -> None:
    world.create("t", sources[0])
    pid = world.worker()
    world.server.kill()
    eventually(lambda: not Path(f"/proc/{pid}/cmdline").exists(), "the worker ends")


def test_memory_is_flat_over_thousands_of_collections_of_series_that_come_and_go(world: World) -> None:
    """Two hundred new series a turn, tried and collected; and targets that come and go."""
    target = {"target_id": "churn", "kind": "TARGET_KIND_PROMETHEUS"}
    with Source() as source:

        def turn(number: int) -> None:
            lines = (f'x_{n % 10}{{request="{number}-{n}"}} 1\n' for n in range(200))
            source.text = "".join(lines)
            found = world.operator.TestTarget(target={**target, "endpoint": source.endpoint})
            assert len(found.points) == 200
            name = {"target_id": f"t-{number}"}
            created = {**target, **name, "endpoint": source.endpoint}
            world.operator.CreateTarget(target=created, wait_duration=seconds(15))
            world.operator.UpdateTarget(target={**created, "service": "other"})
            assert world.operator.DeleteTarget(**name).deleted

        for number in range(100):
            turn(number)
        before = world.memory_mib()
        for number in range(100, 250):
            turn(number)
        assert world.memory_mib() < before + FLAT_MIB
