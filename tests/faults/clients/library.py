"""Works until SIGTERM with the worker of the Python client, recorded where its calls leave for the wire."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from typing import Any

import grpc
from faults.clients.calls import arguments
from faults.clients.plans import Plan, follow_up, plan
from faults.clients.tape import Tape
from support.history.recorder import Recorder

from retinue.client import Done, Failed, Queue, Released, Worker
from retinue.client.channel import Connection
from retinue.client.worker import Job

_GRACE_S = 2.0


class Recorded(Connection):
    """A connection whose blocking channels are recorded."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(os.environ["RETINUE_ADDRESS"])
        self._tape = Tape(recorder)

    def sync_channel(self) -> Any:
        return grpc.intercept_channel(super().sync_channel(), self._tape)


class Handler:
    """Does with a lease what the seed says, or completes all after a while."""

    def __init__(self, seed: str, hold_s: float | None) -> None:
        self._seed, self._hold_s = seed, hold_s

    async def __call__(self, job: Job) -> Done:
        what = Plan.LATE if self._hold_s is not None else plan(self._seed, job.lease)
        match what:
            case Plan.FAIL:
                raise Failed("PLANNED", retry_delay=0.1)
            case Plan.DOOM:
                raise Failed("PLANNED", final=True)
            case Plan.RELEASE | Plan.ABANDON:
                raise Released
            case Plan.LATE:  # long enough to live on renewals
                await asyncio.sleep(random.uniform(0, 3) if self._hold_s is None else self._hold_s)
        children = [follow_up(job.lease)] if what == Plan.FOLLOW else []
        return Done(str(job.lease_epoch), children)


async def work(queue: Queue, flags: Any) -> None:
    worker = Worker(
        queue,
        Handler(flags.seed, flags.hold),
        concurrency=flags.threads,
        lease_duration=flags.lease,
        worker_id=flags.name,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop, _GRACE_S)
    await worker.run()


def main() -> None:
    parser = arguments()
    parser.set_defaults(threads=50)
    parser.add_argument("--lease", type=float, default=1.5, help="seconds")
    parser.add_argument("--hold", type=float, help="seconds: complete all, after so long")
    flags = parser.parse_args()
    logging.disable()
    asyncio.run(work(Queue(flags.queue, connection=Recorded(Recorder(flags.history, flags.name))), flags))


if __name__ == "__main__":
    main()
