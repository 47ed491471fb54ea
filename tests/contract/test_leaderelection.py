"""LeaderElectionService as its contract says, to callers that know nothing else."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from contract.client import Client, Refused, Stream
from contract.line import seconds
from google.protobuf.duration_pb2 import Duration

from retinue.leaderelection.v1 import election_pb2 as pb

pytestmark = pytest.mark.engines("sqlite", "memory", "postgres", "etcd")

once = pytest.mark.engines("sqlite")
"""What no engine can change."""
LONG: dict[str, Any] = {"lease_duration": seconds(120), "app_lease_duration": seconds(50)}
"""Leases for slow machines, where time is not the claim."""


@pytest.fixture
def name() -> str:
    """An election that no other test uses."""
    return f"e-{uuid.uuid4().hex}"


@contextmanager
def campaign(client: Client, **start: Any) -> Iterator[Stream]:
    """A candidate, as it stands right after its start."""
    if "lease_duration" not in start:
        start = {**LONG, **start}
    with client.stream("Campaign", timeout=60) as stream:
        stream.send(start=start)
        yield stream


def until(stream: Stream, kind: str) -> Any:
    """The next event of a kind; what comes before it is passed over."""
    while (message := stream.read()) is not None:
        if message.WhichOneof("event") == kind:
            return getattr(message, kind)
    raise AssertionError(f"the stream ended without {kind}")


def beat(stream: Stream, sequence: int) -> Any:
    """One heartbeat and its answer."""
    stream.send(heartbeat={"sequence": sequence})
    return until(stream, "heartbeat_ack")


def ms(duration: Duration) -> int:
    return int(duration.ToMilliseconds())


# Campaigning


def test_the_first_candidate_is_elected_for_its_lease_less_a_tenth(elector: Client, name: str) -> None:
    with campaign(elector, election_id=name, candidate_id="a", app_lease_duration=seconds(50)) as stream:
        elected = until(stream, "elected")
        assert (elected.election_id, elected.candidate_id, elected.sequence) == (name, "a", 0)
        assert elected.token.value > 0
        assert elected.token.domain
        assert len(elected.session_id) == 32
        assert 0 < ms(elected.valid_duration) <= 45_000
        assert 0 < ms(beat(stream, 1).valid_duration) <= 45_000
        leader = elector.GetLeader(election_id=name).leader
        assert (leader.candidate_id, leader.token) == ("a", elected.token)
        assert leader.HasField("acquire_time")


def test_who_stands_by_hears_who_leads_and_is_next(elector: Client, name: str) -> None:
    with campaign(elector, election_id=name, candidate_id="a", value="here") as first:
        token = until(first, "elected").token
        with campaign(elector, election_id=name, candidate_id="b") as second:
            standby = until(second, "standby")
            assert (standby.leader.candidate_id, standby.leader.value) == ("a", "here")
            assert not beat(second, 1).HasField("valid_duration")
            first.send(resign={})
            assert first.read() is None or first.read() is None
            later = until(second, "elected")
            assert later.token.domain == token.domain
            assert later.token.value > token.value
    assert [term.end_reason for term in elector.ListTerms(election_id=name).terms][1] == pb.END_REASON_RESIGNED


def test_a_broken_stream_is_resumed_with_the_same_token(elector: Client, name: str) -> None:
    with campaign(elector, election_id=name, candidate_id="a", app_lease_duration=seconds(50)) as stream:
        elected = until(stream, "elected")
    again = {"election_id": name, "candidate_id": "a", "session_id": elected.session_id}
    with campaign(elector, **again, app_lease_duration=seconds(50)) as stream:
        resumed = until(stream, "elected")
        assert (resumed.token, resumed.session_id) == (elected.token, elected.session_id)


def test_who_is_silent_loses_it_and_another_leads(elector: Client, name: str) -> None:
    with campaign(elector, election_id=name, candidate_id="a", app_lease_duration=seconds(1)) as first:
        until(first, "elected")
        with campaign(elector, election_id=name, candidate_id="b", liveness=pb.LIVENESS_STREAM) as second:
            until(second, "elected")
            assert until(first, "lost").reason == pb.END_REASON_APP_SILENT
            assert until(first, "standby").leader is not None


def test_a_stream_counts_as_life_where_that_is_asked_for(elector: Client, name: str) -> None:
    start = {"election_id": name, "candidate_id": "a", "liveness": pb.LIVENESS_STREAM}
    with campaign(elector, **start, app_lease_duration=seconds(0.2)) as stream:
        until(stream, "elected")
        stream.half_close()
        with campaign(elector, election_id=name, candidate_id="b") as second:
            for sequence in range(1, 6):
                assert not beat(second, sequence).HasField("valid_duration")
            stream.cancel()
            until(second, "elected")


def test_a_proclaimed_value_is_seen_by_others(elector: Client, name: str) -> None:
    with (
        campaign(elector, election_id=name, candidate_id="a") as stream,
        elector.stream("Observe", election_id=name) as observer,
    ):
        until(stream, "elected")
        stream.send(proclaim={"value": "10.0.0.1:80"})
        while observer.read().leader.value != "10.0.0.1:80":
            pass


def test_an_app_that_is_not_healthy_gives_way(elector: Client, name: str) -> None:
    with campaign(elector, election_id=name, candidate_id="a", app_lease_duration=seconds(3)) as first:
        until(first, "elected")
        first.send(heartbeat={"sequence": 1, "unhealthy": True})
        assert not until(first, "heartbeat_ack").HasField("valid_duration")
        with campaign(elector, election_id=name, candidate_id="b", liveness=pb.LIVENESS_STREAM) as second:
            until(second, "elected")
            assert until(first, "lost").reason == pb.END_REASON_UNHEALTHY


def test_a_step_down_is_heard_by_the_leader(elector: Client, election_operator: Client, name: str) -> None:
    with campaign(elector, election_id=name, candidate_id="a") as stream:
        elected = until(stream, "elected")
        asked = election_operator.RequestStepDown(election_id=name, token=elected.token)
        assert (asked.requested, asked.leader.candidate_id) == (True, "a")
        until(stream, "step_down_requested")
        assert elector.GetLeader(election_id=name).leader.step_down_requested
        stream.send(resign={})
        assert stream.read() is None
    terms = elector.ListTerms(election_id=name).terms
    assert [term.end_reason for term in terms] == [pb.END_REASON_STEPPED_DOWN]
    assert not election_operator.RequestStepDown(election_id=name).requested


# By hand


def test_trying_renewing_and_resigning_by_hand(elector: Client, name: str) -> None:
    won = elector.TryAcquire(
        election_id=name, candidate_id="a", app_lease_duration=seconds(50), lease_duration=seconds(120), value="v"
    )
    assert won.acquired
    held = won.leadership
    assert 0 < ms(held.valid_duration) <= 45_000
    missed = elector.TryAcquire(election_id=name, candidate_id="b")
    assert not missed.acquired
    assert missed.leader.candidate_id == "a"
    again = elector.TryAcquire(election_id=name, candidate_id="a", session_id=held.session_id)
    assert again.leadership.token == held.token
    renewed = elector.Renew(session_id=held.session_id, token=held.token)
    assert renewed.leadership.token == held.token
    said = elector.Proclaim(session_id=held.session_id, token=held.token, value="w")
    assert said.leader.value == "w"
    assert elector.VerifyToken(election_id=name, token=held.token).leader.candidate_id == "a"
    assert elector.Resign(session_id=held.session_id, token=held.token).released
    assert not elector.Resign(session_id=held.session_id, token=held.token).released
    assert not elector.GetLeader(election_id=name).leader.candidate_id
    assert elector.GetLeader(election_id=name).leader.token == held.token, "of the last term"


# Those who look on


def test_an_observer_gets_the_present_state_first_and_each_leader_after(elector: Client, name: str) -> None:
    with elector.stream("Observe", election_id=name) as observer:
        assert not observer.read().leader.candidate_id
        for candidate in ("a", "b"):
            held = elector.TryAcquire(election_id=name, candidate_id=candidate, **LONG).leadership
            assert observer.read().leader.candidate_id == candidate
            elector.Resign(session_id=held.session_id)
            assert not observer.read().leader.candidate_id


def test_elections_and_terms_are_listed_page_by_page(elector: Client, name: str) -> None:
    names = [f"{name}-{number}" for number in range(3)]
    for each in names:
        for candidate in ("a", "b", "c"):
            held = elector.TryAcquire(election_id=each, candidate_id=candidate).leadership
            elector.Resign(session_id=held.session_id)
    found, token = [], ""
    while True:
        page = elector.ListElections(page_size=2, page_token=token)
        found += [leader.election_id for leader in page.leaders]
        if not (token := page.next_page_token):
            break
    assert found == sorted(set(found))
    assert set(names) <= set(found)
    first = elector.ListTerms(election_id=names[0], page_size=2)
    rest = elector.ListTerms(election_id=names[0], page_size=2, page_token=first.next_page_token)
    assert [term.candidate_id for term in [*first.terms, *rest.terms]] == ["c", "b", "a"]
    assert not rest.next_page_token
    with pytest.raises(Refused) as elsewhere:
        elector.ListTerms(election_id=names[1], page_token=first.next_page_token)
    assert elsewhere.value.reason == "PAGE_TOKEN_EXPIRED"


def test_capabilities_are_told(elector: Client) -> None:
    can = elector.GetCapabilities()
    assert can.engine
    assert can.scope != pb.LIVENESS_UNSPECIFIED
    assert can.server_version
    assert ms(can.min_lease_duration) >= 1_000


# Refusals


BAD_STARTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing": ({}, {"start.election_id", "start.candidate_id"}),
    "names": ({"election_id": "a b", "candidate_id": "-x"}, {"start.election_id", "start.candidate_id"}),
    "long names": ({"election_id": "a" * 129, "candidate_id": "b" * 129}, {"start.election_id", "start.candidate_id"}),
    "session": ({"election_id": "a", "candidate_id": "b", "session_id": "x"}, {"start.session_id"}),
    "value": ({"election_id": "a", "candidate_id": "b", "value": "v" * 4_097}, {"start.value"}),
    "lease": ({"election_id": "a", "candidate_id": "b", "lease_duration": seconds(0.5)}, {"start.lease_duration"}),
    "long lease": ({"election_id": "a", "candidate_id": "b", "lease_duration": seconds(601)}, {"start.lease_duration"}),
    "app lease": (
        {"election_id": "a", "candidate_id": "b", "lease_duration": seconds(4), "app_lease_duration": seconds(2.1)},
        {"start.app_lease_duration"},
    ),
    "delay": (
        {"election_id": "a", "candidate_id": "b", "release_delay_duration": seconds(601)},
        {"start.release_delay_duration"},
    ),
    "malformed duration": (
        {"election_id": "a", "candidate_id": "b", "lease_duration": Duration(seconds=20, nanos=-1)},
        {"start.lease_duration"},
    ),
    "enums": (
        {"election_id": "a", "candidate_id": "b", "liveness": 9, "on_disconnect": 9},
        {"start.liveness", "start.on_disconnect"},
    ),
    "proof outside": ({"election_id": "a", "candidate_id": "b", "proof_file": "../x"}, {"start.proof_file"}),
    "no such proof": ({"election_id": "a", "candidate_id": "b", "proof_file": "nobody"}, {"start.proof_file"}),
}


@once
@pytest.mark.parametrize("bad", BAD_STARTS)
def test_a_start_that_is_wrong_is_refused_field_by_field(elector: Client, bad: str) -> None:
    fields, wrong = BAD_STARTS[bad]
    with campaign(elector, **fields) as stream, pytest.raises(Refused) as error:
        stream.read()
    assert (error.value.code, error.value.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert error.value.fields == wrong


@once
@pytest.mark.parametrize("message", [{}, {"heartbeat": {"sequence": 1}}, {"resign": {}}])
def test_the_first_message_must_be_start(elector: Client, message: dict[str, Any]) -> None:
    with elector.stream("Campaign") as stream:
        stream.send(**message)
        with pytest.raises(Refused) as error:
            stream.read()
    assert error.value.fields == {"start"}


@once
@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"start": {"election_id": "a", "candidate_id": "b"}}, "start"),
        ({"heartbeat": {"sequence": 0}}, "heartbeat.sequence"),
        ({"heartbeat": {"sequence": -1}}, "heartbeat.sequence"),
        ({"proclaim": {"value": "v" * 4_097}}, "proclaim.value"),
        ({}, "message"),
    ],
)
def test_a_message_that_is_wrong_ends_the_stream(elector: Client, name: str, message: Any, field: str) -> None:
    with campaign(elector, election_id=name, candidate_id="a") as stream:
        until(stream, "elected")
        stream.send(**message)
        with pytest.raises(Refused) as error:
            until(stream, "lost")
        assert error.value.fields == {field}


def test_a_candidate_that_lives_is_not_doubled(elector: Client, name: str) -> None:
    with campaign(elector, election_id=name, candidate_id="a") as first:
        until(first, "elected")
        with campaign(elector, election_id=name, candidate_id="a") as second, pytest.raises(Refused) as error:
            second.read()
        assert (error.value.code, error.value.reason) == ("ALREADY_EXISTS", "CANDIDATE_EXISTS")
        assert error.value.metadata == {"candidate_id": "a"}


def test_a_stream_whose_session_is_resumed_elsewhere_is_told(elector: Client, name: str) -> None:
    with campaign(elector, election_id=name, candidate_id="a") as first:
        session_id = until(first, "elected").session_id
        with campaign(elector, election_id=name, candidate_id="a", session_id=session_id) as second:
            until(second, "elected")
            with pytest.raises(Refused) as error:
                until(first, "lost")
            assert (error.value.code, error.value.reason) == ("ABORTED", "SESSION_RESUMED")
            assert beat(second, 1).HasField("valid_duration")


def test_tokens_and_sessions_that_are_not_the_leaders_are_refused(elector: Client, name: str) -> None:
    held = elector.TryAcquire(
        election_id=name, candidate_id="a", app_lease_duration=seconds(60), lease_duration=seconds(120)
    ).leadership
    stale = {"domain": held.token.domain, "value": held.token.value + 1}
    elsewhere = {"domain": "elsewhere", "value": held.token.value}
    cases = [
        ("Renew", {"session_id": "0" * 32, "token": held.token}, "NOT_FOUND", "SESSION_NOT_FOUND"),
        ("Renew", {"session_id": held.session_id, "token": stale}, "FAILED_PRECONDITION", "STALE_TOKEN"),
        ("Proclaim", {"session_id": held.session_id, "token": stale}, "FAILED_PRECONDITION", "STALE_TOKEN"),
        ("VerifyToken", {"election_id": name, "token": stale}, "FAILED_PRECONDITION", "STALE_TOKEN"),
        ("VerifyToken", {"election_id": name, "token": elsewhere}, "FAILED_PRECONDITION", "TOKEN_DOMAIN_MISMATCH"),
    ]
    for rpc, fields, code, reason in cases:
        with pytest.raises(Refused) as error:
            getattr(elector, rpc)(**fields)
        assert (error.value.code, error.value.reason, error.value.domain) == (code, reason, "retinue"), rpc
    with campaign(elector, election_id=name, candidate_id="b") as other:
        session_id = until(other, "standby").session_id
        for rpc in ("Renew", "Resign"):
            with pytest.raises(Refused) as error:
                getattr(elector, rpc)(session_id=session_id, token=held.token)
            assert (error.value.code, error.value.reason) == ("PERMISSION_DENIED", "SESSION_MISMATCH")


@once
@pytest.mark.parametrize(
    ("rpc", "fields", "wrong"),
    [
        ("TryAcquire", {}, {"election_id", "candidate_id"}),
        ("Renew", {}, {"session_id", "token"}),
        ("Renew", {"session_id": "0" * 32, "token": {}}, {"token.value", "token.domain"}),
        ("Proclaim", {"value": "v" * 4_097}, {"session_id", "token", "value"}),
        ("Resign", {}, {"session_id"}),
        ("GetLeader", {}, {"election_id"}),
        ("VerifyToken", {}, {"election_id", "token"}),
        ("ListTerms", {"page_size": 501, "page_token": "x"}, {"election_id", "page_size", "page_token"}),
        ("ListElections", {"page_size": -1}, {"page_size"}),
    ],
)
def test_requests_that_are_wrong_name_every_field(elector: Client, rpc: str, fields: Any, wrong: set[str]) -> None:
    with pytest.raises(Refused) as error:
        getattr(elector, rpc)(**fields)
    assert error.value.code == "INVALID_ARGUMENT"
    assert error.value.fields == wrong


@once
def test_asking_for_a_step_down_is_the_operators(elector: Client, name: str) -> None:
    with pytest.raises(Refused) as error:
        elector.RequestStepDown(election_id=name)
    assert (error.value.code, error.value.reason) == ("PERMISSION_DENIED", "ROLE_REQUIRED")


@once
def test_observing_ends_with_the_caller(elector: Client, name: str) -> None:
    for _ in range(20):
        with elector.stream("Observe", election_id=name) as observer:
            observer.read()
    assert elector.GetLeader(election_id=name).leader.election_id == name
