"""The settings of the adapter (`adapter:` in the file, RETINUE_ADAPTER__… in the environment).

Targets stand in a file of their own, which is read again when it changes: see `targetfile.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec


class EndpointSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which addresses may be dialled."""

    allow: tuple[str, ...] = ()
    """Beside loopback and this host's own addresses: `CIDR[:PORT[-PORT]]`. Link-local and metadata addresses only if
    they are named."""


class AdapterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may set."""

    targets: Path | None = None
    """The file of targets; None = DATA_DIR/adapter/targets.yaml. While there is none, RPCs alone declare."""
    allow_override: bool = False
    """Lets RPCs change what the file declares, until the file changes."""
    rule_packs: Path | None = None
    """A directory of rule packs beside the shipped ones; one of the same name takes the shipped one's place."""
    endpoints: EndpointSettings = EndpointSettings()
    max_targets: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    """How many there may be."""
    max_watchers: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    """Streams of WatchMetrics and WatchSignals."""
    stale_intervals: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    """After so many intervals without a good collection a target is DOWN, and nothing of it is shown."""
