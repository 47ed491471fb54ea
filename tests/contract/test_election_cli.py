"""`retinue elect` and `retinue election` against a real server."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import workers
from elections import Elect, alive, await_life, check_lives, lives
from servers import RunningServer, environment, start_server
from workers import eventually, pids_in, retinue, rows

Start = Callable[..., Elect]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = start_server(tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An election of the test's own."""
    return "".join(c if c.isalnum() else "-" for c in str(request.node.name))[:100]


@pytest.fixture
def elect(server: RunningServer, name: str, tmp_path: Path) -> Iterator[Start]:
    """Starts `retinue elect`; whatever still runs is ended after the test."""
    started: list[Elect] = []

    def start(*args: str, **options: Any) -> Elect:
        started.append(Elect(server, name, *args, cwd=tmp_path, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def run(server: RunningServer, *args: str, **options: Any) -> list[dict[str, Any]]:
    return rows(retinue(server, *args, **options))


def history(server: RunningServer, name: str) -> list[dict[str, Any]]:
    return run(server, "election", "history", name)


# elect


def test_the_command_has_the_token_and_its_exit_code_is_ours(server: RunningServer, name: str) -> None:
    program = "cat; echo $RETINUE_ELECTION_ID $RETINUE_ELECTION_TOKEN $RETINUE_ELECTION_TOKEN_DOMAIN; exit 7"
    done = retinue(server, "elect", name, "--", "sh", "-c", program, stdin=b"from a pipe\n")
    assert done.returncode == 7
    first, second = done.stdout.decode().splitlines()
    assert first == "from a pipe"
    [term] = history(server, name)
    assert second.split() == [name, str(term["token"]), term["domain"]]
    assert term["end_reason"] == "resigned"
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert events == ["connected", "elected", "resigned"]
    assert retinue(server, "elect", name, "--quiet", "--", "true").stderr == b""
    assert [term["token"] for term in history(server, name)] == [2, 1]


def test_a_command_that_a_signal_ended_has_the_shells_code(server: RunningServer, name: str) -> None:
    assert retinue(server, "elect", name, "--", "sh", "-c", "kill -9 $$").returncode == 137


def test_the_next_takes_over_when_the_command_ends(elect: Start, tmp_path: Path) -> None:
    first = elect("--", *alive(tmp_path / "lives"))
    now = await_life(tmp_path / "lives", 0)
    second = elect("--", *alive(tmp_path / "lives"))
    assert second.until("standby")["leader"] == first.until("elected")["candidate_id"]
    os.kill(now.pid, signal.SIGTERM)
    assert first.ended() == 143
    await_life(tmp_path / "lives", now.token)
    check_lives(lives(tmp_path / "lives"))


def test_signals_go_to_the_command(elect: Start, tmp_path: Path) -> None:
    program = f"trap 'echo usr >> {tmp_path}/said' USR1; trap 'echo term >> {tmp_path}/said; exit 3' TERM; "
    running = elect("--", "sh", "-c", program + f"echo up >> {tmp_path}/said; while :; do sleep 0.05; done")
    said = tmp_path / "said"
    eventually(lambda: said.exists() and "up" in said.read_text(), "the command is up")
    running.send(signal.SIGUSR1)
    eventually(lambda: "usr" in said.read_text(), "it got SIGUSR1")
    running.send(signal.SIGTERM)
    assert running.ended() == 3
    assert said.read_text().split() == ["up", "usr", "term"]
    running.until("resigned")


def test_a_signal_ends_who_stands_by(elect: Start, tmp_path: Path) -> None:
    elect("--", "sleep", "600").until("elected")
    waiting = elect("--", "touch", str(tmp_path / "ran"))
    waiting.until("standby")
    waiting.send(signal.SIGTERM)
    assert waiting.ended() == 143
    assert not (tmp_path / "ran").exists()


def test_no_wait_gives_up_if_somebody_leads(server: RunningServer, elect: Start, name: str) -> None:
    elect("--candidate", "one", "--", "sleep", "600").until("elected")
    done = retinue(server, "elect", name, "--no-wait", "--", "true")
    assert done.returncode == 75
    assert b"one leads" in done.stderr
    eventually(lambda: retinue(server, "elect", "free", "--no-wait", "--", "true").returncode == 0, "a vacant one")


def test_who_is_asked_to_step_down_ends_its_command_and_stands_by_behind_others(
    server: RunningServer, elect: Start, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "lives"
    first = elect("--candidate", "first", "--", *alive(file))
    now = await_life(file, 0)
    elect("--candidate", "second", "--", *alive(file)).until("standby")
    run(server, "election", "step-down", name)
    assert first.until("lost")["reason"] == "STEP_DOWN_REQUESTED"
    await_life(file, now.token)
    assert [term["candidate_id"] for term in history(server, name)] == ["second", "first"]
    assert history(server, name)[1]["end_reason"] == "stepped_down"
    first.until("standby")
    check_lives(lives(file))


def test_once_ends_when_leadership_is_lost(server: RunningServer, elect: Start, name: str) -> None:
    running = elect("--once", "--", "sleep", "600")
    running.until("elected")
    run(server, "election", "step-down", name)
    assert running.ended() == 75


def test_a_command_that_ignores_sigterm_is_killed_with_its_children(
    server: RunningServer, elect: Start, name: str, tmp_path: Path
) -> None:
    program = f"trap '' TERM; sleep 600 & echo $$ $! > {tmp_path}/pids; wait; while :; do sleep 1; done"
    running = elect("--grace", "0.3s", "--once", "--", "sh", "-c", program)
    eventually(lambda: len(pids_in(tmp_path / "pids")) == 2, "the command is up")
    run(server, "election", "step-down", name)
    assert running.ended() == 75
    for pid in pids_in(tmp_path / "pids"):
        eventually(lambda pid=pid: not workers.alive(pid), "it is dead")


def test_a_killed_elect_takes_its_command_along_and_the_proof_of_it_passes_the_election_on(
    server: RunningServer, elect: Start, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "lives"
    first = elect("--app-lease", "300s", "--lease", "600s", "--", *alive(file))
    now = await_life(file, 0)
    second = elect("--app-lease", "300s", "--lease", "600s", "--", *alive(file))
    second.until("standby")
    first.process.kill()
    later = await_life(file, now.token)
    assert later.token == now.token + 1
    assert history(server, name)[1]["end_reason"] == "app_dead"
    check_lives(lives(file))


def test_a_stopped_elect_has_no_command_when_the_next_one_leads(
    server: RunningServer, elect: Start, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "lives"
    first = elect("--app-lease", "3s", "--", *alive(file))
    now = await_life(file, 0)
    elect("--app-lease", "3s", "--", *alive(file)).until("standby")
    first.send(signal.SIGSTOP)
    later = await_life(file, now.token)
    assert not workers.alive(now.pid), "the guard has kept the deadline"
    first.send(signal.SIGCONT)
    first.until("standby")
    eventually(lambda: lives(file)[-1].end > later.end, "the second goes on")
    check_lives(lives(file))
    assert history(server, name)[1]["end_reason"] == "app_silent"


def test_a_server_that_hangs_ends_the_command_before_the_deadline(tmp_path: Path, name: str) -> None:
    running = start_server(tmp_path)
    file = tmp_path / "lives"
    leader = Elect(running, name, "--app-lease", "3s", "--", *alive(file), cwd=tmp_path)
    try:
        now = await_life(file, 0)
        running.process.send_signal(signal.SIGSTOP)
        assert leader.until("lost")["reason"] == "DEADLINE"
        eventually(lambda: not workers.alive(now.pid), "it is dead")
        running.process.send_signal(signal.SIGCONT)
        await_life(file, now.token)
        check_lives(lives(file))
    finally:
        leader.close()
        running.kill()


@pytest.mark.parametrize(
    "args", [("--", "no-such-program"), (), ("--kill-grace", "3s", "--", "true"), ("--app-lease", "soon", "--", "true")]
)
def test_wrong_usage_ends_with_2(server: RunningServer, name: str, args: tuple[str, ...]) -> None:
    done = retinue(server, "elect", name, *args)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_what_the_server_refuses_ends_with_4_and_says_why(server: RunningServer) -> None:
    done = retinue(server, "elect", "not a name", "--", "true")
    assert done.returncode == 4
    assert b"election_id" in done.stderr
    assert b"Traceback" not in done.stderr


# election


@pytest.mark.parametrize(
    "command", ["elect", "election", *(f"election {one}" for one in ("ls", "leader", "check", "watch", "history"))]
)
def test_every_command_explains_itself(server: RunningServer, command: str) -> None:
    done = retinue(server, *command.split(), "--help")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"Usage: retinue " + command.encode())


def test_who_leads_is_told_to_people_and_to_shells(server: RunningServer, elect: Start, name: str) -> None:
    [vacant] = run(server, "election", "leader", name)
    assert vacant == {"election_id": name, "state": "vacant"}
    assert retinue(server, "election", "check", name).returncode == 1
    assert retinue(server, "election", "leader", name, "--value").returncode == 1
    elect("--candidate", "me", "--value", "10.0.0.1:5432", "--", "sleep", "600").until("elected")
    [leader] = run(server, "election", "leader", name)
    assert (leader["state"], leader["candidate_id"], leader["token"]) == ("leads", "me", 1)
    assert retinue(server, "election", "leader", name, "--value").stdout == b"10.0.0.1:5432\n"
    assert retinue(server, "election", "check", name).returncode == 0
    assert retinue(server, "election", "check", name, "--candidate", "me").returncode == 0
    assert retinue(server, "election", "check", name, "--candidate", "you").returncode == 1
    assert leader["candidate_id"] in [row.get("candidate_id") for row in run(server, "election", "ls")]


def test_watching_shows_the_leader_and_each_change(server: RunningServer, elect: Start, name: str) -> None:
    command = [sys.executable, "-m", "retinue.cli", "election", "watch", name]
    env = environment(RETINUE_ADDRESS=server.address)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["state"] == "vacant"
        running = elect("--candidate", "me", "--", "sleep", "600")
        assert json.loads(watching.stdout.readline())["candidate_id"] == "me"
        running.send(signal.SIGTERM)
        assert json.loads(watching.stdout.readline())["state"] == "vacant"
        watching.terminate()


def test_stepping_down_is_for_operators(server: RunningServer, elect: Start, name: str) -> None:
    elect("--", "sleep", "600").until("elected")
    done = retinue(server, "election", "step-down", name, "--address", server.address)
    assert done.returncode == 4
    assert b"ROLE_REQUIRED" in done.stderr
    done = retinue(server, "election", "step-down", name, "--token", "7")
    assert done.returncode == 4
    assert b"STALE_TOKEN" in done.stderr
    assert retinue(server, "election", "step-down", "nobody-leads-this").returncode == 1


def test_an_unreachable_server_ends_with_3_and_says_where_it_looked(tmp_path: Path) -> None:
    for args in ("election ls", "election check x", "elect x --no-wait -- true"):
        env = environment(RETINUE_LEADERELECTION_ADDRESS=f"unix:{tmp_path}/none.sock")
        command = [sys.executable, "-m", "retinue.cli", *args.split()]
        done = subprocess.run(command, capture_output=True, env=env, timeout=60, check=False)
        assert done.returncode == 3, args
        assert b"none.sock" in done.stderr
        assert b"Traceback" not in done.stderr


def test_on_a_terminal_answers_are_tables(server: RunningServer, elect: Start, name: str) -> None:
    elect("--candidate", "me", "--", "sleep", "600").until("elected")
    ours, theirs = pty.openpty()
    env = environment(RETINUE_ADDRESS=server.address, COLUMNS="200", TERM="xterm")
    command = [sys.executable, "-m", "retinue.cli", "election", "history", name]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as running:
        os.close(theirs)
        assert running.wait(workers.PATIENCE) == 0
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "CANDIDATE ID" in shown
    assert "{" not in shown
