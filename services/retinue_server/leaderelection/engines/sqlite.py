"""SQLite: one file that all servers of a host share; every acknowledged change is synced.

The kernel is one, so a deadline on its boot clock means the same to all of them, as long as they are in the same boot
and in the same time namespace; each row says in which it was written. A row of another is watched instead.

Servers hear of each other's changes by inotify: who has committed one touches the file, since the writes to the log
come before it can be seen. A counter in each row tells changes from renewals. A touch leaves a time that its server
knows again: it looks only if another has changed something before that, which its transaction and a glance after the
touch have seen, or after it, which leaves another time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import apsw

from retinue_server.leaderelection.engine import (
    TERMS_KEPT,
    Capabilities,
    Claim,
    EndReason,
    Granted,
    Hold,
    Record,
    Refused,
    Scope,
    Term,
)
from retinue_server.leaderelection.engines.inotify import Inotify
from retinue_server.leaderelection.engines.memory import boot_ms
from retinue_server.leaderelection.engines.own_thread import OwnThread
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import Reason, ResourceExhausted, RetinueError, Unavailable
from retinue_server.runtime.files import make_directory

T = TypeVar("T")

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_CHECKPOINT_PAGES = 1_000
_BUSY_MS = 2_000
"""How long to wait for another server's transaction."""
_COLUMNS = (
    "epoch, version, candidate_id, session_id, value, lease_ms, release_delay_ms, acquire_ms, step_down,"
    " deadline_ms, kernel"
)
_SYNCS = (apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC, apsw.SQLITE_IOERR_TRUNCATE)

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE election (
  election_id      TEXT PRIMARY KEY,
  epoch            INTEGER NOT NULL,
  version          INTEGER NOT NULL,
  changed          INTEGER NOT NULL,
  candidate_id     TEXT NOT NULL,
  session_id       TEXT NOT NULL,
  value            TEXT NOT NULL,
  lease_ms         INTEGER NOT NULL,
  release_delay_ms INTEGER NOT NULL,
  acquire_ms       INTEGER NOT NULL,
  step_down        INTEGER NOT NULL,
  deadline_ms      INTEGER NOT NULL,
  kernel           TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX election_changed ON election (changed);
CREATE TABLE term (
  election_id  TEXT NOT NULL,
  epoch        INTEGER NOT NULL,
  candidate_id TEXT NOT NULL,
  acquire_ms   INTEGER NOT NULL,
  end_ms       INTEGER,
  reason       INTEGER NOT NULL,
  PRIMARY KEY (election_id, epoch)
) STRICT, WITHOUT ROWID;
"""


def kernel() -> str:
    """Which boot clock this process reads: that of this boot, in this time namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        return f"{boot} {Path('/proc/self/ns/time').readlink()}"
    except OSError:  # a kernel without time namespaces has one clock
        return boot


class SqliteEngine:
    """See engine.Engine. `fatal` is called when the disk can no longer be trusted."""

    capabilities = Capabilities("sqlite", Scope.HOST)

    def __init__(
        self,
        path: Path,
        fatal: Callable[[BaseException], None],
        *,
        now_ms: Callable[[], int] = boot_ms,
        kernel: Callable[[], str] = kernel,
    ) -> None:
        self._path, self._fatal = path, fatal
        self._now_ms, self._kernel_id = now_ms, kernel
        self._kernel = self._domain = ""
        self._db: apsw.Connection
        self._thread: OwnThread | None = None
        self._told: Callable[[str], None] = lambda _: None
        self._watched: set[str] = set()
        self._changed = 0
        """Up to where changes have been told."""
        self._inotify: Inotify | None = None
        self._looking: asyncio.Task[None] | None = None
        self._news = False
        """The file was touched since the last look began."""
        self._change = 0
        """The number of the transaction's change, if it makes one that others watch."""
        self._touched_ns = 0
        """When the file was last touched from here."""

    async def start(self) -> None:
        self._thread = OwnThread("leaderelection-store")
        try:
            await self._thread.call(self._open)
        except (apsw.Error, OSError) as error:
            raise StartError(
                f"cannot open {self._path}: {error}; mend it, or choose another with leaderelection.sqlite.path"
            ) from error
        self._inotify = Inotify(self._path, self._file_changed)

    async def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._inotify is not None:
            self._inotify.close()
        thread.call(self._close)
        await thread.end()

    def listen(self, told: Callable[[str], None]) -> None:
        self._told = told

    def watch(self, election_id: str) -> None:
        self._watched.add(election_id)

    def unwatch(self, election_id: str) -> None:
        self._watched.discard(election_id)

    async def claim(self, claim: Claim, watched: str | None = None) -> Granted | Refused:
        return await self._write(lambda: self._claim(claim, watched))

    async def withdraw(self, election_id: str, session_id: str) -> None:
        """There is no line."""

    async def renew(self, holds: Sequence[Hold]) -> Sequence[Record | None]:
        return await self._write(lambda: [self._renew(hold) for hold in holds])

    async def release(self, hold: Hold, reason: EndReason, wall_ms: int) -> bool:
        return await self._write(lambda: self._release(hold, reason, wall_ms))

    async def proclaim(self, hold: Hold, value: str) -> Record | None:
        where = "election_id = ? AND session_id = ? AND epoch = ?"
        return await self._write(lambda: self._set(f"value = ? WHERE {where}", (value, *hold), hold.election_id))

    async def ask_step_down(self, election_id: str, epoch: int) -> Record | None:
        where = "election_id = ? AND epoch = ? AND candidate_id <> ''"
        return await self._write(lambda: self._set(f"step_down = 1 WHERE {where}", (election_id, epoch), election_id))

    async def read(self, election_id: str) -> Record | None:
        return await self._call(lambda: self._record(election_id))

    async def records(self, after: str, limit: int) -> Sequence[Record]:
        sql = f"SELECT election_id, {_COLUMNS} FROM election WHERE election_id > ? ORDER BY election_id LIMIT ?"  # noqa: S608 - constants
        return await self._call(lambda: [self._made(name, row) for name, *row in self._db.execute(sql, (after, limit))])

    async def terms(self, election_id: str, before: int | None, limit: int) -> Sequence[Term]:
        sql = (
            "SELECT epoch, candidate_id, acquire_ms, end_ms, reason FROM term"
            " WHERE election_id = ? AND epoch < ? ORDER BY epoch DESC LIMIT ?"
        )
        values = (election_id, (1 << 62) if before is None else before, limit)
        return await self._call(
            lambda: [
                Term(epoch, self._domain, candidate, acquire_ms, end_ms, EndReason(reason))
                for epoch, candidate, acquire_ms, end_ms, reason in self._db.execute(sql, values)
            ]
        )

    # On the thread

    def _close(self) -> None:
        self._db.close()

    def _open(self) -> None:
        make_directory(self._path.parent)
        self._kernel = self._kernel_id()
        db = self._db = apsw.Connection(str(self._path))
        db.set_busy_timeout(_BUSY_MS)
        for pragma, value in (("journal_mode", "WAL"), ("synchronous", "FULL"), ("wal_autocheckpoint", 0)):
            db.pragma(pragma, value)
        db.set_wal_hook(self._note_commit)
        self._log_pages = self._checked_pages = 0
        with self._transaction():
            self._migrate()
            self._domain = self._find_domain()
        self._changed = self._latest()

    def _migrate(self) -> None:
        version = int(self._db.pragma("user_version"))
        if version > SCHEMA_VERSION:
            raise StartError(
                f"cannot open {self._path}: its schema is version {version}, newer than {SCHEMA_VERSION}; "
                "use a newer server"
            )
        if version < 1:
            self._db.execute(_SCHEMA)
            self._db.pragma("user_version", 1)

    def _find_domain(self) -> str:
        """The file's own: one that was put in the place of another (a restored backup) gets a new one."""
        file = self._path.stat()
        inode = f"{file.st_dev}:{file.st_ino}"
        known = dict(self._db.execute("SELECT key, value FROM meta"))
        if known.get("inode") != inode:
            known = {"inode": inode, "domain": f"sqlite-{os.urandom(8).hex()}"}
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", known.items())
        return str(known["domain"])

    def _claim(self, claim: Claim, watched: str | None) -> Granted | Refused:
        before = self._record(claim.election_id)
        if before is not None and before.session_id == claim.session_id:
            hold = Hold(claim.election_id, claim.session_id, before.epoch)
            return Granted(self._kept(self._renew(hold, claim.lease_ms)))
        held = before is not None and bool(before.candidate_id)
        if before is not None and held and before.left_ms != 0 and before.version != watched:
            return Refused(before)
        epoch = before.epoch + 1 if before is not None else 1
        if held:
            self._end_term(claim.election_id, epoch - 1, EndReason.EXPIRED, claim.wall_ms)
        self._begin_term(claim, epoch)
        delay_ms = before.release_delay_ms if before is not None and held else 0
        return Granted(self._kept(self._record(claim.election_id)), delay_ms)

    def _begin_term(self, claim: Claim, epoch: int) -> None:
        self._db.execute(
            "INSERT INTO election VALUES (?1, ?2, 1, ?11, ?3, ?4, ?5, ?6, ?7, ?8, 0, ?9, ?10)"
            " ON CONFLICT (election_id) DO UPDATE SET epoch = ?2, version = version + 1, changed = ?11,"
            " candidate_id = ?3, session_id = ?4, value = ?5, lease_ms = ?6, release_delay_ms = ?7, acquire_ms = ?8,"
            " step_down = 0, deadline_ms = ?9, kernel = ?10",
            (
                claim.election_id,
                epoch,
                claim.candidate_id,
                claim.session_id,
                claim.value,
                claim.lease_ms,
                claim.release_delay_ms,
                claim.wall_ms,
                self._now_ms() + claim.lease_ms,
                self._kernel,
                self._next_change(),
            ),
        )
        values = (claim.election_id, epoch, claim.candidate_id, claim.wall_ms, None, 0)
        self._db.execute("INSERT OR REPLACE INTO term VALUES (?, ?, ?, ?, ?, ?)", values)
        self._db.execute(
            "DELETE FROM term WHERE election_id = ? AND epoch <= ?", (claim.election_id, epoch - TERMS_KEPT)
        )

    def _renew(self, hold: Hold, lease_ms: int | None = None) -> Record | None:
        self._db.execute(
            "UPDATE election SET version = version + 1, lease_ms = coalesce(?1, lease_ms),"
            " deadline_ms = ?2 + coalesce(?1, lease_ms), kernel = ?3"
            " WHERE election_id = ?4 AND session_id = ?5 AND epoch = ?6",
            (lease_ms, self._now_ms(), self._kernel, *hold),
        )
        return self._record(hold.election_id) if self._db.changes() else None

    def _release(self, hold: Hold, reason: EndReason, wall_ms: int) -> bool:
        where = "election_id = ? AND session_id = ? AND epoch = ?"
        vacant = f"candidate_id = '', session_id = '', value = '', step_down = 0, deadline_ms = 0 WHERE {where}"
        if self._set(vacant, tuple(hold), hold.election_id) is None:
            return False
        self._end_term(hold.election_id, hold.epoch, reason, wall_ms)
        return True

    def _set(self, change: str, values: Sequence[Any], election_id: str) -> Record | None:
        sql = f"UPDATE election SET version = version + 1, changed = {self._next_change()}, {change}"  # noqa: S608 - constants
        self._db.execute(sql, values)
        return self._record(election_id) if self._db.changes() else None

    def _next_change(self) -> int:
        self._change = self._change or self._latest() + 1
        return self._change

    def _latest(self) -> int:
        return int(self._db.execute("SELECT coalesce(max(changed), 0) FROM election").get)

    def _end_term(self, election_id: str, epoch: int, reason: EndReason, wall_ms: int) -> None:
        sql = "UPDATE term SET end_ms = ?, reason = ? WHERE election_id = ? AND epoch = ?"
        self._db.execute(sql, (wall_ms, int(reason), election_id, epoch))

    def _record(self, election_id: str) -> Record | None:
        sql = f"SELECT {_COLUMNS} FROM election WHERE election_id = ?"  # noqa: S608 - constants
        row = self._db.execute(sql, (election_id,)).fetchone()
        return self._made(election_id, row) if row else None

    def _made(self, election_id: str, row: Sequence[Any]) -> Record:
        epoch, version, candidate, session, value, lease_ms, delay_ms, acquire_ms, step_down, deadline_ms, where = row
        left = max(deadline_ms - self._now_ms(), 0) if where == self._kernel else None
        return Record(
            election_id=election_id,
            domain=self._domain,
            epoch=epoch,
            version=str(version),
            candidate_id=candidate,
            session_id=session,
            value=value,
            lease_ms=lease_ms,
            release_delay_ms=delay_ms,
            acquire_ms=acquire_ms,
            step_down=bool(step_down),
            left_ms=left,
        )

    @staticmethod
    def _kept(record: Record | None) -> Record:
        assert record is not None, "it was written in this transaction"
        return record

    # Between loop and thread

    async def _write(self, step: Callable[[], T]) -> T:
        def run() -> T:
            self._change = 0
            with self._transaction():
                result = step()
            if self._change:
                self._touch()
            self._checkpoint_if_due()
            return result

        return await self._call(run)

    def _touch(self) -> None:
        """Tells the others, and looks itself if they have changed something, too."""
        self._touched_ns = time.time_ns()
        with suppress(OSError):  # others look by themselves, if later
            os.utime(self._path, ns=(self._touched_ns, self._touched_ns))
        alone = self._changed == self._change - 1 and self._latest() == self._change
        if alone:
            self._changed = self._change
        elif self._thread is not None:
            self._thread.tell(self._look_soon)

    async def _call(self, step: Callable[[], T]) -> T:
        if self._thread is None:
            raise Unavailable("cannot go on: the engine is stopped", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=500)

        def run() -> T:
            try:
                return step()
            except apsw.Error as error:
                if getattr(error, "extendedresult", 0) in _SYNCS:
                    self._fatal(error)
                raise _translated(error) from error

        return await self._thread.call(run)

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)

    def _note_commit(self, _: apsw.Connection, __: str, pages: int) -> int:
        if pages < self._log_pages:
            self._checked_pages = 0
        self._log_pages = pages
        return int(apsw.SQLITE_OK)

    def _checkpoint_if_due(self) -> None:
        if self._log_pages - self._checked_pages >= _CHECKPOINT_PAGES:
            self._checked_pages = self._log_pages
            with suppress(apsw.BusyError, apsw.LockedError):  # another server does it
                self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    # Changes by others

    def _file_changed(self) -> None:
        with suppress(OSError):
            if self._path.stat().st_mtime_ns == self._touched_ns:
                return
        self._look_soon()

    def _look_soon(self) -> None:
        self._news = True
        if self._watched and self._looking is None:
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        try:
            while self._news:
                self._news = False
                for election_id in await self._call(self._changes):
                    if election_id in self._watched:
                        self._told(election_id)
        except RetinueError as error:
            _log.warning("cannot look for changes: %s", error)
        finally:
            self._looking = None

    def _changes(self) -> list[str]:
        rows = list(self._db.execute("SELECT election_id, changed FROM election WHERE changed > ?", (self._changed,)))
        self._changed = max([self._changed, *(changed for _, changed in rows)])
        return [election_id for election_id, _ in rows]


class _Transaction:
    """BEGIN IMMEDIATE, then COMMIT or ROLLBACK."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            try:
                self._db.execute("COMMIT")
            except apsw.Error:
                self._undo()
                raise
        else:
            self._undo()

    def _undo(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")


def _translated(error: apsw.Error) -> RetinueError:
    if isinstance(error, apsw.FullError):
        return ResourceExhausted("cannot write: the disk is full", reason=Reason.DISK_FULL, retry_ms=5_000)
    return Unavailable(
        "cannot go on: the engine does not answer; see the server's log",
        reason=Reason.ENGINE_UNAVAILABLE,
        retry_ms=500,
    )
