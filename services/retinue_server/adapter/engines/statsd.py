"""StatsD: datagrams by UDP or a Unix socket, added up as they come.

    NAME:VALUE[:VALUE...]|TYPE[|@RATE][|#TAG:VALUE,...]      c counter, g gauge (+/- change it), ms timer, h d
    distribution, s set

Tags also within the name, as InfluxDB (`name,tag=value`), Librato (`name#tag=value`) and SignalFX (`name[tag=value]`)
have them. Counters are cumulative here, a rate scales them; timers are histograms in seconds; a set is how many came
since the last collection. What the kernel dropped since the reader was too slow is read from the socket's own counter
(SO_MEMINFO), in datagrams.

Lines of a series differ in their value alone: what a name with its type, rate and tags means is worked out once.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
import time
from bisect import bisect_left
from collections import deque
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from retinue_server.adapter.core.mappings import Rules, Shape
from retinue_server.adapter.core.packs import Reject
from retinue_server.adapter.core.points import Histogram, Raw, RawFamily, Summary, Type
from retinue_server.runtime.errors import FailedPrecondition, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.adapter.core.packs import Pack
    from retinue_server.adapter.core.spec import Spec

_MEMINFO, _DROPS, _WORDS = 55, 8, 9
"""SO_MEMINFO, and where among its words the drops are (linux/sock_diag.h)."""
_RCVBUFFORCE = 33
"""SO_RCVBUFFORCE: beyond net.core.rmem_max, with CAP_NET_ADMIN."""
_DATAGRAM_BYTES = 65536
_TURN_S = 0.003
"""Of reading, before others get the loop."""
_RECEIVE_BYTES = 8 << 20
_STALE_INTERVALS = 5
_RECENT = 1024
"""Observations of which quantiles are made."""
_MAX_MEMBERS = 100_000
"""Of a set, between two collections."""


class _Series:
    """What is known of a series."""

    __slots__ = ("at", "counts", "kind", "labels", "members", "name", "recent", "shape", "text", "unit", "value")

    def __init__(self, name: str, labels: dict[str, str], kind: Type, *, shape: Shape, unit: str, text: str) -> None:
        self.name, self.labels, self.kind, self.shape, self.unit, self.text = name, labels, kind, shape, unit, text
        self.value = self.at = 0.0
        self.counts = [0.0] * (1 if kind is Type.SUMMARY else len(shape.buckets))
        self.members: set[bytes] | None = None
        """Of a set."""
        self.recent: deque[float] = deque(maxlen=_RECENT)

    def count(self, text: bytes, weight: float) -> None:
        """c"""
        value = float(text) * weight
        if not 0 <= value < math.inf:
            raise ValueError(text)
        self.value += value

    def set(self, text: bytes, weight: float) -> None:
        """g"""
        value = float(text) * weight
        self.value = self.value + value if text[0] in b"+-" else value

    def join(self, text: bytes, _: float) -> None:
        """s"""
        if self.members is None:
            self.members = set()
        if len(self.members) < _MAX_MEMBERS:
            self.members.add(text)

    def observe(self, text: bytes, weight: float) -> None:
        """ms, h, d; the weight is how many observations it stands for."""
        value = float(text) * self.shape.scale * (0.001 if self.unit else 1.0)
        if not math.isfinite(value):
            raise ValueError(text)
        self.value += value * weight
        if self.kind is Type.SUMMARY:
            self.counts[0] += weight
            self.recent.append(value)
        else:
            self.counts[bisect_left(self.shape.buckets, value)] += weight

    def taken(self) -> float | Histogram | Summary:
        """As it is collected."""
        if self.kind is Type.HISTOGRAM:
            counts = [float(round(count)) for count in accumulate(self.counts)]  # a rate of 0.3 makes thirds
            return Histogram(tuple(zip(self.shape.buckets, counts, strict=True)), self.value, counts[-1])
        if self.kind is Type.SUMMARY:
            ordered = sorted(self.recent)
            shares = [(q, ordered[min(int(q * len(ordered)), len(ordered) - 1)]) for q in self.shape.quantiles]
            return Summary(tuple(shares), self.value, float(round(self.counts[0])))
        if self.members is not None:
            self.value, self.members = float(len(self.members)), set()
        return self.value


_Line = tuple["_Series | None", "Callable[[bytes, float], None] | None", float]
"""What a line of a name, type, rate and tags does: to whom, what, by which weight. None = it is dropped by rule."""
_DROPPED: _Line = (None, None, 0.0)
_ADDERS = {b"c": _Series.count, b"g": _Series.set, b"s": _Series.join}


class StatsdListener:
    """One socket."""

    def __init__(self, spec: Spec, pack: Pack | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec, self._clock = spec, clock
        self._socket: socket.socket | None = None
        self._path: Path | None = None
        self._lines: dict[tuple[bytes, bytes], _Line] = {}
        """By the name, and all behind the value, as they came."""
        self._series: dict[tuple[str, tuple[tuple[str, str], ...], Type], _Series] = {}
        self.reject = Reject()
        self.received = 0
        self._buffer = memoryview(bytearray(_DATAGRAM_BYTES))
        self._now = clock()
        """When what is being read came."""
        self.address = spec.endpoint
        self.use(pack)

    def use(self, pack: Pack | None) -> None:
        """The rules from now on; what they made before goes on until it is stale."""
        self._rules = Rules(pack.defaults, pack.mappings) if pack else Rules({}, [])
        self._lines.clear()

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
        host, _, port = rest.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        internet = socket.AF_INET6 if ":" in bare else socket.AF_INET
        sock = socket.socket(socket.AF_UNIX if kind == "unixgram" else internet, socket.SOCK_DGRAM)
        try:
            if kind == "unixgram":
                self._bind_path(sock, Path(rest))
            else:
                sock.bind((bare, int(port)))
                shown, number = sock.getsockname()[:2]
                self.address = f"udp:[{shown}]:{number}" if ":" in shown else f"udp:{shown}:{number}"
        except OSError:
            sock.close()
            raise
        for option in (socket.SO_RCVBUF, _RCVBUFFORCE):  # as much as this system lets; all of it for who may ask so
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _RECEIVE_BYTES)
        sock.setblocking(False)  # noqa: FBT003 - the socket's own shape
        return sock

    def _bind_path(self, sock: socket.socket, path: Path) -> None:
        if path.is_socket():  # one that a former process left; nothing else is removed
            path.unlink()
        sock.bind(str(path))
        path.chmod(0o660)
        self._path = path

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
        now, families, gone = self._clock(), dict[tuple[str, Type], RawFamily](), set[int]()
        for key, one in list(self._series.items()):
            if one.at < now - (one.shape.ttl_s or _STALE_INTERVALS * self._spec.interval_s):
                del self._series[key]
                gone.add(id(one))
                continue
            family = families.setdefault((one.name, one.kind), RawFamily(one.name, one.kind, [], one.unit, one.text))
            family.points.append(Raw(one.labels, one.taken()))
        if gone:
            self._lines = {line: does for line, does in self._lines.items() if id(does[0]) not in gone}
        return list(families.values())

    def _readable(self) -> None:
        sock, view = self._socket, self._buffer
        assert sock is not None
        self._now = self._clock()
        end = time.monotonic() + _TURN_S
        while True:
            try:
                size = sock.recv_into(view)
            except (BlockingIOError, InterruptedError):
                return
            self.received += 1
            self.take(bytes(view[:size]))
            if time.monotonic() > end:
                return

    def take(self, datagram: bytes) -> None:
        """One datagram; a line that makes no sense costs itself."""
        lines, now = self._lines, self._now
        for line in datagram.split(b"\n"):
            name, _, rest = line.partition(b":")
            value, _, kind = rest.partition(b"|")
            one, add, weight = lines.get((name, kind)) or self._new(line, name, kind)
            if add is None or one is None:
                continue
            one.at = now
            try:
                add(value, weight)
            except (ValueError, IndexError):
                self._several(line, value, add, weight)

    def _several(self, line: bytes, values: bytes, add: Callable[[bytes, float], None], weight: float) -> None:
        """Values with `:` between them, or what is no value at all."""
        texts = values.split(b":")
        for text in texts if len(texts) > 1 else ():
            try:
                add(text, weight)
            except (ValueError, IndexError):
                break
        else:
            if len(texts) > 1:
                return
        self.reject("not_a_number", _told(line))

    def _new(self, line: bytes, name: bytes, more: bytes) -> _Line:
        """What a line does that was not seen yet."""
        kind, _, extras = more.partition(b"|")
        if not kind:
            if line.strip():
                self.reject("bad_line", _told(line))
            return _DROPPED
        if kind not in (b"c", b"g", b"s", b"ms", b"h", b"d"):
            self.reject("unknown_type", _told(line))
            return _DROPPED
        rate, tags, keep = _extras(extras)
        found = self._find(name, kind, tags)
        if found is None:
            return _DROPPED
        series, scale = found
        add = _ADDERS.get(kind, _Series.observe).__get__(series) if series else None
        weight = scale if kind == b"g" else scale / rate if kind == b"c" else 1 / rate
        does: _Line = (series, add, weight)
        if keep and len(self._lines) < 4 * self._spec.limits.max_series:
            self._lines[name, more] = does
        return does

    def _find(self, name: bytes, kind: bytes, tags: bytes) -> tuple[_Series | None, float] | None:
        """The series that it is of, and a rule's scale; no series where a rule drops it, nothing where there is no room
        for it."""
        bare, labels = _tagged(name, tags)
        mapped = self._rules.find(bare, kind)
        if mapped is None:
            shown, shape, text = bare.replace(".", "_").replace("-", "_"), self._rules.usual, ""
        elif not mapped.name:
            return None, 1.0
        else:
            labels = {**mapped.labels, **labels} if mapped.honor_labels else {**labels, **mapped.labels}
            shown, shape, text = mapped.name, mapped.shape, mapped.help
        what = _kind(kind, shape)
        key = shown, tuple(sorted(labels.items())), Type.UNKNOWN if kind == b"s" else what
        series = self._series.get(key)
        if series is None:
            if len(self._series) >= self._spec.limits.max_series:
                self.reject("series_limit", shown[:100])
                return None
            series = self._series[key] = _Series(
                shown, labels, what, shape=shape, unit="s" if kind == b"ms" else "", text=text
            )
        return series, shape.scale


def _kind(kind: bytes, shape: Shape) -> Type:
    if kind == b"c":
        return Type.COUNTER
    if kind in (b"g", b"s"):
        return Type.GAUGE
    return Type.SUMMARY if shape.summary else Type.HISTOGRAM


def _told(line: bytes) -> str:
    return line[:100].decode(errors="replace")


def _extras(more: bytes) -> tuple[float, bytes, bool]:
    """The rate, the tags, and whether other lines will look the same: not with a time of their own."""
    rate, tags, keep = 1.0, b"", True
    for part in more.split(b"|") if more else ():
        if part[:1] == b"@":
            rate = _rate(part[1:])
        elif part[:1] == b"#":
            tags = part[1:]
        elif part[:1] == b"T":
            keep = False
    return rate, tags, keep


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
    return text, labels
