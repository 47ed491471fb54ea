"""The Python client's leadership against a scripted server: deadlines, losses, resumption, and what ends a block."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from retinue.client import errors, sync
from retinue.client.deadline import Deadline, boot_seconds
from retinue.client.election import Election, ElectionEvent, NotElected, Term, TermLost, campaign, default_candidate_id
from retinue.leaderelection.v1 import election_pb2 as pb
from retinue.leaderelection.v1 import leaderelection_service_pb2 as api
from retinue.leaderelection.v1 import leaderelection_service_pb2_grpc as rpc

SESSION = "0" * 32


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_000.0

    def __call__(self) -> float:
        return self.seconds


# The deadline


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def deadline(clock: Clock) -> Deadline:
    found = Deadline(clock)
    found.start()
    return found


def test_a_grant_counts_from_before_its_message_was_written(deadline: Deadline, clock: Clock) -> None:
    first = deadline.beat()
    clock.seconds += 1.5  # the message, the server and the answer took so long
    deadline.grant(first, 1.8)
    assert deadline.at == 1_000 + 1.8
    assert deadline.remaining == pytest.approx(0.3)


def test_an_answer_later_than_what_it_grants_grants_nothing(deadline: Deadline, clock: Clock) -> None:
    first = deadline.beat()
    clock.seconds += 60
    deadline.grant(first, 1.8)
    assert deadline.remaining < 0


def test_a_lost_answer_leaves_the_old_deadline(deadline: Deadline, clock: Clock) -> None:
    deadline.grant(deadline.beat(), 1.8)
    clock.seconds += 0.5
    deadline.beat()
    assert deadline.at == 1_000 + 1.8


def test_the_deadline_only_moves_forward(deadline: Deadline, clock: Clock) -> None:
    first = deadline.beat()
    clock.seconds += 0.5
    second = deadline.beat()
    deadline.grant(second, 1.8)
    deadline.grant(second, 0.1)
    deadline.grant(first, 1.8)
    assert deadline.at == 1_000.5 + 1.8


def test_an_answer_to_what_was_never_sent_grants_nothing(deadline: Deadline) -> None:
    deadline.grant(7, 1.8)
    assert deadline.remaining < 0


def test_another_stream_counts_from_its_own_first_message(deadline: Deadline, clock: Clock) -> None:
    deadline.beat()
    clock.seconds += 5
    deadline.start()
    deadline.grant(1, 1.8)
    assert deadline.remaining < 0, "heartbeat 1 is one of the stream before"
    deadline.grant(0, 1.8)
    assert deadline.at == 1_005 + 1.8


def test_another_term_begins_with_nothing(deadline: Deadline) -> None:
    deadline.grant(deadline.beat(), 1.8)
    deadline.reset()
    assert deadline.remaining < 0


Step = st.tuples(st.sampled_from(["wait", "beat", "answer", "start", "stray"]), st.integers(0, 30))


@given(st.lists(Step, max_size=60))
def test_no_order_of_events_grants_more_than_was_told_from_before_the_message(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    deadline = Deadline(clock)
    deadline.start()
    sent, allowed, last = {0: clock()}, float("-inf"), float("-inf")
    for kind, number in steps:
        if kind == "wait":
            clock.seconds += number / 10
        elif kind == "beat":
            sent[deadline.beat()] = clock()
        elif kind == "start":
            deadline.start()
            sent = {0: clock()}
        elif kind == "answer" or number in sent:
            sequence = number % len(sent)
            deadline.grant(sequence, number / 10)
            allowed = max(allowed, sent[sequence] + number / 10)
        assert last <= deadline.at <= allowed
        last = deadline.at


def test_the_clock_is_the_boot_clock() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= boot_seconds() <= time.clock_gettime(time.CLOCK_BOOTTIME)


# A server by script


class Stream:
    """One stream as the scripted server sees it."""

    def __init__(self, requests: AsyncIterator[api.CampaignRequest], context: Any) -> None:
        self._requests, self._context = requests, context
        self.received: dict[int, float] = {}
        """When each message came, by the boot clock."""

    async def read(self) -> api.CampaignRequest:
        """The next message; never returns once there is none."""
        message = await anext(self._requests, None)
        if message is None:
            await asyncio.Event().wait()
        assert message is not None
        self.received[message.heartbeat.sequence] = boot_seconds()
        return message

    async def send(self, **event: Any) -> None:
        await self._context.write(api.CampaignResponse(**event))

    async def elect(self, valid: float = 60, token: int = 1, sequence: int = 0) -> None:
        fence = pb.FencingToken(domain="d", value=token)
        elected = pb.Leadership(session_id=SESSION, token=fence, valid_duration=duration(valid), sequence=sequence)
        await self.send(elected=elected)

    async def acknowledge(self, sequence: int, valid: float = 60) -> None:
        await self.send(heartbeat_ack=api.CampaignHeartbeatAck(sequence=sequence, valid_duration=duration(valid)))

    async def serve(self, valid: float = 60) -> None:
        """Answers heartbeats for as long as the stream lasts."""
        while True:
            message = await self.read()
            await self.acknowledge(message.heartbeat.sequence, valid)

    async def refuse(self, code: grpc.StatusCode, reason: str = "", *fields: str) -> None:
        status = status_pb2.Status(code=code.value[0])
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="retinue"))
        wrong = [error_details_pb2.BadRequest.FieldViolation(field=field) for field in fields]
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=wrong))
        trailer = (("grpc-status-details-bin", status.SerializeToString()),)
        await self._context.abort(code, "by script", trailing_metadata=trailer)


Script = Callable[[Stream, api.CampaignStart], Awaitable[None]]


class Scripted(rpc.LeaderElectionServiceServicer):
    """Plays a script on each stream; the last one goes on for all that follow."""

    def __init__(self, scripts: tuple[Script, ...]) -> None:
        self._scripts = list(scripts)
        self.starts: list[api.CampaignStart] = []
        self.calls: list[Any] = []
        self.proof_directory = ""

    async def Campaign(self, request_iterator: Any, context: Any) -> Any:  # type: ignore[override] # noqa: N802 - writes to the context
        stream = Stream(request_iterator, context)
        start = (await stream.read()).start
        self.starts.append(api.CampaignStart.FromString(start.SerializeToString()))
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        await script(stream, start)

    async def Resign(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        self.calls.append(request)
        return api.ResignResponse(released=True)

    async def Proclaim(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        self.calls.append(request)
        return api.ProclaimResponse()

    async def GetCapabilities(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        return api.GetCapabilitiesResponse(proof_directory=self.proof_directory)

    @property
    def resigned(self) -> list[str]:
        return [call.session_id for call in self.calls if isinstance(call, api.ResignRequest)]


@asynccontextmanager
async def scripted(*scripts: Script) -> AsyncIterator[tuple[Scripted, str]]:
    servicer = Scripted(scripts)  # type: ignore[abstract] # the client calls no more than these
    server = grpc.aio.server()
    rpc.add_LeaderElectionServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield servicer, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def duration(seconds: float) -> Duration:
    found = Duration()
    found.FromNanoseconds(int(seconds * 1e9))
    return found


async def leads(stream: Stream, start: api.CampaignStart) -> None:
    await stream.elect()
    await stream.serve()


async def stands_by(stream: Stream, start: api.CampaignStart) -> None:
    await stream.send(standby=api.CampaignStandby(session_id=SESSION, leader=pb.Leader(candidate_id="other")))
    await asyncio.Event().wait()


async def for_ever() -> None:
    await asyncio.Event().wait()


# What a block is worth


async def test_the_deadline_is_never_later_than_the_servers_reading_allows() -> None:
    read: list[Stream] = []

    async def slowly(stream: Stream, start: api.CampaignStart) -> None:
        read.append(stream)
        await stream.elect(valid=60)
        for _ in range(8):
            message = await stream.read()
            await asyncio.sleep(0.05)  # what the answer takes
            await stream.acknowledge(message.heartbeat.sequence, 60)
        reached.set()
        await for_ever()

    reached = asyncio.Event()
    async with (
        scripted(slowly) as (_, address),
        Election("e", address=address, app_lease=0.4) as election,
        election.campaign() as term,
    ):
        await reached.wait()
        await asyncio.sleep(0)
        assert boot_seconds() + term.remaining() <= max(read[0].received.values()) + 60


async def test_silence_cancels_the_block_before_the_deadline_and_is_told_outside() -> None:
    entered = asyncio.Event()

    async def mute(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=20.4)
        while True:
            message = await stream.read()
            if not entered.is_set():
                await stream.acknowledge(message.heartbeat.sequence, 20.4)

    left = []
    async with scripted(mute) as (_, address), Election("e", address=address, app_lease=0.4, margin=20) as election:
        with pytest.raises(TermLost) as caught:  # noqa: PT012 - what happens in the block is the claim
            async with election.campaign() as term:
                entered.set()
                assert term.is_leader()
                try:
                    await for_ever()
                except asyncio.CancelledError:
                    left.append(term.remaining())
                    raise
        assert caught.value.reason == term.lost == "DEADLINE"
        assert 0 < left[0] <= 20
        assert not term.is_leader()
        with pytest.raises(TermLost):
            term.check()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0, "the cancellation was taken back"


async def test_a_clock_that_jumps_ends_leadership_at_once_and_the_block_soon() -> None:
    async with scripted(leads) as (_, address), Election("e", address=address) as election:
        candidacy = election.campaign()
        jump = Clock()
        jump.seconds = 0
        candidacy._candidate.deadline.now = lambda: boot_seconds() + jump.seconds
        with pytest.raises(TermLost):  # noqa: PT012 - what happens in the block is the claim
            async with candidacy as term:
                jump.seconds = 3_600  # the machine was suspended; the loop's own clock stood still
                assert not term.is_leader()
                await for_ever()


async def test_an_election_that_is_told_too_late_is_entered_with_the_next_answer() -> None:
    entered = asyncio.Event()

    async def late(stream: Stream, start: api.CampaignStart) -> None:
        message = await stream.read()
        await asyncio.sleep(0.3)
        await stream.elect(valid=0.2)
        await stream.acknowledge(message.heartbeat.sequence, 0.2)
        message = await stream.read()
        assert not entered.is_set()
        await stream.acknowledge(message.heartbeat.sequence, 600)
        await stream.serve()

    async with (
        scripted(late) as (_, address),
        Election("e", address=address, app_lease=1) as election,
        election.campaign() as term,
    ):
        entered.set()
        assert term.remaining() > 300


async def test_a_lost_stream_is_resumed_within_the_term() -> None:
    async def breaks(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        await stream.refuse(grpc.StatusCode.UNAVAILABLE)

    resumed = asyncio.Event()

    async def goes_on(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        await stream.acknowledge((await stream.read()).heartbeat.sequence, 60)
        resumed.set()
        await stream.serve()

    async with (
        scripted(breaks, goes_on) as (servicer, address),
        Election("e", address=address) as election,
        election.campaign() as term,
    ):
        await resumed.wait()
        assert (term.lost, term.token.value) == ("", 1)
    assert [start.session_id for start in servicer.starts] == ["", SESSION]
    assert servicer.resigned == [SESSION]


async def test_another_term_of_the_same_session_is_not_the_blocks_own() -> None:
    async def breaks(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        await stream.refuse(grpc.StatusCode.UNAVAILABLE)

    async def another(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=5, token=2)
        await stream.serve()

    async with scripted(breaks, another) as (servicer, address), Election("e", address=address) as election:
        with pytest.raises(TermLost, match="EXPIRED"):
            async with election.campaign() as term:
                await for_ever()
        assert term.token.value == 1
        assert not term.is_leader()
    assert servicer.resigned == [SESSION], "nobody serves the other term: it is given back"


async def test_what_the_server_knows_early_ends_the_block_early() -> None:
    async def takes_away(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        await stream.send(lost=api.CampaignLost(reason=pb.END_REASON_EXPIRED))
        await stream.serve(60)

    async with scripted(takes_away) as (_, address), Election("e", address=address) as election:
        with pytest.raises(TermLost, match="EXPIRED"):
            async with election.campaign():
                await for_ever()


async def test_a_refusal_ends_the_block_and_is_its_cause() -> None:
    async def breaks(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        await stream.refuse(grpc.StatusCode.ABORTED, "SESSION_RESUMED")

    async with scripted(breaks) as (_, address), Election("e", address=address) as election:
        with pytest.raises(TermLost, match="CONNECTION") as caught:
            async with election.campaign():
                await for_ever()
    assert isinstance(caught.value.__cause__, errors.Aborted)


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ({"step_down_requested": api.CampaignStepDownRequested()}, "STEP_DOWN_REQUESTED"),
        ({"draining": api.CampaignDraining()}, "DRAINING"),
    ],
)
async def test_who_is_asked_to_end_is_cancelled_and_resigns_while_it_still_leads(
    event: dict[str, Any], reason: str
) -> None:
    entered = asyncio.Event()

    async def asks(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        await entered.wait()
        await stream.send(**event)
        await stream.serve(60)

    async with scripted(asks) as (servicer, address), Election("e", address=address) as election:
        with pytest.raises(TermLost, match=reason):  # noqa: PT012 - what happens in the block is the claim
            async with election.campaign() as term:
                entered.set()
                try:
                    await for_ever()
                finally:
                    assert term.is_leader(), "there is time to clean up"
                    assert servicer.resigned == []
    assert servicer.resigned == [SESSION]


async def test_a_term_that_is_taken_back_in_the_same_breath_ends() -> None:
    async def takes_back(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        await stream.send(step_down_requested=api.CampaignStepDownRequested())
        await stream.serve(60)

    for _ in range(5):  # whether the block is entered is a matter of luck
        async with scripted(takes_back) as (servicer, address), Election("e", address=address) as election:
            with pytest.raises(TermLost, match="STEP_DOWN_REQUESTED"):
                async with election.campaign():
                    await for_ever()
        assert servicer.resigned == [SESSION]


async def test_a_block_that_looks_itself_is_not_cancelled_on_request() -> None:
    async def asks(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        await stream.send(step_down_requested=api.CampaignStepDownRequested())
        await stream.serve(60)

    async with (
        scripted(asks) as (servicer, address),
        Election("e", address=address) as election,
        election.campaign(cancel_on_request=False) as term,
    ):
        await term.ending.wait()
        term.check()
    assert servicer.resigned == [SESSION]


async def test_health_that_fails_ends_the_term_and_is_told_to_the_server() -> None:
    sick = asyncio.Event()
    told = asyncio.Event()

    async def listens(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect()
        while True:
            message = await stream.read()
            if message.heartbeat.unhealthy:
                told.set()
            await stream.acknowledge(message.heartbeat.sequence)

    async with (
        scripted(listens) as (_, address),
        Election("e", address=address, app_lease=0.4, healthy=lambda: not sick.is_set()) as election,
    ):
        with pytest.raises(TermLost, match="UNHEALTHY"):  # noqa: PT012 - what happens in the block is the claim
            async with election.campaign():
                sick.set()
                await for_ever()


async def test_a_loop_that_hangs_sends_no_heartbeats() -> None:
    counted: list[int] = []

    async def counts(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        while True:
            counted.append((await stream.read()).heartbeat.sequence)
            await stream.acknowledge(counted[-1], 60)

    async with (
        scripted(counts) as (_, address),
        Election("e", address=address, app_lease=0.4) as election,
        election.campaign() as term,
    ):
        while len(counted) < 3:
            await asyncio.sleep(0.01)
        before = counted[-1]
        time.sleep(0.5)  # noqa: ASYNC251 - the hang
        await asyncio.sleep(0.05)
        assert counted[-1] <= before + 2, "at most one that was due, and the next"
        assert term.is_leader()


# What leaves a block


async def test_a_block_that_ends_resigns_after_its_work() -> None:
    events: list[str] = []
    async with (
        scripted(leads) as (servicer, address),
        Election("e", address=address, listener=lambda event: events.append(event.kind)) as election,
    ):
        async with election.campaign() as term:
            assert servicer.resigned == []
        assert servicer.resigned == [SESSION]
        assert not term.is_leader()
        assert term.lost == ""
    assert events == ["connected", "elected", "resigned"]


async def test_an_error_of_the_block_passes_and_resigns() -> None:
    async with scripted(leads) as (servicer, address), Election("e", address=address) as election:
        with pytest.raises(ZeroDivisionError):
            async with election.campaign():
                raise ZeroDivisionError
    assert servicer.resigned == [SESSION]


async def test_a_cancellation_from_outside_stays_one() -> None:
    async def work(address: str) -> None:
        async with Election("e", address=address) as election, election.campaign():
            entered.set()
            await for_ever()

    entered = asyncio.Event()
    async with scripted(leads) as (servicer, address):
        task = asyncio.create_task(work(address))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert servicer.resigned == [SESSION]


async def test_a_candidate_that_gives_up_leaves_the_line() -> None:
    async with scripted(stands_by) as (servicer, address), Election("e", address=address) as election:
        with pytest.raises(NotElected) as caught:
            async with election.campaign(wait=0):
                pytest.fail("not elected")
        assert caught.value.leader.candidate_id == "other"
        patience = asyncio.timeout(None)

        def runs_out(event: ElectionEvent) -> None:
            if event.kind == "standby":
                patience.reschedule(0)

        async with Election("e", address=address, listener=runs_out) as impatient:
            with pytest.raises(TimeoutError):
                async with patience, impatient.campaign():
                    pytest.fail("not elected")
    assert servicer.resigned == [SESSION, SESSION]


async def test_a_value_is_proclaimed_and_stays_with_the_session() -> None:
    async with scripted(leads) as (servicer, address), Election("e", address=address, value="a") as election:
        candidacy = election.campaign()
        async with candidacy as term:
            await term.proclaim("b")
            assert candidacy._candidate.start.value == "b"
            with pytest.raises(ValueError, match="4096"):
                await term.proclaim("x" * 5_000)
    assert [call.value for call in servicer.calls if isinstance(call, api.ProclaimRequest)] == ["b"]


# Standing


async def test_a_name_that_is_still_live_is_waited_for_then_raised() -> None:
    async def exists(stream: Stream, start: api.CampaignStart) -> None:
        await stream.refuse(grpc.StatusCode.ALREADY_EXISTS, "CANDIDATE_EXISTS")

    async with scripted(exists, exists, leads) as (_, address), campaign("e", address=address) as term:
        assert term.is_leader()
    async with scripted(exists) as (_, address), Election("e", address=address, app_lease=0.1) as election:
        with pytest.raises(errors.AlreadyExists):
            async with election.campaign():
                pytest.fail("not elected")


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED])
async def test_what_the_server_will_always_refuse_is_raised(code: grpc.StatusCode) -> None:
    async def refuses(stream: Stream, start: api.CampaignStart) -> None:
        await stream.refuse(code)

    async with scripted(refuses) as (_, address), Election("e", address=address) as election:
        with pytest.raises(errors.RetinueError):
            async with election.campaign():
                pytest.fail("not elected")


async def test_a_proof_that_the_server_cannot_see_is_dropped_if_it_was_a_guess(tmp_path: Path) -> None:
    async def sees_none(stream: Stream, start: api.CampaignStart) -> None:
        if start.proof_file:
            await stream.refuse(grpc.StatusCode.INVALID_ARGUMENT, "INVALID", "start.proof_file")
        await leads(stream, start)

    async with scripted(sees_none) as (servicer, address):
        servicer.proof_directory = str(tmp_path)
        async with Election("e", address=address) as election, election.campaign() as term:
            assert term.proof is None
        assert [bool(start.proof_file) for start in servicer.starts] == [True, False]
        with pytest.raises(errors.InvalidArgument):
            async with Election("e", address=address, proof_dir=tmp_path) as election, election.campaign():
                pytest.fail("not elected")
    assert list(tmp_path.iterdir()) == []


async def test_lead_stands_again_after_a_loss_until_the_function_returns() -> None:
    async def takes_away(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        await stream.send(lost=api.CampaignLost(reason=pb.END_REASON_EXPIRED))
        await stream.serve(60)

    async def again(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60, token=2)
        await stream.serve(60)

    async def work(term: Term) -> int:
        if term.token.value == 1:
            await for_ever()
        return term.token.value

    async with scripted(takes_away, again) as (_, address), Election("e", address=address) as election:
        assert await election.lead(work) == 2


async def test_lead_does_not_resign_before_its_thread_has_stopped() -> None:
    async def asks(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        await entered.wait()
        await stream.send(step_down_requested=api.CampaignStepDownRequested())
        await stream.serve(60)

    entered, loop = asyncio.Event(), asyncio.get_running_loop()
    seen: list[list[str]] = []

    def work(term: Term) -> None:
        loop.call_soon_threadsafe(entered.set)
        while True:
            try:
                term.check()
            except TermLost:
                time.sleep(0.2)
                seen.append(servicer.resigned.copy())
                raise
            time.sleep(0.01)

    async with scripted(asks) as (servicer, address), Election("e", address=address) as election:
        leading = asyncio.create_task(election.lead(work))
        while not servicer.resigned:
            await asyncio.sleep(0.01)
        leading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leading
    assert seen == [[]]


# The blocking face


async def test_a_thread_that_hangs_loses_its_leadership_if_its_patience_is_said() -> None:
    def work(address: str) -> Term:
        with sync.Election("e", address=address, app_lease=0.4) as election, election.campaign(patience=0.3) as term:
            while term.is_leader():
                time.sleep(0.01)  # never calls check()
        return term

    async def honest(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=0.36)
        await stream.serve(0.36)

    async with scripted(honest) as (_, address):
        with pytest.raises(TermLost, match="DEADLINE"):
            await asyncio.to_thread(work, address)


async def test_a_thread_that_checks_leads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, beats = Clock(), queue.SimpleQueue[int]()
    monkeypatch.setattr(sync, "boot_seconds", clock)

    def work(address: str) -> int:
        with sync.Election("e", address=address, app_lease=0.4) as election, election.campaign(patience=30) as term:
            for _ in range(3):
                clock.seconds += 20
                term.check()
                while not beats.empty():
                    beats.get()
                beats.get(timeout=60)
            return term.token.value

    async def counts(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect(valid=60)
        while True:
            sequence = (await stream.read()).heartbeat.sequence
            beats.put(sequence)
            await stream.acknowledge(sequence, 60)

    async with scripted(counts) as (servicer, address):
        assert await asyncio.to_thread(work, address) == 1
    assert servicer.resigned == [SESSION]


def test_candidates_of_one_host_differ() -> None:
    assert default_candidate_id() != default_candidate_id()


async def test_a_risk_is_told() -> None:
    async def at_risk(stream: Stream, start: api.CampaignStart) -> None:
        await stream.elect()
        await stream.send(at_risk=api.CampaignAtRisk(remaining_duration=duration(7)))
        await stream.serve()

    risk: asyncio.Future[ElectionEvent] = asyncio.get_running_loop().create_future()

    def listen(event: ElectionEvent) -> None:
        if event.kind == "at_risk":
            risk.set_result(event)

    async with (
        scripted(at_risk) as (_, address),
        Election("e", address=address, listener=listen) as election,
        election.campaign() as term,
    ):
        found = await risk
        assert (found.seconds, found.term) == (7, term)
