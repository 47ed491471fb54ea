"""Power loss and syncs that fail: nothing acknowledged is lost, files are sound, a failed sync ends the process."""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pytest
from contract.client import Client, Refused
from contract.conftest import new_line
from contract.line import Line, text
from faults import power
from faults.tables import LONG, PATIENT, Row
from servers import RunningServer, environment, start_server

from retinue.workqueue.v1 import task_pb2
from retinue.workqueue.v1.blob_service_pb2 import UploadBlobRequest
from retinue_server.workqueue.engines.local_blobs import LocalBlobs
from retinue_server.workqueue.engines.sqlite import SqliteEngine

pytestmark = PATIENT
SEEDS = 500 if LONG else 20
RECORDING_BYTES = (64 if LONG else 18) * 1024 * 1024
BODY = task_pb2.Payload(data=bytes(range(250)) * 8)
FATAL_EXIT = 70


class Acknowledged(NamedTuple):
    """Something that was answered with OK when the recording had this length."""

    at: int
    kind: str
    id: str


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return power.compiled(tmp_path_factory.mktemp("power"))


class Shimmed:
    """A server whose files are watched, in a directory of its own."""

    def __init__(self, where: Path, library: Path, stack: ExitStack, **env: str) -> None:
        self.root, self.recording, self.control = where / "root", where / "recording", where / "fail"
        self.root.mkdir()
        watched = {"POWER_ROOT": str(self.root), "POWER_LOG": str(self.recording), "POWER_FAIL": str(self.control)}
        self.server = start_server(self.root, env={"LD_PRELOAD": str(library), **watched, **env})
        stack.callback(lambda: self.server.kill())  # noqa: PLW0108 - the one that is there then
        self.app = Client(self.server.address)
        stack.callback(self.app.channel.close)

    def fail_sync(self, pattern: str, count: int = 1) -> None:
        """From now on the `count`-th sync of a path like this fails."""
        begun = self.control.with_suffix(".new")
        begun.write_text(f"{pattern} {count}\n")
        begun.rename(self.control)

    def restart(self) -> None:
        """A new process on the same files; no sync fails any more."""
        self.control.unlink(missing_ok=True)
        self.server = self.server.restart()

    def log(self) -> str:
        return (self.root / "server.log").read_text()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def shimmed(library: Path, stack: ExitStack) -> Callable[..., Shimmed]:
    """Starts a watched server."""

    def make(**env: str) -> Shimmed:
        where = stack.enter_context(tempfile.TemporaryDirectory(prefix="retinue-"))
        return Shimmed(Path(where).resolve(), library, stack, **env)

    return make


def upload(app: Client, content: bytes) -> str:
    return str(app.upload(UploadBlobRequest(data=content)).blob_id)


class Load:
    """Callers at work, and what they were told."""

    def __init__(self, it: Shimmed) -> None:
        self._it, self._line, self._other = it, new_line(it.app), new_line(it.app)
        self.acknowledged: list[Acknowledged] = []

    def run(self) -> None:
        """Until enough is recorded; then the server is killed while they go on."""
        stop = threading.Event()
        threads = [threading.Thread(target=self._repeat, args=(stop, call)) for call in self._calls()]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 300
        while self._recorded() < RECORDING_BYTES and time.monotonic() < end:
            time.sleep(0.02)
        self._it.server.kill()
        stop.set()
        self._it.app.channel.close()
        for thread in threads:
            thread.join(90)

    def _calls(self) -> tuple[Callable[[], tuple[str, list[str]]], ...]:
        return self._enqueue, self._enqueue, self._complete, self._upload

    def _recorded(self) -> int:
        return self._it.recording.stat().st_size

    def _repeat(self, stop: threading.Event, call: Callable[[], tuple[str, list[str]]]) -> None:
        with suppress(Refused, ValueError):  # the server is gone, or the channel is closed
            while not stop.is_set():
                kind, ids = call()
                at = self._recorded()
                self.acknowledged += [Acknowledged(at, kind, id_) for id_ in ids]

    def _enqueue(self) -> tuple[str, list[str]]:
        return "enqueue", self._line.put_many(10, input=BODY)

    def _complete(self) -> tuple[str, list[str]]:
        leases = self._line.take(5)
        done = [
            {"lease_token": x.lease_token, "result": text("r" * 500), "follow_ups": [self._other.spec()]}
            for x in leases
        ]
        if not done:
            return "complete", []
        results = self._it.app.CompleteTasks(completions=done).results
        return "complete", [x.task_id for x, r in zip(leases, results, strict=True) if not r.HasField("status")]

    def _upload(self) -> tuple[str, list[str]]:
        return "upload", [upload(self._it.app, uuid.uuid4().bytes * 8_000)]


async def lost(data: Path, acknowledged: list[Acknowledged]) -> Counter[str]:
    """What was acknowledged and is not there; the server's own engine opens the files first."""
    failures: list[BaseException] = []
    engine = SqliteEngine(data / "workqueue/queue.db", failures.append)
    blobs = LocalBlobs(data / "workqueue/blobs", 1 << 30, failures.append)
    await engine.start()
    await blobs.start()
    missing: Counter[str] = Counter()
    db = apsw.Connection(str(data / "workqueue/queue.db"), flags=apsw.SQLITE_OPEN_READONLY)
    assert db.pragma("integrity_check") == "ok"
    states = dict(db.execute("SELECT task_id, state FROM task"))
    parents = Counter(row[0] for row in db.execute("SELECT parent_task_id FROM task WHERE parent_task_id <> ''"))
    for _, kind, id_ in acknowledged:
        if kind == "upload":
            content = b"" if await blobs.stat(id_) is None else await blobs.read(id_, 0, 1 << 30)
            missing[kind] += hashlib.sha256(content).hexdigest() != id_
        elif kind == "enqueue":
            missing[kind] += id_ not in states
        else:
            missing[kind] += (states.get(id_), parents[id_]) != (5, 1)
    db.close()
    await engine.stop()
    assert not failures
    return missing


class Outcome(NamedTuple):
    """What became of one power loss."""

    told: Counter[str]
    missing: Counter[str]
    unsound: str


async def lose_power(it: Shimmed, acknowledged: list[Acknowledged], seeds: range) -> dict[int, Outcome]:
    """Plays each seed: the power goes at some point, and the files that are left are looked at."""
    log = list(power.records(it.recording))
    chances = {seed: random.Random(seed) for seed in seeds}
    points = {seed: _point(log, chance) for seed, chance in chances.items()}
    disk, done, outcomes = power.Disk(), 0, {}
    for seed in sorted(seeds, key=points.__getitem__):
        for record in log[done : points[seed]]:
            disk.apply(record)
        done = points[seed]
        end = log[done - 1].end
        told = [a for a in acknowledged if a.at <= end]
        left = disk.lose_power(chances[seed])
        outcomes[seed] = await _look(left, it.root, told)
    return outcomes


def _point(log: list[power.Record], chance: random.Random) -> int:
    """Anywhere, or just before or after a sync or a name's change."""
    point = chance.randrange(1, len(log) + 1)
    if chance.random() < 0.5:
        while point < len(log) and log[point - 1].op == "W":
            point += 1
        point -= chance.randrange(2)
    return max(1, point)


async def _look(left: dict[str, bytes | None], root: Path, told: list[Acknowledged]) -> Outcome:
    said = Counter(a.kind for a in told)
    with tempfile.TemporaryDirectory(prefix="retinue-") as name:
        power.write_out(left, str(root), Path(name))
        try:
            return Outcome(said, await lost(Path(name) / "data", told), "")
        except Exception as error:  # noqa: BLE001 - whatever keeps it from starting is the finding
            return Outcome(said, Counter(), repr(error))


async def test_nothing_acknowledged_is_lost_when_the_power_goes(shimmed: Callable[..., Shimmed], row: Row) -> None:
    it = shimmed()
    load = Load(it)
    load.run()
    outcomes = await lose_power(it, load.acknowledged, range(SEEDS))
    checkpoints = sum(r.op == "S" and r.path.endswith("queue.db") for r in power.records(it.recording))
    told, missing = Counter[str](), Counter[str]()
    for outcome in outcomes.values():
        told += outcome.told
        missing += outcome.missing
    bad = {seed: outcome for seed, outcome in outcomes.items() if outcome.missing.total() or outcome.unsound}
    for kind in ("enqueue", "complete", "upload"):
        row(
            "power loss",
            fault=f"power loss, {kind}",
            count=len(outcomes),
            acknowledged=told[kind],
            lost=missing[kind],
            unsound_files=sum(bool(o.unsound) for o in outcomes.values()),
            checkpoints_recorded=checkpoints,
            recovered="yes" if not bad else "no",
        )
    assert bad == {}
    assert all(told[kind] for kind in ("enqueue", "complete", "upload"))
    assert checkpoints > 1


async def test_a_server_serves_what_a_power_loss_left(shimmed: Callable[..., Shimmed], stack: ExitStack) -> None:
    it = shimmed()
    line = new_line(it.app)
    done = line.lend(input=text("in"))
    line.complete(done, result=text("out"))
    held, waiting, blob = line.lend(), line.put(), upload(it.app, b"content")
    it.server.kill()
    disk = power.Disk()
    for record in power.records(it.recording):
        disk.apply(record)
    for seed in range(6 if LONG else 2):
        where = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="retinue-")))
        power.write_out(disk.lose_power(random.Random(seed)), str(it.root), where)
        server = start_server(where)
        stack.callback(server.kill)
        with Client(server.address) as app:
            after = Line(app, line.id)
            assert after.get(done.task_id).result.text == "out"
            assert after.state(waiting) == "READY"
            assert not after.complete(held).HasField("status")
            with app.stream("DownloadBlob", blob_id=blob) as stream:
                assert b"".join(piece.data for piece in stream) == b"content"
        assert server.stop() == 0


async def test_a_server_that_does_not_sync_is_caught(shimmed: Callable[..., Shimmed]) -> None:
    broken = Path(__file__).parent / "unsynced"
    it = shimmed(PYTHONPATH=os.pathsep.join([str(broken), environment()["PYTHONPATH"]]))
    line = new_line(it.app)
    told = [Acknowledged(it.recording.stat().st_size, "enqueue", line.put()) for _ in range(50)]
    it.server.kill()
    outcomes = await lose_power(it, told, range(20))
    assert any(outcome.unsound or outcome.missing["enqueue"] for outcome in outcomes.values())


FAILING: dict[str, tuple[str, Callable[[Line], object]]] = {
    "a commit's": ("*/queue.db-wal", lambda line: line.put()),
    "a blob's": ("*/uploads/*", lambda line: upload(line.app, b"content")),
    "a directory's": ("*/blobs", lambda line: upload(line.app, b"content")),
}


def exit_code(server: RunningServer) -> int:
    return server.process.wait(60)


@pytest.mark.parametrize("whose", FAILING)
def test_a_sync_that_fails_ends_the_process_unacknowledged_and_a_restart_has_all_else(
    shimmed: Callable[..., Shimmed], row: Row, whose: str
) -> None:
    it = shimmed()
    line = new_line(it.app)
    task_id, lease, blob = line.put(priority=-1), line.lend(), upload(it.app, b"before")
    pattern, call = FAILING[whose]
    it.fail_sync(pattern)
    with pytest.raises(Refused):
        call(line)
    assert exit_code(it.server) == FATAL_EXIT
    assert "cannot go on" in it.log()
    it.restart()
    assert line.state(task_id) == "READY"
    assert not line.complete(lease).HasField("status")
    assert it.app.StatBlob(blob_id=blob).size_bytes == 6
    row(
        "failing fsync",
        fault=f"{whose} fsync fails",
        acknowledged=3,
        lost=0,
        process="exits 70 and says why",
        after_restart="all there",
    )


def test_a_checkpoint_whose_sync_fails_ends_the_process_and_a_restart_has_all(
    shimmed: Callable[..., Shimmed], row: Row
) -> None:
    it = shimmed()
    line = new_line(it.app)
    told: list[str] = []
    it.fail_sync("*/queue.db")
    with suppress(Refused):
        while len(told) < 20_000:
            told += line.put_many(10, input=BODY)
    assert exit_code(it.server) == FATAL_EXIT
    assert "cannot go on" in it.log()
    it.restart()
    there: set[str] = set()
    page: Any = None
    while page is None or page.next_page_token:
        token = page.next_page_token if page else ""
        page = it.app.ListTasks(filter={"queue_id": line.id}, page_size=500, page_token=token)
        there |= {task.task_id for task in page.tasks}
    assert set(told) <= there
    row(
        "failing fsync",
        fault="a checkpoint's fsync fails",
        acknowledged=len(told),
        lost=len(set(told) - there),
        process="exits 70 and says why",
        after_restart="all there",
    )


def recorded(op: str, path: str, data: bytes = b"", inode: int = 1) -> power.Record:
    return power.Record(0, op, path, inode, 0, 0, data)


def test_the_disk_of_these_tests_keeps_what_was_synced_and_loses_or_tears_the_rest() -> None:
    disk = power.Disk()
    synced, more = b"s" * 1024, b"m" * 1024
    begun = [
        recorded("M", "/r/d", inode=0),
        recorded("D", "/r"),
        recorded("C", "/r/d/f"),
        recorded("W", "/r/d/f", synced),
    ]
    for record in [*begun, recorded("S", "/r/d/f")]:
        disk.apply(record)
    nameless = [disk.lose_power(random.Random(seed)) for seed in range(50)]
    assert any("/r/d/f" not in left for left in nameless), "its directory was not synced"
    assert all(left.get("/r/d/f", synced) == synced for left in nameless)
    for record in [recorded("D", "/r/d"), recorded("W", "/r/d/f", more)]:
        disk.apply(record)
    contents = {disk.lose_power(random.Random(seed))["/r/d/f"] for seed in range(200)}
    assert contents == {synced, more, b"m" * 512 + b"s" * 512, b"s" * 512 + b"m" * 512}
