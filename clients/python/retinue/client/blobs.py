"""Content that is too large for a message: asked for before it is sent, resumed after a cut, checked by its
SHA-256.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO

import grpc

from retinue.client import errors
from retinue.client.channel import backoff, is_transient
from retinue.workqueue.v1 import blob_service_pb2 as pb
from retinue.workqueue.v1 import blob_service_pb2_grpc as rpc
from retinue.workqueue.v1.task_pb2 import BlobRef

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from retinue.client.channel import Connection

_PIECE = 1 << 20
_TRIES = 6


class Blobs:
    """The blob store of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def _stub(self) -> rpc.BlobServiceAsyncStub:
        return rpc.BlobServiceStub(self._connection.channel)

    async def stat(self, blob_id: str) -> pb.StatBlobResponse:
        """What is known of a blob; prolongs its life by an hour. Raises NotFound."""
        return await self._connection.call(self._stub.StatBlob, pb.StatBlobRequest(blob_id=blob_id))

    async def put(self, content: bytes) -> BlobRef:
        """Keeps bytes; sends them only if the server does not have them. Safe to repeat."""
        return await self.put_file(BytesIO(content))

    async def put_file(self, file: BinaryIO) -> BlobRef:
        """Keeps the content of a seekable file from its beginning, as put(). The file must not change
        meanwhile.
        """
        digest = await asyncio.to_thread(_digest, file)
        blob = BlobRef(blob_id=digest, size_bytes=file.seek(0, os.SEEK_END))
        if not await self._has(digest):
            await self._upload(file, blob)
        return blob

    async def _has(self, blob_id: str) -> bool:
        try:
            await self.stat(blob_id)
        except errors.NotFound:
            return False
        return True

    async def _upload(self, file: BinaryIO, blob: BlobRef) -> None:
        for attempt, wait in enumerate(backoff(), 1):
            try:
                await self._stub.UploadBlob(_pieces(file, blob), metadata=self._connection.metadata())
            except grpc.aio.AioRpcError as raw:
                error = errors.from_rpc_error(raw)
                if not is_transient(error) or attempt == _TRIES:
                    raise error from raw
                await asyncio.sleep(max(wait, error.retry_after or 0))
            else:
                return

    async def get(self, blob_id: str) -> bytes:
        """The content of a blob. Raises NotFound."""
        file = BytesIO()
        await self.get_file(blob_id, file)
        return file.getvalue()

    async def get_file(self, blob_id: str, file: BinaryIO) -> int:
        """Writes a blob's content to an empty file and returns its size; goes on where a cut connection
        stopped.

        Raises NotFound, and OSError if the bytes that came are not the blob's.
        """
        digest, size, waits = hashlib.sha256(), 0, backoff()
        for attempt in range(1, _TRIES + 1):
            try:
                async for data in self._pieces_from(blob_id, size):
                    await asyncio.to_thread(_take, file, digest, data)
                    size += len(data)
                break
            except errors.RetinueError as error:
                if not is_transient(error) or attempt == _TRIES:
                    raise
                await asyncio.sleep(max(next(waits), error.retry_after or 0))
        if digest.hexdigest() != blob_id:
            raise OSError(f"cannot read blob {blob_id}: other bytes came; try again")
        return size

    async def _pieces_from(self, blob_id: str, offset: int) -> AsyncIterator[bytes]:
        request = pb.DownloadBlobRequest(blob_id=blob_id, offset_bytes=offset)
        try:
            async for piece in self._stub.DownloadBlob(request, metadata=self._connection.metadata()):
                yield piece.data
        except grpc.aio.AioRpcError as raw:
            raise errors.from_rpc_error(raw) from raw


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _take(file: BinaryIO, digest: hashlib._Hash, data: bytes) -> None:
    file.write(data)
    digest.update(data)


async def _pieces(file: BinaryIO, blob: BlobRef) -> AsyncIterator[pb.UploadBlobRequest]:
    yield pb.UploadBlobRequest(blob_id=blob.blob_id, size_bytes=blob.size_bytes)
    await asyncio.to_thread(file.seek, 0)
    while piece := await asyncio.to_thread(file.read, _PIECE):
        yield pb.UploadBlobRequest(data=piece)
