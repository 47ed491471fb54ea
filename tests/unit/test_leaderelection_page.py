"""`GET /leader/NAME`: what a load balancer asks the server beside the app."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from pace import undisturbed
from servers import RunningServer, start_server
from workers import eventually

from retinue.leaderelection.v1 import election_pb2 as pb
from retinue.leaderelection.v1 import leaderelection_service_pb2 as api
from retinue.leaderelection.v1 import leaderelection_service_pb2_grpc as rpc


@pytest.fixture
def store(tmp_path: Path) -> dict[str, str]:
    return {"RETINUE_LEADERELECTION__SQLITE__PATH": str(tmp_path / "elections.db"), "RETINUE_DRAIN_SECONDS": "0.2"}


@pytest.fixture
def server(tmp_path: Path, store: dict[str, str]) -> Iterator[RunningServer]:
    yield from _started(tmp_path / "a", store)


@pytest.fixture
def other(tmp_path: Path, store: dict[str, str]) -> Iterator[RunningServer]:
    yield from _started(tmp_path / "b", store)


def _started(where: Path, store: dict[str, str]) -> Iterator[RunningServer]:
    where.mkdir()
    running = start_server(where, "leaderelection", env=store)
    yield running
    assert running.stop() == 0


def page(server: RunningServer, name: str = "db", **headers: str) -> httpx.Response:
    return httpx.get(f"http://{server.http}/leader/{name}", headers=headers, verify=False, timeout=60)


def acquire(server: RunningServer, name: str = "db", app_lease_s: int = 100) -> pb.Leadership:
    """A leadership that lasts so long, as it is not renewed."""
    request = api.TryAcquireRequest(election_id=name, candidate_id="a", value="10.0.0.1:5432")
    request.lease_duration.FromSeconds(300)
    request.app_lease_duration.FromSeconds(app_lease_s)
    with grpc.insecure_channel(server.address) as channel:
        answer = rpc.LeaderElectionServiceStub(channel).TryAcquire(request, timeout=60)
    assert answer.acquired
    return answer.leadership


def resign(server: RunningServer, held: pb.Leadership) -> None:
    with grpc.insecure_channel(server.address) as channel:
        rpc.LeaderElectionServiceStub(channel).Resign(api.ResignRequest(session_id=held.session_id), timeout=60)


def test_it_is_200_with_the_leader_while_this_servers_app_leads_and_503_before_and_after(
    server: RunningServer,
) -> None:
    before = page(server)
    assert (before.status_code, before.json()) == (503, {"electionId": "db"})
    held = acquire(server)
    during = page(server)
    assert during.status_code == 200
    assert during.headers["content-type"] == "application/json"
    assert during.headers["cache-control"] == "no-store"
    said = during.json()
    assert (said["candidateId"], said["value"]) == ("a", "10.0.0.1:5432")
    assert said["token"] == {"domain": held.token.domain, "value": str(held.token.value)}
    assert held.session_id not in during.text, "whoever knows it may act for the session"
    resign(server, held)
    assert page(server).status_code == 503


def test_it_is_503_at_the_server_whose_app_does_not_lead(server: RunningServer, other: RunningServer) -> None:
    acquire(server)
    assert (page(server).status_code, page(other).status_code) == (200, 503)


def test_it_is_503_when_the_app_is_past_its_deadline(server: RunningServer) -> None:
    names = (f"db-{number}" for number in itertools.count())

    def led() -> str:
        name = next(names)
        acquire(server, name, app_lease_s=1)
        assert page(server, name).status_code == 200
        return name

    name = undisturbed(led, within_s=0.5)
    eventually(lambda: page(server, name).status_code == 503, "the deadline is over")


def test_it_answers_head_and_refuses_other_verbs(server: RunningServer) -> None:
    acquire(server)
    head = httpx.head(f"http://{server.http}/leader/db", verify=False, timeout=60)
    assert (head.status_code, head.content) == (200, b"")
    post = httpx.post(f"http://{server.http}/leader/db", json={}, verify=False, timeout=60)
    assert (post.status_code, post.headers["allow"]) == (405, "GET, HEAD")


def test_a_page_of_another_host_or_origin_learns_nothing(server: RunningServer) -> None:
    assert page(server, host="evil.example").status_code == 403
    assert page(server, origin="http://evil.example").status_code == 403


@pytest.mark.parametrize("name", ["", "a/b", "%2e%2e", "-x", "x" * 129, "ü"])
def test_what_cannot_be_an_election_is_404(server: RunningServer, name: str) -> None:
    assert page(server, name).status_code == 404


def test_an_election_that_is_not_served_here_is_404(tmp_path: Path, store: dict[str, str]) -> None:
    only = {"RETINUE_LEADERELECTION__ELECTIONS": "db"}
    server = start_server(tmp_path, "leaderelection", env=store | only)
    try:
        assert [page(server, name).status_code for name in ("db", "mail")] == [503, 404]
    finally:
        assert server.stop() == 0


def test_it_asks_no_engine(tmp_path: Path) -> None:
    nowhere = {
        "RETINUE_LEADERELECTION__ENGINE": "etcd",
        "RETINUE_LEADERELECTION__ETCD__ENDPOINTS": "127.0.0.1:1",
    }
    server = start_server(tmp_path, "leaderelection", env=nowhere)
    try:
        assert page(server).status_code == 503
        quickest = min(page(server).elapsed.total_seconds() for _ in range(5))
        assert quickest < 1, "a call of the engine would wait two seconds"
    finally:
        assert server.stop() == 0
