"""Where a PostgreSQL is, for every engine that uses one; needs the extra `postgres`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_LIVELINESS: dict[str, Any] = {
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""So that a peer that is gone without a word is noticed."""


class Address:
    """Where the database is. Raises ValueError, which does not repeat the URL: a password may be in it."""

    def __init__(self, url: str, password_file: Path | None = None) -> None:
        try:
            self._known = conninfo_to_dict(url)
        except psycopg.ProgrammingError:
            raise ValueError("its url is none that libpq takes: postgresql://USER@HOST:PORT/DATABASE") from None
        if not self._known:
            raise ValueError("it needs a url: postgresql://USER@HOST:PORT/DATABASE")
        self._password_file = password_file

    def parameters(self, **defaults: Any) -> dict[str, Any]:
        """What to connect with: defaults, unless the url says otherwise. The password is read anew.

        Raises psycopg.OperationalError if the password can't be read.
        """
        told = {**_LIVELINESS, **defaults, **self._known, "client_encoding": "UTF8"}
        if self._password_file is not None:
            told["password"] = self._password(self._password_file)
        return told

    @staticmethod
    def _password(path: Path) -> str:
        try:
            return path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise psycopg.OperationalError(f"cannot read the password from {path}: {error}") from None


def schema_name(schema: str) -> str:
    """The name of a schema that needs no quotes; raises ValueError for another."""
    if not _SCHEMA.fullmatch(schema):
        raise ValueError(f"{schema!r} is no name for a schema: use lower-case letters, digits and _")
    return schema


MIGRATION_LOCK = 0x5E71_4E0E
"""The advisory lock of all migrations of Retinue in one database."""
