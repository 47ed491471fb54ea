"""The tokens that callers may show, as a file has them."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from typing import TYPE_CHECKING

from retinue_server.runtime.dispatch import Role

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)


class TokenFileError(Exception):
    """A token file that can't be used; the message says why and what to do."""


class TokenFile:
    """Lines `ROLE TOKEN` (`#` starts a comment), read again when the file's modification time changes.

    A file that can't be used when it is read again leaves the tokens as they were, and says so in the log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._roles = _read(path)

    def role(self, token: str) -> Role | None:
        """The token's role; every known token is compared, each in constant time."""
        self._reload()
        digest = _digest(token)
        found = None
        for known, role in self._roles.items():
            if hmac.compare_digest(known, digest):
                found = role
        return found

    def _reload(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._roles = _read(self._path)
        except TokenFileError as error:
            log.error("%s; the tokens stay as they were", error)  # noqa: TRY400 - the message is the cause
        else:
            log.info("read %d tokens from %s", len(self._roles), self._path)


def _stamp(path: Path) -> tuple[int, int, int]:
    """Changes with the content: time, size and file number; zeros while there is no file."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> dict[bytes, Role]:
    try:
        text = path.read_text()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise TokenFileError(f"cannot read the token file {path}: {error}") from None
    if mode & stat.S_IRWXO:
        raise TokenFileError(
            f"cannot use the token file {path}: every user may open it; run `chmod o= {path}` "
            "(in a pod, mount the secret with defaultMode 0440)"
        )
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return dict(_parse(path, number, words) for number, words in enumerate(lines, 1) if words)


def _parse(path: Path, number: int, words: list[str]) -> tuple[bytes, Role]:
    names = {role.name.lower(): role for role in Role}
    if len(words) != 2 or words[0] not in names:  # noqa: PLR2004 - a role and a token
        raise TokenFileError(
            f"cannot use the token file {path}: line {number} must be ROLE TOKEN, "
            f"where ROLE is one of {', '.join(names)}"
        )
    return _digest(words[1]), names[words[0]]


def _digest(token: str) -> bytes:
    """Equal lengths make the comparison's time independent of the token's."""
    return hashlib.sha256(token.encode()).digest()
