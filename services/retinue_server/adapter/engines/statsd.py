"""StatsD: datagrams by UDP or a Unix socket, added up as they come.

    NAME:VALUE[:VALUE...]|TYPE[|@RATE][|#TAG:VALUE,...]      c counter, g gauge (+/- change it), ms timer, h d
    distribution, s set

Tags also within the name, as InfluxDB (`name,tag=value`), Librato (`name#tag=value`) and SignalFX (`name[tag=value]`)
have them. Counters are cumulative here, a rate scales them; timers are histograms in seconds. What the kernel dropped
since the reader was too slow is read from the socket's own counter (SO_MEMINFO), in datagrams.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
import time
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from retinue_server.adapter.core.packs import Reject
from retinue_server.adapter.core.points import Histogram, Raw, RawFamily, Type
from retinue_server.runtime.errors import FailedPrecondition, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.adapter.core.spec import Spec

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf)
_MEMINFO, _DROPS, _WORDS = 55, 8, 9
"""SO_MEMINFO, and where among its words the drops are (linux/sock_diag.h)."""
_DATAGRAM_BYTES = 65536
_BURST = 256
"""Datagrams, before others get the loop."""
_RECEIVE_BYTES = 8 << 20


class _Sum:
    """A counter, a gauge or a set."""

    __slots__ = ("at", "kind", "labels", "members", "name", "value")

    def __init__(self, name: str, labels: dict[str, str], kind: Type) -> None:
        self.name, self.labels, self.kind, self.value, self.at = name, labels, kind, 0.0, 0.0
        self.members: set[bytes] = set()


class _Times(_Sum):
    """Observations by bucket."""

    __slots__ = ("counts",)

    def __init__(self, name: str, labels: dict[str, str]) -> None:
        super().__init__(name, labels, Type.HISTOGRAM)
        self.counts = [0.0] * len(_BUCKETS)


class StatsdListener:
    """One socket."""

    def __init__(self, spec: Spec, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec, self._clock = spec, clock
        self._socket: socket.socket | None = None
        self._path: Path | None = None
        self._known: dict[tuple[bytes, bytes, bytes], _Sum] = {}
        """By name, type and tags as they came."""
        self._same: dict[tuple[str, tuple[tuple[str, str], ...], Type], _Sum] = {}
        self.reject = Reject()
        self.received = 0
        self._buffer = bytearray(_DATAGRAM_BYTES)
        self._now = 0.0
        self.address = spec.endpoint

    async def open(self) -> None:
        """Binds; raises PORT_IN_USE."""
        try:
            self._socket = self._bound()
        except OSError as error:
            raise FailedPrecondition(
                f"cannot listen on {self._spec.endpoint}: {error.strerror}; choose another", reason=Reason.PORT_IN_USE
            ) from None
        asyncio.get_running_loop().add_reader(self._socket, self._readable)

    def _bound(self) -> socket.socket:
        kind, _, rest = self._spec.endpoint.partition(":")
        if kind == "unixgram":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            path = Path(rest)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            sock.bind(rest)
            path.chmod(0o660)
            self._path = path
        else:
            host, _, port = rest.rpartition(":")
            bare = host.removeprefix("[").removesuffix("]")
            sock = socket.socket(socket.AF_INET6 if ":" in bare else socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((bare, int(port)))
            shown, number = sock.getsockname()[:2]
            self.address = f"udp:[{shown}]:{number}" if ":" in shown else f"udp:{shown}:{number}"
        with contextlib.suppress(OSError):  # as much as this system lets
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        sock.setblocking(False)  # noqa: FBT003 - the socket's own shape
        return sock

    @property
    def dropped(self) -> int:
        """Datagrams that the kernel dropped; none of a Unix socket, whose senders wait."""
        if self._socket is None or self._path is not None:
            return 0
        told = self._socket.getsockopt(socket.SOL_SOCKET, _MEMINFO, _WORDS * 4)
        return int(struct.unpack(f"={len(told) // 4}I", told)[_DROPS]) if len(told) >= _WORDS * 4 else 0

    async def close(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def drain(self) -> list[RawFamily]:
        """Everything so far; what had no news for long is left out."""
        too_old = self._clock() - 5 * self._spec.interval_s
        families: dict[tuple[str, Type], RawFamily] = {}
        for key, one in list(self._same.items()):
            if one.at < too_old:
                del self._same[key]
                self._known = {k: v for k, v in self._known.items() if v is not one}
                continue
            family = families.setdefault((one.name, one.kind), RawFamily(one.name, one.kind, []))
            family.points.append(Raw(one.labels, _value(one)))
        return list(families.values())

    def _readable(self) -> None:
        sock, buffer = self._socket, self._buffer
        assert sock is not None
        self._now = self._clock()
        for _ in range(_BURST):
            try:
                size = sock.recv_into(buffer)
            except (BlockingIOError, InterruptedError):
                return
            self.received += 1
            self.take(bytes(buffer[:size]))

    def take(self, datagram: bytes) -> None:
        """One datagram; a line that makes no sense costs itself."""
        for line in datagram.split(b"\n"):
            name, _, rest = line.partition(b":")
            values, _, rest = rest.partition(b"|")
            kind, _, more = rest.partition(b"|")
            if not kind:
                if line.strip():
                    self.reject("bad_line", _told(line))
                continue
            rate, tags = _extras(more) if more else (1.0, b"")
            one = self._known.get((name, kind, tags)) or self._new(name, kind, tags)
            if one is None:
                continue
            one.at = self._now
            try:
                for text in values.split(b":") if b":" in values else (values,):
                    self._add(one, kind, text, rate)
            except ValueError:
                self.reject("not_a_number", _told(line))

    def _add(self, one: _Sum, kind: bytes, text: bytes, rate: float) -> None:
        if kind == b"c":
            value = float(text)
            if not value >= 0 or value == math.inf:
                raise ValueError(text)
            one.value += value / rate
        elif kind == b"g":
            value = float(text)
            one.value = one.value + value if text[:1] in b"+-" else value
        elif kind == b"s":
            one.members.add(text)
            one.value = len(one.members)
        else:
            value = float(text) * (0.001 if kind == b"ms" else 1.0)
            if not math.isfinite(value):
                raise ValueError(text)
            assert isinstance(one, _Times)
            one.counts[bisect_left(_BUCKETS, value)] += 1 / rate
            one.value += value / rate

    def _new(self, name: bytes, kind: bytes, tags: bytes) -> _Sum | None:
        if kind not in (b"c", b"g", b"s", b"ms", b"h", b"d"):
            self.reject("unknown_type", f"{name.decode(errors='replace')}|{kind.decode(errors='replace')}"[:100])
            return None
        if len(self._known) >= 2 * self._spec.limits.max_series:
            self.reject("series_limit", name[:100].decode(errors="replace"))
            return None
        bare, labels = _tagged(name, tags)
        if kind == b"ms":
            bare += "_seconds"
        shown = Type.COUNTER if kind == b"c" else Type.GAUGE if kind in b"gs" else Type.HISTOGRAM
        fresh = _Times(bare, labels) if shown is Type.HISTOGRAM else _Sum(bare, labels, shown)
        one = self._same.setdefault((bare, tuple(sorted(labels.items())), shown), fresh)
        self._known[name, kind, tags] = one
        return one


def _told(line: bytes) -> str:
    return line[:100].decode(errors="replace")


def _extras(more: bytes) -> tuple[float, bytes]:
    """The rate and the tags."""
    rate, tags = 1.0, b""
    for part in more.split(b"|"):
        if part[:1] == b"@":
            rate = _rate(part[1:])
        elif part[:1] == b"#":
            tags = part[1:]
    return rate, tags


def _rate(text: bytes) -> float:
    try:
        rate = float(text)
    except ValueError:
        return 1.0
    return rate if 0 < rate <= 1 else 1.0


def _tagged(name: bytes, tags: bytes) -> tuple[str, dict[str, str]]:
    """The bare name and the labels, whichever dialect they came in."""
    text, pairs = name.decode(errors="replace"), tags.decode(errors="replace").split(",") if tags else []
    within = ""
    if "[" in text and "]" in text:
        before, _, rest = text.partition("[")
        within, _, after = rest.partition("]")
        text = before + after
    elif "#" in text:
        text, _, within = text.partition("#")
    elif "," in text:
        text, _, within = text.partition(",")
    labels = {}
    for pair in (*within.split(","), *pairs):
        cut = min((place for place in (pair.find("="), pair.find(":")) if place > 0), default=-1)
        if cut > 0:
            labels[pair[:cut]] = pair[cut + 1 :]
        elif pair:
            labels[pair] = "true"
    return text.replace(".", "_").replace("-", "_"), labels


def _value(one: _Sum) -> float | Histogram:
    if not isinstance(one, _Times):
        return one.value
    counts = [float(round(count)) for count in accumulate(one.counts)]  # a rate of 0.3 makes thirds
    return Histogram(tuple(zip(_BUCKETS, counts, strict=True)), one.value, counts[-1])
