"""The `retinue` command against a real server."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from servers import RunningServer, environment
from workers import PATIENCE, Work, retinue, rows

if TYPE_CHECKING:
    pass


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A queue of the test's own."""
    return str(request.node.name)[:120]


def run(server: RunningServer, *args: str, **options: Any) -> list[dict[str, Any]]:
    return rows(retinue(server, *args, **options))


def refused(server: RunningServer, *args: str, **options: Any) -> tuple[int, str]:
    done = retinue(server, *args, **options)
    return done.returncode, done.stderr.decode()


def test_help_is_quick_and_loads_neither_grpc_nor_rich() -> None:
    program = (
        "import sys; sys.argv = ['retinue', '--help']\n"
        "from retinue.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = [name for name in ('grpc', 'rich', 'asyncio', 'google.protobuf') if name in sys.modules]\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"retinue queue enqueue greetings hello" in done.stdout


def test_the_client_loads_no_command_line_and_no_telemetry() -> None:
    program = (
        "import sys\nimport retinue.client.sync, retinue.client.runner\n"
        "heavy = [name for name in sys.modules if name.split('.')[0] in ('click', 'rich', 'opentelemetry')]\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    "command",
    [
        "queue",
        "queue enqueue",
        "queue tasks",
        "queue redrive",
        "queue create",
        "work",
        "blob",
        "blob get",
        "call",
        "status",
    ],
)
def test_every_command_explains_itself(server: RunningServer, command: str) -> None:
    done = retinue(server, *command.split(), "--help")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"Usage: retinue " + command.encode())


def test_a_task_goes_in_is_seen_and_waited_for(server: RunningServer, name: str, tmp_path: Path) -> None:
    [task] = run(server, "queue", "enqueue", name, "héllo", "--label", "k=v", "--priority", "3", "--type", "greeting")
    [seen] = run(server, "queue", "tasks", name, "--label", "k=v", "--state", "ready")
    assert (seen["task_id"], seen["priority"], seen["task_type"]) == (task["task_id"], 3, "greeting")
    work = Work(server, tmp_path, name, "--exit-when-empty", "--", "cat")
    [done] = run(server, "queue", "wait", task["task_id"], "--for", "20s")
    assert (done["state"], done["result"]) == ("succeeded", {"text": "héllo"})
    assert work.ended() == 0
    assert work.events[-1]["succeeded"] == 1
    work.close()
    [counts] = run(server, "queue", "stats", name)
    assert (counts["succeeded"], counts["ready"]) == (1, 0)
    assert name in [row["queue"] for row in run(server, "queue", "ls")]


def test_input_comes_from_standard_input_files_and_json(server: RunningServer, name: str, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "large.txt").write_text("x" * 300_000)

    def sent(*args: str, stdin: bytes = b"") -> dict[str, Any]:
        [task] = run(server, "queue", "enqueue", name, *args, stdin=stdin)
        [found] = run(server, "queue", "get", task["task_id"])
        return dict(found.get("input", {}))

    assert sent("-", stdin=b"from a pipe") == {"text": "from a pipe"}
    assert sent(f"@{tmp_path / 'cat.png'}") == {"data": "iVBOR/8=", "content_type": "image/png"}
    assert sent('{"a": [1, null]}', "--json") == {"json": {"a": [1.0, None]}}
    assert sent("--file", str(tmp_path / "large.txt"))["blob"]["size_bytes"] == 300_000
    assert sent() == {}


def test_a_directory_becomes_one_task_per_file_and_repeating_it_adds_none(
    server: RunningServer, name: str, tmp_path: Path
) -> None:
    for number in range(700):
        path = tmp_path / f"in/{number % 7}/{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    (tmp_path / "in/large.bin").write_bytes(bytes(1_000_000))
    first = run(server, "queue", "enqueue", name, "--from-dir", str(tmp_path / "in"), "--key", "import-")
    again = run(server, "queue", "enqueue", name, "--from-dir", str(tmp_path / "in"), "--key", "import-")
    assert len(first) == len(again) == 701
    assert {row["existing"] for row in first} == {False}
    assert {row["existing"] for row in again} == {True}
    assert {row["path"]: row["task_id"] for row in first} == {row["path"]: row["task_id"] for row in again}
    [one] = run(server, "queue", "tasks", name, "--label", "path=3/10.txt")
    assert one["labels"] == {"path": "3/10.txt"}


def test_operators_pause_and_resume_over_the_control_socket(server: RunningServer, name: str) -> None:
    run(server, "queue", "create", name, "--lease", "10s", "--max-attempts", "2", "--max-tasks", "5")
    [queue] = run(server, "queue", "update", name, "--attempt", "1m")
    assert queue["settings"]["lease_duration"] == "10s"
    assert queue["settings"]["attempt_duration"] == "60s"
    assert [row["state"] for row in run(server, "queue", "pause", name)] == ["paused"]
    assert [row["state"] for row in run(server, "queue", "drain", name)] == ["draining"]
    code, message = refused(server, "queue", "enqueue", name, "x")
    assert (code, "QUEUE_DRAINING" in message) == (4, True)
    assert [row["state"] for row in run(server, "queue", "resume", name)] == ["active"]


def test_dead_tasks_are_redriven_and_waiting_ones_cancelled(server: RunningServer, name: str, tmp_path: Path) -> None:
    run(server, "queue", "enqueue", name, "x", "--task-id", f"{name}-1")
    work = Work(server, tmp_path, name, "--exit-when-empty", "--", "sh", "-c", "echo broken >&2; exit 65")
    assert work.ended() == 0
    work.close()
    done = retinue(server, "queue", "wait", f"{name}-1")
    assert done.returncode == 4
    assert json.loads(done.stdout)["last_failure"]["message"] == "broken"
    assert run(server, "queue", "redrive", "--queue", name, "--dry-run")[0]["count"] == 1
    assert run(server, "queue", "redrive", "--queue", name)[0]["count"] == 1
    code, _ = refused(server, "queue", "redrive", f"{name}-1")
    assert code == 4, "it is ready already"
    run(server, "queue", "reschedule", f"{name}-1", "--delay", "1h", "--priority", "7")
    assert run(server, "queue", "get", f"{name}-1")[0]["state"] == "scheduled"
    assert retinue(server, "queue", "wait", f"{name}-1", "--for", "0.1").returncode == 5
    assert run(server, "queue", "cancel", f"{name}-1")[0]["count"] == 1
    assert refused(server, "queue", "delete", name)[0] == 4
    assert run(server, "queue", "purge", name, "--finished")[0]["deleted_tasks"] == 1
    run(server, "queue", "delete", name)


def test_watch_tells_what_happens(server: RunningServer, name: str) -> None:
    env = environment(RETINUE_ADDRESS=server.address)
    command = [sys.executable, "-m", "retinue.cli", "queue", "watch", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as watching:
        assert watching.stdout is not None
        end, line = time.monotonic() + PATIENCE, b""
        os.set_blocking(watching.stdout.fileno(), False)
        while not line and time.monotonic() < end:  # the watch says nothing before the first event
            run(server, "queue", "enqueue", name, "x")
            line = watching.stdout.readline()
        watching.kill()
    event = json.loads(line)
    assert (event["type"], event["queue_id"]) == ("enqueued", name)


def test_blobs_go_up_and_come_back(server: RunningServer, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 3
    [kept] = run(server, "blob", "put", "-", stdin=content)
    assert kept["size_bytes"] == len(content)
    assert retinue(server, "blob", "get", kept["blob_id"]).stdout == content
    run(server, "blob", "get", kept["blob_id"], str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert run(server, "blob", "stat", kept["blob_id"])[0]["size_bytes"] == len(content)
    assert refused(server, "blob", "stat", "0" * 64)[0] == 4
    assert refused(server, "blob", "get", "0" * 64, str(tmp_path / "none"))[0] == 4
    assert not (tmp_path / "none").exists()


def test_call_needs_nothing_but_reflection(server: RunningServer, name: str) -> None:
    listed = retinue(server, "call").stdout.decode().split()
    assert "retinue.workqueue.v1.WorkQueueService" in listed
    assert "(stream UploadBlobRequest) -> UploadBlobResponse" in retinue(server, "call", "BlobService").stdout.decode()
    request = json.dumps({"tasks": [{"queue_id": name, "input": {"json": {"a": 1}}, "delay_duration": "3600s"}]})
    [answer] = run(server, "call", "WorkQueueService/EnqueueTasks", request)
    [found] = run(
        server,
        "call",
        "retinue.workqueue.v1.WorkQueueService/GetTask",
        "-",
        stdin=json.dumps(answer["results"][0]).encode(),
    )
    assert found["task"]["spec"]["input"] == {"json": {"a": 1.0}}
    [kept] = run(server, "call", "BlobService/UploadBlob", stdin=b'{"size_bytes": 5}\n{"data": "aGVsbG8="}\n')
    [piece] = run(server, "call", "BlobService/DownloadBlob", json.dumps({"blob_id": kept["blob_id"]}))
    assert piece == {"data": "aGVsbG8="}
    opened = b'{"open": {"queue_id": "q", "worker_id": "w"}, "extend_all": true, "sequence": 7}\n'
    assert run(server, "call", "WorkQueueService/StreamTasks", stdin=opened) == [{"settled": {"sequence": "7"}}]


def test_call_as_operator_dials_the_control_socket(server: RunningServer, name: str) -> None:
    run(server, "queue", "create", name)
    request = json.dumps({"queue_id": name})
    code, message = refused(server, "call", "WorkQueueAdminService/PauseQueue", request)
    assert (code, "ROLE_REQUIRED" in message) == (4, True)
    [answer] = run(server, "call", "--control", "WorkQueueAdminService/PauseQueue", request)
    assert answer["queue"]["state"] == "QUEUE_STATE_PAUSED"


def test_refusals_name_every_violation_and_what_to_do(server: RunningServer) -> None:
    request = json.dumps({"tasks": [{"queue_id": "-", "priority": 5000}]})
    code, message = refused(server, "call", "WorkQueueService/EnqueueTasks", request)
    assert code == 4
    assert "tasks[0].queue_id" in message
    assert "tasks[0].priority" in message
    code, message = refused(server, "queue", "get", "nothing")
    assert (code, "TASK_NOT_FOUND" in message, "to do" in message) == (4, True, True)


@pytest.mark.parametrize(
    "args",
    [
        ("queue", "enqueue"),
        ("queue", "enqueue", "q", "{", "--json"),
        ("queue", "enqueue", "q", "x", "--label", "novalue"),
        ("queue", "enqueue", "q", "x", "--delay", "soon"),
        ("queue", "cancel"),
        ("queue", "nothing"),
        ("call", "NoSuchService/Method"),
        ("call", "WorkQueueService/NoSuchMethod"),
        ("call", "WorkQueueService/GetTask", '{"nonsense": 1}'),
        ("work", "q", "--exit", "1=perhaps", "--", "true"),
        ("work", "q"),
    ],
)
def test_wrong_usage_ends_with_2(server: RunningServer, args: tuple[str, ...]) -> None:
    code, message = refused(server, *args)
    assert code == 2
    assert message
    assert "Traceback" not in message


@pytest.mark.parametrize("args", ["queue ls", "queue enqueue q x", "status", "call"])
def test_an_unreachable_server_ends_with_3_at_once_and_says_how_to_start_one(tmp_path: Path, args: str) -> None:
    env = environment(RETINUE_ADDRESS=f"unix:{tmp_path}/none.sock")
    command = [sys.executable, "-m", "retinue.cli", *args.split()]
    done = subprocess.run(command, capture_output=True, env=env, timeout=8, check=False)
    assert done.returncode == 3
    assert b"retinue-server" in done.stderr
    assert b"Traceback" not in done.stderr


def test_status_shows_every_service(server: RunningServer) -> None:
    found = run(server, "status")
    assert {row["status"] for row in found} == {"serving"}
    assert "retinue.workqueue.v1.WorkQueueService" in [row["service"] for row in found]


def test_on_a_terminal_answers_are_tables(server: RunningServer, name: str) -> None:
    run(server, "queue", "enqueue", name, "x")
    shown = on_a_terminal(server, "queue", "ls")
    assert "QUEUE" in shown
    assert "{" not in shown
    assert "No such" not in on_a_terminal(server, "queue", "tasks", name)


def test_on_a_terminal_work_shows_one_live_line(server: RunningServer, name: str) -> None:
    run(server, "queue", "enqueue", name, "x")
    run(server, "queue", "enqueue", name, "bad")
    shown = on_a_terminal(
        server, "work", name, "--exit-when-empty", "--", "sh", "-c", "grep -q x || { echo why >&2; exit 65; }"
    )
    assert "1 done" in shown
    assert "1 dead" in shown
    assert "EXIT_65  why" in shown


def on_a_terminal(server: RunningServer, *args: str) -> str:
    """What a command prints to a terminal."""
    ours, theirs = pty.openpty()
    env = environment(RETINUE_ADDRESS=server.address, COLUMNS="200", TERM="xterm")
    command = [sys.executable, "-m", "retinue.cli", *args]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as running:
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 65536):
                shown += data
        except OSError:  # how a terminal ends
            pass
        assert running.wait(PATIENCE) == 0, shown.decode()
    os.close(ours)
    return shown.decode()
