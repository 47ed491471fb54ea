"""The content of an upload as it comes in: how much it may be, and what it turns out to be."""

from __future__ import annotations

from retinue_server.runtime.errors import InvalidArgument, Reason, ResourceExhausted, Violation


class Content:
    """Counts and hashes; `blob_id` is the SHA-256 in hex."""

    def __init__(self, max_bytes: int) -> None:
        import hashlib  # noqa: PLC0415 - loads slowly, and only uploads need it

        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.size = 0

    def admit(self, size: int) -> None:
        """So many bytes more are about to come; ResourceExhausted if they are too many."""
        self.size += size
        if self.size > self._max_bytes:
            raise ResourceExhausted(
                f"cannot keep a blob of more than {self._max_bytes} bytes",
                reason=Reason.PAYLOAD_TOO_LARGE,
                limit=self._max_bytes,
            )

    def update(self, data: bytes) -> None:
        """They have come; takes a while, and any thread."""
        self._hash.update(data)

    def checked(self, expected_id: str, expected_size: int) -> str:
        """Its blob_id; InvalidArgument if something else was announced ("" and 0 announce nothing)."""
        blob_id = self._hash.hexdigest()
        wrong = []
        if expected_id not in ("", blob_id):
            wrong.append(Violation("blob_id", f"the content's SHA-256 is {blob_id}"))
        if expected_size not in (0, self.size):
            wrong.append(Violation("size_bytes", f"{self.size} bytes came"))
        if wrong:
            error = InvalidArgument("cannot keep the blob: other bytes came than were announced", wrong)
            error.reason = Reason.BLOB_MISMATCH
            raise error
        return blob_id
