"""Leadership, from the side of an app: work that runs while it leads and has ended before anybody else can lead.

    async with election.campaign("nightly-report") as term:
        await write_report(fencing_token=term.token.value)

The block is entered when this app is elected. It is cancelled before the leadership's deadline, and `TermLost` is
raised outside, as `asyncio.timeout` does; when it has ended, by itself or not, the election is given on. What the block
starts (threads, processes, tasks of others) must have ended with it. The one guarantee that covers an effect which
arrives late is the token: whatever is protected must refuse a lower one than the highest it has seen.

Heartbeats come from the event loop on which the block runs: a loop that hangs loses its leadership, as it must. A block
that holds up the loop can't be cancelled either: long computations belong in a thread that looks at `term.is_leader()`,
or in a process of its own (`retinue elect`).

`Election` is the same with a connection that stays: to campaign again and again (`lead`), and to look who leads.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import re
import secrets
import socket
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeAlias, TypeVar, overload

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from retinue.client import address as addresses
from retinue.client import errors
from retinue.client.candidate import Candidate
from retinue.client.channel import DEFAULT_TIMEOUT, Connection, backoff, is_transient
from retinue.client.proof import ProofFile
from retinue.leaderelection.v1 import election_pb2 as pb
from retinue.leaderelection.v1 import leaderelection_service_pb2 as api
from retinue.leaderelection.v1 import leaderelection_service_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

log = logging.getLogger(__name__)

T = TypeVar("T")
Seconds: TypeAlias = float | timedelta

PATTERN = "leaderelection"
PROOF_DIR = "RETINUE_LEADERELECTION_PROOF_DIR"
_RECONNECT_MS = 250
"""A session must be resumed within the app's lease."""
_LOOK = 0.25
"""How often to look at the boot clock at least: the loop's own clock stands still while the machine is suspended."""
_LAST_WORDS, _GOODBYE = 2.0, 0.25
"""How long resigning may take, in seconds: for a leader, and for others."""
_AGAIN = 0.05
_REENTRY = 2.0
"""How long one that was asked to give up leadership lets others come first, in seconds."""
_MAX_VALUE = 4_096

Kind = Literal["connected", "disconnected", "standby", "elected", "at_risk", "asked_to_end", "lost", "resigned"]


class TermLost(Exception):
    """The leadership is over or about to be, and the work was stopped.

    `reason` is DEADLINE (nothing renewed it in time), STEP_DOWN_REQUESTED, DRAINING (the server stops), UNHEALTHY,
    CONNECTION (the server refused to go on; see __cause__), or the server's word: EXPIRED, ENGINE_LOST, APP_SILENT ...
    """

    def __init__(self, election_id: str, reason: str) -> None:
        super().__init__(f"the leadership of {election_id} is lost [{reason}]")
        self.election_id = election_id
        self.reason = reason


class NotElected(Exception):
    """Somebody else leads, and waiting longer was not asked for. `leader` is who, as far as the server knows."""

    def __init__(self, election_id: str, leader: pb.Leader) -> None:
        super().__init__(f"not elected for {election_id}: {leader.candidate_id or 'somebody else'} leads")
        self.election_id = election_id
        self.leader = leader


class ElectionEvent(NamedTuple):
    """What happened. `elected` comes before the work begins, `lost` as soon as it must end, `resigned` after it has."""

    kind: Kind
    term: Term | None = None
    reason: str = ""
    """Why: of `lost` and `asked_to_end` as in TermLost, of `disconnected` that of the error."""
    leader: pb.Leader | None = None
    """Of `standby`: who leads."""
    seconds: float = 0.0
    """Of `at_risk`: how long the leadership can last if the engine stays away."""


class Term:
    """One leadership. Its methods but proclaim() do no I/O, and threads may call them."""

    def __init__(self, candidate: Candidate, speak: Callable[[str], Awaitable[None]], descriptor: int | None) -> None:
        self.election_id = candidate.start.election_id
        self.candidate_id = candidate.start.candidate_id
        assert candidate.token is not None
        self.token: pb.FencingToken = candidate.token
        """What the protected resource compares; the same for the whole term."""
        self.ending = asyncio.Event()
        """Set when the work should end: a step-down was asked for, the server stops, or the deadline is near."""
        self.proof = descriptor
        """The descriptor of the lock that proves death, for `pass_fds` of processes that work for the term."""
        self.lost = ""
        """Why the work had to end; empty = it has not."""
        self.on_check: Callable[[], None] = lambda: None
        """Called by check(): a sign that the work goes on."""
        self.on_renewed: Callable[[], None] = lambda: None
        """Called on the event loop whenever the deadline has moved."""
        self._deadline = candidate.deadline
        self._speak = speak
        self._over = False

    def is_leader(self) -> bool:
        """Whether the leadership is valid at this instant, by the boot clock."""
        return self.remaining() > 0

    def remaining(self) -> float:
        """Seconds until the deadline if nothing is renewed; 0 or less = over."""
        return 0.0 if self._over else self._deadline.remaining

    def check(self) -> None:
        """Raises TermLost if this is not the leader, or should not be any longer: for work that can't be cancelled."""
        self.on_check()
        if not self.is_leader():
            raise self.loss()
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raises TermLost if the work had to end, but does not look at the clock."""
        if self.lost:
            raise self.loss()

    def loss(self) -> TermLost:
        """What is raised for work that had to end."""
        return TermLost(self.election_id, self.lost or "DEADLINE")

    async def proclaim(self, value: str) -> None:
        """Publishes a value for those who look for the leader, up to 4,096 characters. Raises RetinueError."""
        await self._speak(value)

    def close(self) -> None:
        """Ends it here, whatever the deadline says."""
        self._over = True


class Campaign:
    """One candidacy, and the term that comes of it; made by Election.campaign(). It can be entered once."""

    def __init__(
        self,
        election: Election,
        start: api.CampaignStart,
        *,
        wait: Seconds | None,
        margin: Seconds | None,
        cancel_on_request: bool,
        alive: Callable[[], bool],
    ) -> None:
        self._election = election
        self._candidate = Candidate(
            election.connection, start, self, healthy=election.healthy, alive=alive, prepare=self._take_proof
        )
        self._wait = None if wait is None else _seconds(wait)
        self._margin = None if margin is None else _seconds(margin)
        self._cancel_on_request = cancel_on_request
        self._entering = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._proof: ProofFile | None = None
        self._leader: pb.Leader | None = None
        self._cancel: Callable[[], object] = lambda: None
        self._connected: bool | None = None
        self._entered = False
        self._cancelled = False
        self._ended = False
        """The work has stopped; what is heard from now on is the echo of our resignation."""
        self.term: Term | None = None

    async def __aenter__(self) -> Term:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        return await self.begin(task.cancel)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """The algorithm of asyncio.timeout: the cancellation is ours if nobody else asked for one."""
        ours = self._cancelled and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError
        await self.end()
        if ours:
            raise self.loss() from self._fatal or error

    async def begin(self, cancel: Callable[[], object]) -> Term:
        """Returns when elected; calls `cancel`, on the loop, when the work must end. As campaign() raises."""
        try:
            term = await self._stand()
            term.raise_if_lost()  # in the same breath
        except BaseException:
            self._ended = True
            await self._leave()
            raise
        self._cancel, self._entered = cancel, True
        self._emit("elected")
        self._look()
        return term

    async def end(self) -> None:
        """The work has stopped: resigns."""
        if self._timer is not None:
            self._timer.cancel()
        self._ended = True
        await self._leave()

    def loss(self) -> TermLost:
        """What is raised for the work that had to end."""
        assert self.term is not None
        return self.term.loss()

    @property
    def _fatal(self) -> BaseException | None:
        running = self._running
        return running.exception() if running is not None and running.done() and not running.cancelled() else None

    # Before the term

    async def _stand(self) -> Term:
        try:
            return await self._until_elected()
        except errors.InvalidArgument as error:
            if not (self._proof and self._election.proof_is_guess and _about_proof(error)):
                raise
            log.info("the server can't see our proof of death in its directory: going without")
            self._drop_proof()
            self._election.proof_dir = None
            return await self._until_elected()

    async def _take_proof(self) -> None:
        if self._proof is None:
            self._proof = await self._election.proof()
            self._candidate.start.proof_file = self._proof.name if self._proof else ""

    async def _until_elected(self) -> Term:
        self._running = asyncio.create_task(self._candidate.run())
        entering = asyncio.create_task(self._entering.wait())
        try:
            await asyncio.wait([self._running, entering], timeout=self._patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            entering.cancel()
        if self._running.done():
            self._running.result()
        if self.term is None:
            raise NotElected(self._candidate.start.election_id, self._leader or pb.Leader())
        return self.term

    @property
    def _patience(self) -> float | None:
        return self._election.timeout if self._wait == 0 else self._wait

    @property
    def margin(self) -> float:
        """How long before the deadline the work is cancelled, in seconds."""
        return self._candidate.app_lease / 10 if self._margin is None else self._margin

    # What the candidate hears

    def connected(self) -> None:
        self._connected = True
        self._emit("connected")

    def disconnected(self, error: errors.RetinueError) -> None:
        if self._wait == 0 and self.term is None:
            raise error
        if self._connected is not False:  # told already
            self._connected = False
            self._emit("disconnected", reason=error.reason or error.code.name)

    def standby(self, leader: pb.Leader) -> None:
        self._leader = leader
        self._emit("standby", leader=leader)
        if self._wait == 0:
            self._entering.set()

    def granted(self) -> None:
        candidate = self._candidate
        if self.term is None:
            if candidate.deadline.remaining > self.margin:  # it may have come late
                descriptor = self._proof.descriptor if self._proof else None
                self.term = Term(candidate, self._proclaim, descriptor)
                self._entering.set()
        elif candidate.token != self.term.token:
            self.lost("EXPIRED")
        else:
            self.term.on_renewed()
            if not self._election.healthy():
                self._stop("UNHEALTHY")

    def at_risk(self, seconds: float) -> None:
        self._emit("at_risk", seconds=seconds)

    def asked_to_end(self, reason: str) -> None:
        if self.term is not None:
            self.term.ending.set()
            self._emit("asked_to_end", reason=reason)
            if self._cancel_on_request:
                self._stop(reason)

    def lost(self, reason: str) -> None:
        if self.term is not None:
            self.term.close()
            self._stop(reason)
            self._stop_running()

    # During the term

    def _look(self) -> None:
        """Cancels the work before the deadline; past it, the session ends: nobody serves another term of it."""
        assert self.term is not None
        left = self._candidate.deadline.remaining
        if self._fatal is not None:
            self._stop("CONNECTION")
        if left <= self.margin:
            self._stop("DEADLINE")
        if left <= 0:
            self.term.close()
            self._stop_running()
            return
        due = left if self.term.lost else left - self.margin
        self._timer = asyncio.get_running_loop().call_later(min(max(due, 0), _LOOK), self._look)

    def _stop(self, reason: str) -> None:
        assert self.term is not None
        if self.term.lost or self._ended:
            return
        self.term.lost = reason
        self.term.ending.set()
        if self._entered:
            self._emit("lost", reason=reason)
            self._cancelled = True
            self._cancel()

    async def _proclaim(self, value: str) -> None:
        assert self.term is not None
        start = self._candidate.start
        await self._election.call(
            "Proclaim", api.ProclaimRequest(session_id=start.session_id, token=self.term.token, value=checked(value))
        )
        start.value = value

    # After it

    async def _leave(self) -> None:
        """The session ends, and with it the leadership if there is any left; the next candidate need not wait."""
        try:
            if self._candidate.session_id:
                await self._resign()
        finally:
            if self.term is not None:
                self.term.close()
            await self._await_end()
            self._drop_proof()

    async def _resign(self) -> None:
        """A session that does not lead resigns, too: or it might yet be elected, with nobody there."""
        end = self._candidate.deadline.now() + _LAST_WORDS
        try:
            # A server that has just started does not know the session yet.
            while not await self._released(end) and self._leads and self._candidate.deadline.now() < end:  # noqa: ASYNC110 - it answers, it tells nothing
                await asyncio.sleep(_AGAIN)
        except errors.RetinueError as error:
            log.info("not resigned, the election passes on when its time is over: %s", error)

    async def _released(self, end: float) -> bool:
        leads = self._leads
        deadline = self._candidate.deadline
        seconds = min(end - deadline.now(), deadline.remaining) if leads else _GOODBYE
        request = api.ResignRequest(session_id=self._candidate.session_id)
        answer = await self._election.call("Resign", request, timeout=seconds, repeatable=leads)
        if answer.released and leads:
            self._emit("resigned")
        return bool(answer.released)

    @property
    def _leads(self) -> bool:
        return self.term is not None and self.term.is_leader()

    def _stop_running(self) -> None:
        if self._running is not None:
            self._running.cancel()

    async def _await_end(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
            if not self._running.cancelled():
                self._running.exception()  # raised where it mattered

    def _drop_proof(self) -> None:
        proof, self._proof = self._proof, None
        if proof is not None:
            proof.close()

    def _emit(self, kind: Kind, **told: Any) -> None:
        if self._election.listener is not None:
            self._election.listener(ElectionEvent(kind, self.term, **told))


class Election:
    """One election on one server, for candidates and those who look on. Cheap; a given connection is shared.

    `candidate_id` must be unique in the election (default: the host's name, the process and a random part); `value` is
    what is proclaimed, such as an address. `app_lease` is how soon others take over when this app is gone, `lease` when
    its server is (defaults: the server's, 2 s and 15 s). `release_delay` is what others wait after a term that did not
    end by resignation. `margin` is how long before the deadline the work is cancelled (default: a tenth of the app's
    lease). `proof_dir` is where a locked file proves our death (default: RETINUE_LEADERELECTION_PROOF_DIR, or the
    server's directory if it is here, too; False = none). `healthy` is asked with each heartbeat; False gives leadership
    up. `listener` hears of events, on the event loop, and must not block. Times are seconds or `timedelta`.
    """

    def __init__(
        self,
        election_id: str,
        *,
        candidate_id: str = "",
        value: str = "",
        lease: Seconds | None = None,
        app_lease: Seconds | None = None,
        release_delay: Seconds | None = None,
        margin: Seconds | None = None,
        proof_dir: str | os.PathLike[str] | Literal[False] | None = None,
        healthy: Callable[[], bool] = lambda: True,
        listener: Callable[[ElectionEvent], None] | None = None,
        address: str | None = None,
        connection: Connection | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        patient: bool = True,
    ) -> None:
        self.election_id = election_id
        self.candidate_id = candidate_id or default_candidate_id()
        self.value = checked(value)
        self.healthy, self.listener, self.timeout = healthy, listener, timeout
        self._lease, self._app_lease, self._release_delay = lease, app_lease, release_delay
        self._margin = margin
        self._owned = connection is None
        self.connection = connection or Connection(
            address, pattern=PATTERN, patient=patient, reconnect_ms=_RECONNECT_MS
        )
        named = os.environ.get(PROOF_DIR) if proof_dir is None else proof_dir
        self.proof_dir = Path(named) if named else None
        self.proof_is_guess = not named
        """Whether the directory is what the server calls it, which need not be the same here."""
        self._directory_is_known = bool(named) or proof_dir is False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection if it was opened here. Safe to repeat."""
        if self._owned:
            await self.connection.close()

    async def call(
        self,
        method: str,
        request: Any,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC sends it along
        repeatable: bool = True,
    ) -> Any:
        """One unary call by name. Raises RetinueError."""
        stub = rpc.LeaderElectionServiceStub(self.connection.channel)
        seconds = self.timeout if timeout is None else timeout
        return await self.connection.call(getattr(stub, method), request, timeout=seconds, repeatable=repeatable)

    # Candidates

    def campaign(
        self,
        *,
        wait: Seconds | None = None,
        cancel_on_request: bool = True,
        alive: Callable[[], bool] = lambda: True,
    ) -> Campaign:
        """Stands for the election: `async with election.campaign() as term`.

        It waits for as long as it takes, or for `wait` seconds and then raises NotElected; 0 = only if nobody leads
        now. When a step-down is asked for or the server stops, the block is cancelled as at the deadline, unless
        `cancel_on_request` is False: then it should end by itself soon after `term.ending` is set. No heartbeats are
        sent while `alive()` is False. Raises RetinueError for what the server will always refuse; a server that can't
        be reached is waited for.
        """
        start = api.CampaignStart(
            election_id=self.election_id,
            candidate_id=self.candidate_id,
            value=self.value,
            lease_duration=_duration(self._lease),
            app_lease_duration=_duration(self._app_lease),
            release_delay_duration=_duration(self._release_delay),
        )
        return Campaign(self, start, wait=wait, margin=self._margin, cancel_on_request=cancel_on_request, alive=alive)

    @overload
    async def lead(self, function: Callable[[Term], Awaitable[T]], **options: Any) -> T: ...
    @overload
    async def lead(self, function: Callable[[Term], T], **options: Any) -> T: ...

    async def lead(self, function: Callable[[Term], Any], **options: Any) -> Any:
        """Campaigns again and again, and runs `function(term)` each time it leads, until the function returns.

        A coroutine function is cancelled when leadership is lost. A plain one runs in a thread and must return soon
        after `term.check()` raises; until it has returned this app does not stand again. `options` are campaign()'s.
        """
        while True:
            try:
                async with self.campaign(**options) as term:
                    return await _run(function, term)
            except TermLost as lost:
                log.info("%s; standing again", lost)
                if lost.reason in ("STEP_DOWN_REQUESTED", "UNHEALTHY"):
                    await asyncio.sleep(_REENTRY)

    async def proof(self) -> ProofFile | None:
        """A locked file to prove our death by, where there is a directory that the server sees, too."""
        if not self._directory_is_known:
            self.proof_dir = await self._servers_directory()
            self._directory_is_known = True
        if self.proof_dir is None:
            return None
        try:
            return ProofFile(self.proof_dir)
        except OSError as error:
            if not self.proof_is_guess:
                raise
            log.info("no proof of death in %s: %s", self.proof_dir, error)
            return None

    async def _servers_directory(self) -> Path | None:
        if not addresses.is_local(self.connection.address):
            return None
        answer = await self.call("GetCapabilities", api.GetCapabilitiesRequest(), repeatable=False)
        found = Path(answer.proof_directory or "/nonexistent")
        return found if await asyncio.to_thread(found.is_dir) else None

    # Those who look on

    async def leader(self, *, cached: bool = False) -> pb.Leader:
        """Who leads, now, or with `cached` when the server looked last; `candidate_id` is empty if nobody does."""
        response = await self.call("GetLeader", api.GetLeaderRequest(election_id=self.election_id, cached=cached))
        return response.leader  # type: ignore[no-any-return] # by the contract

    async def observe(self) -> AsyncIterator[pb.Leader]:
        """Who leads now, then each change; slow readers get the latest. Goes on over lost connections."""
        last: pb.Leader | None = None
        waits = backoff()
        while True:
            try:
                async for leader in self._observe():
                    waits = backoff()
                    if leader != last:
                        last = leader
                        yield leader
            except grpc.aio.AioRpcError as raw:
                error = errors.from_rpc_error(raw)
                if not is_transient(error) or (last is None and not self.connection.patient and not error.reason):
                    raise error from raw
            await asyncio.sleep(next(waits))

    async def _observe(self) -> AsyncIterator[pb.Leader]:
        stub = rpc.LeaderElectionServiceStub(self.connection.channel)
        request = api.ObserveRequest(election_id=self.election_id)
        call: Any = stub.Observe(request, metadata=self.connection.metadata())
        try:
            async for response in call:
                yield response.leader
        finally:
            call.cancel()

    async def verify(self, token: pb.FencingToken) -> pb.Leader:
        """Who leads under a token. Raises FailedPrecondition (STALE_TOKEN, TOKEN_DOMAIN_MISMATCH)."""
        response = await self.call("VerifyToken", api.VerifyTokenRequest(election_id=self.election_id, token=token))
        return response.leader  # type: ignore[no-any-return] # by the contract

    async def terms(self, *, page_size: int = 0) -> AsyncIterator[pb.Term]:
        """The terms that are remembered, the latest first."""
        request = api.ListTermsRequest(election_id=self.election_id, page_size=page_size)
        async for page in self._pages("ListTerms", request):
            for term in page.terms:
                yield term

    async def list(self, *, page_size: int = 0) -> AsyncIterator[pb.Leader]:
        """All elections of the engine by name, not this one alone."""
        async for page in self._pages("ListElections", api.ListElectionsRequest(page_size=page_size)):
            for leader in page.leaders:
                yield leader

    async def _pages(self, method: str, request: Any) -> AsyncIterator[Any]:
        while True:
            page = await self.call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def request_step_down(self, token: pb.FencingToken | None = None) -> api.RequestStepDownResponse:
        """Asks the leader to resign, if the term is still that of the token. For operators: dial the control socket."""
        request = api.RequestStepDownRequest(election_id=self.election_id, token=token)
        return await self.call("RequestStepDown", request)  # type: ignore[no-any-return] # by the contract


@asynccontextmanager
async def campaign(election_id: str, *, wait: Seconds | None = None, **options: Any) -> AsyncIterator[Term]:
    """Stands for one election over a connection of its own; takes the options of Election, and `wait` of campaign()."""
    async with Election(election_id, **options) as election, election.campaign(wait=wait) as term:
        yield term


def default_candidate_id() -> str:
    """Unique per process, also when a restarted pod has its old name and pid."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64].lstrip("._-")
    return f"{host or 'host'}-{os.getpid()}-{secrets.token_hex(4)}"


def checked(value: str) -> str:
    """A value that can be proclaimed. Raises ValueError: on a stream it would cost the leadership."""
    if len(value) > _MAX_VALUE:
        raise ValueError(f"cannot proclaim {len(value)} characters: {_MAX_VALUE} at most")
    return value


async def _run(function: Callable[[Term], Any], term: Term) -> Any:
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return await function(term)
    thread = asyncio.ensure_future(asyncio.to_thread(function, term))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        term.lost = term.lost or "CANCELLED"
        await asyncio.wait([thread])
        thread.exception()  # the leadership's end is what is told
        raise


def _about_proof(error: errors.InvalidArgument) -> bool:
    return all(violation.field == "start.proof_file" for violation in error.violations)


def _seconds(value: Seconds) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else float(value)


def _duration(value: Seconds | None) -> Duration | None:
    if value is None:
        return None
    found = Duration()
    found.FromTimedelta(timedelta(seconds=_seconds(value)))
    return found
