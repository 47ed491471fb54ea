"""`/metrics` and `/metrics/TARGET`: lines that are ready, with this process's own among them."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from retinue_server.adapter import metrics
from retinue_server.adapter.core import exposition
from retinue_server.adapter.core.collection import Collector, Limits, Registry, by_name
from retinue_server.adapter.core.packs import Reject

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from retinue_server.adapter.core.points import AnyFamily, Family
    from retinue_server.adapter.core.target import Target
    from retinue_server.adapter.core.targets import Targets


class MetricPages:
    """What the metrics listener asks."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._own = Collector("", {}, Limits(), Registry())

    def page(self, own: Iterable[Any], name: str, *, open_metrics: bool) -> tuple[str, bytes] | None:
        """Content type and text; `own` are prometheus_client's metrics of this process, shown where no target is
        named."""
        if not name:
            shown = [self._of_process(own), *(one.shown.families for one in self._targets.all() if not one.is_stale)]
            return _page(shown, self._targets.all(), open_metrics=open_metrics)
        target = self._targets.find(name)
        if target is None:
            return None
        return _page([() if target.is_stale else target.shown.families], [target], open_metrics=open_metrics)

    def _of_process(self, own: Iterable[Any]) -> list[Family]:
        from retinue_server.adapter import parsing  # noqa: PLC0415 - where pages are asked for

        return self._own.take(parsing.of_metrics(own, Reject()), 0)


def _page(shown: Iterable[Sequence[AnyFamily]], targets: Iterable[Target], *, open_metrics: bool) -> tuple[str, bytes]:
    """What two say of one name, or what bears the name of another's lines, is shown of the first alone: what is shown
    of a target may be older than what the next one was told it may call itself."""
    families = by_name(chain(shown, [list(metrics.signals(targets))]))
    names = Registry()
    alike: list[list[AnyFamily]] = []
    for same in families:
        first = same[0]
        if not names.claim(first.name, first.type, first.unit, ""):
            alike.append([one for one in same if (one.type, one.unit) == (first.type, first.unit)])
    text = exposition.document(alike, open_metrics=open_metrics)
    return exposition.OPEN_METRICS if open_metrics else exposition.TEXT, text
