"""What the programs share: a channel that finds a restarted server at once, and calls that go into the history."""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from support.history import Item, Op
from support.history.recorder import Recorder

from retinue.workqueue.v1 import workqueue_service_pb2_grpc

TIMEOUT_S = 3.0
_QUICK = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


def arguments() -> argparse.ArgumentParser:
    """What every program is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--queue", required=True)
    parser.add_argument("--name", required=True, help="unique in the history")
    parser.add_argument("--history", required=True, type=Path, help="a directory")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def until_told() -> threading.Event:
    """Set by SIGTERM."""
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    return told


def lasting(seconds: float) -> Duration:
    """A duration, to the millisecond."""
    duration = Duration()
    duration.FromMilliseconds(round(seconds * 1000))
    return duration


class Caller:
    """Makes calls and records them; one a thread."""

    def __init__(self, recorder: Recorder, seed: str) -> None:
        self.recorder = recorder
        self.chance = random.Random(seed)
        self.channel = grpc.insecure_channel(os.environ["RETINUE_ADDRESS"], _QUICK)
        self.stub = workqueue_service_pb2_grpc.WorkQueueServiceStub(self.channel)

    def ask(self, op: Op, items: Sequence[Item], method: Callable[..., Any], request: Any) -> Any:
        """One recorded call whose answer goes item by item; None if the answer is unknown."""
        n = self.recorder.call(op, items)
        try:
            response = method(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            self.lost(n, error)
            return None
        self.recorder.ok(n, {i: r.status.reason for i, r in enumerate(response.results) if r.HasField("status")})
        return response

    def insist(self, op: Op, items: Sequence[Item], method: Callable[..., Any], request: Any) -> Any:
        """Repeats a call whose answer is unknown a few times, or gives up: both must do no harm."""
        for _ in range(4):
            if response := self.ask(op, items, method, request):
                return response
            if self.chance.random() < 0.2:
                break
        return None

    def lost(self, n: int, error: Any) -> None:
        """The answer of a call is unknown; gives the server a moment."""
        self.recorder.unknown(n, error.code().name)
        time.sleep(self.chance.uniform(0.02, 0.2))
