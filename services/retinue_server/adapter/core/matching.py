"""Which series somebody wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from retinue_server.adapter.core.points import AnyFamily, Labels, Series


class Match(msgspec.Struct, frozen=True):
    """What is left out matches all."""

    name: str = ""
    targets: frozenset[str] = frozenset()
    labels: tuple[tuple[str, str], ...] = ()

    def family(self, name: str) -> bool:
        """Whether a metric of that name may have some."""
        if self.name.endswith("*"):
            return name.startswith(self.name[:-1])
        return not self.name or name == self.name

    def target(self, target_id: str) -> bool:
        """Whether a target may."""
        return not self.targets or target_id in self.targets

    def series(self, labels: Labels) -> bool:
        """Whether it is one."""
        return not self.labels or set(self.labels) <= set(labels)


def select(
    families: Iterable[AnyFamily], matches: Sequence[Match], target: str
) -> Iterator[tuple[AnyFamily, list[Series]]]:
    """Of one target's families, those with series that any of the matches wants."""
    wanting = [match for match in matches if match.target(target)]
    if matches and not wanting:
        return
    for family in families:
        some = [match for match in wanting if match.family(family.name)]
        if matches and not some:
            continue
        if not some or any(not match.labels for match in some):
            yield family, family.series
            continue
        found = [one for one in family.series if any(match.series(one.labels) for match in some)]
        if found:
            yield family, found
