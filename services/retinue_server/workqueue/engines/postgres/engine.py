"""The threads of the engine; see the package."""

from __future__ import annotations

import asyncio
import queue as queues
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import psycopg
from msgspec.structs import replace

from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import Reason, Unavailable
from retinue_server.runtime.postgres import Address
from retinue_server.workqueue.engine import Capabilities, Durability, Instant, Transaction
from retinue_server.workqueue.engine import View as AnyView
from retinue_server.workqueue.engines.groups import Step, Steps, answer
from retinue_server.workqueue.engines.postgres.blobs import PostgresBlobs
from retinue_server.workqueue.engines.postgres.days import keep_days
from retinue_server.workqueue.engines.postgres.leases import Leases
from retinue_server.workqueue.engines.postgres.marks import Marks
from retinue_server.workqueue.engines.postgres.migrate import migrate
from retinue_server.workqueue.engines.postgres.news import News, Ready
from retinue_server.workqueue.engines.postgres.session import AGAIN, Session, Statement, translated
from retinue_server.workqueue.engines.postgres.statements import Statements
from retinue_server.workqueue.engines.postgres.store import Exclusively, Store, View

T = TypeVar("T")

_TRIES = 8
"""How often a step is run again because others were faster."""
_READERS = 2
_DAYS_EVERY_S = 60.0


class PostgresEngine:
    """The store in one schema of a database; see the package.

    `url` is what libpq takes; a wrong one is a ValueError. With `own_clock` (the default) the database's clock is the
    one that counts; tests that hold the clock switch it off.
    """

    def __init__(
        self,
        url: str,
        *,
        password_file: Path | None = None,
        schema: str = "retinue",
        connections: int = 2,
        prepared_statements: bool = True,
        listen_url: str = "",
        own_clock: bool = True,
    ) -> None:
        self.capabilities = Capabilities("postgres", Durability.DISK, many_coordinators=True, own_clock=own_clock)
        self._statements = Statements(schema)
        self._connections, self._prepared = connections, prepared_statements
        self._where = Address(url, password_file)
        self._direct = Address(listen_url or url, password_file)
        self._on_ready: Ready | None = None
        self._news: News | None = None
        self._housekeeping: threading.Thread | None = None
        self._closing = threading.Event()
        self._steps = Steps()
        self._writers: list[_Writer] = []
        self._readers: queues.SimpleQueue[Session] = queues.SimpleQueue()
        self._reading: ThreadPoolExecutor | None = None
        self._offset_ms = 0
        self._days: frozenset[int] = frozenset()

    def now(self) -> Instant:
        """The database's time as far as it is known here: what its last answer said, and the time since."""
        now_ms = time.monotonic_ns() // 1_000_000 + self._offset_ms
        return Instant(now_ms, now_ms)

    def room(self) -> None:
        """The database's disk is not seen from here."""

    def blobs(self, max_bytes: int) -> PostgresBlobs:
        """The blobs in the same schema; they start after the engine."""
        return PostgresBlobs(self._session, self._statements, max_bytes)

    def on_ready(self, hear: Ready) -> None:
        """Who is told, on the event loop, when tasks became ready by another coordinator's doing. Before `start`."""
        self._on_ready = hear

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self._prepare)
        except psycopg.Error as error:
            raise StartError(f"cannot use the database: {str(error).strip()}") from error
        self._closing.clear()
        self._housekeeping = threading.Thread(target=self._keep_house, name="workqueue-days", daemon=True)
        self._housekeeping.start()
        self._start_news(loop)
        self._reading = ThreadPoolExecutor(_READERS, "workqueue-reader")
        for _ in range(_READERS):
            self._readers.put(self._session("reader"))
        turn, marks, leases = threading.Lock(), Marks(), Leases()
        for number in range(self._connections):
            store = Store(self._session("writer"), self._statements, lambda: self._days, marks, leases)
            store.own_clock = self.capabilities.own_clock
            writer = _Writer(self._steps, store, loop, self._committed, turn)
            writer.thread = threading.Thread(target=writer.run, name=f"workqueue-writer-{number}", daemon=True)
            writer.thread.start()
            self._writers.append(writer)

    async def stop(self) -> None:
        writers, self._writers = self._writers, []
        for _ in writers:
            self._steps.end()
        for writer in writers:
            await asyncio.to_thread(writer.thread.join)
            writer.store.session.close()
        reading, self._reading = self._reading, None
        await asyncio.to_thread(self._stop_beside)
        if reading is not None:
            await asyncio.to_thread(reading.shutdown)
            for _ in range(_READERS):
                self._readers.get().close()

    def write(self, step: Callable[[Transaction], T]) -> asyncio.Future[T]:
        if not self._writers:
            raise Unavailable("cannot write: the engine is stopped", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=500)
        return self._steps.do(step)

    async def read(self, query: Callable[[AnyView], T]) -> T:
        if self._reading is None:
            raise Unavailable("cannot read: the engine is stopped", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=500)
        return await asyncio.get_running_loop().run_in_executor(self._reading, self._run_query, query)

    def _session(self, role: str) -> Session:
        return Session(self._where, f"retinue workqueue {role}", prepared=self._prepared)

    def _prepare(self) -> None:
        session = self._session("start")
        try:
            migrate(session, self._statements)
            self.capabilities = replace(self.capabilities, durability=_durability(session))
            [(_, now_ms)] = session.run([(self._statements["clock"], ())])
            self._set_clock(now_ms)
        finally:
            session.close()

    def _start_news(self, loop: asyncio.AbstractEventLoop) -> None:
        hear = self._on_ready
        if hear is not None:
            listener = Session(self._direct, "retinue workqueue listener", prepared=False)

            def heard(queue_id: str, count: int) -> None:
                loop.call_soon_threadsafe(hear, queue_id, count)

            self._news = News(self._session("news"), listener, self._statements.schema, heard)
            self._news.start()

    def _keep_house(self) -> None:
        """Keeps the days of history; what it can't do now it does later."""
        while not self._closing.is_set():
            with suppress(psycopg.Error):
                self.keep_days()
            self._closing.wait(_DAYS_EVERY_S)

    def keep_days(self) -> None:
        """Makes and drops days of history now, as it is done every minute; blocks."""
        session = self._session("days")
        try:
            self._days = keep_days(session, self._statements)
        finally:
            session.close()

    def _stop_beside(self) -> None:
        self._closing.set()
        news, self._news = self._news, None
        if news is not None:
            news.stop()
        housekeeping, self._housekeeping = self._housekeeping, None
        if housekeeping is not None:
            housekeeping.join()

    def _committed(self, store: Store) -> None:
        self._set_clock(store.time.wall_ms)
        if self._news is not None and store.ready_tasks:
            self._news.tell(store.ready_tasks)

    def _set_clock(self, now_ms: int) -> None:
        self._offset_ms = now_ms - time.monotonic_ns() // 1_000_000

    def _run_query(self, query: Callable[[AnyView], T]) -> T:
        session = self._readers.get()
        try:
            return _queried(session, View(session, self._statements), query)
        except psycopg.Error as error:
            raise translated(error) from error
        finally:
            session.rollback()
            self._readers.put(session)


def _durability(session: Session) -> Durability:
    """What the server's settings promise of a commit. Raises StartError for an encoding that can't hold all texts."""
    sql = "SELECT current_setting('fsync'), current_setting('server_encoding')"
    [(fsync, encoding)] = session.run([(sql, ())])
    if encoding != "UTF8":
        raise StartError(f"cannot use a database whose encoding is {encoding}: make one with ENCODING 'UTF8'")
    return Durability.DISK if fsync == "on" else Durability.OS


def _queried(session: Session, view: View, query: Callable[[AnyView], T]) -> T:
    """Runs a query; once more if the connection was lost, since it changes nothing."""
    try:
        view.begin()
        result = query(view)
        view.end()
    except psycopg.OperationalError:
        if not session.lost:
            raise
        view.begin()
        result = query(view)
        view.end()
    return result


class _Writer:
    """One thread with one connection."""

    thread: threading.Thread

    def __init__(
        self,
        steps: Steps,
        store: Store,
        loop: asyncio.AbstractEventLoop,
        committed: Callable[[Store], None],
        turn: threading.Lock,
    ) -> None:
        self._steps, self.store, self._loop, self._committed = steps, store, loop, committed
        self._turn = turn
        self._writes: list[Statement] = []
        """What goes out with the commit."""
        self._committing = False
        """Whether a commit was sent, so that a lost connection leaves open what came of it."""

    def run(self) -> None:
        """Serves until None comes.

        The next writer's turn begins before this one's commit: what these steps read is locked, so that its steps find
        what these ones made of it (and what is known by heart is waited for, leases.py). Not so if they made tasks
        ready, which the next ones may look for.
        """
        while True:
            with self._turn:
                group = self._steps.next_group()
                error = self._tried(partial(self._run, group)) if group else None
                committed = error is None and bool(self.store.ready_tasks)
                if committed:
                    error = self._tried(self._commit)
            if not group:
                return
            if not committed:
                error = error or self._tried(self._commit)
            if error:
                self._make_up_for(error, group)
            self.store.end()
            self._loop.call_soon_threadsafe(answer, group)

    def _tried(self, action: Callable[[], None]) -> Exception | None:
        """What an action raised."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a writer that ends would let its callers wait for ever
            return error
        return None

    def _make_up_for(self, error: Exception, group: list[Step]) -> None:
        """Makes the best of what came between a group and its commit."""
        lost = self.store.session.lost and not self._committing
        if isinstance(error, (*AGAIN, Exclusively)) or (isinstance(error, psycopg.OperationalError) and lost):
            self._again(group, exclusive=isinstance(error, Exclusively))
        else:
            self._give_up(group, error)

    def _again(self, group: list[Step], *, exclusive: bool) -> None:
        """The whole group once more."""
        self._undo()
        error = self._tried(lambda: self._run(group, exclusive=exclusive, careful=True)) or self._tried(self._commit)
        if isinstance(error, (*AGAIN, Exclusively)):
            self._one_by_one(group)
        elif error:
            self._give_up(group, error)

    def _one_by_one(self, group: list[Step]) -> None:
        for step in group:
            self._undo()
            self._persist(step)

    def _persist(self, step: Step) -> None:
        """One step, alone, until no other coordinator is faster."""
        for number in range(_TRIES):
            run = partial(self._run, [step], exclusive=number >= _TRIES // 2, careful=True)
            error = self._tried(run) or self._tried(self._commit)
            if error is None:
                return
            self._give_up([step], error)
            if not isinstance(error, (*AGAIN, Exclusively)):
                return
            time.sleep(random.uniform(0, 0.01))  # noqa: S311 - so that two do not meet again

    def _run(self, group: list[Step], *, exclusive: bool = False, careful: bool = False) -> None:
        self._committing = False
        self.store.open(exclusive=exclusive, careful=careful)
        for step in group:
            step.run(self.store, (psycopg.Error, Exclusively))
        self._writes = self.store.writes()

    def _commit(self) -> None:
        self._committing = True
        rows = self.store.session.first_rows([*self._writes, ("COMMIT", ())])
        [status] = rows.pop()
        if status != "COMMIT":
            raise psycopg.OperationalError(f"the commit ended as {status}")
        self.store.committed(rows)
        self._committed(self.store)

    def _undo(self) -> None:
        """Nothing of the transaction is left."""
        self.store.session.rollback()
        self.store.forget()

    def _give_up(self, group: list[Step], error: BaseException) -> None:
        self._undo()
        told = translated(error)
        for step in group:
            step.fail(told)
