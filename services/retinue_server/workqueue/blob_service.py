"""BlobService: bytes in and out of the blob store, in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue.workqueue.v1 import blob_service_pb2 as blobs
from retinue_server.runtime import wire
from retinue_server.runtime.errors import Violation
from retinue_server.workqueue.core import limits
from retinue_server.workqueue.core.queue import blob_not_found

if TYPE_CHECKING:
    from retinue_server.runtime.dispatch import Call
    from retinue_server.workqueue.engine import BlobStat, BlobStore

DESCRIPTOR = blobs.DESCRIPTOR.services_by_name["BlobService"]
PIECE = 256 * 1024
MAX_PIECE = 1024 * 1024


class BlobService:
    """See the contract."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    async def UploadBlob(self, call: Call) -> blobs.UploadBlobResponse:
        first: blobs.UploadBlobRequest = await call.read() or blobs.UploadBlobRequest()
        _check_first(first)
        upload = self._store.upload()
        try:
            await upload.write(first.data)
            while (piece := await call.read()) is not None:
                _check_piece(piece)
                await upload.write(piece.data)
            stat = await upload.commit(first.blob_id, first.size_bytes)
        finally:
            await upload.abort()
        return blobs.UploadBlobResponse(blob_id=stat.blob_id, size_bytes=stat.size)

    async def DownloadBlob(self, request: blobs.DownloadBlobRequest, call: Call) -> None:
        stat = await self._stat(request.blob_id)
        offset = request.offset_bytes
        if not 0 <= offset <= stat.size:
            limits.refuse("download", [Violation("offset_bytes", f"must be from 0 to {stat.size}")])
        while data := await self._store.read(request.blob_id, offset, PIECE):
            await call.write(blobs.DownloadBlobResponse(data=data))
            offset += len(data)

    async def StatBlob(self, request: blobs.StatBlobRequest, call: Call) -> blobs.StatBlobResponse:
        stat = await self._stat(request.blob_id)
        return blobs.StatBlobResponse(
            blob_id=stat.blob_id, size_bytes=stat.size, create_time=wire.to_timestamp(stat.create_ms)
        )

    async def _stat(self, blob_id: str) -> BlobStat:
        limits.refuse("find the blob", list(limits.blob_id(blob_id)))
        stat = await self._store.stat(blob_id)
        if stat is None:
            raise blob_not_found(blob_id)
        return stat


def _check_first(first: blobs.UploadBlobRequest) -> None:
    violations = [*limits.blob_id(first.blob_id)] if first.blob_id else []
    if first.size_bytes < 0:
        violations.append(Violation("size_bytes", "must not be negative"))
    limits.refuse("upload", [*violations, *_too_large(first)])


def _check_piece(piece: blobs.UploadBlobRequest) -> None:
    late = [name for name in ("blob_id", "size_bytes") if getattr(piece, name)]
    limits.refuse("upload", [*(Violation(n, "belongs in the first message") for n in late), *_too_large(piece)])


def _too_large(piece: blobs.UploadBlobRequest) -> list[Violation]:
    if len(piece.data) <= MAX_PIECE:
        return []
    return [Violation("data", f"must be at most {MAX_PIECE} bytes; it has {len(piece.data)}")]
