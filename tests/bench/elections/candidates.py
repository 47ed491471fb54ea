"""Candidates that are measured: streams of the bench's own, and an app in a process that can be killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any, Self

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from servers import environment

from bench.processes import ROOT, Failure
from retinue.leaderelection.v1 import leaderelection_service_pb2 as api
from retinue.leaderelection.v1.leaderelection_service_pb2_grpc import LeaderElectionServiceStub

ELECTION = "bench"
PATIENCE = 60.0
_BEATS = 4


def seconds(value: float) -> Duration:
    found = Duration()
    found.FromTimedelta(timedelta(seconds=value))
    return found


class Candidate:
    """One session on a stream, with heartbeats; a context that hangs up.

    Times are those of time.perf_counter(), taken when the message has been read.
    """

    def __init__(self, channel: grpc.aio.Channel, name: str, app_lease: float = 2.0, lease: float = 0.0) -> None:
        self._channel, self._interval = channel, app_lease / _BEATS
        self._start = api.CampaignStart(election_id=ELECTION, candidate_id=name, app_lease_duration=seconds(app_lease))
        if lease:
            self._start.lease_duration.CopyFrom(seconds(lease))
        self._heard = asyncio.Event()
        self._elected: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._resigned = False
        self._writing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Returns when the server has answered: it leads or stands by."""
        self._call: Any = LeaderElectionServiceStub(self._channel).Campaign()
        await self._call.write(api.CampaignRequest(start=self._start))
        self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._listen())]
        await asyncio.wait_for(self._heard.wait(), PATIENCE)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._resigned:
            await asyncio.wait(self._tasks[1:], timeout=PATIENCE)  # the server ends the stream
        for task in self._tasks:
            task.cancel()
        self._call.cancel()
        await asyncio.wait(self._tasks)

    async def _beat(self) -> None:
        for sequence in itertools.count(1):
            await asyncio.sleep(self._interval)
            async with self._writing:  # a stream takes one message at a time
                if self._resigned:
                    break
                await self._call.write(api.CampaignRequest(heartbeat=api.CampaignHeartbeat(sequence=sequence)))

    async def _listen(self) -> None:
        try:
            async for message in self._call:
                if message.HasField("elected") and not self._elected.done():
                    self._elected.set_result(time.perf_counter())
                self._heard.set()
        except grpc.aio.AioRpcError as error:
            if not self._elected.done():
                self._elected.set_exception(Failure(f"the stream ended: {error.details()}"))
            self._heard.set()

    async def elected(self) -> float:
        """When it was elected; waits for it."""
        return await asyncio.wait_for(asyncio.shield(self._elected), PATIENCE)

    async def resign(self) -> float:
        """When `resign` began to be written."""
        self._resigned = True
        async with self._writing:
            began = time.perf_counter()
            await self._call.write(api.CampaignRequest(resign=api.CampaignResign()))
        return began


class App:
    """A process that leads by the Python client until it is killed; a context that kills it."""

    def __init__(self, address: str, proof_dir: str, app_lease: float) -> None:
        command = [sys.executable, "-m", "bench.elections.app", address, ELECTION, proof_dir, str(app_lease)]
        env = environment()
        env["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env)

    def __enter__(self) -> Self:
        return self

    def lead(self) -> None:
        """Returns when it leads."""
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], PATIENCE)[0] or out.readline() != b"elected\n":
            raise Failure("the app was not elected")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def kill(self) -> float:
        """When SIGKILL was about to be sent."""
        began = time.perf_counter()
        self._process.kill()
        return began
