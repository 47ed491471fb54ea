"""What changed, for those who watch: who watches the same shares one match and one message for each collection."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import msgspec

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue_server.adapter import translate
from retinue_server.adapter.core.matching import select
from retinue_server.adapter.core.target import Shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from retinue.adapter.v1 import metric_pb2 as metric_pb
    from retinue_server.adapter.core.matching import Match
    from retinue_server.adapter.core.points import AnyFamily, Labels, Series

_MAX_BYTES = 3 * 1024 * 1024 // 2
"""Of a message; a metric may be that long alone."""

Sent = dict[str, tuple["AnyFamily", dict["Labels", "Series"]]]
"""What a watcher was told of a target: families by name, with their series by labels. Never changed, so that many may
have the same one."""
NOTHING: Sent = {}
_NOT_SHOWN = Shown()


class Change(msgspec.Struct, frozen=True):
    """From what was sent `before` to what there is `now`."""

    before: Sent
    now: Sent
    metrics: Sequence[metric_pb.Metric]
    messages: Sequence[api.WatchMetricsResponse]
    """The metrics; none if there are none. Shared: not to be changed."""


class _View:
    """What some matches show of one target since its latest collection."""

    def __init__(self, shown: Shown, matches: Sequence[Match], target_id: str) -> None:
        self.shown = shown
        self._now: Sent = {
            family.name: (family, {one.labels: one for one in series})
            for family, series in select(shown.families, matches, target_id)
        } or NOTHING
        self._changes: dict[int, Change] = {}
        """By what was sent before; readers that keep up have the same."""

    def since(self, before: Sent) -> Change:
        known = self._changes.get(id(before))
        if known is None:
            metrics = [*_new(before, self._now, self.shown.time_ms), *_gone(before, self._now, self.shown.time_ms)]
            known = Change(before, self._now, metrics, list(cut(metrics)) if metrics else [])
            self._changes[id(before)] = known  # which keeps `before`, and so its id
        return known


class Feed:
    """For all who watch the same matches."""

    def __init__(self, matches: Sequence[Match]) -> None:
        self._matches = matches
        self._views: dict[str, _View] = {}

    def wants(self, target_id: str) -> bool:
        """Whether a target can have some of it."""
        return not self._matches or any(match.target(target_id) for match in self._matches)

    def change(self, target_id: str, shown: Shown | None, before: Sent) -> Change:
        """Of a target; None = nothing is shown of it."""
        shown = shown or _NOT_SHOWN
        view = self._views.get(target_id)
        if view is None or view.shown is not shown:
            view = _View(shown, self._matches, target_id)
            self._views[target_id] = view
            if shown is _NOT_SHOWN:
                del self._views[target_id]  # it may be gone for good
        return view.since(before)


class Feeds:
    """By what is watched, as long as somebody does."""

    def __init__(self) -> None:
        self._feeds: WeakValueDictionary[tuple[Match, ...], Feed] = WeakValueDictionary()

    def of(self, matches: Sequence[Match]) -> Feed:
        """The one for these."""
        return self._feeds.setdefault(tuple(matches), Feed(matches))


def _new(before: Sent, now: Sent, time_ms: int) -> Iterator[metric_pb.Metric]:
    for name, (family, series) in now.items():
        _, known = before.get(name, (family, {}))
        new = [one for labels, one in series.items() if _differs(known.get(labels), one)]
        if new:
            yield translate.metric(family, new, time_ms=time_ms, stale=False)


def _differs(before: Series | None, now: Series) -> bool:
    """Two that are no number are the same."""
    return before is None or (before != now and str(before) != str(now))


def _gone(before: Sent, now: Sent, time_ms: int) -> Iterator[metric_pb.Metric]:
    """Series that were there and are not any more, with what they were last."""
    for name, (family, series) in before.items():
        _, left = now.get(name, (family, {}))
        gone = [one for labels, one in series.items() if labels not in left]
        if gone:
            yield translate.metric(family, gone, time_ms=time_ms, stale=True)


def cut(metrics: Iterable[metric_pb.Metric]) -> Iterator[api.WatchMetricsResponse]:
    """Into messages that are not too long; one at least."""
    response, size = api.WatchMetricsResponse(), 0
    for one in metrics:
        more = one.ByteSize()
        if size and size + more > _MAX_BYTES:
            yield response
            response, size = api.WatchMetricsResponse(), 0
        response.metrics.append(one)
        size += more
    yield response
