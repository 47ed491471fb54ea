"""StatsD: lines a second on one core, and whether every datagram is accounted for."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.adapter.players import PATIENCE, Figures, Ours, ours
from bench.processes import HOME, LOAD_CORE, Failure, pinned
from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import target_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

FULL, PACED = "as fast as it goes", "300,000 lines a second"
_PACE = 300_000
_TARGET = "statsd"
_SOURCE = Path(__file__).with_name("statsd.c")


def statsd(_: str, seconds: int) -> Mapping[str, Figures]:
    """At a pace, then at full speed, into one listener."""
    sender = _sender()
    with ours() as server:
        wanted = pb.Target(target_id=_TARGET, kind=pb.TARGET_KIND_STATSD, endpoint="udp:127.0.0.1:0")
        wanted.interval_duration.FromSeconds(1)
        server.declare([wanted], wait=False)
        return {
            PACED: _sent(server, sender, seconds, _PACE),
            FULL: _sent(server, sender, seconds, 0),
        }


def _sender() -> Path:
    built = HOME / "statsd"
    if not built.exists() or built.stat().st_mtime < _SOURCE.stat().st_mtime:
        HOME.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cc", "-O2", "-Wall", "-o", str(built), str(_SOURCE)], check=True)
    return built


def _counts(server: Ours) -> tuple[int, int]:
    found = server.stub.GetTarget(api.GetTargetRequest(target_id=_TARGET), timeout=PATIENCE).target.status.datagrams
    return found.received, found.dropped


def _sent(server: Ours, sender: Path, seconds: int, pace: int) -> Figures:
    told = server.stub.GetTarget(api.GetTargetRequest(target_id=_TARGET), timeout=PATIENCE).target.status
    port = told.address.rpartition(":")[2]
    before, orders, cpu = _counts(server), _orders(server), server.cpu()
    done = subprocess.run(
        pinned(LOAD_CORE, [str(sender), port, str(seconds), str(pace)]), capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    received, dropped, drained = _settled(server, before, said["sent"])
    cpu = server.cpu() - cpu
    _await_orders(server, orders + received * said["counters"])
    return {
        "rate": received * said["lines"] / (said["seconds"] + drained),
        "sent_rate": said["sent"] * said["lines"] / said["seconds"],
        "dropped_share": dropped / said["sent"],
        "unaccounted": float(said["sent"] - received - dropped),
        "per_core": received * said["lines"] / cpu,
    }


def _settled(server: Ours, before: tuple[int, int], sent: int) -> tuple[int, int, float]:
    """Received and dropped, once that is all, and how long that took; what is missing after a while stays so."""
    began, last, calm = time.monotonic(), (-1, -1), 0
    while time.monotonic() < began + PATIENCE:
        now = _counts(server)
        found = now[0] - before[0], now[1] - before[1]
        calm = calm + 1 if found == last else 0
        if sum(found) >= sent or calm > 20:
            return *found, time.monotonic() - began
        last = found
        time.sleep(0.05)
    raise Failure("the listener does not come to an end")


def _orders(server: Ours) -> float:
    return server.metric("shop_orders_total", target=_TARGET)


def _await_orders(server: Ours, wanted: float) -> None:
    """What is shown, after the next collection."""
    end = time.monotonic() + PATIENCE
    while (found := _orders(server)) != wanted:
        if time.monotonic() > end:
            raise Failure(f"shop_orders_total is {found:.0f}, not {wanted:.0f}")
        time.sleep(0.2)
