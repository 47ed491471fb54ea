"""`retinue-server --check-pack FILE`: looks rule packs over, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from retinue_server.adapter import packfile
from retinue_server.adapter.core import linting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


def check(paths: Iterable[str], say: Callable[[str], object]) -> int:
    """Says what is wrong with these files, or with those of a directory: 0 if nothing is, 1 if something is."""
    found = [finding for path in paths for finding in _findings(Path(path))]
    for finding in found:
        say(finding)
    return 1 if found else 0


def _findings(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = sorted(path.glob("*.yaml"))
        for file in files:
            yield from _findings(file)
        if not files:
            yield f"{path}: it has no *.yaml"
        return
    try:
        pack = packfile.read(str(path), path.read_bytes())
    except OSError as error:
        yield f"{path}: {error.strerror}"
    except packfile.PackError as error:
        yield str(error)
    else:
        if path.suffix != ".yaml":
            yield f"{path}: its name must end with .yaml, or it is not read"
        yield from (f"{path}: {finding}" for finding in linting.findings(pack))
