"""Why a connection could not be secured, in words that say what to look at."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from retinue_server.runtime.errors import Code

if TYPE_CHECKING:
    from retinue_server.scattergather.engine import Done

_UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([a-z ]+)")
_ENDED = "it ended the handshake, perhaps for want of a certificate that it trusts; look at tls.cert_file"
_KNOWN = {
    "Hostname Verification Check failed": "its certificate is for another name; say tls.server_name",
    "WRONG_VERSION_NUMBER": "it does not speak TLS, and the pool's `tls` says that it does",
    "Socket closed": _ENDED,
    "Connection reset": _ENDED,
}
"""What gRPC says, and what that means of a connection that was to be secured."""
_CONNECTING = "failed to connect"


def plainly(done: Done, code: int, message: str, reply: bytes | None) -> None:
    """Tells `done`, with what the handshake failed of if that is why there is no connection."""
    if code == Code.UNAVAILABLE and _CONNECTING in message:
        message = _plain(message)
    done(code, message, reply)


def _plain(message: str) -> str:
    if untrusted := _UNTRUSTED.search(message):
        return f"cannot connect to the leaf: its certificate is not trusted, {untrusted[1]}; look at tls.ca_file"
    for fragment, meaning in _KNOWN.items():
        if fragment in message:
            return f"cannot connect to the leaf: {meaning}"
    return message
