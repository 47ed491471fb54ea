"""What a caller is told when a call fails: the canonical code, the message and, by `details`, more."""

from __future__ import annotations

import logging
import os

from retinue_server.runtime.errors import Code, Reason, RetinueError

DETAILS_KEY = "grpc-status-details-bin"
"""The trailing metadata that carries a serialised google.rpc.Status."""

log = logging.getLogger(__name__)

MESSAGE_CHARS = 512
"""Limit of a message: percent-encoded, a character can take twelve bytes."""


class Refusal(Exception):
    """The end of a call with a status other than OK, ready for any transport."""

    def __init__(self, code: Code, message: str, status: bytes = b"") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        """A serialised google.rpc.Status, the value of `grpc-status-details-bin`; empty without details."""
        self.trailing: tuple[tuple[str, str | bytes], ...] = ()
        """More trailing metadata, as an upstream gave it."""


def refusal(error: RetinueError) -> Refusal:
    """What the caller sees of a domain error; its cause goes to the log."""
    from retinue_server.runtime import details  # noqa: PLC0415 - google.rpc loads when something is refused

    if error.__cause__ is not None:
        log.warning("%s: %r", error.message, error.__cause__)
    message = shorten(error.message)
    return Refusal(error.code, message, details.serialised(error, message))


def unexpected(error: BaseException, method: str) -> Refusal:
    """INTERNAL with an id that finds the traceback in the log; nothing of the cause goes out."""
    error_id = os.urandom(6).hex()
    log.error("%s failed unexpectedly, error id %s", method, error_id, exc_info=error)
    message = f"internal error {error_id}: the server's log says more under this id"
    return refusal(RetinueError(message, reason=Reason.INTERNAL, error_id=error_id))


def shorten(message: str) -> str:
    """As much of a message as a status holds."""
    return message if len(message) <= MESSAGE_CHARS else message[: MESSAGE_CHARS - 1] + "…"
