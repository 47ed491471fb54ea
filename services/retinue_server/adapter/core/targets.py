"""All targets: declared, collected on a schedule of our own, read by everybody else.

Each target has a task that asks its source, hands what came to the worker and keeps what comes back. Nobody who reads
waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from typing import TYPE_CHECKING, Protocol, Self

from retinue_server.adapter.core import limits
from retinue_server.adapter.core.spec import Kind, State
from retinue_server.adapter.core.target import Target
from retinue_server.adapter.engine import Answer, SourceError
from retinue_server.runtime.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    RetinueError,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from retinue_server.adapter.core.packs import Pack
    from retinue_server.adapter.core.points import AnyFamily, RawFamily, Signal
    from retinue_server.adapter.core.spec import Spec
    from retinue_server.adapter.engine import Listener, Source

log = logging.getLogger(__name__)

_RETRY_MS = 1000
_SHORTEST_S = 1.0
"""Between two collections of what tells."""
_ASKED_BY_PACK = frozenset({Kind.JSON, Kind.POSTGRESQL})
"""Kinds whose pack says what to ask for, not only what the answer means."""
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


class TestedPoint(Protocol):
    """A point as it came, the lines that it becomes, and why it was refused."""

    raw: str
    normalised: str
    rejection: str


class Trial(Protocol):
    """What each point would become; the worker's `Tried`."""

    omitted: int
    signals: list[Signal]
    failure: str

    @property
    def points(self) -> Sequence[TestedPoint]:
        """In the order in which they came."""


class Work(Protocol):
    """Makes families and signals of answers, elsewhere."""

    def declare(self, spec: Spec, pack: Pack | None) -> None:
        """A target from now on."""

    def forget(self, target_id: str) -> None:
        """No longer."""

    async def take(self, target_id: str, answer: Answer | list[RawFamily], now_ms: int) -> Outcome:
        """Raises SourceError if nobody can do it now."""

    async def try_out(self, spec: Spec, pack: Pack | None, answer: Answer) -> Trial:
        """What would become of it; keeps nothing. Raises as `take`."""


class Targets:
    """See the module. On the event loop only."""

    def __init__(
        self,
        work: Work,
        make: Callable[[Spec, Pack | None], Source | Listener],
        packs: Mapping[str, Pack],
        *,
        objection: Callable[[str], str] = lambda _: "",
        most: int = 100,
        stale_intervals: int = 5,
        max_watchers: int = 1000,
        allow_override: bool = False,
    ) -> None:
        self._work, self._make, self._packs = work, make, packs
        self._most, self._stale, self._max_watchers = most, stale_intervals, max_watchers
        self._allow_override, self._objection = allow_override, objection
        self._targets: dict[str, Target] = {}
        self._sources: dict[str, Source | Listener] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._generation, self._epoch = 0, secrets.token_hex(4)
        self._changing = asyncio.Lock()
        self._watchers: set[Watcher] = set()
        self._listeners: list[Callable[[bool], None]] = []
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
            watcher.woken.set()

    def subscribe(self, listener: Callable[[bool], None]) -> None:
        """For grpc.health.v1: called when a target's state may have changed; this server is well whatever they do."""
        self._listeners.append(listener)
        listener(True)  # noqa: FBT003 - as `dispatch.Health` has it

    def health_of(self, name: str) -> bool | None:
        """Of `target/NAME`, for grpc.health.v1: whether its last collection succeeded."""
        target = self._targets.get(name.removeprefix("target/")) if name.startswith("target/") else None
        return None if target is None else target.status.state in (State.UP, State.DEGRADED, State.LIMITED)

    async def packs_changed(self) -> None:
        """What is declared gets the rule packs as they are now, from its next collection on."""
        for target in list(self._targets.values()):
            try:
                pack = self.pack_of(target.spec)
            except FailedPrecondition as error:
                log.warning("target %s keeps its former rules: %s", target.spec.target_id, error)
                continue
            if target.spec.kind in _ASKED_BY_PACK:
                await self._asked_anew(target)
                continue
            self._work.declare(target.spec, pack)
            use = getattr(self._sources[target.spec.target_id], "use", None)
            if use is not None:
                use(pack)

    async def _asked_anew(self, known: Target) -> None:
        """By the pack as it is now."""
        async with self._changing:
            if self._targets.get(known.spec.target_id) is known:
                await self._replace(known, known.spec, from_file=known.from_file)

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
        return f"{self._epoch}-{target.generation}"

    async def create(self, spec: Spec, *, from_file: bool = False) -> Target:
        """Raises as CreateTarget does."""
        async with self._changing:
            return await self._create(spec, from_file=from_file)

    async def _create(self, spec: Spec, *, from_file: bool) -> Target:
        known = self._targets.get(spec.target_id)
        if known is not None:
            if known.spec == spec:
                return known
            self._check(known, "", from_file=from_file)
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
        return await self._begin(spec, self._source(spec), from_file=from_file)

    async def update(self, spec: Spec, *, etag: str = "", from_file: bool = False) -> Target:
        """Raises as UpdateTarget does. What is shown stays until the next collection."""
        async with self._changing:
            return await self._update(spec, etag, from_file=from_file)

    async def _update(self, spec: Spec, etag: str, *, from_file: bool) -> Target:
        known = self.get(spec.target_id)
        self._check(known, etag, from_file=from_file)
        if known.spec.kind is not spec.kind:
            raise FailedPrecondition(
                f"cannot make target {spec.target_id} a {spec.kind.name}: its kind stays; delete it first",
                reason=Reason.TARGET_IMMUTABLE,
            )
        if known.spec == spec:
            known.from_file = known.from_file or from_file
            return known
        return await self._replace(known, spec, from_file=from_file or known.from_file)

    async def _replace(self, known: Target, spec: Spec, *, from_file: bool) -> Target:
        """By another of its name; if that can't be, it goes on."""
        source = self._source(spec)
        await self._rest(spec.target_id)
        try:
            return await self._begin(spec, source, from_file=from_file, former=known)
        except RetinueError:  # such as a port that is taken
            await self._begin(known.spec, self._source(known.spec), from_file=known.from_file, former=known)
            raise

    async def delete(self, target_id: str, *, etag: str = "", from_file: bool = False) -> bool:
        """Whether there was one."""
        async with self._changing:
            known = self._targets.get(target_id)
            if known is None:
                return False
            self._check(known, etag, from_file=from_file)
            await self._end(target_id)
            return True

    def _source(self, spec: Spec) -> Source | Listener:
        """Raises ENDPOINT_FORBIDDEN for an address that may not be dialled; names are looked up at each collection."""
        pack = self.pack_of(spec)
        address = limits.address(spec)
        why = self._objection(address) if address else ""
        if why:
            raise PermissionDenied(
                f"cannot collect {address}: {why}; the setting adapter.endpoints.allow makes exceptions",
                reason=Reason.ENDPOINT_FORBIDDEN,
                address=address,
            )
        return self._make(spec, pack)

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
        if pack is not None and not spec.rule_pack and pack.kind != name:
            return None
        if spec.rule_pack and (pack is None or pack.kind != spec.kind.name.lower()):
            has = f"is for {pack.kind}" if pack else "is not loaded"
            raise FailedPrecondition(
                f"cannot use rule pack {spec.rule_pack} for {spec.kind.name}: it {has}",
                reason=Reason.RULE_PACK_NOT_FOUND,
                rule_pack=spec.rule_pack,
            )
        return pack

    async def _begin(
        self, spec: Spec, source: Source | Listener, *, from_file: bool, former: Target | None = None
    ) -> Target:
        if hasattr(source, "open"):
            await source.open()
        self._generation += 1
        target = Target(spec, from_file=from_file, generation=self._generation)
        if former is not None:
            target.shown, target.status = former.shown, former.status
            if former.spec == spec:
                target.generation = former.generation
        self._targets[spec.target_id], self._sources[spec.target_id] = target, source
        self._work.declare(spec, self.pack_of(spec))
        self._tasks[spec.target_id] = asyncio.create_task(self._run(target, source), name=f"adapter-{spec.target_id}")
        self._tell(spec.target_id, 0)
        return target

    async def _end(self, target_id: str) -> None:
        await self._rest(target_id)
        self._targets.pop(target_id)
        self._work.forget(target_id)
        self._tell(target_id)

    async def _rest(self, target_id: str) -> None:
        """It is not collected any more, and what was shown still is."""
        task, source = self._tasks.pop(target_id, None), self._sources.pop(target_id, None)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        if source is not None:
            await source.close()

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
            pause = due - time.monotonic() + interval * 0.02 * random.random()  # noqa: S311 - spreads them
            await asyncio.sleep(min(pause, _SHORTEST_S))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(target.news.wait(), max(pause - _SHORTEST_S, 0))
                due = time.monotonic()
            target.news.clear()

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
        except Exception as error:
            log.exception("cannot collect target %s", spec.target_id)
            self._failed(target, f"it can't be collected: {type(error).__name__}", began)
        else:
            if outcome.failure:
                self._failed(target, outcome.failure, began, misconfigured=True)
            else:
                self._succeeded(target, source, outcome, began)
        self._tell(spec.target_id)

    def _succeeded(self, target: Target, source: Source | Listener, outcome: Outcome, began: float) -> None:
        self.collections["succeeded"] += 1
        at_once = getattr(source, "reject", None)
        counts, examples = (at_once.counts, at_once.examples) if at_once else ({}, {})
        rejected = {name: counts.get(name, 0) + outcome.rejected.get(name, 0) for name in (*outcome.rejected, *counts)}
        target.succeeded(
            outcome.families,
            outcome.signals,
            now_ms=_now_ms(),
            took_ms=round((time.monotonic() - began) * 1000),
            rejected=rejected,
            examples={**examples, **outcome.examples},
            limited=outcome.limited or counts.get("series_limit", 0) > target.status.rejected.get("series_limit", 0),
        )

    def _failed(self, target: Target, why: str, began: float, *, misconfigured: bool = False) -> None:
        self.collections["failed"] += 1
        stale = round(target.spec.interval_s * 1000) * self._stale
        took = round((time.monotonic() - began) * 1000)
        target.failed(why, now_ms=_now_ms(), took_ms=took, misconfigured=misconfigured, stale_after_ms=stale)

    async def try_out(self, spec: Spec) -> Trial | str:
        """Asks once and keeps nothing; why that failed, if it did."""
        source = self._source(spec)
        try:
            async with asyncio.timeout(spec.timeout_s):
                answer = await _ask(source)
            assert isinstance(answer, Answer)
            return await self._work.try_out(spec, self.pack_of(spec), answer)
        except TimeoutError:
            return f"it did not answer within {spec.timeout_s:g} s"
        except SourceError as error:
            return str(error)
        except Exception as error:
            log.exception("cannot test target %s", spec.target_id)
            return f"it can't be collected: {type(error).__name__}"
        finally:
            await source.close()

    def hurry(self, target_id: str) -> None:
        """It has told something: it is collected as soon as a second has gone since the last time."""
        target = self._targets.get(target_id)
        if target is not None:
            target.news.set()

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
        """From now on, as a context; raises WATCHER_LIMIT."""
        if len(self._watchers) >= self._max_watchers:
            raise ResourceExhausted(
                f"cannot watch: the server has {self._max_watchers} watchers already",
                reason=Reason.WATCHER_LIMIT,
                retry_ms=_RETRY_MS,
            )
        return Watcher(self._watchers, lambda: self._stopping)

    def _tell(self, target_id: str, collections: int = 1) -> None:
        for watcher in self._watchers:
            watcher.wake(target_id, collections)
        for listener in self._listeners:
            listener(True)  # noqa: FBT003 - as above


class Watcher:
    """Hears of collections since it was made; who is slow hears of several at once."""

    def __init__(self, among: set[Watcher], stopping: Callable[[], bool]) -> None:
        self._among, self._stopping = among, stopping
        self._news: dict[str, int] = {}
        self.woken = asyncio.Event()
        among.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._among.discard(self)

    def wake(self, target_id: str, collections: int) -> None:
        """A target was collected so often, or has come or gone."""
        self._news[target_id] = self._news.get(target_id, 0) + collections
        self.woken.set()

    async def news(self) -> Mapping[str, int]:
        """How often each target was collected since the last time, once there is news; UNAVAILABLE at the end."""
        while True:
            if self._stopping():
                raise Unavailable(
                    "cannot go on: the server is stopping", reason=Reason.SHUTTING_DOWN, retry_ms=_RETRY_MS
                )
            if self._news:
                news, self._news = self._news, {}
                return news
            self.woken.clear()
            await self.woken.wait()


async def _ask(source: Source | Listener) -> Answer | list[RawFamily]:
    drain = getattr(source, "drain", None)
    if drain is not None:
        found: list[RawFamily] = drain()
        return found
    return await source.collect()  # type: ignore[union-attr] # what is not drained is asked


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
