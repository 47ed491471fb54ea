"""What is under test: the settings of the server, and the faults that an engine alone can suffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.faults.schedule import Kind


@dataclass(frozen=True)
class Engine:
    """An engine that is ready for servers."""

    name: str
    env: Mapping[str, str]
    """The server's settings."""
    coordinators: int = 1
    renewed_at_start: bool = True
    """See Policy."""
    faults: Mapping[Kind, Callable[[], None]] = field(default_factory=dict)
    """Each returns when the engine can be reached again, or is about to be."""
    module: str = "retinue_server"


Prepare = Callable[[Path], AbstractContextManager[Engine]]
"""Makes an engine ready in an empty directory."""


@contextmanager
def sqlite(_: Path) -> Iterator[Engine]:
    """One file, one coordinator."""
    yield Engine("sqlite", {"RETINUE_WORKQUEUE__ENGINE": "sqlite"})


ENGINES: Mapping[str, Prepare] = {"sqlite": sqlite}
