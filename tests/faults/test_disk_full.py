"""A full disk: new data is refused with DISK_FULL and changes nothing, work that is there ends, and all recovers alone.

On real small file systems, filled by the callers themselves or by another program.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from contract.client import Client, Refused
from contract.conftest import new_line
from contract.line import Line, seconds, text
from faults.disks import KINDS, MIB, Filler, mounted, why_not
from faults.tables import LONG, PATIENT, Row
from servers import RunningServer, start_server

from retinue.workqueue.v1 import task_pb2
from retinue.workqueue.v1.blob_service_pb2 import UploadBlobRequest

pytestmark = PATIENT
SIZE_MIB = 64
RESERVE = SIZE_MIB * MIB // 8
BODY = task_pb2.Payload(data=bytes(60_000))


@dataclass
class Small:
    """A server whose data is on a small disk."""

    kind: str
    server: RunningServer
    filler: Filler
    log: Path
    app: Client
    operator: Client

    def metric(self, name: str, what: str) -> float:
        """A gauge's value; it is as of some seconds ago."""
        with urllib.request.urlopen(f"http://{self.server.ready['metrics']}/metrics", timeout=60) as page:
            [line] = [line for line in page.read().decode().splitlines() if line.startswith(f'{name}{{for="{what}"}}')]
        return float(line.split()[-1])

    def warnings(self, word: str) -> list[str]:
        """What the log says of it."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line["message"] for line in lines if line["level"] == "warning" and word in line["message"]]

    def serves(self) -> bool:
        with urllib.request.urlopen(f"http://{self.server.ready['metrics']}/healthz", timeout=60) as page:
            return bool(page.status == 200)


@pytest.fixture(params=["ext4"])
def small(request: pytest.FixtureRequest) -> Iterator[Small]:
    if reason := why_not(request.param):
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="retinue-") as name, ExitStack() as stack:
        where = Path(name)
        disk = stack.enter_context(mounted(request.param, where / "data", SIZE_MIB))
        server = start_server(where, "--metrics", "127.0.0.1:0")
        stack.callback(server.kill)
        app, operator = Client(server.address), Client(server.control)
        stack.callback(app.channel.close)
        stack.callback(operator.channel.close)
        small = Small(request.param, server, Filler(disk), where / "server.log", app, operator)
        stack.callback(lambda: small.server.kill())  # noqa: PLW0108 - the one that is there then
        yield small
        assert small.server.stop() == 0, "it lived through all of it"


def until(what: Callable[[], object], wait: float = 90) -> None:
    """Returns once it is so."""
    end = time.monotonic() + wait
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.05)
    assert found


def check_full(error: Refused) -> None:
    """Refused as the contract says: DISK_FULL, with a time at which to try again."""
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "DISK_FULL"), error
    assert error.retry_s


def taken(call: Callable[..., object], *args: object) -> bool:
    """Whether it was accepted; the only refusal is a full disk."""
    try:
        call(*args)
    except Refused as error:
        check_full(error)
        return False
    return True


def fill_with_tasks(line: Line) -> list[str]:
    """Enqueues until that is refused; what was acknowledged."""
    ids: list[str] = []
    while taken(lambda: ids.extend(line.put_many(10, input=BODY))):
        assert len(ids) * len(BODY.data) < SIZE_MIB * MIB
    return ids


def counts(app: Client, line: Line) -> int:
    [stats] = app.GetQueueStats(queue_ids=[line.id]).stats
    return int(stats.ready + stats.leased)


def upload(app: Client, content: bytes) -> str:
    pieces = [UploadBlobRequest(data=content[i : i + MIB]) for i in range(0, len(content), MIB)]
    return str(app.upload(*pieces).blob_id)


def test_a_disk_that_tasks_filled_refuses_more_and_lets_all_be_worked_off(small: Small) -> None:
    line = new_line(small.app)
    operator = small.operator
    operator.CreateQueue(queue_id=line.id, settings={"lease_duration": seconds(2)})
    ids = fill_with_tasks(line)
    assert len(ids) > 200
    for _ in range(20):
        assert not taken(line.put)
    assert counts(small.app, line) == len(ids), "a refused call changes nothing"

    leases = [lease for _ in range(len(ids) // 10) for lease in line.take(10, lease_duration=seconds(600))]
    assert [lease.task_id for lease in leases] == ids
    first, second, third, *rest = leases
    assert not line.fail(first, retry_delay_duration=seconds(3600)).HasField("status")
    assert not line.release(second, delay_duration=seconds(3600)).HasField("status")
    for start in range(0, len(rest), 100):
        block = [{"lease_token": lease.lease_token} for lease in rest[start : start + 100]]
        assert not any(r.HasField("status") for r in small.app.ExtendLeases(extensions=block).results)
        done = [{**item, "result": text("r" * 100)} for item in block]
        assert not any(r.HasField("status") for r in small.app.CompleteTasks(completions=done).results)
    assert not line.complete(third, follow_ups=[line.spec(task_id="child")]).HasField("status")
    line.take_one(lease_duration=seconds(1))
    again = line.take_one()
    assert (again.task_id, again.lease_epoch) == ("child", 2), "the sweep goes on"
    assert small.serves()
    until(lambda: small.metric("retinue_workqueue_admitting", "tasks") == 0)
    assert small.metric("retinue_workqueue_disk_free_bytes", "tasks") < 2 * RESERVE

    operator.PurgeQueue(queue_id=line.id, include_finished=True)
    until(partial(taken, line.put))
    assert len(fill_with_tasks(new_line(small.app))) > 200, "what was deleted made room, in the file itself"
    assert len(small.warnings("no more tasks")) == 2, "once a change, not once a call"
    assert len(small.warnings("tasks are taken in again")) == 1


def test_a_log_that_fills_the_disk_gives_its_room_back_when_tasks_are_deleted(small: Small) -> None:
    line = new_line(small.app)
    fill_with_tasks(line)
    small.filler.leave(RESERVE // 8)
    until(lambda: not taken(line.put))
    small.operator.PurgeQueue(queue_id=line.id)
    until(partial(taken, line.put))


def test_a_disk_that_blobs_filled_refuses_more_keeps_nothing_of_them_and_completes(small: Small) -> None:
    line = new_line(small.app)
    leases = [line.lend() for _ in range(20)]
    kept: list[bytes] = []
    for i in range(SIZE_MIB):
        content = i.to_bytes(4, "big") * (MIB // 2)
        if not taken(upload, small.app, content):
            break
        kept.append(content)
    assert len(kept) > 10
    with pytest.raises(Refused) as lost:
        small.app.StatBlob(blob_id=hashlib.sha256(content).hexdigest())
    assert lost.value.reason == "BLOB_NOT_FOUND"
    assert list((small.server.data_dir / "workqueue/blobs/uploads").iterdir()) == []
    fill_with_tasks(line)
    for lease in leases:
        assert not line.complete(lease, result=text("done")).HasField("status")
    for content in kept:
        with small.app.stream("DownloadBlob", blob_id=hashlib.sha256(content).hexdigest()) as stream:
            assert b"".join(piece.data for piece in stream) == content
    until(lambda: small.metric("retinue_workqueue_admitting", "blobs") == 0)
    assert len(small.warnings("no more blobs")) == 1


def test_a_disk_that_another_program_filled_serves_again_when_there_is_room(small: Small) -> None:
    line = new_line(small.app)
    leases = [line.lend() for _ in range(50)]
    small.filler.leave(RESERVE // 2)
    until(lambda: not taken(line.put))
    assert not taken(upload, small.app, bytes(MIB))
    for lease in leases[:25]:
        assert not line.complete(lease, result=text("done")).HasField("status")
    small.filler.fill()
    for lease in leases[25:]:
        taken(line.complete, lease)
    assert not taken(line.put)
    small.filler.empty()
    for lease in leases[25:]:
        until(partial(taken, line.complete, lease))
    until(partial(taken, line.put))
    until(partial(taken, upload, small.app, bytes(MIB)))
    done = line.tasks(states=[task_pb2.TASK_STATE_SUCCEEDED])
    assert len(done) == len(leases)


def test_a_server_starts_on_a_disk_that_is_nearly_full(small: Small) -> None:
    line = new_line(small.app)
    ids = fill_with_tasks(line)
    small.server.kill()
    small.server = small.server.restart()
    assert counts(small.app, line) == len(ids)
    fill_with_tasks(line)  # the log, emptied at the start, has given some room back
    assert not line.complete(line.take_one()).HasField("status")


@dataclass
class Work:
    """One kind of call made over and over while the disk fills; what came of it."""

    call: Callable[[], list[str]]
    acknowledged: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self.acknowledged += self.call()
            except Refused as error:
                self.refused[f"{error.code} {error.reason}"] += 1
                time.sleep(0.005)  # as a caller would; the loop is bounded by `stop`


class Load:
    """Callers that enqueue, complete and upload at the same time."""

    def __init__(self, small: Small) -> None:
        self.line, self.done = new_line(small.app), new_line(small.app)
        self.done.put_many(10)
        self._held: list[task_pb2.Lease] = []
        app = small.app
        self.work = {
            "enqueue": Work(lambda: self.line.put_many(5)),
            "complete": Work(self._complete),
            "upload": Work(lambda: [upload(app, os.urandom(4_096))]),
        }

    def _complete(self) -> list[str]:
        """Each completion brings the next task, which is taken in on a full disk too; what is refused is repeated."""
        self._held = self._held or self.done.take(10)
        if not self._held:
            return []
        done = [{"lease_token": lease.lease_token, "follow_ups": [self.done.spec()]} for lease in self._held]
        results = self.done.app.CompleteTasks(completions=done).results
        leases, self._held = self._held, []
        return [x.task_id for x, r in zip(leases, results, strict=True) if not r.HasField("status")]

    def marks(self) -> dict[str, tuple[int, int]]:
        """How many calls were accepted and refused so far, by kind."""
        return {name: (len(w.acknowledged), sum(w.refused.values())) for name, w in self.work.items()}

    def accepts(self, name: str, before: dict[str, tuple[int, int]]) -> bool:
        """Whether a call of this kind has been accepted since."""
        return self.marks()[name][0] > before[name][0]

    def all_accept(self, before: dict[str, tuple[int, int]]) -> bool:
        """Whether every kind of call has been accepted since."""
        return all(self.accepts(name, before) for name in self.work)

    def new_data_is_refused(self, before: dict[str, tuple[int, int]]) -> bool:
        """Whether enqueueing and uploading have been refused since."""
        return all(self.marks()[name][1] > before[name][1] for name in ("enqueue", "upload"))

    def lost(self, small: Small) -> dict[str, int]:
        """What was acknowledged and is not there."""
        there = {task.task_id for task in _all_tasks(small.app, self.line)}
        ended = {task.task_id for task in _all_tasks(small.app, self.done, states=[task_pb2.TASK_STATE_SUCCEEDED])}
        blobs = small.server.data_dir / "workqueue" / "blobs"
        return {
            "enqueue": len(set(self.work["enqueue"].acknowledged) - there),
            "complete": len(set(self.work["complete"].acknowledged) - ended),
            "upload": sum(not _is_whole(blobs, blob_id) for blob_id in self.work["upload"].acknowledged),
        }


def _all_tasks(app: Client, line: Line, **wanted: Any) -> Iterator[task_pb2.Task]:
    token = ""
    while True:
        page = app.ListTasks(filter={"queue_id": line.id, **wanted}, page_size=500, page_token=token)
        yield from page.tasks
        token = page.next_page_token
        if not token:
            return


def _is_whole(blobs: Path, blob_id: str) -> bool:
    path = blobs / blob_id[:2] / blob_id
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == blob_id


FILLS: dict[str, Callable[[Filler], None]] = {
    "filled to the reserve": lambda filler: filler.leave(RESERVE // 2),
    "filled to the last byte": lambda filler: filler.fill(),
}


@pytest.mark.parametrize("small", KINDS, indirect=True)
@pytest.mark.parametrize("fault", FILLS)
def test_nothing_acknowledged_is_lost_while_the_disk_fills_and_empties_under_load(
    small: Small, row: Row, fault: str
) -> None:
    """Another program takes the rest of the disk and gives it back; to the reserve, work that is there goes on."""
    load, stop, rounds = Load(small), threading.Event(), 15 if LONG else 2
    threads = [threading.Thread(target=work.run, args=(stop,)) for work in load.work.values()]
    for thread in threads:
        thread.start()
    try:
        for _ in range(rounds):
            until(partial(load.all_accept, load.marks()))
            FILLS[fault](small.filler)
            until(partial(load.new_data_is_refused, load.marks()))
            if fault == "filled to the reserve":
                until(partial(load.accepts, "complete", load.marks()))
            small.filler.empty()
        until(partial(load.all_accept, load.marks()))
    finally:
        stop.set()
        for thread in threads:
            thread.join(90)
    small.server.kill()
    small.server = small.server.restart()
    lost = load.lost(small)
    for name, work in load.work.items():
        row(
            "disk full",
            fault=f"{small.kind} {fault}, during {name}",
            count=rounds,
            acknowledged=len(work.acknowledged),
            lost=lost[name],
            refused=", ".join(f"{count} {code}" for code, count in sorted(work.refused.items())) or "none",
            recovered_without_restart=f"{rounds} of {rounds}",
        )
    assert lost == {"enqueue": 0, "complete": 0, "upload": 0}
    assert all(set(work.refused) <= {"RESOURCE_EXHAUSTED DISK_FULL"} for work in load.work.values())
    assert fault == "filled to the last byte" or not load.work["complete"].refused
