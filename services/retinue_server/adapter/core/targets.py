"""All targets: declared, collected on a schedule of our own, read by everybody else.

Each target has a task that asks its source, hands what came to the worker and keeps what comes back. Nobody who reads
waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING, Protocol

from retinue_server.adapter.core import limits
from retinue_server.adapter.core.spec import Kind, State
from retinue_server.adapter.core.target import Target
from retinue_server.adapter.engine import Answer, SourceError
from retinue_server.runtime.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    Reason,
    ResourceExhausted,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence

    from retinue_server.adapter.core.packs import Pack
    from retinue_server.adapter.core.points import AnyFamily, RawFamily, Signal
    from retinue_server.adapter.core.spec import Spec
    from retinue_server.adapter.engine import Listener, Source

log = logging.getLogger(__name__)

_RETRY_MS = 1000
_AGAIN_S = 1.0
"""After a collection that broke in a way nobody foresaw."""


class Outcome(Protocol):
    """What a collection left; the worker's `Taken`."""

    @property
    def families(self) -> Sequence[AnyFamily]:
        """Normalised."""

    signals: list[Signal]
    rejected: dict[str, int]
    examples: dict[str, str]
    limited: bool
    failure: str


class Work(Protocol):
    """Makes families and signals of answers, elsewhere."""

    def declare(self, spec: Spec, pack: Pack | None) -> None:
        """A target from now on."""

    def forget(self, target_id: str) -> None:
        """No longer."""

    async def take(self, target_id: str, answer: Answer | list[RawFamily], now_ms: int) -> Outcome:
        """Raises WorkerGone, which is an Exception."""


class Targets:
    """See the module. On the event loop only."""

    def __init__(
        self,
        work: Work,
        make: Callable[[Spec, Pack | None], Source | Listener],
        packs: Mapping[str, Pack],
        *,
        most: int = 100,
        stale_intervals: int = 5,
        max_watchers: int = 1000,
        allow_override: bool = False,
    ) -> None:
        self._work, self._make, self._packs = work, make, packs
        self._most, self._stale, self._max_watchers = most, stale_intervals, max_watchers
        self._allow_override = allow_override
        self._targets: dict[str, Target] = {}
        self._sources: dict[str, Source | Listener] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._generation = 0
        self._watchers: set[Watcher] = set()
        self._stopping = False
        self.collections = {"succeeded": 0, "failed": 0}

    # The life of all

    async def start(self) -> None:
        """Targets come by `create`."""

    async def stop(self) -> None:
        for target_id in list(self._targets):
            await self._end(target_id)

    async def quiesce(self) -> None:
        """Ends the watching."""
        self._stopping = True
        for watcher in self._watchers:
            watcher.wake("")

    def health_of(self, name: str) -> bool | None:
        """Of `target/NAME`, for grpc.health.v1: whether its last collection succeeded."""
        target = self._targets.get(name.removeprefix("target/")) if name.startswith("target/") else None
        return None if target is None else target.status.state in (State.UP, State.DEGRADED, State.LIMITED)

    def packs_changed(self) -> None:
        """What is declared gets the rule packs as they are now, from its next collection on."""
        for target in self._targets.values():
            try:
                pack = self.pack_of(target.spec)
            except FailedPrecondition as error:
                log.warning("target %s keeps its former rules: %s", target.spec.target_id, error)
                continue
            self._work.declare(target.spec, pack)

    # Declarations

    def get(self, target_id: str) -> Target:
        """Raises TARGET_NOT_FOUND."""
        found = self._targets.get(target_id)
        if found is None:
            raise limits.unknown(target_id)
        return found

    def find(self, target_id: str) -> Target | None:
        """The same; None if there is none."""
        return self._targets.get(target_id)

    def source(self, target_id: str) -> Source | Listener | None:
        """Of a target, for what it tells of itself."""
        return self._sources.get(target_id)

    def names(self, after: str = "") -> list[str]:
        """In order."""
        return sorted(name for name in self._targets if name > after)

    def all(self) -> Iterable[Target]:
        """In the order of their coming."""
        return self._targets.values()

    def etag(self, target: Target) -> str:
        """Of it as it is."""
        return str(target.generation)

    async def create(self, spec: Spec, *, from_file: bool = False) -> Target:
        """Raises as CreateTarget does."""
        known = self._targets.get(spec.target_id)
        if known is not None:
            if known.spec == spec and known.from_file == from_file:
                return known
            raise AlreadyExists(
                f"cannot create target {spec.target_id}: there is another one of that name; update it",
                reason=Reason.TARGET_EXISTS,
                target_id=spec.target_id,
            )
        if len(self._targets) >= self._most:
            raise ResourceExhausted(
                f"cannot create target {spec.target_id}: there are {self._most} already; raise adapter.max_targets",
                reason=Reason.TARGET_LIMIT,
            )
        return await self._begin(spec, from_file=from_file)

    async def update(self, spec: Spec, *, etag: str = "", from_file: bool = False) -> Target:
        """Raises as UpdateTarget does. What is shown stays until the next collection."""
        known = self.get(spec.target_id)
        self._check(known, etag, from_file=from_file)
        if known.spec.kind is not spec.kind:
            raise FailedPrecondition(
                f"cannot make target {spec.target_id} a {spec.kind.name}: its kind stays; delete it first",
                reason=Reason.TARGET_IMMUTABLE,
            )
        if known.spec == spec:
            return known
        self.pack_of(spec)
        await self._end(spec.target_id, forget=False)
        return await self._begin(spec, from_file=from_file or known.from_file, former=known)

    async def delete(self, target_id: str, *, etag: str = "", from_file: bool = False) -> bool:
        """Whether there was one."""
        known = self._targets.get(target_id)
        if known is None:
            return False
        self._check(known, etag, from_file=from_file)
        await self._end(target_id)
        return True

    def _check(self, known: Target, etag: str, *, from_file: bool) -> None:
        if etag and etag != self.etag(known):
            raise Aborted(
                f"cannot change target {known.spec.target_id}: somebody else did; read it again",
                reason=Reason.STALE_ETAG,
                etag=self.etag(known),
            )
        if known.from_file and not from_file and not self._allow_override:
            raise FailedPrecondition(
                f"cannot change target {known.spec.target_id}: the file of targets declares it; change it there",
                reason=Reason.TARGET_FROM_FILE,
            )

    def pack_of(self, spec: Spec) -> Pack | None:
        """Raises RULE_PACK_NOT_FOUND for one that is named and not there; what has no usual pack has none."""
        name = spec.rule_pack or spec.kind.name.lower()
        pack = self._packs.get(name)
        if spec.rule_pack and (pack is None or pack.kind != spec.kind.name.lower()):
            has = f"is for {pack.kind}" if pack else "is not loaded"
            raise FailedPrecondition(
                f"cannot use rule pack {spec.rule_pack} for {spec.kind.name}: it {has}",
                reason=Reason.RULE_PACK_NOT_FOUND,
                rule_pack=spec.rule_pack,
            )
        return pack

    async def _begin(self, spec: Spec, *, from_file: bool, former: Target | None = None) -> Target:
        pack = self.pack_of(spec)
        source = self._make(spec, pack)
        if hasattr(source, "open"):
            await source.open()
        self._generation += 1
        target = Target(spec, from_file=from_file, generation=self._generation)
        if former is not None:
            target.shown, target.status = former.shown, former.status
        self._targets[spec.target_id], self._sources[spec.target_id] = target, source
        self._work.declare(spec, pack)
        self._tasks[spec.target_id] = asyncio.create_task(self._run(target, source), name=f"adapter-{spec.target_id}")
        return target

    async def _end(self, target_id: str, *, forget: bool = True) -> None:
        task, source = self._tasks.pop(target_id), self._sources.pop(target_id)
        self._targets.pop(target_id)
        task.cancel()
        await asyncio.wait({task})
        await source.close()
        if forget:
            self._work.forget(target_id)
            self._tell(target_id)

    # Collections

    async def _run(self, target: Target, source: Source | Listener) -> None:
        interval = target.spec.interval_s
        due = time.monotonic()
        while True:
            try:
                await self._collect(target, source)
            except Exception:
                log.exception("cannot collect target %s", target.spec.target_id)
                await asyncio.sleep(_AGAIN_S)
            due = max(due + interval, time.monotonic())  # one that took too long is not made up for
            await asyncio.sleep(due - time.monotonic() + interval * 0.02 * random.random())  # noqa: S311 - spreads them

    async def _collect(self, target: Target, source: Source | Listener) -> None:
        spec, began = target.spec, time.monotonic()
        try:
            async with asyncio.timeout(spec.timeout_s):
                answer = await _ask(source)
            outcome = await self._work.take(spec.target_id, answer, _now_ms())
        except TimeoutError:
            self._failed(target, f"it did not answer within {spec.timeout_s:g} s", began)
        except SourceError as error:
            self._failed(target, str(error), began, misconfigured=error.misconfigured)
        else:
            if outcome.failure:
                self._failed(target, outcome.failure, began, misconfigured=True)
            else:
                self._succeeded(target, outcome, began)
        self._tell(spec.target_id)

    def _succeeded(self, target: Target, outcome: Outcome, began: float) -> None:
        self.collections["succeeded"] += 1
        target.succeeded(
            outcome.families,
            outcome.signals,
            now_ms=_now_ms(),
            took_ms=round((time.monotonic() - began) * 1000),
            rejected=outcome.rejected,
            examples=outcome.examples,
            limited=outcome.limited,
        )

    def _failed(self, target: Target, why: str, began: float, *, misconfigured: bool = False) -> None:
        self.collections["failed"] += 1
        stale = round(target.spec.interval_s * 1000) * self._stale
        took = round((time.monotonic() - began) * 1000)
        target.failed(why, now_ms=_now_ms(), took_ms=took, misconfigured=misconfigured, stale_after_ms=stale)

    async def try_out(self, spec: Spec, probe: Callable[[Answer, Pack | None], None]) -> str:
        """Asks once and keeps nothing; why that failed, empty if it did not."""
        pack = self.pack_of(spec)
        source = self._make(spec, pack)
        try:
            async with asyncio.timeout(spec.timeout_s):
                answer = await _ask(source)
            assert isinstance(answer, Answer)
            probe(answer, pack)
        except TimeoutError:
            return f"it did not answer within {spec.timeout_s:g} s"
        except SourceError as error:
            return str(error)
        finally:
            await source.close()
        return ""

    def report(self, target_id: str) -> Listener:
        """Where an app's own reports go; raises TARGET_NOT_REPORT."""
        target = self.get(target_id)
        if target.spec.kind is not Kind.REPORT:
            raise FailedPrecondition(
                f"cannot report to target {target_id}: it is of kind {target.spec.kind.name}",
                reason=Reason.TARGET_NOT_REPORT,
            )
        return self._sources[target_id]  # type: ignore[return-value] # REPORT is a kind that tells

    # Watching

    def watch(self) -> Watcher:
        """Raises WATCHER_LIMIT."""
        if len(self._watchers) >= self._max_watchers:
            raise ResourceExhausted(
                f"cannot watch: the server has {self._max_watchers} watchers already",
                reason=Reason.WATCHER_LIMIT,
                retry_ms=_RETRY_MS,
            )
        return Watcher(self._watchers, lambda: self._stopping)

    def _tell(self, target_id: str) -> None:
        for watcher in self._watchers:
            watcher.wake(target_id)


class Watcher:
    """Hears of collections; who is slow hears of several at once."""

    def __init__(self, among: set[Watcher], stopping: Callable[[], bool]) -> None:
        self._among, self._stopping = among, stopping
        self._news: dict[str, int] = {}
        self._woken = asyncio.Event()

    def wake(self, target_id: str) -> None:
        """A target was collected, or has gone; empty = the server stops."""
        if target_id:
            self._news[target_id] = self._news.get(target_id, 0) + 1
        self._woken.set()

    async def news(self) -> AsyncGenerator[tuple[Sequence[str], int], None]:
        """Targets that changed, and how many collections were passed over; UNAVAILABLE at the end."""
        self._among.add(self)
        try:
            while True:
                await self._woken.wait()
                self._woken.clear()
                if self._stopping():
                    raise Unavailable(
                        "cannot go on: the server is stopping", reason=Reason.SHUTTING_DOWN, retry_ms=_RETRY_MS
                    )
                news, self._news = self._news, {}
                if news:
                    yield list(news), sum(news.values()) - len(news)
        finally:
            self._among.discard(self)


async def _ask(source: Source | Listener) -> Answer | list[RawFamily]:
    drain = getattr(source, "drain", None)
    if drain is not None:
        found: list[RawFamily] = drain()
        return found
    return await source.collect()  # type: ignore[union-attr] # what is not drained is asked


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
