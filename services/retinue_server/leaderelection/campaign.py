"""The Campaign stream: one task reads what the app says, one tells it what happens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from retinue.leaderelection.v1 import leaderelection_service_pb2 as api
from retinue_server.leaderelection import translate
from retinue_server.leaderelection.core import limits
from retinue_server.leaderelection.core.requests import Liveness
from retinue_server.runtime.errors import Aborted, Reason, RetinueError, Unavailable, Violation

if TYPE_CHECKING:
    from retinue_server.leaderelection.core.elections import Elections
    from retinue_server.leaderelection.core.session import Outbox, Session
    from retinue_server.leaderelection.proof import Proofs
    from retinue_server.runtime.dispatch import Call


class Campaign:
    """The life of one stream."""

    def __init__(self, elections: Elections, read: translate.Reader, proofs: Proofs, call: Call) -> None:
        self._elections, self._read, self._proofs, self._call = elections, read, proofs, call
        self._session: Session
        self._outbox: Outbox
        self._resigned = False

    async def run(self) -> None:
        """Serves until the app resigns or goes; what a bad message raises ends it."""
        self._begin(await self._call.read() or api.CampaignRequest())
        reading = asyncio.create_task(self._listen())
        telling = asyncio.create_task(self._tell())
        try:
            await asyncio.wait([reading, telling], return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
                await self._half_closed(telling)
            if telling.done():
                telling.result()
        finally:
            self._elections.end(self._session, self._outbox)
            await _ended(reading, telling)
        if not self._resigned and self._outbox.closed:
            raise self._outbox.error or _over(stopping=self._elections.stopping)

    def _begin(self, first: api.CampaignRequest) -> None:
        if not first.HasField("start"):
            limits.refuse("campaign", [Violation("start", "is required in the first message")])
        asked = self._read.start(first.start)
        is_dead = self._proofs.watch(asked.proof_file, self._read.violations)
        self._session, self._outbox = self._elections.begin(asked, is_dead, self._read.violations)

    async def _half_closed(self, telling: asyncio.Task[None]) -> None:
        """The app sends no more: by the open RPC it lives on; otherwise what it has runs out."""
        if self._resigned:
            self._outbox.close()
        if self._resigned or self._session.asked.liveness is Liveness.STREAM:
            await telling

    # Reading

    async def _listen(self) -> None:
        while not self._resigned and (message := await self._call.read()) is not None:
            await self._take(message)
            await self._outbox.room()

    async def _take(self, message: api.CampaignRequest) -> None:
        match message.WhichOneof("message"):
            case "heartbeat":
                said = message.heartbeat
                self._elections.heartbeat(self._session, said.sequence, healthy=not said.unhealthy)
            case "proclaim":
                self._elections.say(self._session, message.proclaim.value)
            case "resign":
                self._resigned = True
                await self._elections.leave(self._session)
            case "start":
                limits.refuse("campaign", [Violation("start", "must come in the first message alone")])
            case _:
                limits.refuse("campaign", [Violation("message", "is required")])

    # Telling

    async def _tell(self) -> None:
        while events := await self._outbox.take():
            for event in events:
                await self._call.write(translate.event(event))


def _over(*, stopping: bool) -> RetinueError:
    if stopping:
        return Unavailable("cannot go on: the server is stopping", reason=Reason.SHUTTING_DOWN, retry_ms=500)
    return Aborted("cannot go on: another stream has resumed this session", reason=Reason.SESSION_RESUMED)


async def _ended(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
