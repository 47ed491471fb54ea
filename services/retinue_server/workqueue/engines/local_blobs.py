"""Blobs in a local directory: `blobs/ab/abcdef…`, one file a content, written beside, synced, then renamed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import InvalidArgument, NotFound, Reason, ResourceExhausted, Violation
from retinue_server.workqueue.engine import BlobStat

T = TypeVar("T")


class LocalBlobs:
    """See engine.BlobStore. Modification time is when a blob was first kept, access time when last asked for."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._uploads = root / "uploads"

    async def start(self) -> None:
        try:
            await asyncio.to_thread(self._prepare)
        except OSError as error:
            raise StartError(f"cannot keep blobs in {self._root}: {error.strerror}: {error.filename}") from error

    async def stop(self) -> None:
        """Nothing stays open between calls."""

    def _prepare(self) -> None:
        self._uploads.mkdir(parents=True, exist_ok=True)
        for left in self._uploads.iterdir():
            left.unlink()

    def upload(self) -> _Upload:
        return _Upload(self, self._uploads / secrets.token_hex(16), self._max_bytes)

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
        self._blobs, self._path, self._max_bytes = blobs, path, max_bytes
        self._hash = hashlib.sha256()
        self._size = 0
        self._file: IO[bytes] | None = None

    async def write(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._max_bytes:
            raise ResourceExhausted(
                f"cannot keep a blob of more than {self._max_bytes} bytes",
                reason=Reason.PAYLOAD_TOO_LARGE,
                limit=self._max_bytes,
            )
        await _disk(lambda: self._append(data))

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._file = self._path.open("xb")
        self._file.write(data)
        self._hash.update(data)

    async def commit(self, expected_id: str, expected_size: int) -> BlobStat:
        blob_id = self._hash.hexdigest()
        wrong = []
        if expected_id not in ("", blob_id):
            wrong.append(Violation("blob_id", f"the content's SHA-256 is {blob_id}"))
        if expected_size not in (0, self._size):
            wrong.append(Violation("size_bytes", f"{self._size} bytes came"))
        if wrong:
            error = InvalidArgument("cannot keep the blob: other bytes came than were announced", wrong)
            error.reason = Reason.BLOB_MISMATCH
            raise error
        return await _disk(lambda: self._publish(blob_id))

    def _publish(self, blob_id: str) -> BlobStat:
        if self._file is None:
            self._append(b"")
        file, self._file = self._file, None
        assert file is not None
        with file:
            file.flush()
            os.fsync(file.fileno())
        if (kept := self._blobs.find(blob_id)) is not None:
            self._path.unlink()
            return kept
        target = self._blobs.path(blob_id)
        target.parent.mkdir(exist_ok=True)
        self._path.replace(target)
        for directory in (target.parent, target.parent.parent):
            _sync_directory(directory)
        return BlobStat(blob_id, self._size, int(time.time() * 1000))

    async def abort(self) -> None:
        await asyncio.to_thread(self._drop)

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._path.unlink(missing_ok=True)


async def _disk(work: Callable[[], T]) -> T:
    """Runs blocking work; a full disk is the caller's to know."""
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise ResourceExhausted(
                "cannot keep the blob: the disk is full; nothing was kept",
                reason=Reason.DISK_FULL,
                retry_ms=5_000,
            ) from error
        raise


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
