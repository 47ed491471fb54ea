"""The pool file is read when the process starts, and again when it has changed and rests.

It is looked at and not listened to, since a file of a ConfigMap, of another machine or of a bind mount changes without
a word. A change is taken when two looks have found the same: a file that is written in place is there in part for a
while, and a part may well be right in itself, with shards missing that were expected.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from retinue_server.runtime.addresses import StartError
from retinue_server.scattergather.poolfile import PoolFileError, UnreadableError, read

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from retinue_server.scattergather.core.topology import Pool

log = logging.getLogger(__name__)

_LOOK_S = 1.0

_Stamp = tuple[int, ...] | None
"""Changes with the content: times, size and file number; None while there is no file."""


class PoolFile:
    """A part: gives `apply` the pools of the file when it starts, and again when they change.

    `prepare` is given them before, on a thread; it raises StartError for pools that can't be served.
    """

    def __init__(
        self,
        path: Path,
        apply: Callable[[Sequence[Pool]], None],
        *,
        must_exist: bool,
        prepare: Callable[[Sequence[Pool]], None] = lambda _: None,
        look_s: float = _LOOK_S,
    ) -> None:
        self._path, self._apply, self._prepare = path, apply, prepare
        self._must_exist, self._look_s = must_exist, look_s
        self._seen: _Stamp = None
        """At the last look."""
        self._taken: _Stamp = None
        """Of what is served, or was found to be wrong."""
        self._served: Sequence[Pool] = ()
        self._complaint = ""
        self._looking: asyncio.Task[None] | None = None

    @property
    def ok(self) -> bool:
        """Whether the file, as it is now, is what is served."""
        return not self._complaint

    async def start(self) -> None:
        """Raises StartError for a file that is wrong, or is missing although it was named."""
        if self._looking is not None:
            return
        try:
            self._seen = await asyncio.to_thread(_stamp, self._path)
            if self._seen is not None or self._must_exist:
                self._taken = ()  # whatever it is: it may have been amid a change, so it is read once more
                self._serve(await asyncio.to_thread(self._read))
        except PoolFileError as error:
            raise StartError(str(error)) from None
        self._looking = asyncio.create_task(self._go_on_looking())

    async def stop(self) -> None:
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.cancel()
            await asyncio.wait({looking})

    async def _go_on_looking(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            await self.look()

    async def look(self) -> None:
        """Takes what has changed; of itself this happens every `look_s`. What is wrong goes to the log."""
        try:
            await self._look()
        except (PoolFileError, StartError) as error:
            self._complain(f"{error}; the pools stay as they were")
        except Exception as error:  # whatever it is, it must not end the looking
            if not self._complaint:
                log.exception("cannot serve the pools of %s", self._path)
            self._complaint = str(error) or type(error).__name__

    async def _look(self) -> None:
        before, self._seen = self._seen, await asyncio.to_thread(_stamp, self._path)
        if self._seen != before or self._seen == self._taken:
            return  # it is being written, or is known
        try:
            pools = await asyncio.to_thread(self._read)
        except UnreadableError:
            raise  # and tried again at the next look: what hinders may go without a trace in the file
        except PoolFileError:
            self._taken = self._seen
            raise
        if await asyncio.to_thread(_stamp, self._path) == self._seen:
            self._serve(pools)
            self._taken = self._seen

    def _read(self) -> Sequence[Pool]:
        pools = read(self._path)
        self._prepare(pools)
        return pools

    def _serve(self, pools: Sequence[Pool]) -> None:
        if pools != self._served or self._complaint:
            self._apply(pools)
            log.info("serving %d pools of %s", len(pools), self._path)
        self._served, self._complaint = pools, ""

    def _complain(self, text: str) -> None:
        """Once for each cause."""
        if text != self._complaint:
            log.error(text)
        self._complaint = text


def _stamp(path: Path) -> _Stamp:
    """Raises UnreadableError if even that can't be known."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableError(path, error) from None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
