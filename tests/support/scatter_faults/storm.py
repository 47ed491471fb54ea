"""Callers that leave while their leaves are asked, and hedged: by the thousand."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToJson

from retinue.scattergather.v1 import scattergather_service_pb2 as api
from support.scatter_faults.behaviour import Behaviour, Kind
from support.scatter_faults.callers import Caller, Pending
from support.scatter_faults.pools import STRICT, Policy, Pool
from support.scatter_faults.stage import Stage

_SHARDS, _WAVE, _FEW = 4, 60, 3
_HEDGE_S, _STAYS_S = 0.005, 0.06
_FAST_S, _SLOW_S = 0.01, 1.0
_STUCK_S = 30.0
_HEDGED: dict[str, Any] = {"timeout_s": 10.0, "hedge_s": _HEDGE_S, "ratio": 1.0, "burst": 10_000}
STORM = Pool("storm", {f"s{i}": (f"a{i}", f"b{i}") for i in range(_SHARDS)}, **_HEDGED)
"""Nobody answers: whoever asks it leaves."""
CALM = Pool("calm", {f"s{i}": (f"fast{i}", f"slow{i}") for i in range(_SHARDS)}, **_HEDGED)
"""Of two replicas one is slow: its calls lose."""
_POLICIES = (STRICT, Policy(0.5), Policy(0.25, first_k=1), Policy(0.25, soft_s=0.05))


MEMORY = ("rss_kib", "malloc_kib", "blocks")
"""What the process takes, what of that C has in use, and how many blocks Python has."""


class Storm:
    """Waves of callers over a stage whose root counts what it holds (tests/faults/counted_server.py)."""

    def __init__(self, where: Path, seed: int, program: Path | None = None) -> None:
        self._counts = where / "counts.json"
        self._chance = random.Random(seed)
        self._program = program
        self.stage = Stage(where, module="faults.counted_server")

    def open(self, env: Mapping[str, str]) -> None:
        """Starts leaves and root."""
        names = [leaf for pool in (STORM, CALM) for leaves in pool.replicas.values() for leaf in leaves]
        house = self.stage.village.build(*names, program=self._program)
        house.tell(Behaviour(Kind.STALL), *(name for name in names if name[0] in "ab"))
        house.tell(Behaviour(delay_s=_FAST_S), *(name for name in names if name.startswith("fast")))
        house.tell(Behaviour(delay_s=_SLOW_S), *(name for name in names if name.startswith("slow")))
        self.stage.open(STORM, CALM, env={"COUNTS": str(self._counts), **env})

    def blow(self, callers: int) -> None:
        """So many come and leave; what is left of them is nothing."""
        for _ in range(0, callers, _WAVE):
            self._wave()
        self.stage.await_idle()
        self.stage.await_ended()

    def _wave(self) -> None:
        """Some cancel, some have no time, some break the connection, some are answered by the faster replicas; a few
        leave streams, and a few HTTP."""
        each = _WAVE // 4
        with Caller(self.stage.root.address, self.stage.notes) as staying:
            leaving = Caller(self.stage.root.address, self.stage.notes)
            cancelled = [self._begin(staying) for _ in range(each)]
            late = [self._begin(staying, deadline_s=self._chance.uniform(0.001, _STAYS_S)) for _ in range(each)]
            gone = [self._begin(leaving) for _ in range(each)]
            answered = [staying.begin(CALM) for _ in range(each)]
            left = [staying.visit(STORM, how) for how in (staying.stream, self._post) for _ in range(_FEW)]
            time.sleep(self._chance.uniform(0, _STAYS_S))  # they leave at whatever moment
            leaving.disconnect()
            for pending in cancelled:
                pending.leave()
            for leave in left:
                leave()
            for pending in (*cancelled, *late, *gone, *answered):
                pending.result()

    def _post(self, request: api.ScatterRequest) -> Callable[[], object]:
        """Asks by HTTP, and gives what closes the connection."""
        connection = HTTPConnection(self.stage.root.http, timeout=_STUCK_S)
        path = "/retinue.scattergather.v1.ScatterGatherService/Scatter"
        connection.request("POST", path, MessageToJson(request), {"content-type": "application/json"})
        return connection.close

    def _begin(self, caller: Caller, deadline_s: float | None = None) -> Pending:
        return caller.begin(STORM, self._chance.choice(_POLICIES), mode="leaves", deadline_s=deadline_s)

    def rest(self, idle: Mapping[str, int]) -> dict[str, int]:
        """What the root holds once it is no more than when it was idle; if it stays more, that."""
        end = time.monotonic() + _STUCK_S
        found = self.counts()
        while more(found, idle) and time.monotonic() < end:
            found = self.counts()
        return found

    def counts(self) -> dict[str, int]:
        """What the root holds now."""
        self._counts.unlink(missing_ok=True)
        self.stage.root.process.send_signal(signal.SIGUSR1)
        end = time.monotonic() + _STUCK_S
        while not self._counts.exists():
            assert time.monotonic() < end, "the root does not count"
            time.sleep(0.02)
        found: dict[str, int] = json.loads(self._counts.read_text())
        return found


def more(found: Mapping[str, int], idle: Mapping[str, int]) -> list[str]:
    """Of what there is more than there was; memory apart."""
    return [name for name, count in found.items() if name not in MEMORY and count > idle.get(name, count)]
