"""The worker process: parses, normalises and renders, so that the event loop of the server never waits for it.

Messages both ways are msgpack with four bytes of length in front, over standard input and output; when the input
ends, so does the process. What it knows of targets (which series there were, since when they count) is lost with it:
the server declares them anew, and their counters begin anew.

Answers are worked out in threads, which share the processor fairly: a page of 64 MiB takes long, and those of others
come between. Of large questions one is worked out at a time, since each takes much memory.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, overload

import msgspec

from retinue_server.adapter import parsing
from retinue_server.adapter.core import exposition, packs
from retinue_server.adapter.core.collection import Collector, Limits, Registry
from retinue_server.adapter.core.packs import Reject
from retinue_server.adapter.core.points import Packed, Raw, RawFamily, Signal
from retinue_server.adapter.engine import SourceError

log = logging.getLogger(__name__)

_LARGE_BYTES = 1 << 20
_THREADS = 8
_MAX_TESTED = 1000


class Declare(msgspec.Struct, tag="declare", array_like=True):
    """A target from now on; the former of its name goes on where it is the same."""

    target: str
    own: dict[str, str]
    limits: Limits
    pack: packs.Pack | None


class Forget(msgspec.Struct, tag="forget", array_like=True):
    """No target of that name any more."""

    target: str


class Take(msgspec.Struct, tag="take", array_like=True):
    """What a collection brought: text, a document, or families. `number` comes back with the answer."""

    number: int
    target: str
    text: bytes
    content_type: str
    document: Any
    families: list[RawFamily] | None
    now_ms: int


class Try(msgspec.Struct, tag="try", array_like=True):
    """The same of a target that is none: what each point becomes is to be told, nothing to be kept."""

    number: int
    declared: Declare
    text: bytes
    content_type: str
    document: Any


class Taken(msgspec.Struct, tag="taken", array_like=True):
    """What became of it."""

    number: int
    families: list[Packed]
    signals: list[Signal]
    rejected: dict[str, int]
    """Since the target was declared."""
    examples: dict[str, str]
    limited: bool
    failure: str
    """Why nothing could be made of it; then families and signals are empty, and what was there stands."""
    cpu_s: float


class Point(msgspec.Struct, array_like=True):
    """A point as it came, the lines that it becomes, and why it was refused."""

    raw: str
    normalised: str
    rejection: str


class Tried(msgspec.Struct, tag="tried", array_like=True):
    """What would become of it."""

    number: int
    points: list[Point]
    omitted: int
    signals: list[Signal]
    failure: str


Question = Take | Try
Request = Declare | Forget | Take | Try
Response = Taken | Tried
_PREFIX = 4
_NICE = 10
"""Whoever scrapes waits for the server; nobody waits for this process."""


class _Known:
    """A target. Who holds `lock` may use the collector."""

    def __init__(self, declared: Declare, collector: Collector) -> None:
        self.declared, self.collector, self.lock = declared, collector, threading.Lock()


class Worker:
    """What the process does, message by message. Declarations come from one thread, questions from any."""

    def __init__(self) -> None:
        self._registry = Registry()
        self._targets: dict[str, _Known] = {}

    def told(self, told: Declare | Forget) -> None:
        """Declarations have no answer."""
        known = self._targets.get(told.target)
        if known is not None and isinstance(told, Declare) and known.declared.own == told.own:
            known.declared, known.collector.limits = told, told.limits
            return
        if known is not None:
            del self._targets[told.target]
            with known.lock:
                known.collector.close()
        if isinstance(told, Declare):
            collector = Collector(told.target, told.own, told.limits, self._registry)
            self._targets[told.target] = _Known(told, collector)

    def answer(self, asked: Question) -> Response:
        """Whatever happens, there is one."""
        try:
            return self._take(asked) if isinstance(asked, Take) else _try(asked)
        except SourceError as error:
            return _failed(asked, str(error))
        except Exception as error:
            log.exception("cannot make anything of what target %s says", _name(asked))
            return _failed(asked, f"nothing can be made of what it says: {type(error).__name__}")

    def _take(self, asked: Take) -> Taken:
        began = time.thread_time()
        known = self._targets.get(asked.target)
        if known is None:
            return _failed(asked, "it is gone")
        declared, reject = known.declared, Reject()
        raw = _raw(asked, declared, reject)
        with known.lock:
            if self._targets.get(asked.target) is not known:
                return _failed(asked, "it is gone")
            collector = known.collector
            collector.reject.add(reject)
            families = collector.take(raw, asked.now_ms)
            counts, examples = dict(collector.reject.counts), dict(collector.reject.examples)
            limited = collector.limited
        found = packs.signals(declared.pack, {family.name: family for family in families})
        cpu_s = time.thread_time() - began
        return Taken(
            asked.number, [family.packed() for family in families], found, counts, examples, limited, "", cpu_s
        )


def _raw(asked: Question, declared: Declare, reject: Reject) -> list[RawFamily]:
    """All of it before any is taken: half an answer is none."""
    if isinstance(asked, Take) and asked.families is not None:
        return asked.families
    if declared.own.get("kind") == "prometheus":
        return list(parsing.parse(asked.text, asked.content_type, reject))
    document = parsing.json_document(asked.text) if asked.document is None else asked.document
    return packs.apply(declared.pack, document, reject) if declared.pack else []


def _try(asked: Try) -> Tried:
    """Each point alone, so that what becomes of it can be told; then all of them together, for the signals."""
    declared, reject = asked.declared, Reject()
    raw = _raw(asked, declared, reject)
    whole = Collector(declared.target, declared.own, declared.limits, Registry())
    families = whole.take(raw, 0)
    alone = Collector(declared.target, declared.own, declared.limits, Registry())
    points = [Point(example, "", reason) for reason, example in reject.examples.items()]
    count = len(points) + sum(len(family.points) for family in raw)
    for family in raw:
        points += [_tested(alone, family, point) for point in family.points[: max(_MAX_TESTED - len(points), 0)]]
    found = packs.signals(declared.pack, {one.name: one for one in families})
    return Tried(asked.number, points, count - len(points), found, "")


def _tested(collector: Collector, family: RawFamily, point: Raw) -> Point:
    labels = ",".join(f"{name}={value!r}" for name, value in point.labels.items())
    collector.reject = Reject()
    taken = collector.take([RawFamily(family.name, family.type, [point], family.unit, family.help)], 0)
    lines = b"".join(one.text for one in taken).decode()[:4000]
    value = exposition.number(point.value) if isinstance(point.value, int | float) else _of_parts(point.value)
    return Point(f"{family.name}{{{labels}}} {value}"[:1000], lines, next(iter(collector.reject.counts), ""))


def _of_parts(value: Any) -> str:
    return f"{type(value).__name__.lower()} of {exposition.number(value.count)}"


@overload
def _failed(asked: Take, why: str) -> Taken: ...
@overload
def _failed(asked: Try, why: str) -> Tried: ...
def _failed(asked: Question, why: str) -> Response:
    if isinstance(asked, Take):
        return Taken(asked.number, [], [], {}, {}, limited=False, failure=why, cpu_s=0.0)
    return Tried(asked.number, [], 0, [], why)


def _name(asked: Question) -> str:
    return asked.target if isinstance(asked, Take) else asked.declared.target


def read(stream: IO[bytes]) -> bytes | None:
    """The next message; None at the end."""
    length = stream.read(_PREFIX)
    return stream.read(int.from_bytes(length, "big")) if len(length) == _PREFIX else None


def framed(data: bytes) -> bytes:
    """As it is sent."""
    return len(data).to_bytes(_PREFIX, "big") + data


def encoded(asked: Question, answer: Response) -> bytes:
    """An answer as it is sent; one that can't be is a failure."""
    try:
        return framed(msgspec.msgpack.encode(answer))
    except (ValueError, OverflowError) as error:  # such as half a surrogate pair in a text
        return framed(msgspec.msgpack.encode(_failed(asked, f"what it says can't be told: {error}")))


def main() -> None:
    """Until the input ends."""
    os.nice(_NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which drains
    worker, decoder, writing = Worker(), msgspec.msgpack.Decoder(Request), threading.Lock()
    small, large = ThreadPoolExecutor(_THREADS), ThreadPoolExecutor(1)
    out = sys.stdout.buffer

    def work(asked: Question) -> None:
        data = encoded(asked, worker.answer(asked))
        try:
            with writing:
                out.write(data)
                out.flush()
        except BrokenPipeError:
            os._exit(0)  # nobody is there any more

    while (data := read(sys.stdin.buffer)) is not None:
        asked = decoder.decode(data)
        if isinstance(asked, Declare | Forget):
            worker.told(asked)
        else:
            (large if len(data) > _LARGE_BYTES else small).submit(work, asked)
    os._exit(0)  # whatever is under way


if __name__ == "__main__":
    main()
