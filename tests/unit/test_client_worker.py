"""Claims about the worker loop that need no server."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from typing import Any, cast

from servers import environment

from retinue.client.worker import Job, Worker, WorkerEvent
from retinue.workqueue.v1 import task_pb2 as pb


async def test_a_lease_that_is_lost_before_its_handler_began_never_runs_it() -> None:
    ran = []

    async def handler(job: Job) -> bytes:
        ran.append(job.task_id)
        return b""

    events: list[WorkerEvent] = []
    worker = Worker(cast("Any", None), handler, listener=events.append)
    worker.leased([pb.Lease(task_id="t", lease_token=b"token")], time.monotonic())
    worker.lost(b"token", told=True)
    async with asyncio.timeout(60):
        while not worker.idle:
            await asyncio.sleep(0)
    assert ran == []
    assert [event.kind for event in events] == ["leased", "lost"]


def test_a_signal_while_modules_load_ends_a_command_even_where_the_default_is_to_ignore_it() -> None:
    code = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the kernel has it for the first process of a container
class Early:
    def find_spec(self, name, *_):
        if name == "retinue.cli.app":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Early())
from retinue.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, timeout=60, check=False, env=environment()
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stdout
