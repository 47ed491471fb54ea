"""`retinue work` against a real server: what commands get, what their end means, and what survives crashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from servers import RunningServer, start_server
from workers import PATIENCE, Work, alive, eventually, pids_in

from retinue.client.queue import duration
from retinue.client.sync import Queue
from retinue.workqueue.v1 import task_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from retinue.workqueue.v1.task_pb2 import Task

MEBI = 1 << 20
SHORT_LEASE = ("--lease", "2s")


@pytest.fixture
def queue(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Queue]:
    name = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name.removeprefix("test_"))[:120]
    with Queue(name, address=server.address) as found:
        yield found


@pytest.fixture
def work(server: RunningServer, queue: Queue, tmp_path: Path) -> Iterator[Callable[..., Work]]:
    started: list[Work] = []

    def start(*args: str, queue_id: str = "", **env: str) -> Work:
        started.append(Work(server, tmp_path, queue_id or queue.queue_id, *args, **env))
        return started[-1]

    yield start
    for one in started:
        one.close()


def script(tmp_path: Path, text: str) -> str:
    """A program in Python; `note(text)` appends a line to tmp_path/notes."""
    path = tmp_path / "program.py"
    notes = f"def note(text):\n    open({str(tmp_path / 'notes')!r}, 'a').write(f'{{text}}\\n')\n"
    path.write_text("import os, signal, subprocess, sys, time\n" + notes + text)
    return str(path)


def finished(queue: Queue, task_id: str, patience: float = PATIENCE) -> Task:
    task: Task = queue.wait(task_id, timeout=patience)
    return task


def test_without_placeholders_input_is_stdin_and_output_is_stdout(queue: Queue, work: Any) -> None:
    task = queue.enqueue("hello")
    work("--", "tr", "a-z", "A-Z")
    assert queue.load(finished(queue, task.task_id).result) == "HELLO"


def test_with_placeholders_the_command_gets_the_paths_of_files(queue: Queue, work: Any) -> None:
    task = queue.enqueue(b"\x00\xffbytes")
    work("--", "cp", "{input}", "{output}")
    assert queue.load(finished(queue, task.task_id).result) == b"\x00\xffbytes"


def test_the_environment_and_task_json_describe_the_attempt(queue: Queue, work: Any, tmp_path: Path) -> None:
    program = script(
        tmp_path,
        "import json\n"
        "keep = {k: v for k, v in os.environ.items() if k.startswith(('RETINUE_', 'WORK_ITEM', 'TRACEPARENT'))}\n"
        "task = json.load(open(os.environ['RETINUE_TASK_FILE']))\n"
        "same = open(os.environ['WORK_ITEM_FILE']).read() == open(os.environ['RETINUE_INPUT_FILE']).read()\n"
        "json.dump([keep, task, same, os.listdir(os.path.dirname(os.environ['RETINUE_OUTPUT_FILE']))],"
        " open(os.environ['RETINUE_OUTPUT_FILE'], 'w'))\n",
    )
    task = queue.enqueue("x", labels={"path": "a/cat.jpg", "k": "v"}, task_type="t")
    sent = queue.get(task.task_id).spec.traceparent
    work("--lease", "20s", "--", sys.executable, program, "{task}")
    env, told, same, before = json.loads(queue.load(finished(queue, task.task_id).result))
    assert env["RETINUE_TASK_ID"] == task.task_id
    assert (env["RETINUE_ATTEMPT"], env["RETINUE_LEASE_DURATION"]) == ("1", "20")
    assert int(env["RETINUE_LEASE_EPOCH"]) == told["lease_epoch"] >= 1
    assert env["WORK_ITEM_FILE"].endswith("/input/cat.jpg")
    assert told["labels"] == {"path": "a/cat.jpg", "k": "v"}
    assert same
    assert before == []
    assert env["TRACEPARENT"].split("-")[1] == sent.split("-")[1], "the trace goes on"
    assert env["TRACEPARENT"] != sent


def test_an_empty_input_gives_an_empty_file(queue: Queue, work: Any) -> None:
    task = queue.enqueue()
    work("--", "wc", "-c")
    assert str(queue.load(finished(queue, task.task_id).result)).strip() == "0"


def test_an_output_that_is_not_utf8_comes_back_as_bytes(queue: Queue, work: Any) -> None:
    task = queue.enqueue("x")
    work("--", "printf", r"caf\351")
    done = finished(queue, task.task_id)
    assert done.result.data == b"caf\xe9"


def test_json_input_is_a_json_file(queue: Queue, work: Any) -> None:
    task = queue.enqueue({"n": 3, "text": "ö", "big": 2**60})
    work("--", "cat")
    assert json.loads(queue.load(finished(queue, task.task_id).result)) == {"n": 3, "text": "ö", "big": 2**60}


def test_a_20_mib_input_arrives_whole(queue: Queue, work: Any) -> None:
    content = os.urandom(MEBI) * 20
    task = queue.enqueue(content)
    work("--", "sha256sum", "{input}")
    # Its standard output is a log here: the placeholder says where outputs go, and it wrote none.
    done = finished(queue, task.task_id)
    assert done.state == pb.TASK_STATE_SUCCEEDED
    again = queue.enqueue(content)
    done = finished(queue, again.task_id)
    assert done.result.WhichOneof("content") is None


def test_a_5_mb_output_goes_through_the_blob_store(queue: Queue, work: Any) -> None:
    task = queue.enqueue("x")
    work("--", sys.executable, "-c", "import sys; sys.stdout.buffer.write(bytes(range(250)) * 20_000)")
    done = finished(queue, task.task_id)
    assert done.result.blob.size_bytes == 5_000_000
    assert done.result.blob.blob_id == hashlib.sha256(bytes(range(250)) * 20_000).hexdigest()
    assert queue.load(done.result) == bytes(range(250)) * 20_000


@pytest.mark.parametrize(
    ("code", "state", "reason"),
    [
        (65, pb.TASK_STATE_DEAD, "EXIT_65"),
        (75, pb.TASK_STATE_RETRYING, "EXIT_75"),
        (1, pb.TASK_STATE_RETRYING, "EXIT_1"),
        (137, pb.TASK_STATE_RETRYING, "SIGNAL_9"),
    ],
)
def test_an_exit_code_says_what_becomes_of_the_task(
    queue: Queue, work: Any, code: int, state: int, reason: str
) -> None:
    task = queue.enqueue("x", retry=pb.RetryPolicy(max_attempts=5, initial_backoff_duration=duration(600)))
    running = work("--", "sh", "-c", f"echo why >&2; exit {code}")
    running.until("dead" if state == pb.TASK_STATE_DEAD else "retrying")
    found = queue.get(task.task_id)
    # Full jitter may draw a wait near 0: then it is on its next attempt already.
    assert found.state == state or found.attempt > 1
    assert (found.last_failure.reason, found.last_failure.message) == (reason, "why")


def test_exit_99_gives_the_task_back_uncounted(queue: Queue, work: Any, tmp_path: Path) -> None:
    task = queue.enqueue("x")
    running = work("--", "sh", "-c", f"test -e {tmp_path}/second || {{ touch {tmp_path}/second; exit 99; }}")
    running.until("released")
    done = finished(queue, task.task_id)
    assert (done.state, done.attempt) == (pb.TASK_STATE_SUCCEEDED, 1)


def test_exit_codes_can_be_given_another_meaning(queue: Queue, work: Any) -> None:
    task = queue.enqueue("x")
    work("--exit", "3=final", "--", "sh", "-c", "exit 3")
    assert finished(queue, task.task_id).state == pb.TASK_STATE_DEAD


def test_a_command_killed_by_a_signal_is_retried_and_flagged(queue: Queue, work: Any) -> None:
    task = queue.enqueue("x", retry=pb.RetryPolicy(max_attempts=1))
    work("--", "sh", "-c", "kill -9 $$")
    done = finished(queue, task.task_id)
    assert (done.state, done.last_failure.reason) == (pb.TASK_STATE_DEAD, "SIGNAL_9")


def test_the_failure_message_is_the_end_of_standard_error_even_if_it_is_not_utf8(queue: Queue, work: Any) -> None:
    task = queue.enqueue("x")
    program = "import sys; sys.stderr.buffer.write(b'a' * 100_000 + b'\\xff the end'); sys.exit(65)"
    work("--", sys.executable, "-c", program)
    message = finished(queue, task.task_id).last_failure.message
    assert message.endswith("\ufffd the end")
    assert len(message) <= 2048


def test_a_program_that_does_not_exist_is_refused_at_once(server: RunningServer, work: Any) -> None:
    running = work("--", "no-such-program-at-all")
    assert running.ended() == 2
    assert "no such program" in running.log


def test_a_program_that_cannot_be_started_fails_the_attempt(queue: Queue, work: Any, tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    task = queue.enqueue("x", retry=pb.RetryPolicy(max_attempts=1))
    work("--", str(program))
    assert finished(queue, task.task_id).last_failure.reason == "EXEC_FAILED"


def test_a_hanging_command_is_killed_at_the_attempt_deadline(queue: Queue, work: Any, tmp_path: Path) -> None:
    program = f"trap '' TERM; echo $$ >> {tmp_path}/notes; exec sleep 600"
    task = queue.enqueue("x", attempt_duration=4.0, retry=pb.RetryPolicy(max_attempts=1))
    running = work("--kill-grace", "0.5", "--", "sh", "-c", program)
    done = finished(queue, task.task_id)
    assert (done.state, done.last_failure.reason) == (pb.TASK_STATE_DEAD, "ATTEMPT_DEADLINE")
    running.until("dead", "lost")  # its clock and the server's end the attempt at the same moment
    [pid] = pids_in(tmp_path / "notes")
    eventually(lambda: not alive(pid), "the command ends")


def test_a_cancelled_task_ends_its_command_and_the_whole_group(queue: Queue, work: Any, tmp_path: Path) -> None:
    program = script(tmp_path, "note(os.getpid())\nnote(subprocess.Popen(['sleep', '600']).pid)\ntime.sleep(600)\n")
    task = queue.enqueue("x")
    work(*SHORT_LEASE, "--", sys.executable, program)
    eventually(lambda: len(pids_in(tmp_path / "notes")) >= 2, "the command runs")
    assert queue.cancel(task.task_id) == [None]
    assert finished(queue, task.task_id).state == pb.TASK_STATE_CANCELLED
    eventually(lambda: not any(map(alive, pids_in(tmp_path / "notes"))), "the group ends")


def test_then_enqueues_the_output_with_its_labels(queue: Queue, work: Any) -> None:
    second = f"{queue.queue_id}-2"
    task = queue.enqueue("abc", labels={"path": "a.txt"})
    work("--then", second, "--then-label", "stage=2", "--", "tr", "a-z", "A-Z")
    assert finished(queue, task.task_id).state == pb.TASK_STATE_SUCCEEDED
    with Queue(second, address=queue.connection.address) as follow:
        [follow_up] = list(follow.list())
    assert follow_up.parent_task_id == task.task_id
    assert dict(follow_up.spec.labels) == {"path": "a.txt", "stage": "2"}
    assert queue.load(queue.get(follow_up.task_id).spec.input) == "ABC"


def test_then_passes_a_large_output_on_without_a_second_upload(queue: Queue, work: Any) -> None:
    second = f"{queue.queue_id}-2"
    task = queue.enqueue("x")
    work("--then", second, "--", sys.executable, "-c", "print('y' * 1_000_000)")
    work("--", "wc", "-c", queue_id=second)
    first = finished(queue, task.task_id)
    with Queue(second, address=queue.connection.address) as follow:
        [found] = list(follow.list())
        done = finished(follow, found.task_id)
        assert done.spec.input.blob.blob_id == first.result.blob.blob_id
        assert queue.load(done.result).strip() == "1000001"


def test_outputs_are_published_under_their_path(queue: Queue, work: Any, tmp_path: Path) -> None:
    task = queue.enqueue("abc", labels={"path": "deep/er/a.txt"})
    running = work("--output-dir", str(tmp_path / "out"), "--exit-when-empty", "--", "tr", "a-z", "A-Z")
    assert finished(queue, task.task_id).state == pb.TASK_STATE_SUCCEEDED
    assert running.ended() == 0
    assert [
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    ] == ["deep/er/a.txt"]
    assert (tmp_path / "out/deep/er/a.txt").read_text() == "ABC"


@pytest.mark.parametrize("path", ["../escape", "/etc/escape", "link/escape", "..", ".retinue-x/y"])
def test_an_output_path_that_leads_elsewhere_is_refused(queue: Queue, work: Any, tmp_path: Path, path: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/link").symlink_to("/tmp")
    task = queue.enqueue("abc", labels={"path": path})
    work("--output-dir", str(tmp_path / "out"), "--", "cat")
    done = finished(queue, task.task_id)
    assert (done.state, done.last_failure.reason) == (pb.TASK_STATE_DEAD, "OUTPUT_PATH")


def test_an_output_that_is_a_link_is_not_followed(queue: Queue, work: Any) -> None:
    task = queue.enqueue("x")
    work("--", "ln", "-s", "/etc/passwd", "{output}")
    assert finished(queue, task.task_id).last_failure.reason == "OUTPUT_NOT_A_FILE"


def test_attempt_directories_are_gone_after_the_work_and_failed_ones_are_kept_if_asked(queue: Queue, work: Any) -> None:
    good, bad = queue.enqueue("good"), queue.enqueue("bad")
    running = work("--keep-failed", "--exit-when-empty", "--", "sh", "-c", "grep -q good || exit 65")
    assert running.ended() == 0
    assert finished(queue, good.task_id).state == pb.TASK_STATE_SUCCEEDED
    kept = [path.name for path in running.work_dir.iterdir()]
    assert kept == ["failed"]
    [attempt] = (running.work_dir / "failed").iterdir()
    assert attempt.name.startswith(bad.task_id)
    assert (attempt / "input/data").read_text() == "bad"


def test_max_tasks_takes_that_many_and_leaves(queue: Queue, work: Any) -> None:
    for number in range(5):
        queue.enqueue(str(number))
    running = work("--max-tasks", "3", "--concurrency", "2", "--", "cat")
    assert running.ended() == 0
    states = sorted(task.state for task in queue.list())
    assert states == [pb.TASK_STATE_READY] * 2 + [pb.TASK_STATE_SUCCEEDED] * 3


def test_sigterm_lets_running_commands_finish_and_takes_no_more(queue: Queue, work: Any, tmp_path: Path) -> None:
    first, second = queue.enqueue("1"), queue.enqueue("2")
    running = work(
        "--concurrency",
        "1",
        "--",
        "sh",
        "-c",
        f"touch {tmp_path}/began; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done",
    )
    eventually((tmp_path / "began").exists, "the command runs")
    running.signal(signal.SIGTERM)
    time.sleep(0.3)  # whatever it does wrong, it does now
    (tmp_path / "go").touch()
    assert running.ended() == 0
    assert queue.get(first.task_id).state == pb.TASK_STATE_SUCCEEDED
    assert queue.get(second.task_id).state == pb.TASK_STATE_READY


def test_after_the_grace_running_commands_are_killed_and_given_back(queue: Queue, work: Any, tmp_path: Path) -> None:
    program = script(tmp_path, "note(os.getpid())\ntime.sleep(600)\n")
    task = queue.enqueue("x")
    running = work("--grace", "0.5", "--", sys.executable, program)
    eventually(lambda: bool(pids_in(tmp_path / "notes")), "the command runs")
    running.signal(signal.SIGTERM)
    assert running.ended() == 0
    found = queue.get(task.task_id)
    assert (found.state, found.attempt, found.lease_expirations) == (pb.TASK_STATE_READY, 0, 0)
    assert not any(map(alive, pids_in(tmp_path / "notes")))


def test_a_second_signal_ends_at_once_even_a_command_that_ignores_sigterm(
    queue: Queue, work: Any, tmp_path: Path
) -> None:
    program = script(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nnote(os.getpid())\ntime.sleep(600)\n")
    task = queue.enqueue("x")
    running = work("--kill-grace", "300", "--", sys.executable, program)
    eventually(lambda: bool(pids_in(tmp_path / "notes")), "the command runs")

    running.signal(signal.SIGINT)
    running.signal(signal.SIGTERM)  # another, since two at once of one kind are one
    assert running.ended() == 0, "though the grace is not over"
    assert queue.get(task.task_id).state == pb.TASK_STATE_READY
    assert not any(map(alive, pids_in(tmp_path / "notes")))


def test_a_killed_runner_leaves_no_process_no_directory_and_no_output(queue: Queue, work: Any, tmp_path: Path) -> None:
    program = script(
        tmp_path,
        "sys.stdout.write('partial')\nsys.stdout.flush()\nnote(subprocess.Popen(['sleep', '600']).pid)\n"
        "note(os.getpid())\nif os.environ['RETINUE_LEASE_EPOCH'] == '1': time.sleep(600)\n",
    )
    out = tmp_path / "out"
    task = queue.enqueue("x", labels={"path": "result"})
    first = work("--lease", "5s", "--output-dir", str(out), "--", sys.executable, program)
    eventually(lambda: len(pids_in(tmp_path / "notes")) == 2, "the command and its child run")
    first.kill()
    eventually(lambda: not any(map(alive, pids_in(tmp_path / "notes"))), "the whole group ends")
    eventually(lambda: not list(first.work_dir.iterdir()) and not list(out.iterdir()), "the files go")
    work("--lease", "5s", "--output-dir", str(out), "--", sys.executable, program)
    done = finished(queue, task.task_id)
    assert (done.state, done.lease_expirations) == (pb.TASK_STATE_SUCCEEDED, 1)
    assert (out / "result").read_text() == "partial"


def test_a_guard_that_is_killed_is_replaced(queue: Queue, work: Any, tmp_path: Path) -> None:
    running = work("--", "cat")
    running.until("connected")
    [guard] = [
        pid for pid in _children(running.process.pid) if b"guard.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(guard, signal.SIGKILL)
    tasks = [queue.enqueue(str(number)) for number in range(3)]
    assert [queue.load(finished(queue, task.task_id).result) for task in tasks] == ["0", "1", "2"]


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[list[RunningServer]]:
    """A server that the test may kill; the last in the list is ended."""
    (tmp_path / "own").mkdir()
    servers = [start_server(tmp_path / "own")]
    yield servers
    servers[-1].stop()


def test_a_worker_survives_a_killed_server_and_completes_exactly_once(
    own_server: list[RunningServer], tmp_path: Path
) -> None:
    server = own_server[0]
    program = script(
        tmp_path,
        "note(os.environ['RETINUE_TASK_ID'])\n"
        f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.05)\n"
        "print('done')\n",
    )
    with Queue("survivor", address=server.address) as queue:
        task, later = queue.enqueue("x"), queue.enqueue("y")
        running = Work(
            server, tmp_path, "survivor", "--concurrency", "1", "--lease", "60s", "--", sys.executable, program
        )
        try:
            eventually((tmp_path / "notes").exists, "the command runs")
            server.kill()
            running.until("disconnected")
            (tmp_path / "go").touch()  # it finishes while nobody can take its result
            time.sleep(0.5)
            own_server.append(server.restart())
            done = finished(queue, task.task_id)
            assert (done.state, done.attempt, done.lease_epoch) == (pb.TASK_STATE_SUCCEEDED, 1, 1)
            assert queue.load(done.result) == "done\n"
            assert finished(queue, later.task_id).state == pb.TASK_STATE_SUCCEEDED
            assert (tmp_path / "notes").read_text().split() == [task.task_id, later.task_id], "each ran once"
        finally:
            running.close()


def test_a_command_outlives_a_restart_of_the_server_as_long_as_its_lease_may(
    own_server: list[RunningServer], tmp_path: Path
) -> None:
    server = own_server[0]
    program = script(tmp_path, f"note('began')\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.05)\n")
    with Queue("restart", address=server.address) as queue:
        task = queue.enqueue("x")
        running = Work(server, tmp_path, "restart", "--lease", "15s", "--", sys.executable, program)
        try:
            eventually((tmp_path / "notes").exists, "the command runs")
            assert server.stop() == 0
            own_server.append(server.restart())
            running.until("connected")
            running.until("connected")
            time.sleep(15.5)  # longer than the lease: it must have been renewed on the new connection
            (tmp_path / "go").touch()
            done = finished(queue, task.task_id)
            assert (done.state, done.lease_epoch) == (pb.TASK_STATE_SUCCEEDED, 1)
        finally:
            running.close()


def test_a_command_ends_when_its_lease_can_no_longer_be_valid(own_server: list[RunningServer], tmp_path: Path) -> None:
    server = own_server[0]
    program = script(tmp_path, "note(os.getpid())\ntime.sleep(600)\n")
    with Queue("gone", address=server.address) as queue:
        queue.enqueue("x")
        running = Work(server, tmp_path, "gone", "--lease", "2s", "--", sys.executable, program)
        try:
            eventually(lambda: bool(pids_in(tmp_path / "notes")), "the command runs")
            os.kill(server.process.pid, signal.SIGSTOP)
            eventually(lambda: not any(map(alive, pids_in(tmp_path / "notes"))), "the command ends")
            assert running.process.poll() is None, "the runner stays"
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
            running.close()
