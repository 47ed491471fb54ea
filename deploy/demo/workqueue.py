"""`make demo`: over a thousand real files through three stages of ordinary tools, while server and workers are killed.

Each stage is a queue with a runner; `--then` enqueues the next stage's task in the commit that completes this one. At
the end the three output trees are compared with those of a serial run, and the queues' own bookkeeping is printed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from rich.console import Console
from rich.live import Live
from rich.table import Table

from retinue.workqueue.v1 import (
    task_pb2,
    workqueue_admin_service_pb2,
    workqueue_admin_service_pb2_grpc,
    workqueue_service_pb2,
    workqueue_service_pb2_grpc,
)

FILES = int(os.environ.get("DEMO_FILES", "1100"))
LARGEST = 64 * 1024
STAGES = {
    "compress": ["gzip", "-nc"],
    "count": ["sh", "-c", "gzip -dc | wc"],
    "hash": ["sha256sum"],
}
"""What each stage does with its standard input; a queue has its name."""
KILLS = (("server", 0.15), ("count", 0.30), ("server", 0.45), ("compress", 0.55), ("hash", 0.75), ("server", 0.85))
"""Who is killed with SIGKILL, and at what share of the work."""
LEASE = "4s"

console = Console()


def main() -> int:
    """Runs the demo; 0 if everything is as in the serial run."""
    root = Path(".retinue/demo").absolute()
    shutil.rmtree(root, ignore_errors=True)
    sources = stage_in(root / "input")
    console.print(
        f"{len(sources)} Python files of the standard library and the installed packages, {len(STAGES)} stages"
    )
    suite = Suite(root)
    try:
        suite.start()
        enqueue(suite, root / "input", sources)
        seconds = follow(suite, len(sources))
        book = suite.book()
    finally:
        suite.stop()
    console.print("the same, serially ...")
    started = time.monotonic()
    serial(root / "input", root / "serial", sources)
    return report(root, sources, suite, book, (seconds, time.monotonic() - started))


def stage_in(target: Path) -> list[str]:
    """Copies the sources to one tree; their paths in it, sorted."""
    places = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    found: list[str] = []
    for path in (p for place in places for p in sorted(place.rglob("*.py"))):
        if len(found) >= FILES:
            break
        if not path.is_file() or not 0 < path.stat().st_size <= LARGEST:
            continue
        copy = target / f"{len(found):04d}-{path.parent.name}-{path.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        found.append(copy.name)
    return found


@dataclass
class Suite:
    """The server and one runner a stage, as processes that may be killed and come back."""

    root: Path
    kills: list[str] = field(default_factory=list)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = self.root / "logs"

    def start(self) -> None:
        """Starts everything."""
        self.logs.mkdir(parents=True)
        for name in ("server", *STAGES):
            self.spawn(name)

    def spawn(self, name: str) -> None:
        """Starts the server or a stage's runner."""
        command = self._server() if name == "server" else self._runner(name)
        with (self.logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _server(self) -> list[str]:
        data = str(self.root / "data")
        return [sys.executable, "-m", "retinue_server", "--listen", self.address, "--http", "none", "--data-dir", data]

    def _runner(self, stage: str) -> list[str]:
        later = list(STAGES)[list(STAGES).index(stage) + 1 :]
        chain = ["--then", later[0]] if later else []
        places = ["--output-dir", str(self.root / "output" / stage), "--work-dir", str(self.root / "work" / stage)]
        options = ["--address", self.address, "--lease", LEASE, "--concurrency", "2", "--json", *places, *chain]
        return [sys.executable, "-m", "retinue.cli", "work", stage, *options, "--", *STAGES[stage]]

    def kill(self, name: str) -> None:
        """SIGKILL, no warning; and a new one in its place."""
        self.processes[name].kill()
        self.processes[name].wait()
        self.kills.append(name)
        self.spawn(name)

    def stop(self) -> None:
        """Runners first, then the server."""
        for name in (*STAGES, "server"):
            if name in self.processes:
                self.processes[name].send_signal(signal.SIGTERM)
                self.processes[name].wait()

    def stats(self) -> dict[str, dict[str, int]]:
        """Tasks by queue and state; empty while the server is away."""
        request = workqueue_admin_service_pb2.GetQueueStatsRequest()
        with grpc.insecure_channel(self.address) as channel:
            stub = workqueue_admin_service_pb2_grpc.WorkQueueAdminServiceStub(channel)
            try:
                answer = stub.GetQueueStats(request, timeout=2, wait_for_ready=True)
            except grpc.RpcError:
                return {}
        states = ("scheduled", "ready", "leased", "retrying", "succeeded", "dead", "cancelled", "expired")
        return {s.queue_id: {state: getattr(s, state) for state in states} for s in answer.stats}

    def book(self) -> list[task_pb2.Task]:
        """All tasks, as the queues remember them."""
        return list(self._pages())

    def _pages(self) -> Iterator[task_pb2.Task]:
        token = ""
        with grpc.insecure_channel(self.address) as channel:
            stub = workqueue_service_pb2_grpc.WorkQueueServiceStub(channel)
            while True:
                request = workqueue_service_pb2.ListTasksRequest(page_size=500, page_token=token)
                page = stub.ListTasks(request, timeout=10, wait_for_ready=True)
                yield from page.tasks
                token = page.next_page_token
                if not token:
                    return


def enqueue(suite: Suite, tree: Path, sources: list[str]) -> None:
    """One task a file, in batches that may be repeated."""
    with grpc.insecure_channel(suite.address) as channel:
        stub = workqueue_service_pb2_grpc.WorkQueueServiceStub(channel)
        for start in range(0, len(sources), 20):
            block = sources[start : start + 20]
            request = workqueue_service_pb2.EnqueueTasksRequest(
                tasks=[
                    task_pb2.TaskSpec(
                        queue_id="compress",
                        input=task_pb2.Payload(data=(tree / name).read_bytes()),
                        labels={"path": name},
                        idempotency_key=name,
                    )
                    for name in block
                ],
                atomic=True,
            )
            stub.EnqueueTasks(request, timeout=30, wait_for_ready=True)


def follow(suite: Suite, files: int) -> float:
    """Shows the progress and does the killing; seconds until all is done."""
    due = list(KILLS)
    started = time.monotonic()
    stats: dict[str, dict[str, int]] = {}
    with Live(console=console, refresh_per_second=4) as live:
        while (share := done_share(stats, files)) < 1:
            stats = suite.stats() or stats
            if due and share >= due[0][1]:
                suite.kill(due.pop(0)[0])
            live.update(progress(stats, suite, files, time.monotonic() - started))
            time.sleep(0.2)
            if time.monotonic() - started > 600:  # noqa: PLR2004 - ten minutes are an hour too long
                raise SystemExit(f"cannot finish: look into {suite.logs}")
        live.update(progress(stats, suite, files, time.monotonic() - started))
    return time.monotonic() - started


def done_share(stats: dict[str, dict[str, int]], files: int) -> float:
    """How much of all stages' work is done."""
    return sum(stats.get(stage, {}).get("succeeded", 0) for stage in STAGES) / (files * len(STAGES))


def progress(stats: dict[str, dict[str, int]], suite: Suite, files: int, seconds: float) -> Table:
    """The picture while it runs."""
    table = Table(title=f"{seconds:.0f} s, killed so far: {', '.join(suite.kills) or 'nobody'}")
    for name in ("stage", "command", "ready", "leased", "retrying", "succeeded", "dead"):
        table.add_column(name, justify="left" if name in ("stage", "command") else "right")
    for stage, command in STAGES.items():
        counts = stats.get(stage, {})
        numbers = [str(counts.get(state, 0)) for state in ("ready", "leased", "retrying")]
        done = f"{counts.get('succeeded', 0)}/{files}"
        table.add_row(stage, " ".join(command), *numbers, done, str(counts.get("dead", 0)))
    return table


def serial(tree: Path, output: Path, sources: list[str]) -> None:
    """The same tools, file by file, without a queue."""
    for stage in STAGES:
        (output / stage).mkdir(parents=True)

    def one(name: str) -> None:
        content = (tree / name).read_bytes()
        for stage, command in STAGES.items():
            content = subprocess.run(command, input=content, capture_output=True, check=True).stdout
            (output / stage / name).write_bytes(content)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, sources))


def report(
    root: Path, sources: list[str], suite: Suite, book: list[task_pb2.Task], seconds: tuple[float, float]
) -> int:
    """What the queues remember, and whether the trees are the same."""
    table = Table(title="the queues' own bookkeeping")
    for name in ("stage", "tasks", "succeeded", "leases", "expired leases", "failed attempts"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in STAGES:
        tasks = [task for task in book if task.queue_id == stage]
        done = sum(task.state == task_pb2.TASK_STATE_SUCCEEDED for task in tasks)
        leases, lapsed = sum(t.lease_epoch for t in tasks), sum(t.lease_expirations for t in tasks)
        failed = sum(max(0, t.attempt - 1) for t in tasks)
        table.add_row(stage, str(len(tasks)), str(done), str(leases), str(lapsed), str(failed))
    console.print(table)
    trees = [(root / kind / stage / name) for stage in STAGES for name in sources for kind in ("output",)]
    wrong = [
        p
        for p in trees
        if not p.is_file() or p.read_bytes() != (root / "serial" / p.relative_to(root / "output")).read_bytes()
    ]
    extra = [p for p in (root / "output").rglob("*") if p.is_file() and p not in set(trees)]
    exact = len(book) == len(sources) * len(STAGES) and all(t.state == task_pb2.TASK_STATE_SUCCEEDED for t in book)
    console.print(
        f"{len(suite.kills)} SIGKILLs ({', '.join(suite.kills)}); {seconds[0]:.0f} s, serial run {seconds[1]:.0f} s"
    )
    if wrong or extra or not exact:
        console.print(f"[red]NOT identical: {len(wrong)} differ, {len(extra)} too many, tasks exact: {exact}")
        return 1
    console.print(f"[green]{len(trees)} outputs, byte-identical to the serial run; every task succeeded exactly once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
