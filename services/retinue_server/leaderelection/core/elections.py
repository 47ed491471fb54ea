"""All elections of one server: its sessions, their renewals, and what others ask."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from retinue_server.leaderelection.core import limits, rules
from retinue_server.leaderelection.core.clock import Clock, SystemClock
from retinue_server.leaderelection.core.contest import Contest, Lead
from retinue_server.leaderelection.core.requests import (
    Draining,
    IsDead,
    Leadership,
    Standing,
    Token,
    Transition,
    View,
)
from retinue_server.leaderelection.core.session import Outbox, Session
from retinue_server.leaderelection.engine import EndReason, Engine, Record, Term
from retinue_server.runtime.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    RetinueError,
    Unavailable,
    Violation,
)

_log = logging.getLogger(__name__)

Found = Sequence[Violation]
"""What the translation from the wire has found wrong already."""
_PING_S = 5.0
_PING_AGAIN_S = 0.5
_RENEW_BATCH = 1_000
_LIMIT_RETRY_MS = 1_000
_NOT_ABOVE = Violation("heartbeat.sequence", "must be above the last one")
SERVER_ID_BYTES, _SESSION_ID_BYTES = 6, 16
"""A session_id begins with the id of its server, which survives the process: no other server resumes the session, which
might be alive here."""


class Acquired(NamedTuple):
    """How TryAcquire went: the leadership, or who has it."""

    leadership: Leadership | None
    view: View


class Elections:
    """The use cases."""

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock | None = None,
        names: Sequence[str] = (),
        max_sessions: int = 10_000,
        max_observers: int = 10_000,
        drain_ms: int = 10_000,
        server_id: str = "",
        journal: Callable[[Transition], None] = lambda _: None,
        chance: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.engine = engine
        self._clock = clock or SystemClock()
        self._names = frozenset(names)
        self._max_sessions, self._max_observers = max_sessions, max_observers
        self._drain_ms = drain_ms
        self._server_id = server_id or chance(SERVER_ID_BYTES).hex()
        self._chance = chance
        self._journal = journal
        self.contests: dict[str, Contest] = {}
        self._sessions: dict[str, Session] = {}
        self.observers = 0
        self.ended: Counter[EndReason] = Counter()
        """Terms that ended here since the start, for metrics."""
        self.elected = 0
        self.renewals = 0
        self.renew_s = 0.0
        """How long they took, in all."""
        self._renewing: asyncio.Task[None] | None = None
        self._renew = asyncio.Event()
        self._stopping = asyncio.Event()
        self._listeners: list[Callable[[bool], None]] = []
        self._healthy = False

    # Life

    async def start(self) -> None:
        """Begins to renew. The engine has started."""
        self.engine.listen(self._told)
        self._renewing = asyncio.create_task(self._keep_renewing())
        await self._ping()
        self._pinging = asyncio.create_task(self._keep_pinging())

    async def stop(self) -> None:
        """Ends everything; holds run out in the engine."""
        renewing, self._renewing = self._renewing, None
        if renewing is None:
            return
        for contest in list(self.contests.values()):
            await contest.stop()
        for task in (renewing, self._pinging):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def quiesce(self) -> None:
        """The server stops: leaders are told, and their terms end before it does, by resignation or by their time."""
        self._stopping.set()
        longest = max((s.asked.app_lease_ms for s in self._live()), default=0)
        stop_ms = self._clock.now().boot_ms + max(self._drain_ms - 2 * longest, 0)
        for contest in self.contests.values():
            contest.stop_granting_ms = stop_ms
            for session in contest.line.values():
                session.tell(Draining(max(self._drain_ms - 2 * longest, 0)))
            contest.wake()
            self._close_standby(contest)
        while any(contest.lead is not None for contest in self.contests.values()):
            await self._some_term_over()
        for session in self._live():
            if session.outbox is not None:
                session.outbox.close()

    def _close_standby(self, contest: Contest) -> None:
        for session in contest.line.values():
            leads = contest.lead is not None and contest.lead.session is session
            if not leads and session.outbox is not None:
                session.outbox.close()

    async def _some_term_over(self) -> None:
        contest = next((c for c in self.contests.values() if c.lead is not None), None)
        if contest is not None:
            with contest.watching() as changed:
                lead = contest.lead
                while contest.lead is lead and lead is not None:
                    changed.clear()
                    await changed.wait()

    @property
    def stopping(self) -> bool:
        """Whether the server stops."""
        return self._stopping.is_set()

    def _live(self) -> list[Session]:
        return [session for contest in self.contests.values() for session in contest.line.values()]

    # Health

    def subscribe(self, listener: Callable[[bool], None]) -> None:
        """See dispatch.Health."""
        self._listeners.append(listener)
        listener(self._healthy)

    def _heard(self, error: RetinueError | None) -> None:
        """The engine answered, or did not."""
        if error is not None and not isinstance(error, Unavailable):
            return
        healthy = error is None
        if healthy != self._healthy:
            self._healthy = healthy
            for listener in self._listeners:
                listener(healthy)

    async def _ping(self) -> None:
        try:
            await self.engine.records("", 1)
            self._heard(None)
        except RetinueError as error:
            self._heard(error)

    async def _keep_pinging(self) -> None:
        while True:
            await asyncio.sleep(_PING_S if self._healthy else _PING_AGAIN_S)
            await self._ping()

    # Candidates

    def begin(self, asked: Standing, is_dead: IsDead | None, found: Found = ()) -> tuple[Session, Outbox]:
        """A campaign, new or resumed; its events come out of the outbox."""
        self._check(asked, found, "campaign", "start.")
        contest = self._contest(asked.election_id)
        outbox = Outbox()
        session = self._resumed(asked, contest)
        if session is None:
            session = self._new(asked, contest, is_dead)
        else:
            session.is_dead = is_dead
        contest.attach(session, outbox, self._clock.now().boot_ms)
        return session, outbox

    def _check(self, asked: Standing, found: Found, what: str, at: str = "") -> None:
        limits.refuse(what, [*found, *limits.standing(asked, at)])
        limits.able(asked, self.engine.capabilities)
        self._known(asked.election_id)
        if self.stopping:
            raise Unavailable("cannot stand: the server is stopping", reason=Reason.SHUTTING_DOWN, retry_ms=500)

    def _resumed(self, asked: Standing, contest: Contest) -> Session | None:
        session = contest.line.get(asked.session_id)
        if session is None or session.asked.candidate_id != asked.candidate_id or session.leaving is not None:
            return None
        session.asked = asked
        if asked.value:
            session.value = asked.value
        return session

    def _new(self, asked: Standing, contest: Contest, is_dead: IsDead | None) -> Session:
        now = self._clock.now().boot_ms
        for other in contest.line.values():
            if other.asked.candidate_id == asked.candidate_id and other.leaving is None and other.is_alive(now):
                raise AlreadyExists(
                    f"cannot stand for {asked.election_id} as {asked.candidate_id}: a live session has that name; "
                    "choose another, or give its session_id to resume it",
                    reason=Reason.CANDIDATE_EXISTS,
                    candidate_id=asked.candidate_id,
                )
        if len(self._live()) >= self._max_sessions:
            raise ResourceExhausted(
                f"cannot stand for {asked.election_id}: the server has {self._max_sessions} sessions already",
                reason=Reason.ELECTION_LIMIT,
                retry_ms=_LIMIT_RETRY_MS,
            )
        former = asked.session_id.startswith(self._server_id)
        session = Session(asked, asked.session_id if former else self._new_session_id(), now, is_dead)
        session.is_of_former_process = former
        contest.enter(session)
        return session

    def _new_session_id(self) -> str:
        return self._server_id + self._chance(_SESSION_ID_BYTES - SERVER_ID_BYTES).hex()

    def end(self, session: Session, outbox: Outbox) -> None:
        """The stream of a session has ended."""
        self._contest(session.asked.election_id).detach(session, outbox)

    def heartbeat(self, session: Session, sequence: int, *, healthy: bool, found: Found = ()) -> None:
        """A sign of life; it is answered by an Ack."""
        if found or sequence <= session.sequence:
            wrong = [] if sequence > session.sequence else [_NOT_ABOVE]
            limits.refuse("take a heartbeat", [*found, *wrong])
        self._contest(session.asked.election_id).heartbeat(session, sequence, healthy=healthy)

    def say(self, session: Session, value: str) -> None:
        """A value for this term, if it leads, and for later ones; it is published soon."""
        limits.refuse("proclaim", list(limits.value(value, "proclaim.value")))
        session.value = value
        self._contest(session.asked.election_id).wake()

    async def leave(self, session: Session) -> bool:
        """The app's work has stopped; returns when the election is given away. Whether a term ended by it."""
        contest = self._contest(session.asked.election_id)
        lead = contest.lead
        leads = lead is not None and lead.session is session
        ends = leads and lead is not None and lead.ending is None
        session.leaving = EndReason.RESIGNED
        with contest.watching() as changed:
            contest.wake()
            while contest.lead is lead and leads:
                changed.clear()
                await changed.wait()
        return ends

    # Candidates by hand

    async def try_acquire(self, asked: Standing, found: Found = ()) -> Acquired:
        """One try to lead."""
        self._check(asked, found, "acquire")
        contest = self._contest(asked.election_id)
        session = self._resumed(asked, contest)
        if session is None:
            if contest.lead is not None:
                return Acquired(None, contest.view())
            contest.look_later()  # the claim tells all that a look would
            session = self._new(asked, contest, None)
        session.hear(0, self._clock.now().boot_ms, healthy=True)
        await contest.claim(session)
        return await self._outcome(contest, session)

    async def _outcome(self, contest: Contest, session: Session) -> Acquired:
        lead = contest.lead
        if lead is None or lead.session is not session:
            session.leaving = EndReason.RESIGNED
            contest.wake()
            return Acquired(None, contest.view())
        with contest.watching() as changed:
            contest.wake()
            while contest.lead is lead and not lead.elected:  # after the release delay of the term before
                changed.clear()
                await changed.wait()
        valid_ms = contest.extend(session) if contest.lead is lead else None
        return Acquired(lead.leadership(valid_ms) if valid_ms is not None else None, contest.view())

    def renew(self, session_id: str, token: Token | None, found: Found = ()) -> tuple[Leadership, bool]:
        """A sign of life by hand; the leadership, and whether it was asked to step down."""
        contest, lead = self._led_by("renew", session_id, token, found)
        lead.session.hear(0, self._clock.now().boot_ms, healthy=True)
        valid_ms = contest.extend(lead.session)
        if valid_ms is None:
            raise _stale(lead.record)
        return lead.leadership(valid_ms), lead.record.step_down

    async def proclaim(self, session_id: str, token: Token | None, value: str, found: Found = ()) -> View:
        """Publishes a value."""
        contest, lead = self._led_by("proclaim", session_id, token, [*found, *limits.value(value)])
        lead.session.value = value
        await contest.publish(lead)
        if lead.taken:
            raise _stale(lead.record)
        return contest.view()

    async def resign(self, session_id: str, token: Token | None, found: Found = ()) -> bool:
        """Ends a session; whether a term ended by it."""
        wrong = [*found, *limits.session(session_id, required=True), *limits.token(token, required=False)]
        limits.refuse("resign", wrong)
        session = self._session(session_id)
        if session is None:
            return False
        lead = self._contest(session.asked.election_id).lead
        if token is not None:
            if lead is not None and lead.session is not session and _token_of(lead.record) == token:
                raise _mismatch()
            if lead is None or lead.session is not session or _token_of(lead.record) != token:
                return False
        return await self.leave(session)

    def _led_by(self, what: str, session_id: str, token: Token | None, found: Found) -> tuple[Contest, Lead]:
        """The term of a session, if it leads under that token."""
        limits.refuse(what, [*found, *limits.session(session_id, required=True), *limits.token(token)])
        session = self._session(session_id)
        if session is None:
            raise NotFound(
                f"cannot {what}: there is no such session, or it is over; acquire anew",
                reason=Reason.SESSION_NOT_FOUND,
            )
        contest = self._contest(session.asked.election_id)
        lead = contest.lead
        if lead is not None and lead.session is not session and _token_of(lead.record) == token:
            raise _mismatch()
        if lead is None or lead.session is not session or _token_of(lead.record) != token or lead.ending is not None:
            raise _stale(contest.record)
        return contest, lead

    def _session(self, session_id: str) -> Session | None:
        return next((c.line[session_id] for c in self.contests.values() if session_id in c.line), None)

    # Those who look on

    async def leader(self, election_id: str, *, cached: bool = False) -> View:
        """Who leads."""
        limits.refuse("find the leader", list(limits.name(election_id, "election_id")))
        self._known(election_id)
        contest = self.contests.get(election_id)
        if cached and contest is not None and contest.record is not None:
            return contest.view()
        record = await self._read(election_id)
        return self._view(election_id, record)

    def _view(self, election_id: str, record: Record | None) -> View:
        contest = self.contests.get(election_id)
        if contest is not None:
            contest.saw(record)
            return contest.view()
        return View(election_id, record, led=record is not None and not rules.is_over(record, 0))

    async def _read(self, election_id: str) -> Record | None:
        try:
            record = await self.engine.read(election_id)
        except Unavailable as error:
            self._heard(error)
            raise
        self._heard(None)
        return record

    async def observe(self, election_id: str) -> AsyncIterator[View]:
        """Who leads, now and after each change; slow readers get the latest."""
        limits.refuse("observe", list(limits.name(election_id, "election_id")))
        self._known(election_id)
        if self.observers >= self._max_observers:
            raise ResourceExhausted(
                f"cannot observe: the server has {self._max_observers} observers already",
                reason=Reason.OBSERVER_LIMIT,
                retry_ms=_LIMIT_RETRY_MS,
            )
        self.observers += 1
        try:
            async for view in self._views(election_id):
                yield view
        finally:
            self.observers -= 1

    async def _views(self, election_id: str) -> AsyncIterator[View]:
        last = self._view(election_id, await self._read(election_id))
        contest = self._contest(election_id)
        with contest.watching() as changed:
            yield last
            while await self._changed(changed):
                changed.clear()
                view = contest.view()
                if _shown(view) != _shown(last):
                    last = view
                    yield view

    async def _changed(self, changed: asyncio.Event) -> bool:
        """Waits for a change; raises Unavailable when the server stops."""
        waits = [asyncio.ensure_future(changed.wait()), asyncio.ensure_future(self._stopping.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self.stopping:
            raise Unavailable("cannot go on: the server is stopping", reason=Reason.SHUTTING_DOWN, retry_ms=500)
        return True

    async def verify(self, election_id: str, token: Token | None, found: Found = ()) -> View:
        """Who leads under a token."""
        limits.refuse("verify", [*found, *limits.name(election_id, "election_id"), *limits.token(token)])
        self._known(election_id)
        assert token is not None
        view = self._view(election_id, await self._read(election_id))
        if view.record is None:
            raise _stale(None)
        if view.record.domain != token.domain:
            raise FailedPrecondition(
                "cannot compare the token: it is of another domain than the election",
                reason=Reason.TOKEN_DOMAIN_MISMATCH,
                domain=view.record.domain,
            )
        if view.record.epoch != token.value or not view.led:
            raise _stale(view.record)
        return view

    async def ask_step_down(self, election_id: str, token: Token | None, found: Found = ()) -> tuple[bool, View]:
        """Asks the leader to resign; whether there was one."""
        wrong = [*found, *limits.name(election_id, "election_id"), *limits.token(token, required=False)]
        limits.refuse("ask for a step-down", wrong)
        self._known(election_id)
        view = self._view(election_id, await self._read(election_id))
        if token is not None and (view.record is None or _token_of(view.record) != token):
            raise _stale(view.record)
        if view.record is None or not view.led:
            return False, view
        record = await self.engine.ask_step_down(election_id, view.record.epoch)
        if record is None:
            return False, self._view(election_id, await self._read(election_id))
        if (contest := self.contests.get(election_id)) is not None:
            contest.look()
        return True, self._view(election_id, record)

    async def page(self, after: str, size: int, found: Found = ()) -> tuple[list[View], bool]:
        """Elections by name, and whether there are more."""
        limits.refuse("list elections", [*found, *limits.page_size(size)])
        wanted = size or limits.DEFAULT_PAGE
        records = await self.engine.records(after, wanted + 1)
        return [self._view(r.election_id, r) for r in records[:wanted]], len(records) > wanted

    async def terms(
        self, election_id: str, before: int | None, size: int, found: Found = ()
    ) -> tuple[list[Term], bool]:
        """Terms of an election, the latest first, and whether there are more."""
        wrong = [*found, *limits.name(election_id, "election_id"), *limits.page_size(size)]
        limits.refuse("list terms", wrong)
        self._known(election_id)
        wanted = size or limits.DEFAULT_PAGE
        terms = await self.engine.terms(election_id, before, wanted + 1)
        return list(terms[:wanted]), len(terms) > wanted

    def seen(self, election_id: str) -> View | None:
        """An election as it was seen last, without asking the engine; None if this server serves none of that name."""
        if (self._names and election_id not in self._names) or list(limits.name(election_id, "election_id")):
            return None
        contest = self.contests.get(election_id)
        return contest.view() if contest is not None else View(election_id)

    def leads_here(self, election_id: str) -> bool:
        """Whether an app of this server leads, at this moment."""
        return self.valid_ms(election_id) > 0

    def valid_ms(self, election_id: str) -> int:
        """For how long an app of this server leads if nothing is renewed; 0 = it does not."""
        contest = self.contests.get(election_id)
        lead = contest.lead if contest is not None else None
        if lead is None or not lead.elected or lead.ending is not None:
            return 0
        until = lead.valid_until_ms if lead.session.by_stream else lead.granted_until_ms
        return max(until - self._clock.now().boot_ms, 0)

    # Contests

    def _contest(self, election_id: str) -> Contest:
        contest = self.contests.get(election_id)
        if contest is None:
            contest = Contest(
                election_id,
                self.engine,
                self._clock,
                heard=self._heard,
                passed=self._passed,
                renew=self._renew.set,
            )
            self.contests[election_id] = contest
            self._forget_idle()
        return contest

    def _forget_idle(self) -> None:
        """Keeps the table small; an idle contest knows nothing that matters."""
        if len(self.contests) > 2 * self._max_sessions:
            self.contests = {name: contest for name, contest in self.contests.items() if not contest.idle}

    def _known(self, election_id: str) -> None:
        if self._names and election_id not in self._names:
            raise NotFound(
                f"cannot find election {election_id}: this server serves {', '.join(sorted(self._names))}",
                reason=Reason.ELECTION_NOT_FOUND,
                election_id=election_id,
            )

    def _told(self, election_id: str) -> None:
        if (contest := self.contests.get(election_id)) is not None:
            contest.look()

    def _passed(self, transition: Transition) -> None:
        if transition.kind == "elected":
            self.elected += 1
        elif transition.kind == "ended":
            self.ended[transition.reason] += 1
        self._journal(transition)

    # Renewing

    async def _keep_renewing(self) -> None:
        while True:
            self._renew.clear()
            await self._renew_due()
            leads = self._leads()
            await self._clock.wait(self._renew, min((lead.renew_ms for _, lead in leads), default=None))

    def _leads(self) -> list[tuple[Contest, Lead]]:
        return [
            (contest, contest.lead)
            for contest in self.contests.values()
            if contest.lead is not None and not contest.lead.taken
        ]

    async def _renew_due(self) -> None:
        """Renews what is due, and with it what will be soon: one write for as many as can be."""
        now = self._clock.now().boot_ms
        leads = self._leads()
        if not any(lead.renew_ms <= now for _, lead in leads):
            return
        due = [(c, lead) for c, lead in leads if lead.renew_ms <= now + rules.renew_after(lead.record.lease_ms) // 2]
        for start in range(0, len(due), _RENEW_BATCH):
            await self._renew_block(due[start : start + _RENEW_BATCH])

    async def _renew_block(self, block: Sequence[tuple[Contest, Lead]]) -> None:
        stamp = self._clock.now().boot_ms
        self.renewals += 1
        try:
            records = await self.engine.renew([lead.hold for _, lead in block])
        except Exception as error:  # noqa: BLE001 - without renewals every leader here would lose its term
            self._not_renewed(block, error)
            return
        self._heard(None)
        self.renew_s += (self._clock.now().boot_ms - stamp) / 1000
        for (contest, lead), record in zip(block, records, strict=True):
            contest.renewed(lead, record, stamp)

    def _not_renewed(self, block: Sequence[tuple[Contest, Lead]], error: Exception) -> None:
        if isinstance(error, RetinueError):
            self._heard(error)
        else:
            _log.error("cannot renew for the moment", exc_info=error)
        now = self._clock.now().boot_ms
        for contest, lead in block:
            contest.not_renewed(lead, now)


def _token_of(record: Record) -> Token:
    return Token(record.domain, record.epoch)


def _stale(record: Record | None) -> FailedPrecondition:
    error = FailedPrecondition(
        "cannot go on under this token: it is not that of the present term; stop, and refuse what comes under it",
        reason=Reason.STALE_TOKEN,
    )
    if record is not None:
        error.metadata.update(token=str(record.epoch), domain=record.domain)
    return error


def _mismatch() -> PermissionDenied:
    return PermissionDenied(
        "cannot act for another session: the token is of one, the session_id of another",
        reason=Reason.SESSION_MISMATCH,
    )


def _shown(view: View) -> tuple[object, ...]:
    record = view.record
    if record is None:
        return ()
    if not view.led:
        return (record.domain, record.epoch)
    return (record.domain, record.epoch, record.candidate_id, record.value, record.step_down, record.acquire_ms)
