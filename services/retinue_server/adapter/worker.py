"""The worker process: parses, normalises and renders, so that the event loop of the server never waits for it.

Messages both ways are msgpack with four bytes of length in front, over standard input and output; when the input
ends, so does the process. What it knows of targets (which series there were, since when they count) is lost with it:
the server declares them anew, and their counters begin anew.
"""

from __future__ import annotations

import os
import sys
import time
from typing import IO, Any

import msgspec

from retinue_server.adapter import parsing
from retinue_server.adapter.core import packs
from retinue_server.adapter.core.collection import Collector, Limits, Registry
from retinue_server.adapter.core.points import Packed, RawFamily, Signal  # noqa: TC001 - fields are read at run time
from retinue_server.adapter.engine import SourceError


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
    """What a collection brought: text, a document, or families."""

    target: str
    text: bytes
    content_type: str
    document: Any
    families: list[RawFamily] | None
    now_ms: int


class Taken(msgspec.Struct, array_like=True):
    """What became of it."""

    families: list[Packed]
    signals: list[Signal]
    rejected: dict[str, int]
    """Since the target was declared."""
    examples: dict[str, str]
    limited: bool
    failure: str
    """Why nothing could be made of it; then families and signals are empty, and what was there stands."""
    cpu_s: float


Request = Declare | Forget | Take
_PREFIX = 4
_NICE = 10
"""Whoever scrapes waits for the server; nobody waits for this process."""


class Worker:
    """What the process does, message by message."""

    def __init__(self) -> None:
        self._registry = Registry()
        self._targets: dict[str, tuple[Declare, Collector]] = {}

    def do(self, asked: Request) -> Taken | None:
        """Declarations and the like have no answer."""
        if isinstance(asked, Take):
            return self._take(asked)
        declared, collector = self._targets.pop(asked.target, (None, None))
        if isinstance(asked, Forget):
            if collector is not None:
                collector.close()
            return None
        if collector is None or declared is None or declared.own != asked.own:
            if collector is not None:
                collector.close()
            collector = Collector(asked.target, asked.own, asked.limits, self._registry)
        collector.limits = asked.limits
        self._targets[asked.target] = asked, collector
        return None

    def _take(self, asked: Take) -> Taken:
        began = time.process_time()
        declared, collector = self._targets[asked.target]
        failure, families = "", []
        try:
            families = collector.take(self._raw(asked, declared, collector), asked.now_ms)
        except SourceError as error:
            failure = str(error)
        known = {family.name: family for family in families}
        return Taken(
            [family.packed() for family in families],
            packs.signals(declared.pack, known) if not failure else [],
            collector.reject.counts,
            collector.reject.examples,
            collector.limited,
            failure,
            time.process_time() - began,
        )

    def _raw(self, asked: Take, declared: Declare, collector: Collector) -> list[RawFamily]:
        """All of it before any is taken: half an answer is none."""
        if asked.families is not None:
            return asked.families
        if asked.content_type:
            return list(parsing.parse(asked.text, asked.content_type, collector.reject))
        return packs.apply(declared.pack, asked.document, collector.reject) if declared.pack else []


def read(stream: IO[bytes]) -> bytes | None:
    """The next message; None at the end."""
    length = stream.read(_PREFIX)
    return stream.read(int.from_bytes(length, "big")) if len(length) == _PREFIX else None


def framed(data: bytes) -> bytes:
    """As it is sent."""
    return len(data).to_bytes(_PREFIX, "big") + data


def main() -> None:
    """Until the input ends."""
    os.nice(_NICE)
    worker, decoder, encoder = Worker(), msgspec.msgpack.Decoder(Request), msgspec.msgpack.Encoder()
    while (data := read(sys.stdin.buffer)) is not None:
        answer = worker.do(decoder.decode(data))
        if answer is not None:
            sys.stdout.buffer.write(framed(encoder.encode(answer)))
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
