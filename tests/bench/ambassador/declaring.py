"""How soon what is declared is served, and what many upstreams cost."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING

from bench.ambassador.players import Ambassador, Figures, Proxy, backend, ours, upstream
from bench.figures import percentile
from bench.processes import Failure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NATIVE, ENVOY = "retinue, native", "retinue, Envoy"
_PLANES = {NATIVE: ("native", "TCP", "echo"), ENVOY: ("envoy", "HTTP", "web")}
"""Each with a protocol of its own, and who is behind."""
_REQUEST = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
_STEPS = 20, 100, 500
"""Up to the first of them nothing is measured: what is needed once comes with it."""


def first_byte(_: str, times: int) -> Mapping[str, Figures]:
    """From the call that declares an upstream to the first byte of an answer through it."""
    with ExitStack() as stack:
        behind = stack.enter_context(backend())
        found: dict[str, list[float]] = {name: [] for name in _PLANES}
        ambassadors = {name: stack.enter_context(ours(plane)) for name, (plane, _, _) in _PLANES.items()}
        for number in range(times):
            for name, (_, protocol, kind) in _PLANES.items():
                took = _first_byte(ambassadors[name], f"up{number}", protocol, behind[kind])
                if number:  # the first opens the channel, too
                    found[name].append(took * 1000)
        return {name: {f"p{q}_ms": percentile(each, q / 100) for q in (50, 99)} for name, each in found.items()}


def _first_byte(ambassador: Ambassador, name: str, protocol: str, behind: Proxy) -> float:
    began = time.perf_counter()
    proxy = ambassador.declare(upstream(name, protocol, behind.address))
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as app:
        app.sendall(_REQUEST)
        if not app.recv(1):
            raise Failure(f"{name} closed the connection")
        took = time.perf_counter() - began
    ambassador.remove(name)
    return took


def many(name: str, _: int) -> Mapping[str, Figures]:
    """Up to 500 upstreams, one declared after the other, each served when its call returns."""
    plane, protocol, kind = _PLANES[name]
    with ExitStack() as stack:
        behind = stack.enter_context(backend())[kind]
        ambassador = stack.enter_context(ours(plane))
        costs, sizes = [], []
        for before, count in pairwise((0, *_STEPS)):
            began, cpu = time.perf_counter(), ambassador.cpu()
            for number in range(before, count):
                ambassador.declare(upstream(f"up{number}", protocol, behind.address))
            took = (time.perf_counter() - began) / (count - before)
            costs.append((ambassador.cpu() - cpu) / (count - before) * 1000)
            sizes.append(ambassador.memory())
        return {name: {"declare_ms": took * 1000, **growth(costs, sizes)}}


def growth(costs: Sequence[float], sizes: Sequence[Figures]) -> Figures:
    """What one costs, in milliseconds of CPU and in KiB, and how much of that one cost when there were fewer."""
    _, few, most = costs
    start, middle, end = (sum(one.values()) for one in sizes)
    few_kib = (middle - start) / (_STEPS[1] - _STEPS[0]) * 1024
    most_kib = (end - middle) / (_STEPS[2] - _STEPS[1]) * 1024
    return {
        "declare_cpu_ms": most,
        "declare_of_100": most / few,
        "upstream_kib": most_kib,
        "memory_of_100": most_kib / max(few_kib, 1.0),
        **sizes[-1],
    }
