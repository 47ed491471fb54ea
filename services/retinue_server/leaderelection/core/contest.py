"""One election on this server: the line of its candidates, the term that one of them leads, and those who look on.

One task per election does whatever is due, one thing at a time (`_turn`), then sleeps until something happens or the
next time comes. It alone claims and releases; heartbeats only move the deadlines that it looks at.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from msgspec.structs import replace

from retinue_server.leaderelection.core import rules
from retinue_server.leaderelection.core.requests import (
    Ack,
    AtRisk,
    Elected,
    Leadership,
    Lost,
    Standby,
    StepDownRequested,
    Token,
    Transition,
    View,
)
from retinue_server.leaderelection.engine import Claim, EndReason, Engine, Granted, Hold, Record
from retinue_server.runtime.errors import RetinueError, Unavailable

if TYPE_CHECKING:
    from retinue_server.leaderelection.core.clock import Clock, Instant
    from retinue_server.leaderelection.core.session import Outbox, Session

_log = logging.getLogger(__name__)

_PROOF_LOOK_MS = 10
"""How often to look whether an app that has gone is dead."""
_REENTRY_MS = 2_000
"""How long one who gave up leadership for its health, or was asked to, stands behind the others."""
_AFTER_ERROR_MS = 250


class Lead:
    """A term that a session of this server has in the engine."""

    def __init__(self, session: Session, record: Record, stamp_ms: int, act_ms: int) -> None:
        self.session = session
        self.hold = Hold(record.election_id, session.session_id, record.epoch)
        self.record = record
        self.valid_until_ms = 0
        """By the engine's lease, less the guard."""
        self.renew_ms = 0
        """When to renew next."""
        self.granted_until_ms = 0
        """The latest deadline that the app was told, without the guard."""
        self.act_ms = act_ms
        """When the app may be told: after the release delay of the term before."""
        self.elected = False
        self.failing = False
        self.told_step_down = False
        self.taken = False
        """Another has it, says the engine."""
        self.ending: EndReason | None = None
        """Why it ends, once that is known."""
        self.release_ms = 0
        """When to give the election away, then."""
        self.renewed(record, stamp_ms)

    def renewed(self, record: Record, stamp_ms: int) -> None:
        """The engine confirmed the lease; the stamp is from before it was asked."""
        self.record = record
        self.valid_until_ms = stamp_ms + rules.guarded(record.lease_ms)
        self.renew_ms = stamp_ms + rules.renew_after(record.lease_ms)
        self.failing = False

    def grant(self) -> int | None:
        """Moves the app's deadline as far as its last sign of life allows; what to tell it, from then."""
        session = self.session
        if not self.elected or self.ending is not None or not session.healthy:
            return None
        until = min(session.alive_until_ms, self.valid_until_ms)
        told = rules.guarded(until - session.heard_ms)
        if told <= 0:
            return None
        self.granted_until_ms = max(self.granted_until_ms, until)
        return told

    def transition(self, kind: str, reason: EndReason = EndReason.UNKNOWN) -> Transition:
        """As the journal is told."""
        asked, record = self.session.asked, self.record
        return Transition(kind, asked.election_id, asked.candidate_id, Token(record.domain, record.epoch), reason)

    def leadership(self, valid_ms: int) -> Leadership:
        """As the app is told."""
        asked, record = self.session.asked, self.record
        token = Token(record.domain, record.epoch)
        return Leadership(
            asked.election_id, asked.candidate_id, self.session.session_id, token, valid_ms, self.session.sequence
        )


class Contest:
    """One election on this server."""

    def __init__(
        self,
        election_id: str,
        engine: Engine,
        clock: Clock,
        *,
        heard: Callable[[RetinueError | None], None],
        passed: Callable[[Transition], None],
        renew: Callable[[], None],
    ) -> None:
        self.election_id = election_id
        self._engine, self._clock = engine, clock
        self._heard, self._passed, self._renew = heard, passed, renew
        self.line: dict[str, Session] = {}
        """All sessions by id, the next candidate first."""
        self.lead: Lead | None = None
        self.record: Record | None = None
        """As it was seen last."""
        self._seen_ms = 0
        """Since when it is seen unchanged."""
        self._known = False
        self._look_ms = 0
        """When to ask the engine again."""
        self._watchers: set[asyncio.Event] = set()
        self._led = False
        """What the watchers were told last."""
        self._asked: dict[str, bool] = {}
        """Sessions that stand in the engine's line, and whether what it answered last is not known."""
        self._wake = asyncio.Event()
        self._engine_turn = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None
        self.stop_granting_ms: int | None = None
        """While the server stops: when to let the deadlines run out."""

    # Who takes part

    def enter(self, session: Session) -> None:
        """A candidate."""
        self.line[session.session_id] = session
        self._begin()

    def attach(self, session: Session, outbox: Outbox, now_ms: int) -> None:
        """A stream for a session; one that was there before hears nothing more."""
        if session.outbox is not None:
            session.outbox.close()
        session.outbox, session.introduced = outbox, False
        session.hear(0, now_ms, healthy=True)
        lead = self.lead
        if lead is not None and lead.session is session and (valid_ms := self.extend(session)) is not None:
            session.introduced = True
            session.tell(Elected(lead.leadership(valid_ms)))
        self.wake()

    def detach(self, session: Session, outbox: Outbox) -> None:
        """The stream has ended."""
        if session.outbox is not outbox:
            return
        if session.leaving is None and session.releases_on_disconnect:
            session.leaving = EndReason.DISCONNECTED
        session.outbox = None
        self.wake()

    @contextlib.contextmanager
    def watching(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever what others see may have changed."""
        event = asyncio.Event()
        self._watchers.add(event)
        self._begin()
        try:
            yield event
        finally:
            self._watchers.discard(event)
            self.wake()

    def wake(self) -> None:
        """Something happened: look at everything again."""
        self._wake.set()

    def look(self) -> None:
        """The engine may have news."""
        self._look_ms = 0
        self.wake()

    @property
    def idle(self) -> bool:
        """Whether nobody takes part."""
        return not (self.line or self.lead or self._asked or self._watchers)

    def _begin(self) -> None:
        if self._running is None:
            self._engine.watch(self.election_id)
            self._running = asyncio.create_task(self._run())
        self.wake()

    async def stop(self) -> None:
        """Ends the task; what is held runs out in the engine."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    # What is known

    def view(self) -> View:
        """What others see, as it was seen last."""
        record = self.record
        if record is None:
            return View(self.election_id)
        unchanged = self._clock.now().boot_ms - self._seen_ms
        mine = self.lead is not None and self.lead.hold.epoch == record.epoch
        return View(
            self.election_id, record, led=bool(record.candidate_id) and (mine or not rules.is_over(record, unchanged))
        )

    def saw(self, record: Record | None) -> None:
        """The engine's answer."""
        before = self.record
        if record is None or before is None:
            changed = record is not before
        else:
            if record.domain == before.domain and record.epoch < before.epoch:
                return  # a later answer has overtaken it
            changed = _public(record) != _public(before)
        if record is None or before is None or record.version != before.version or record.left_ms is not None:
            self.record, self._seen_ms = record, self._clock.now().boot_ms
        if changed or not self._known:
            self._known = True
            self._tell_watchers()

    def _tell_watchers(self) -> None:
        for event in self._watchers:
            event.set()

    # The task

    async def _run(self) -> None:
        try:
            while not self.idle:
                self._wake.clear()
                failed = not await self._try_turn()
                if self.idle:
                    break
                if failed:  # whatever happens meanwhile, or an engine that fails would be asked without a pause
                    await self._clock.wait(asyncio.Event(), self._clock.now().boot_ms + _AFTER_ERROR_MS)
                else:
                    await self._clock.wait(self._wake, self._next_time())
        finally:
            self._engine.unwatch(self.election_id)
            self._running = None

    async def _try_turn(self) -> bool:
        """Does what is due; whether that went well."""
        try:
            await self._turn()
        except Unavailable as error:
            self._heard(error)
            return False
        except RetinueError as error:
            self._refuse(error)
            return False
        except Exception:  # noqa: BLE001 - a task that ends would leave its election without anybody
            _log.exception("cannot go on with election %s for the moment", self.election_id)
            return False
        finally:
            self._introduce()
            self._notice()
        return True

    async def _turn(self) -> None:
        while True:
            now = self._clock.now().boot_ms
            self._drop_the_gone(now)
            await self._withdraw(now)
            if self.lead is None:
                if (candidate := self._candidate(now)) is not None and await self._compete(candidate):
                    continue
            elif await self._attend(self.lead, now):
                continue
            await self._look_if_due()
            return

    def _refuse(self, error: RetinueError) -> None:
        """The engine will not have this election, such as one whose object is missing: its candidates are told."""
        for session in self.line.values():
            if session.outbox is not None:
                session.outbox.close(error)

    def _introduce(self) -> None:
        """Tells newcomers where they stand."""
        for session in self.line.values():
            if session.outbox is not None and not session.introduced:
                session.introduced = True
                session.tell(Standby(session.session_id, self.view()))

    def _notice(self) -> None:
        """Tells the watchers of a lease that is over: no answer of the engine does."""
        if (led := self.view().led) != self._led:
            self._led = led
            self._tell_watchers()

    def _drop_the_gone(self, now_ms: int) -> None:
        for session in list(self.line.values()):
            leads = self.lead is not None and self.lead.session is session
            over = session.leaving is not None or (session.outbox is None and not session.is_alive(now_ms))
            if over and not leads:
                del self.line[session.session_id]

    async def _withdraw(self, now_ms: int) -> None:
        """Takes those who do not stand any more out of the engine's line, where others would wait for them; a term that
        one of them won unawares is given back."""
        for session_id in [session_id for session_id in self._asked if not self._stands(session_id, now_ms)]:
            async with self._engine_turn:
                if session_id not in self._asked:  # it has been elected meanwhile
                    continue
                await self._engine.withdraw(self.election_id, session_id)
                record = await self._engine.read(self.election_id) if self._asked[session_id] else None
                if record is not None and record.session_id == session_id:
                    hold = Hold(self.election_id, session_id, record.epoch)
                    await self._engine.release(hold, EndReason.DISCONNECTED, self._clock.now().wall_ms)
                self._asked.pop(session_id, None)

    def _stands(self, session_id: str, now_ms: int) -> bool:
        session = self.line.get(session_id)
        return session is not None and session.may_stand(now_ms)

    def _candidate(self, now_ms: int) -> Session | None:
        if self.stop_granting_ms is not None:
            return None
        return next((session for session in self.line.values() if session.may_stand(now_ms)), None)

    # Standing by

    async def _compete(self, session: Session) -> bool:
        """Claims for the first in line, if that can help now; whether it leads."""
        now = self._clock.now().boot_ms
        if now < self._look_ms and not self._is_over(now):
            return False
        await self.claim(session)
        return self.lead is not None

    async def claim(self, session: Session) -> None:
        """One try to make a session leader."""
        async with self._engine_turn:
            if self.lead is not None:
                return
            now = self._clock.now()
            watched = self.record.version if self.record and self._is_over(now.boot_ms) else None
            unsure = self._asked.get(session.session_id, False)
            if not unsure:
                session.owed_ms = self.record.release_delay_ms if self.record and self.record.candidate_id else 0
            self._asked[session.session_id] = True
            outcome = await self._engine.claim(_claim(session, now.wall_ms), watched)
            self._heard(None)
            if isinstance(outcome, Granted):
                del self._asked[session.session_id]
                self._take(session, outcome, now, max(outcome.delay_ms, session.owed_ms if unsure else 0))
            else:
                self._asked[session.session_id] = False
                self.saw(outcome.record)
                self.look_later()

    def _take(self, session: Session, granted: Granted, stamp: Instant, delay_ms: int) -> None:
        act_ms = self._clock.now().boot_ms + delay_ms if delay_ms else 0
        self.lead = Lead(session, granted.record, stamp.boot_ms, act_ms)
        if session.is_of_former_process:
            self.lead.granted_until_ms = self._clock.now().boot_ms + session.asked.app_lease_ms
        self._renew()
        self.saw(granted.record)
        self.look_later()
        self.wake()

    def _is_over(self, now_ms: int) -> bool:
        return self.record is not None and rules.is_over(self.record, now_ms - self._seen_ms)

    # Leading

    async def _attend(self, lead: Lead, now_ms: int) -> bool:
        """Looks after a term; whether it is over."""
        if lead.ending is None and (reason := self._why_over(lead, now_ms)) is not None:
            self._end(lead, reason, now_ms)
        if lead.ending is not None:
            return await self._release_if_due(lead, now_ms)
        if not lead.elected and now_ms >= lead.act_ms:
            self._elect(lead)
        if lead.record.step_down and lead.elected and not lead.told_step_down:
            lead.told_step_down = True
            lead.session.tell(StepDownRequested())
        if lead.elected and lead.record.value != lead.session.value:
            await self.publish(lead)
        return False

    async def publish(self, lead: Lead) -> None:
        """Proclaims what the session wants proclaimed."""
        record = await self._engine.proclaim(lead.hold, lead.session.value)
        self._heard(None)
        if record is None:
            self._taken(lead)
        else:
            lead.record = record
            self.saw(record)

    def _taken(self, lead: Lead) -> None:
        """The engine says that the term is not ours any more."""
        lead.taken = True
        self.wake()

    def _elect(self, lead: Lead) -> None:
        lead.elected = True
        valid_ms = lead.session.asked.app_lease_ms if lead.session.by_stream else lead.grant()
        if valid_ms is None:  # it was heard of too long ago
            lead.elected = False
            self._end(lead, EndReason.APP_SILENT, self._clock.now().boot_ms)
            return
        lead.session.introduced = True
        lead.session.tell(Elected(lead.leadership(valid_ms)))
        self._passed(lead.transition("elected"))
        self._tell_watchers()

    def _why_over(self, lead: Lead, now_ms: int) -> EndReason | None:  # noqa: PLR0911 - a line for each reason
        session = lead.session
        if session.leaving is EndReason.RESIGNED and lead.told_step_down:
            return EndReason.STEPPED_DOWN
        if session.leaving is not None:
            return session.leaving
        if lead.taken:
            return EndReason.EXPIRED
        if now_ms >= lead.valid_until_ms:
            return EndReason.ENGINE_LOST
        if session.outbox is None and session.is_dead is not None and session.is_dead():
            return EndReason.APP_DEAD
        if now_ms < self._granted_until(lead) or (not lead.elected and session.is_able(now_ms)):
            return None
        if self.stop_granting_ms is not None:
            return EndReason.SERVER_STOPPED
        return EndReason.APP_SILENT if session.healthy else EndReason.UNHEALTHY

    def _granted_until(self, lead: Lead) -> int:
        if not lead.session.by_stream:
            return lead.granted_until_ms
        return lead.valid_until_ms if self.stop_granting_ms is None else self.stop_granting_ms

    def _end(self, lead: Lead, reason: EndReason, now_ms: int) -> None:
        lead.ending = reason
        at_once = reason in (EndReason.RESIGNED, EndReason.STEPPED_DOWN) or not lead.granted_until_ms
        lead.release_ms = now_ms if at_once else now_ms + lead.session.asked.release_delay_ms
        if lead.elected and lead.session.leaving is None:
            lead.session.tell(Lost(reason))

    async def _release_if_due(self, lead: Lead, now_ms: int) -> bool:
        if now_ms < lead.release_ms:
            return False
        released = await self._release(lead, lead.ending or EndReason.UNKNOWN)
        self._leave(lead, lead.ending or EndReason.UNKNOWN)
        if released and not self.line:
            self.look_later()  # nobody claims, and what a look would tell is known
        return True

    async def _release(self, lead: Lead, reason: EndReason) -> bool:
        async with self._engine_turn:
            released = await self._engine.release(lead.hold, reason, self._clock.now().wall_ms)
            self._heard(None)
            if released and self.record is not None and self.record.session_id == lead.hold.session_id:
                vacant = replace(self.record, candidate_id="", session_id="", value="", step_down=False, version="")
                self.record, self._seen_ms = vacant, self._clock.now().boot_ms
                self._tell_watchers()
        return released

    def _leave(self, lead: Lead, reason: EndReason) -> None:
        """The term is over here; its session goes to the end of the line, if it lives."""
        self.lead = None
        self._look_ms = 0
        session = self.line.pop(lead.session.session_id, None)
        if session is not None and session.leaving is None:
            self.line[session.session_id] = session
            if reason in (EndReason.UNHEALTHY, EndReason.STEPPED_DOWN):
                session.not_before_ms = self._clock.now().boot_ms + _REENTRY_MS
            if lead.elected:
                session.tell(Standby(session.session_id, self.view()))
        if lead.elected:
            self._passed(lead.transition("ended", reason))
        self._tell_watchers()

    # Heartbeats, renewals

    def heartbeat(self, session: Session, sequence: int, *, healthy: bool) -> None:
        """A sign of life of a session, and its answer."""
        now = self._clock.now().boot_ms
        could_stand = session.may_stand(now)
        session.hear(sequence, now, healthy=healthy)
        session.tell(Ack(sequence, self._extend(session, now)))
        if session.may_stand(now) != could_stand:
            self.wake()

    def extend(self, session: Session) -> int | None:
        """Moves the deadline of a session that leads; what to tell it, None if it does not lead."""
        return self._extend(session, self._clock.now().boot_ms)

    def _extend(self, session: Session, now_ms: int) -> int | None:
        lead = self.lead
        if lead is None or lead.session is not session:
            return None
        if self.stop_granting_ms is not None and now_ms >= self.stop_granting_ms:
            return None
        return lead.grant()

    def renewed(self, lead: Lead, record: Record | None, stamp_ms: int) -> None:
        """What the engine said of a term."""
        if self.lead is not lead:
            return
        if record is None:
            lead.renew_ms = stamp_ms + lead.record.lease_ms
            self._taken(lead)
            self.look()
            return
        if lead.failing:
            self._passed(lead.transition("renewed"))
        lead.renewed(record, stamp_ms)
        self.saw(record)
        self.look_later()
        if record.step_down and not lead.told_step_down:
            self.wake()

    def not_renewed(self, lead: Lead, now_ms: int) -> None:
        """The engine did not answer; the deadline stands."""
        lead.renew_ms = now_ms + rules.retry_after(lead.record.lease_ms)
        if not lead.failing and lead.elected:
            self._passed(lead.transition("at risk"))
            lead.session.tell(AtRisk(max(lead.valid_until_ms - now_ms, 0)))
        lead.failing = True

    # Looking

    async def _look_if_due(self) -> None:
        """Asks the engine who leads, if a claim has not just told."""
        now = self._clock.now().boot_ms
        if now < self._look_ms:
            return
        record = await self._engine.read(self.election_id)
        self._heard(None)
        self.saw(record)
        if self.lead is not None:
            self._look_at_own(self.lead, record)
        self.look_later()

    def _look_at_own(self, lead: Lead, record: Record | None) -> None:
        if record is None or (record.session_id, record.epoch) != (lead.hold.session_id, lead.hold.epoch):
            self._taken(lead)
        elif record.step_down and not lead.told_step_down:
            lead.record = replace(lead.record, step_down=True)
            self.wake()

    def look_later(self) -> None:
        """Who leads is told by its renewals."""
        now = self._clock.now().boot_ms
        pause = self._engine.capabilities.poll_ms if self.lead is None else self.lead.record.lease_ms
        self._look_ms = now + pause

    def _next_time(self) -> int:
        """When the next thing is due."""
        now = self._clock.now().boot_ms
        times = [self._look_ms]
        if self.record is not None and self.record.candidate_id and self.lead is None:
            over = self._seen_ms + rules.over_in(self.record)
            times.append(over if over > now else self._look_ms)
        times += [s.not_before_ms for s in self.line.values() if s.not_before_ms > now]
        times += [s.alive_until_ms for s in self.line.values() if s.outbox is None]
        if self.lead is not None:
            times += self._lead_times(self.lead, now)
        return max(min(times), now)

    def _lead_times(self, lead: Lead, now_ms: int) -> list[int]:
        if lead.ending is not None:
            return [lead.release_ms]
        times = [lead.valid_until_ms]
        if not lead.elected:
            times.append(lead.act_ms)
        else:
            times.append(self._granted_until(lead))
        if lead.session.outbox is None and lead.session.is_dead is not None:
            times.append(now_ms + _PROOF_LOOK_MS)
        return times


def _claim(session: Session, wall_ms: int) -> Claim:
    asked = session.asked
    return Claim(
        election_id=asked.election_id,
        candidate_id=asked.candidate_id,
        session_id=session.session_id,
        value=session.value,
        lease_ms=asked.lease_ms,
        release_delay_ms=asked.release_delay_ms,
        wall_ms=wall_ms,
    )


def _public(record: Record) -> tuple[object, ...]:
    """What others can see of it."""
    return record.domain, record.epoch, record.candidate_id, record.value, record.step_down, record.acquire_ms
