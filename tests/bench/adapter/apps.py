"""Apps with many series: five pages of 2,000 lines each, and some that never answer; run as a program of its own.

A page is what an app of some size shows: counters and gauges with two or three labels, and histograms. Each value
changes from one page to the next; the pages are made beforehand, so that serving them costs next to nothing.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import socketserver
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LINES = 2000
VERSIONS = 16
_BOUNDS = ("0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "+Inf")
_COUNTERS, _GAUGES, _HISTOGRAMS = 1000, 800, 200
"""Lines of each."""


def page(app: int, version: int) -> bytes:
    """In the text format; counters and buckets grow with the version."""
    dice = random.Random(app * 1000 + version)
    return "".join(_lines(app, version, dice)).encode()


def _lines(app: int, version: int, dice: random.Random) -> Iterator[str]:
    for family in range(_COUNTERS // 50):
        yield f"# HELP shop_part_{family}_calls_total Calls of part {family}.\n"
        yield f"# TYPE shop_part_{family}_calls_total counter\n"
        for method, code in itertools.product(range(10), (200, 201, 404, 500, 503)):
            value = (version + 1) * 1000 + dice.randrange(1000)
            labels = f'method="method_{method}",code="{code}",zone="zone-{app}"'
            yield f"shop_part_{family}_calls_total{{{labels}}} {value}\n"
    for family in range(_GAUGES // 40):
        yield f"# HELP shop_pool_{family}_connections Connections of pool {family}.\n"
        yield f"# TYPE shop_pool_{family}_connections gauge\n"
        for shard in range(40):
            labels = f'shard="shard-{shard:02}",state="{"busy" if shard % 2 else "idle"}"'
            yield f"shop_pool_{family}_connections{{{labels}}} {dice.uniform(0, 100):.6f}\n"
    yield "# HELP shop_request_duration_seconds How long requests take.\n"
    yield "# TYPE shop_request_duration_seconds histogram\n"
    for path in range(_HISTOGRAMS // (len(_BOUNDS) + 2)):
        count = 0
        for bound in _BOUNDS:
            count += (version + 1) * 100 + dice.randrange(100)
            yield f'shop_request_duration_seconds_bucket{{path="/path/{path}",le="{bound}"}} {count}\n'
        yield f'shop_request_duration_seconds_count{{path="/path/{path}"}} {count}\n'
        yield f'shop_request_duration_seconds_sum{{path="/path/{path}"}} {count * 0.1:.6f}\n'
    yield "# TYPE shop_uptime_seconds gauge\n"
    for part in range(_HISTOGRAMS % (len(_BOUNDS) + 2)):
        yield f'shop_uptime_seconds{{part="{part}"}} {version + dice.random():.3f}\n'


class _App(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, number: int) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\ncontent-length: %d\r\n\r\n"
        )
        pages = [page(number, version) for version in range(VERSIONS)]
        self.answers = itertools.cycle([head % len(text) + text for text in pages])


class _Answer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        read = b""
        while b"\r\n\r\n" not in read:
            some = self.request.recv(4096)
            if not some:
                return
            read += some
        assert isinstance(self.server, _App)
        self.request.sendall(next(self.server.answers))


def main() -> None:
    """`apps.py GOOD HUNG`: prints where they listen as a JSON line, then serves until its input ends."""
    good, hung = (int(text) for text in sys.argv[1:])
    apps = [_App(number) for number in range(good)]
    for app in apps:
        threading.Thread(target=app.serve_forever, daemon=True).start()
    mute = [socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in range(hung)]  # nobody accepts
    told = {"good": [app.server_address[1] for app in apps], "hung": [sock.getsockname()[1] for sock in mute]}
    print(json.dumps(told), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
