"""The core of the adapter over sources and work that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from retinue_server.adapter.core.packs import Pack
from retinue_server.adapter.core.points import SIGNALS, Family, RawFamily, Series, Signal, Type
from retinue_server.adapter.core.spec import Kind, Spec
from retinue_server.adapter.core.targets import Targets
from retinue_server.adapter.engine import Answer, SourceError
from retinue_server.adapter.worker import Taken, Tried

HTTP = "http://127.0.0.1:1"


class PlayedSource:
    """Answers when it is let, as the test says."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.asked, self.at_once, self.closed = spec, 0, 0, False
        self.most_at_once = 0
        self.error: Exception | None = None
        self.lets = asyncio.Event()
        self.lets.set()

    async def collect(self) -> Answer:
        self.asked += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.lets.wait()
            if self.error is not None:
                raise self.error
            return Answer(document={"target": self.spec.target_id})
        finally:
            self.at_once -= 1

    async def close(self) -> None:
        assert not self.at_once, "closed while it is asked"
        self.closed = True


class PlayedWork:
    """One series of each collection, with how many there were."""

    def __init__(self) -> None:
        self.declared: dict[str, Pack | None] = {}
        self.forgotten: list[str] = []
        self.counts: dict[str, int] = {}
        self.failure = ""
        self.error: Exception | None = None

    def declare(self, spec: Spec, pack: Pack | None) -> None:
        self.declared[spec.target_id] = pack

    def forget(self, target_id: str) -> None:
        del self.declared[target_id]
        self.forgotten.append(target_id)

    async def take(self, target_id: str, _: Answer | list[RawFamily], now_ms: int) -> Taken:
        if self.error is not None:
            raise self.error
        count = self.counts[target_id] = self.counts.get(target_id, 0) + 1
        family = Family("x", Type.GAUGE, "", "", [Series((("target", target_id),), float(count))])
        families = [] if self.failure else [family.packed()]
        return Taken(0, families, absent(), {}, {}, limited=False, failure=self.failure, cpu_s=0.0)

    async def try_out(self, spec: Spec, pack: Pack | None, answer: Answer) -> Tried:
        return Tried(0, [], 0, absent(), "")


def absent() -> list[Signal]:
    return [Signal(None, "absent", "") for _ in SIGNALS]


class Core:
    """Targets, and the sources that were made for them."""

    def __init__(self, **settings: Any) -> None:
        self.work, self.sources = PlayedWork(), dict[str, PlayedSource]()
        self.refusing: Exception | None = None
        """What making a source raises."""
        self.prepare: Callable[[PlayedSource], None] = lambda _: None
        self.packs: dict[str, Pack] = settings.pop("packs", {})
        self.targets = Targets(self.work, self._make, self.packs, **settings)

    def _make(self, spec: Spec, _: Pack | None) -> PlayedSource:
        if self.refusing is not None:
            raise self.refusing
        source = PlayedSource(spec)
        self.prepare(source)
        self.sources[spec.target_id] = source
        return source

    async def create(self, target_id: str = "shop", **fields: Any) -> Any:
        """Once it was collected."""
        target = await self.targets.create(spec(target_id, **fields))
        await target.collected.wait()
        return target


def spec(target_id: str = "shop", **fields: Any) -> Spec:
    """A declaration that is collected every few milliseconds."""
    said: dict[str, Any] = {"kind": Kind.PROMETHEUS, "endpoint": HTTP, "interval_s": 0.005, "timeout_s": 0.05}
    return Spec(target_id, **said | fields)


class Away(SourceError):
    """Nobody is there."""
