"""TLS to endpoints: a context that is made anew when the files it stands on change."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from retinue_server.ambassador.engine import Refused

if TYPE_CHECKING:
    from retinue_server.ambassador.core.spec import Tls

Stamp = tuple[tuple[str, int, int], ...]


def context(tls: Tls) -> ssl.SSLContext:
    """Raises Refused for files that can't be used; blocks."""
    named = tls.ca_file
    try:
        made = ssl.create_default_context(cafile=tls.ca_file or None)
        if tls.cert_file:
            named = f"{tls.cert_file} with {tls.key_file}"
            made.load_cert_chain(tls.cert_file, tls.key_file)
    except (OSError, ssl.SSLError) as error:
        raise Refused(f"cannot use {named}: {error}") from None
    return made


def stamp(tls: Tls) -> Stamp:
    """Changes with the files; blocks."""
    found = []
    for name in (tls.ca_file, tls.cert_file, tls.key_file):
        if name:
            try:
                status = Path(name).stat()
            except OSError:
                continue  # being replaced; the next look has it
            found.append((name, status.st_mtime_ns, status.st_ino))
    return tuple(found)
