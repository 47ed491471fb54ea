"""Blobs in a local directory: `blobs/ab/abcdef…`, one file a content, written beside, synced, then renamed."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TypeVar

from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import NotFound, Reason
from retinue_server.runtime.files import make_directory, sync_directory
from retinue_server.workqueue.engine import BlobStat, Room
from retinue_server.workqueue.engines.content import Content
from retinue_server.workqueue.engines.room import RESERVE_BYTES, DiskRoom, is_full

T = TypeVar("T")


class LocalBlobs:
    """See engine.BlobStore. Modification time is when a blob was first kept, access time when last asked for."""

    def __init__(
        self, root: Path, max_bytes: int, fatal: Callable[[BaseException], None], *, reserve_bytes: int = RESERVE_BYTES
    ) -> None:
        self._root, self._max_bytes, self.fatal = root, max_bytes, fatal
        self._uploads = root / "uploads"
        self.disk = DiskRoom(self._uploads, reserve_bytes, "blobs")

    async def start(self) -> None:
        try:
            await asyncio.to_thread(self._prepare)
        except OSError as error:
            raise StartError(f"cannot keep blobs in {self._root}: {error.strerror}: {error.filename}") from error

    async def stop(self) -> None:
        """Nothing stays open between calls."""

    async def room(self) -> Room:
        await asyncio.to_thread(self.disk.look)
        return self.disk.report

    def _prepare(self) -> None:
        make_directory(self._uploads)
        for left in self._uploads.iterdir():
            left.unlink()

    def upload(self) -> _Upload:
        return _Upload(self, self._uploads / os.urandom(16).hex(), self._max_bytes)

    async def stat(self, blob_id: str) -> BlobStat | None:
        return await asyncio.to_thread(self.find, blob_id)

    def find(self, blob_id: str) -> BlobStat | None:
        """`stat`, blocking."""
        path = self.path(blob_id)
        try:
            found = path.stat()
            os.utime(path, (time.time(), found.st_mtime))
        except FileNotFoundError:
            return None
        return BlobStat(blob_id, found.st_size, int(found.st_mtime * 1000))

    async def read(self, blob_id: str, offset: int, size: int) -> bytes:
        return await asyncio.to_thread(self._read, blob_id, offset, size)

    def _read(self, blob_id: str, offset: int, size: int) -> bytes:
        try:
            with self.path(blob_id).open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except FileNotFoundError:
            raise NotFound(f"cannot find blob {blob_id}", reason=Reason.BLOB_NOT_FOUND, blob_id=blob_id) from None

    async def idle(self, age_ms: int, limit: int) -> list[str]:
        return await asyncio.to_thread(self._idle, age_ms, limit)

    def _idle(self, age_ms: int, limit: int) -> list[str]:
        before = time.time() - age_ms / 1000
        found = (p for p in self._root.glob("[0-9a-f][0-9a-f]/*") if p.stat().st_atime <= before)
        return [path.name for path, _ in zip(found, range(limit), strict=False)]

    async def delete(self, blob_id: str, age_ms: int) -> None:
        await asyncio.to_thread(self._delete, blob_id, age_ms)

    def _delete(self, blob_id: str, age_ms: int) -> None:
        path = self.path(blob_id)
        with suppress(FileNotFoundError):
            if path.stat().st_atime <= time.time() - age_ms / 1000:
                path.unlink()

    def path(self, blob_id: str) -> Path:
        """Where the blob is, or would be."""
        return self._root / blob_id[:2] / blob_id


class _Upload:
    """See engine.BlobWriter."""

    def __init__(self, blobs: LocalBlobs, path: Path, max_bytes: int) -> None:
        self._blobs, self._path = blobs, path
        self._content = Content(max_bytes)
        self._file: FileIO | None = None

    async def write(self, data: bytes) -> None:
        self._content.admit(len(data))
        await self._disk(lambda: self._append(data))

    def _append(self, data: bytes) -> None:
        self._blobs.disk.claim(len(data))
        if self._file is None:
            self._file = self._path.open("xb", buffering=0)  # what a full disk leaves in a buffer fails at close again
        self._content.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    async def commit(self, expected_id: str, expected_size: int) -> BlobStat:
        blob_id = self._content.checked(expected_id, expected_size)
        return await self._disk(lambda: self._publish(blob_id))

    def _publish(self, blob_id: str) -> BlobStat:
        if self._file is None:
            self._append(b"")
        file, self._file = self._file, None
        assert file is not None
        with file:
            self._sync(partial(os.fsync, file))
        target = self._blobs.path(blob_id)
        kept = self._blobs.find(blob_id)
        if kept is None:
            target.parent.mkdir(exist_ok=True)
            self._path.replace(target)
        else:
            self._path.unlink()
        for directory in (target.parent, target.parent.parent):  # whoever put it there may not have come so far yet
            self._sync(partial(sync_directory, directory))
        return kept or BlobStat(blob_id, self._content.size, int(time.time() * 1000))

    def _sync(self, sync: Callable[[], None]) -> None:
        """A sync that fails is not tried again: what is on disk is not known, and the process ends."""
        try:
            sync()
        except OSError as error:
            if not is_full(error):
                self._blobs.fatal(error)
            raise

    async def abort(self) -> None:
        await asyncio.to_thread(self._drop)

    async def _disk(self, work: Callable[[], T]) -> T:
        """Runs blocking work; a full disk is the caller's to know."""
        try:
            return await asyncio.to_thread(work)
        except OSError as error:
            if is_full(error):
                raise self._blobs.disk.ran_out() from None
            raise

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._path.unlink(missing_ok=True)
