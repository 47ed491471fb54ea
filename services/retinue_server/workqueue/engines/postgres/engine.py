"""The threads of the engine; see the package."""

from __future__ import annotations

import asyncio
import queue as queues
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psycopg

from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import Reason, RetinueError, Unavailable
from retinue_server.workqueue.engine import Capabilities, Durability, Instant, Transaction
from retinue_server.workqueue.engine import View as AnyView
from retinue_server.workqueue.engines.postgres.blobs import PostgresBlobs
from retinue_server.workqueue.engines.postgres.migrate import migrate
from retinue_server.workqueue.engines.postgres.session import AGAIN, Address, Session, translated
from retinue_server.workqueue.engines.postgres.statements import Statements
from retinue_server.workqueue.engines.postgres.store import Exclusively, Store, View

T = TypeVar("T")

_GROUP = 256
"""How many steps one commit holds at most."""
_TRIES = 8
"""How often a step is run again because others were faster."""
_READERS = 2


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
        own_clock: bool = True,
    ) -> None:
        self.capabilities = Capabilities("postgres", Durability.DISK, many_coordinators=True, own_clock=own_clock)
        self._statements = Statements(schema)
        self._connections, self._prepared = connections, prepared_statements
        self._where = Address(url, password_file)
        self._steps: queues.SimpleQueue[_Step | None] = queues.SimpleQueue()
        self._writers: list[_Writer] = []
        self._readers: queues.SimpleQueue[Session] = queues.SimpleQueue()
        self._reading: ThreadPoolExecutor | None = None
        self._offset_ms = 0
        self._days: frozenset[int] = frozenset()

    def now(self) -> Instant:
        """The database's time as far as it is known here: what its last answer said, and the time since."""
        now_ms = time.monotonic_ns() // 1_000_000 + self._offset_ms
        return Instant(now_ms, now_ms)

    def blobs(self, max_bytes: int) -> PostgresBlobs:
        """The blobs in the same schema; they start after the engine."""
        return PostgresBlobs(self._session, self._statements, max_bytes)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self._prepare)
        except psycopg.Error as error:
            raise StartError(f"cannot use the database: {str(error).strip()}") from error
        self._reading = ThreadPoolExecutor(_READERS, "workqueue-reader")
        for _ in range(_READERS):
            self._readers.put(self._session("reader"))
        turn = threading.Lock()
        for number in range(self._connections):
            store = Store(self._session("writer"), self._statements, lambda: self._days)
            store.own_clock = self.capabilities.own_clock
            writer = _Writer(self._steps, store, loop, self._heard, turn)
            writer.thread = threading.Thread(target=writer.run, name=f"workqueue-writer-{number}", daemon=True)
            writer.thread.start()
            self._writers.append(writer)

    async def stop(self) -> None:
        writers, self._writers = self._writers, []
        for _ in writers:
            self._steps.put(None)
        for writer in writers:
            await asyncio.to_thread(writer.thread.join)
            writer.store.session.close()
        reading, self._reading = self._reading, None
        if reading is not None:
            await asyncio.to_thread(reading.shutdown)
            for _ in range(_READERS):
                self._readers.get().close()

    async def write(self, step: Callable[[Transaction], T]) -> T:
        if not self._writers:
            raise Unavailable("cannot write: the engine is stopped", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=500)
        job = _Step(step, asyncio.get_running_loop().create_future())
        self._steps.put(job)
        result: T = await asyncio.shield(job.done)
        return result

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
        finally:
            session.close()

    def _heard(self, now: Instant) -> None:
        self._offset_ms = now.wall_ms - time.monotonic_ns() // 1_000_000

    def _run_query(self, query: Callable[[AnyView], T]) -> T:
        session = self._readers.get()
        try:
            return _queried(session, View(session, self._statements), query)
        except psycopg.Error as error:
            raise translated(error) from error
        finally:
            session.rollback()
            self._readers.put(session)


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


class _Step:
    """A step with the caller who waits for it."""

    def __init__(self, step: Callable[[Transaction], Any], done: asyncio.Future[Any]) -> None:
        self._step, self.done = step, done
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self, store: Store) -> None:
        """Runs it, maybe again; what it raises undoes it alone. Errors of the database undo the group."""
        self._result = self._error = None
        try:
            with store.savepoint():
                self._result = self._step(store)
        except (psycopg.Error, Exclusively):
            raise
        except Exception as error:  # noqa: BLE001 - the caller gets it
            self._error = error

    def fail(self, error: RetinueError) -> None:
        """Replaces whatever came of it."""
        self._error = error

    def answer(self) -> None:
        """Tells the caller, on the loop."""
        if self.done.done():
            return
        if self._error is None:
            self.done.set_result(self._result)
        else:
            self.done.set_exception(self._error)
            self.done.exception()


def _answer(group: list[_Step]) -> None:
    for step in group:
        step.answer()


class _Writer:
    """One thread with one connection."""

    thread: threading.Thread

    def __init__(
        self,
        steps: queues.SimpleQueue[_Step | None],
        store: Store,
        loop: asyncio.AbstractEventLoop,
        heard: Callable[[Instant], None],
        turn: threading.Lock,
    ) -> None:
        self._steps, self.store, self._loop, self._heard = steps, store, loop, heard
        self._turn = turn
        self._committing = False
        """Whether a commit was sent, so that a lost connection leaves open what came of it."""

    def run(self) -> None:
        """Serves until None comes.

        The next writer's turn begins before this one's commit: what these steps read is locked, so that its steps find
        what these ones made of it.
        """
        while True:
            with self._turn:
                group = self._next_group()
                error = self._tried(partial(self._run, group)) if group else None
            if not group:
                return
            if error := error or self._tried(self._commit):
                self._make_up_for(error, group)
            self._loop.call_soon_threadsafe(_answer, group)

    def _next_group(self) -> list[_Step]:
        """Waits for a step, and takes with it all that wait already."""
        first = self._steps.get()
        group = [first] if first else []
        while first and len(group) < _GROUP:
            try:
                step = self._steps.get_nowait()
            except queues.Empty:
                break
            if step is None:
                self._steps.put(None)
                break
            group.append(step)
        return group

    def _tried(self, action: Callable[[], None]) -> Exception | None:
        """What an action raised."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a writer that ends would let its callers wait for ever
            return error
        return None

    def _make_up_for(self, error: Exception, group: list[_Step]) -> None:
        """Makes the best of what came between a group and its commit."""
        lost = self.store.session.lost and not self._committing
        if isinstance(error, AGAIN):
            self._one_by_one(group)
        elif isinstance(error, Exclusively) or (isinstance(error, psycopg.OperationalError) and lost):
            self._again(group, exclusive=isinstance(error, Exclusively))
        else:
            self._give_up(group, error)

    def _again(self, group: list[_Step], *, exclusive: bool) -> None:
        """The whole group once more."""
        self._undo()
        error = self._tried(lambda: self._run(group, exclusive=exclusive)) or self._tried(self._commit)
        if isinstance(error, (*AGAIN, Exclusively)):
            self._one_by_one(group)
        elif error:
            self._give_up(group, error)

    def _one_by_one(self, group: list[_Step]) -> None:
        for step in group:
            self._undo()
            self._persist(step)

    def _persist(self, step: _Step) -> None:
        """One step, alone, until no other coordinator is faster."""
        for number in range(_TRIES):
            run = partial(self._run, [step], exclusive=number >= _TRIES // 2)
            error = self._tried(run) or self._tried(self._commit)
            if error is None:
                return
            self._give_up([step], error)
            if not isinstance(error, (*AGAIN, Exclusively)):
                return
            time.sleep(random.uniform(0, 0.01))  # noqa: S311 - so that two do not meet again

    def _run(self, group: list[_Step], *, exclusive: bool = False) -> None:
        self._committing = False
        self.store.open(exclusive=exclusive)
        for step in group:
            step.run(self.store)

    def _commit(self) -> None:
        writes = self.store.writes()
        self._committing = True
        [(status,)] = self.store.session.run([*writes, ("COMMIT", ())])
        if status != "COMMIT":
            raise psycopg.OperationalError(f"the commit ended as {status}")
        self._heard(self.store.time)

    def _undo(self) -> None:
        """Nothing of the transaction is left."""
        self.store.session.rollback()
        self.store.forget()

    def _give_up(self, group: list[_Step], error: BaseException) -> None:
        self._undo()
        told = translated(error)
        for step in group:
            step.fail(told)
