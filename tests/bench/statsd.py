"""How many lines of StatsD an adapter takes, and what they cost it: a real server, datagrams of many lines by UDP.

    PYTHONPATH=services:clients/python:tests .venv/bin/python -m bench.statsd [LINES_PER_SECOND [SECONDS]]

The sender keeps to its rate whatever the server does; what the kernel drops is counted and told. CPU is that of the
server's process alone, its collections among it.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
from servers import start_server

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import target_pb2 as pb
from retinue.adapter.v1.adapter_service_pb2_grpc import AdapterServiceStub

_SIZE = 1432
"""Bytes of a datagram: what fits into a frame of Ethernet."""
_WARM_S = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")


def datagrams(count: int = 40_000) -> list[tuple[bytes, int]]:
    """Counters, timers and gauges of 500 endpoints, with and without tags and rates; and how many lines each has."""
    chance = random.Random(1)
    found: list[tuple[bytes, int]] = []
    lines: list[str] = []
    size = 0
    for _ in range(count):
        kind = chance.choice("cccmg")
        value = {"c": "1|c", "m": f"{chance.random() * 300:.2f}|ms", "g": f"{chance.randrange(1000)}|g"}[kind]
        tags = chance.choice(["", "|#env:prod,zone:a", "|@0.1|#env:prod"])
        line = f"shop.web.endpoint{chance.randrange(500)}.{kind}x:{value}{tags}"
        if size + len(line) + 1 > _SIZE:
            found.append(("\n".join(lines).encode(), len(lines)))
            lines, size = [], 0
        lines.append(line)
        size += len(line) + 1
    return found


def send(sock: socket.socket, said: list[tuple[bytes, int]], rate: float, seconds: float) -> tuple[int, int]:
    """How many datagrams and lines were sent."""
    sent = lines = 0
    began = time.monotonic()
    turns = itertools.cycle(said)
    while (gone := time.monotonic() - began) < seconds:
        while lines < gone * rate:
            data, count = next(turns)
            sock.send(data)
            sent, lines = sent + 1, lines + count
        time.sleep(0.0005)
    return sent, lines


def cpu_s(pid: int) -> float:
    """What a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def main(rate: float, seconds: float) -> None:
    """Prints one line."""
    with tempfile.TemporaryDirectory() as where:
        server = start_server(Path(where), "adapter")
        try:
            with grpc.insecure_channel(server.control) as channel:
                adapter: Any = AdapterServiceStub(channel)
                wanted = pb.Target(target_id="it", kind=pb.TARGET_KIND_STATSD, endpoint="udp:127.0.0.1:0")
                target = adapter.CreateTarget(api.CreateTargetRequest(target=wanted)).target
                host, _, port = target.status.address.removeprefix("udp:").rpartition(":")
                print(_measured(adapter, server.process.pid, (host, int(port)), rate, seconds))
        finally:
            server.stop()


def _measured(adapter: Any, pid: int, address: tuple[str, int], rate: float, seconds: float) -> str:
    said = datagrams()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        warm, _ = send(sock, said, rate, _WARM_S)
        before = cpu_s(pid)
        sent, lines = send(sock, said, rate, seconds)
    while True:
        counts = adapter.GetTarget(api.GetTargetRequest(target_id="it")).target.status.datagrams
        if counts.received + counts.dropped >= warm + sent:
            break
        time.sleep(0.01)
    took = cpu_s(pid) - before
    share = counts.received / (counts.received + counts.dropped)
    return (
        f"{lines / seconds:,.0f} lines/s sent in {sent:,} datagrams; dropped {counts.dropped:,}; "
        f"received + dropped - sent = {counts.received + counts.dropped - warm - sent}; "
        f"{took / seconds:.0%} of a core; {lines * share / took:,.0f} lines per second of CPU"
    )


if __name__ == "__main__":
    asked = [float(text) for text in sys.argv[1:]]
    main(*asked, *(300_000.0, 4.0)[len(asked) :])
