"""How coordinators hear of each other's tasks: LISTEN and NOTIFY, outside the transactions of steps.

A NOTIFY takes a lock of the whole database when it commits; so only one connection sends, at most every 50 ms, what has
come up since. News is a hint: who misses some (or stands behind a pooler, where LISTEN does not work) finds the tasks
when it looks again, within a second.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import psycopg

if TYPE_CHECKING:
    from retinue_server.workqueue.engines.postgres.session import Session

_log = logging.getLogger(__name__)
_PAUSE_S = 0.05
_AWAY_S = 1.0
_ROOM = 7_000
"""Bytes of a payload; PostgreSQL takes 7,999."""

Ready = Callable[[str, int], None]
"""Told: a queue, and how many tasks became ready in it."""


class News:
    """Two threads, one that tells and one that listens."""

    def __init__(self, teller: Session, listener: Session, schema: str, hear: Ready) -> None:
        self._teller, self._listener, self._hear = teller, listener, hear
        self.channel = f"retinue:{schema}"
        self._me = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._news: Counter[str] = Counter()
        self._something = threading.Event()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begins."""
        for run, name in ((self._tell_all, "workqueue-news-out"), (self._listen, "workqueue-news-in")):
            thread = threading.Thread(target=run, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Returns when both have ended."""
        self._stopping.set()
        self._something.set()
        for thread in self._threads:
            thread.join()

    def tell(self, ready: Mapping[str, int]) -> None:
        """Notes what became ready; returns at once."""
        with self._lock:
            self._news.update(ready)
        self._something.set()

    def _tell_all(self) -> None:
        while not self._stopping.is_set():
            self._something.wait()
            self._something.clear()
            with self._lock:
                news, self._news = self._news, Counter()
            for payload in _payloads(self._me, news):
                with contextlib.suppress(psycopg.Error):  # it is a hint
                    self._teller.run([("SET synchronous_commit = off", ()), _notify(self.channel, payload)])
            self._stopping.wait(_PAUSE_S)
        if not self._listener.lost:
            with contextlib.suppress(psycopg.Error):  # so that our own listener stops at once, not within a second
                self._teller.run([_notify(self.channel, self._me)])
        self._teller.close()

    def _listen(self) -> None:
        told = False
        while not self._stopping.is_set():
            try:
                self._listener.connection.execute(f'LISTEN "{self.channel}"', prepare=False)
                told = False
                self._hear_all(self._listener.connection)
            except psycopg.Error as error:
                if not told:
                    _log.warning("cannot listen for other coordinators: %s; looking every second", str(error).strip())
                told = True
                self._listener.close()
                self._stopping.wait(_AWAY_S)
        self._listener.close()

    def _hear_all(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        while not self._stopping.is_set():
            for notice in connection.notifies(timeout=1.0, stop_after=1):
                self._take(notice.payload)

    def _take(self, payload: str) -> None:
        sender, *lines = payload.split("\n")
        if sender == self._me:
            return
        for line in lines:
            queue_id, _, count = line.partition(" ")
            if count.isdecimal():
                self._hear(queue_id, int(count))


def _notify(channel: str, payload: str) -> tuple[str, tuple[str, str]]:
    return "SELECT pg_notify($1::text, $2::text)", (channel, payload)


def _payloads(me: str, news: Mapping[str, int]) -> list[str]:
    """As many lines in each as it has room for."""
    payloads: list[str] = []
    text = me
    for queue_id, count in news.items():
        line = f"\n{queue_id} {count}"
        if len(text) + len(line) > _ROOM:
            payloads.append(text)
            text = me
        text += line
    return [*payloads, text] if news else []
