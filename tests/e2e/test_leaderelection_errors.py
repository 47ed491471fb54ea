"""Every documented error of leader election, provoked by grpcurl alone, its details decoded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import RunningServer, start_server

GRPCURL = Path(sys.executable).with_name("grpcurl")
LONG = {"leaseDuration": "600s", "appLeaseDuration": "300s"}
"""Leases that nobody here renews."""
SERVICE = "retinue.leaderelection.v1.LeaderElectionService"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    env = {
        "RETINUE_LEADERELECTION__ELECTIONS": "e,f,g",
        "RETINUE_LEADERELECTION__MAX_OBSERVERS": "1",
        "RETINUE_LEADERELECTION__MAX_SESSIONS": "2",
    }
    running = start_server(tmp_path_factory.mktemp("server"), "leaderelection", env=env)
    yield running
    assert running.stop() == 0


def grpcurl(server: RunningServer, rpc: str, *messages: dict[str, Any], keep_open: bool = False) -> Any:
    """Runs it with these messages; what it says of the end and of the answers."""
    text = "".join(json.dumps(message) for message in messages)
    command = [str(GRPCURL), "-plaintext", "-max-time", "200", "-d", "@", server.address, f"{SERVICE}/{rpc}"]
    running = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if keep_open:
        assert running.stdin is not None
        running.stdin.write(text)
        running.stdin.flush()
        if rpc != "Campaign":  # of a single request it wants to see the end
            running.stdin.close()
            running.stdin = None
        return running
    out, err = running.communicate(text, timeout=250)
    return out, err


def error(server: RunningServer, rpc: str, *messages: dict[str, Any]) -> str:
    _, err = grpcurl(server, rpc, *messages)
    return str(err)


def start(candidate: str, election: str = "e", **fields: Any) -> dict[str, Any]:
    return {"start": {"electionId": election, "candidateId": candidate, **fields}}


def test_every_documented_error_is_decoded(server: RunningServer) -> None:
    out, _ = grpcurl(server, "TryAcquire", {"electionId": "e", "candidateId": "a", **LONG})
    held = json.loads(out)["leadership"]
    token = {"domain": held["token"]["domain"], "value": held["token"]["value"]}
    stale = {**token, "value": "99"}
    session = held["session_id"]
    standby = grpcurl(server, "Campaign", start("b", **LONG), keep_open=True)
    observer = grpcurl(server, "Observe", {"electionId": "f"}, keep_open=True)
    try:
        other = json.loads(_first_object(standby))["standby"]["session_id"]
        json.loads(_first_object(observer))
        cases = [
            ("INVALID_FIELD", "InvalidArgument", error(server, "Campaign", {"heartbeat": {"sequence": "1"}})),
            ("INVALID_FIELD", "InvalidArgument", error(server, "GetLeader", {"electionId": "no such name"})),
            ("CANDIDATE_EXISTS", "AlreadyExists", error(server, "Campaign", start("b"))),
            ("ELECTION_NOT_FOUND", "NotFound", error(server, "Campaign", start("a", "unknown"))),
            ("ELECTION_LIMIT", "ResourceExhausted", error(server, "Campaign", start("z"))),
            ("OBSERVER_LIMIT", "ResourceExhausted", error(server, "Observe", {"electionId": "g"})),
            ("SESSION_NOT_FOUND", "NotFound", error(server, "Renew", {"sessionId": "0" * 32, "token": token})),
            ("STALE_TOKEN", "FailedPrecondition", error(server, "Renew", {"sessionId": session, "token": stale})),
            ("STALE_TOKEN", "FailedPrecondition", error(server, "VerifyToken", {"electionId": "e", "token": stale})),
            (
                "TOKEN_DOMAIN_MISMATCH",
                "FailedPrecondition",
                error(server, "VerifyToken", {"electionId": "e", "token": {**token, "domain": "other"}}),
            ),
            ("SESSION_MISMATCH", "PermissionDenied", error(server, "Resign", {"sessionId": other, "token": token})),
            ("ROLE_REQUIRED", "PermissionDenied", error(server, "RequestStepDown", {"electionId": "e"})),
            (
                "PAGE_TOKEN_EXPIRED",
                "OutOfRange",
                error(server, "ListTerms", {"electionId": "e", "pageToken": _others()}),
            ),
        ]
        for reason, code, told in cases:
            assert f"Code: {code}" in told, (reason, told)
            assert f'"reason":"{reason}"' in told.replace(" ", ""), (reason, told)
            assert '"domain":"retinue"' in told.replace(" ", ""), (reason, told)
    finally:
        for running in (standby, observer):
            running.kill()
            running.communicate()


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[RunningServer]:
    """A server that takes any number of sessions."""
    running = start_server(tmp_path, "leaderelection")
    yield running
    assert running.stop() == 0


def test_a_session_that_is_resumed_elsewhere_is_told_so(roomy: RunningServer) -> None:
    server = roomy
    first = grpcurl(server, "Campaign", start("c", "g", liveness="LIVENESS_STREAM"), keep_open=True)
    elected = json.loads(_first_object(first))
    session = (elected.get("elected") or elected["standby"])["session_id"]
    second = grpcurl(server, "Campaign", start("c", "g", liveness="LIVENESS_STREAM", sessionId=session), keep_open=True)
    try:
        json.loads(_first_object(second))
        _, told = first.communicate(timeout=60)
        assert "Code: Aborted" in told
        assert '"reason":"SESSION_RESUMED"' in told.replace(" ", "")
    finally:
        for running in (first, second):
            running.kill()
            running.communicate()


def _first_object(running: subprocess.Popen[str]) -> str:
    """The first answer that it prints."""
    assert running.stdout is not None
    text = ""
    for line in running.stdout:
        text += line
        if line == "}\n":
            return text
    raise AssertionError(f"it ended: {running.stderr.read() if running.stderr else ''}")


def _others() -> str:
    """A page token of another list."""
    import base64  # noqa: PLC0415 - here alone

    return base64.urlsafe_b64encode(b'["elections",1,"x"]').rstrip(b"=").decode()
