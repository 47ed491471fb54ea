"""AdapterService: translate, call the core."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import metric_pb2 as metric_pb
from retinue_server.adapter import translate
from retinue_server.adapter.core import limits
from retinue_server.adapter.core.collection import Collector, Registry, sift
from retinue_server.adapter.core.matching import select
from retinue_server.adapter.core.spec import TOLD
from retinue_server.adapter.watching import NOTHING, Feeds, cut
from retinue_server.runtime import wire
from retinue_server.runtime.dispatch import Role
from retinue_server.runtime.errors import (
    Reason,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from retinue.adapter.v1 import target_pb2 as pb
    from retinue_server.adapter.core.matching import Match
    from retinue_server.adapter.core.spec import State
    from retinue_server.adapter.core.target import Target
    from retinue_server.adapter.core.targets import Targets
    from retinue_server.adapter.watching import Change, Feed, Sent
    from retinue_server.runtime.dispatch import Call

DESCRIPTOR = api.DESCRIPTOR.services_by_name["AdapterService"]
ROLES = dict.fromkeys(("CreateTarget", "UpdateTarget", "DeleteTarget", "TestTarget"), Role.OPERATOR)

_PAGES: wire.PageTokens[str] = wire.PageTokens("targets", 1, str)
_MAX_BYTES = 3 * 1024 * 1024
_LEAST_BYTES = 80
"""Of a series, whose four labels are ours: what is too large is refused before it is made."""
_RETRY_MS = 1000


class AdapterService:
    """For apps and operators; see the contract."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._feeds = Feeds()

    # Targets

    async def CreateTarget(self, request: api.CreateTargetRequest, call: Call) -> api.CreateTargetResponse:
        read = translate.Reader()
        wait_s = read.wait_s(request.wait_duration, call.time_remaining())
        target = await self._targets.create(read.target(request.target, "create the target"))
        if wait_s:
            with contextlib.suppress(TimeoutError):  # it is collected all the same
                await asyncio.wait_for(target.collected.wait(), wait_s)
        return api.CreateTargetResponse(target=self._told(target))

    async def UpdateTarget(self, request: api.UpdateTargetRequest, call: Call) -> api.UpdateTargetResponse:
        spec = translate.Reader().target(request.target, "update the target")
        return api.UpdateTargetResponse(target=self._told(await self._targets.update(spec, etag=request.etag)))

    async def DeleteTarget(self, request: api.DeleteTargetRequest, call: Call) -> api.DeleteTargetResponse:
        self._named(request.target_id, "delete the target")
        return api.DeleteTargetResponse(deleted=await self._targets.delete(request.target_id, etag=request.etag))

    async def GetTarget(self, request: api.GetTargetRequest, call: Call) -> api.GetTargetResponse:
        self._named(request.target_id, "get the target")
        return api.GetTargetResponse(target=self._told(self._targets.get(request.target_id)))

    async def ListTargets(self, request: api.ListTargetsRequest, call: Call) -> api.ListTargetsResponse:
        read = translate.Reader()
        size = limits.page_size(request.page_size, limits.PAGE_SIZES, read.violations)
        limits.refuse(read.violations, "list targets")
        names = self._targets.names(_PAGES.decode(request.page_token) or "")
        return api.ListTargetsResponse(
            targets=[self._told(self._targets.get(name)) for name in names[:size]],
            next_page_token=_PAGES.encode(names[size - 1]) if len(names) > size else "",
        )

    async def WatchTargets(self, request: api.WatchTargetsRequest, call: Call) -> None:
        read = translate.Reader()
        for index, name in enumerate(request.target_ids):
            limits.check_id(name, read.violations, f"target_ids[{index}]")
        limits.refuse(read.violations, "watch the targets")
        only = set(request.target_ids)
        told: dict[str, tuple[State, str]] = {}
        with self._targets.watch() as watcher:
            await self._write_targets(self._targets.names(), only, told, call)
            await call.write(api.WatchTargetsResponse(synced=api.Synced()))
            while True:
                await self._write_targets(await watcher.news(), only, told, call)

    async def _write_targets(
        self, names: Iterable[str], only: Collection[str], told: dict[str, tuple[State, str]], call: Call
    ) -> None:
        for name in (name for name in names if not only or name in only):
            target = self._targets.find(name)
            if target is None:
                if told.pop(name, None) is not None:
                    await call.write(api.WatchTargetsResponse(removed_target_id=name))
                continue
            now = target.status.state, self._targets.etag(target)
            if told.get(name) != now:
                told[name] = now
                await call.write(api.WatchTargetsResponse(target=self._told(target)))

    async def TestTarget(self, request: api.TestTargetRequest, call: Call) -> api.TestTargetResponse:
        spec = translate.Reader().target(request.target, "test the target")
        if spec.kind in TOLD:
            raise Unimplemented(
                f"cannot test a target of kind {spec.kind.name}: it is not asked, it tells",
                reason=Reason.CAPABILITY_MISSING,
                capability="TestTarget",
            )
        return translate.tested(await self._targets.try_out(spec))

    def _told(self, target: Target) -> pb.Target:
        source = self._targets.source(target.spec.target_id)
        told = {name: getattr(source, name, 0) for name in ("received", "dropped")}
        address = getattr(source, "address", "")
        return translate.target(target, self._targets.etag(target), address=address, **told)

    def _named(self, target_id: str, what: str) -> None:
        read = translate.Reader()
        limits.check_id(target_id, read.violations)
        limits.refuse(read.violations, what)

    # Metrics

    async def GetMetrics(self, request: api.GetMetricsRequest, call: Call) -> api.GetMetricsResponse:
        read = translate.Reader()
        matches = read.matches(request.matches)
        max_age = None
        if request.HasField("max_age_duration"):
            max_age = wire.duration_ms(request.max_age_duration, "max_age_duration", read.violations)
        limits.refuse(read.violations, "get metrics")
        targets = self._wanted(matches)
        if max_age is not None:
            _check_age(targets, max_age)
        response = api.GetMetricsResponse(metrics=_merged(targets, matches, include_stale=request.include_stale))
        _check_size(response)
        return response

    async def WatchMetrics(self, request: api.WatchMetricsRequest, call: Call) -> None:
        read = translate.Reader()
        matches = read.matches(request.matches)
        limits.refuse(read.violations, "watch metrics")
        feed = self._feeds.of(matches)
        sent: dict[str, Sent] = {}
        with self._targets.watch() as watcher:
            first = list(cut(self._changes(self._targets.names(), feed, sent)))
            for index, response in enumerate(first):
                response.synced = index == len(first) - 1
                await call.write(response)
            missed = 0
            while True:
                news = {name: times for name, times in (await watcher.news()).items() if feed.wants(name)}
                missed += sum(max(times - 1, 0) for times in news.values())
                for response in self._news(list(news), missed, feed, sent):
                    missed = 0
                    await call.write(response)

    def _news(
        self, target_ids: Sequence[str], coalesced: int, feed: Feed, sent: dict[str, Sent]
    ) -> Iterable[api.WatchMetricsResponse]:
        """Messages that others get, too, for a reader that keeps up; else its own."""
        if len(target_ids) == 1 and not coalesced:
            return self._change(target_ids[0], feed, sent).messages
        metrics = self._changes(target_ids, feed, sent)
        responses = list(cut(metrics)) if metrics else []
        if responses:
            responses[0].coalesced = coalesced
        return responses

    def _changes(self, target_ids: Iterable[str], feed: Feed, sent: dict[str, Sent]) -> list[metric_pb.Metric]:
        wanted = [target_id for target_id in target_ids if feed.wants(target_id)]
        return [one for target_id in wanted for one in self._change(target_id, feed, sent).metrics]

    def _change(self, target_id: str, feed: Feed, sent: dict[str, Sent]) -> Change:
        """Since what was sent, which is brought up to date."""
        target = self._targets.find(target_id)
        shown = target.shown if target and not target.is_stale else None
        change = feed.change(target_id, shown, sent.pop(target_id, NOTHING))
        if change.now:
            sent[target_id] = change.now
        return change

    async def DescribeMetrics(self, request: api.DescribeMetricsRequest, call: Call) -> api.DescribeMetricsResponse:
        read = translate.Reader()
        matches = read.matches(request.matches)
        limits.refuse(read.violations, "describe metrics")
        found = {
            family.name: translate.described(family)
            for target in self._wanted(matches)
            if not target.is_stale
            for family, _ in select(target.shown.families, matches, target.spec.target_id)
        }
        response = api.DescribeMetricsResponse(metrics=[found[name] for name in sorted(found)])
        _check_size(response)
        return response

    def _wanted(self, matches: Sequence[Match]) -> list[Target]:
        feed = self._feeds.of(matches)
        return [target for target in self._targets.all() if feed.wants(target.spec.target_id)]

    # Signals

    async def GetSignals(self, request: api.GetSignalsRequest, call: Call) -> api.GetSignalsResponse:
        names = self._each_named(request.target_ids)
        now = time.time_ns() // 1_000_000
        return api.GetSignalsResponse(
            signals=[translate.signals(name, self._targets.get(name).shown, now) for name in names]
        )

    async def WatchSignals(self, request: api.WatchSignalsRequest, call: Call) -> None:
        names = self._each_named(request.target_ids)
        only = set(request.target_ids)
        shown: dict[str, object] = {}
        with self._targets.watch() as watcher:
            await self._write_signals(names, shown, call)
            while True:
                news = await watcher.news()
                await self._write_signals([name for name in news if not only or name in only], shown, call)

    async def _write_signals(self, names: Iterable[str], shown: dict[str, object], call: Call) -> None:
        for name in names:
            target = self._targets.find(name)
            if target is None:
                if shown.pop(name, None) is not None:
                    await call.write(api.WatchSignalsResponse(signals=metric_pb.Signals(target_id=name)))
                continue
            now = (list(target.shown.signals), list(target.shown.rates))
            if shown.get(name) != now:
                shown[name] = now
                told = translate.signals(name, target.shown, time.time_ns() // 1_000_000)
                await call.write(api.WatchSignalsResponse(signals=told))

    def _each_named(self, target_ids: Sequence[str]) -> list[str]:
        read = translate.Reader()
        for index, name in enumerate(target_ids):
            limits.check_id(name, read.violations, f"target_ids[{index}]")
        limits.refuse(read.violations, "find the targets")
        names = list(dict.fromkeys(target_ids)) or self._targets.names()
        for name in names:
            self._targets.get(name)
        return names

    # Reports

    async def ReportMetrics(self, request: api.ReportMetricsRequest, call: Call) -> api.ReportMetricsResponse:
        read = translate.Reader()
        families = read.report(request)
        limits.refuse(read.violations, "take the report")
        reports: Any = self._targets.report(request.target_id)
        spec = self._targets.get(request.target_id).spec
        good, reject = sift(Collector(spec.target_id, spec.own_labels, spec.limits, Registry()), families)
        left = reports.put(good)
        self._targets.hurry(request.target_id)
        if left:
            reject("series_limit", request.target_id, left)
        reports.reject.add(reject)
        return api.ReportMetricsResponse(
            accepted_points=sum(len(family.points) for family in good) - left,
            rejections=translate.rejections(reject.counts, reject.examples),
        )


def _check_age(targets: Iterable[Target], max_age_ms: int) -> None:
    now = time.time_ns() // 1_000_000
    for target in targets:
        if now - target.shown.time_ms > max_age_ms:
            raise Unavailable(
                f"cannot give metrics so new: the latest of target {target.spec.target_id} are older",
                reason=Reason.METRICS_TOO_OLD,
                retry_ms=_RETRY_MS,
                target_id=target.spec.target_id,
            )


def _merged(targets: Iterable[Target], matches: Sequence[Match], *, include_stale: bool) -> list[metric_pb.Metric]:
    found: dict[str, metric_pb.Metric] = {}
    size = 0
    for target in targets:
        if target.is_stale and not include_stale:
            continue
        for family, series in select(target.shown.families, matches, target.spec.target_id):
            size += len(series) * _LEAST_BYTES
            if size > _MAX_BYTES:
                raise _too_large()
            made = translate.metric(family, series, time_ms=target.shown.time_ms, stale=target.is_stale)
            if family.name in found:
                found[family.name].series.extend(made.series)
            else:
                found[family.name] = made
    return [found[name] for name in sorted(found)]


def _check_size(response: Any) -> None:
    if response.ByteSize() > _MAX_BYTES:
        raise _too_large()


def _too_large() -> ResourceExhausted:
    return ResourceExhausted(
        f"cannot answer: it is more than {_MAX_BYTES} bytes; match less", reason=Reason.MESSAGE_TOO_LARGE
    )
