"""A broken variant, loaded into a server by the tests alone: SQLite acknowledges what it has not synced."""

import apsw


def _break(db: apsw.Connection) -> None:
    db.pragma("synchronous", "OFF")
    db.authorizer = lambda what, name, *_: (
        apsw.SQLITE_IGNORE if (what, name) == (apsw.SQLITE_PRAGMA, "synchronous") else apsw.SQLITE_OK
    )


apsw.connection_hooks.append(_break)
