"""`make run` as a newcomer meets it: every line that it prints works as printed, and Ctrl-C ends it cleanly."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Running:
    """The suite as `make run` starts it, on free ports."""

    def __init__(self, data_dir: Path) -> None:
        command = [sys.executable, "deploy/local/run.py", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            [*command, "--data-dir", str(data_dir)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.guide: list[str] = []
        for line in self.process.stdout:
            self.guide.append(line.strip())
            if "Ctrl-C" in line:
                break
        assert self.guide, self.process.communicate()[1]

    def interrupt(self) -> int:
        """Ctrl-C on a terminal: the signal goes to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)
        with self.process:
            self.errors = self.process.stderr.read() if self.process.stderr else ""
        return self.process.returncode


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path / "state")
    with running.process:
        yield running
        if running.process.poll() is None:
            running.interrupt()


def environment(suite: Running) -> dict[str, str]:
    """What a person on the default addresses does not have to set."""
    listen = next(word for line in suite.guide for word in line.split() if word.startswith("127.0.0.1:"))
    control = next(word for line in suite.guide for word in line.split() if word.endswith("control.sock"))
    return {**os.environ, "RETINUE_ADDRESS": listen, "RETINUE_CONTROL_ADDRESS": f"unix:{(ROOT / control).resolve()}"}


def printed(suite: Running) -> list[str]:
    """The lines to copy."""
    return [line for line in suite.guide if line and not line.startswith(("#", "http://"))]


def campaigns(suite: Running) -> list[str]:
    """Those that stay until they are interrupted."""
    return [line for line in printed(suite) if "LIVENESS_STREAM" in line]


class Terminal:
    """A printed line that stays, in a terminal of its own."""

    def __init__(self, suite: Running, line: str) -> None:
        self._process = subprocess.Popen(  # what a background job starts ignores Ctrl-C, unless told otherwise
            ["env", "--default-signal=INT", "bash", "-c", f"exec {line}"],
            cwd=ROOT,
            env=environment(suite),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def token(self) -> int:
        """The token under which it leads, once it does."""
        assert self._process.stdout is not None
        said = ""
        for line in self._process.stdout:
            said += line
            if found := re.search(r'"elected".*"value": "(\d+)"', said, re.DOTALL):
                return int(found[1])
        raise AssertionError(said)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=60)


def test_of_the_two_printed_campaigns_the_second_leads_when_the_first_is_interrupted(suite: Running) -> None:
    first_line, second_line = campaigns(suite)
    first = Terminal(suite, first_line)
    one = first.token()
    second = Terminal(suite, second_line)
    first.interrupt()
    assert second.token() > one
    second.interrupt()


def test_every_printed_line_works_as_printed(suite: Running) -> None:
    lines = [line for line in printed(suite) if line not in campaigns(suite)]
    assert len(lines) >= 12
    script = "set -eo pipefail\n" + "\n".join(lines)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=environment(suite),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"status"' not in done.stdout.partition('"upstream"')[0], "the completion was accepted"
    assert '"state": "UPSTREAM_STATE_ACTIVE"' in done.stdout, "the upstream is served"
    assert re.search(r'"coverage": {\s+"expected": "2",\s+"answered": "1"\s+}', done.stdout), "a leaf is missing"
    assert re.search(r'"failures": \[\s+{\s+"shard_id": "gone",\s+"code": 14,', done.stdout), "and named"
    assert "ERROR" not in done.stderr


def test_ctrl_c_ends_it_cleanly(suite: Running) -> None:
    assert suite.interrupt() == 0
    assert "Traceback" not in suite.errors


def test_a_taken_port_is_answered_with_its_owner(suite: Running, tmp_path: Path) -> None:
    listen = environment(suite)["RETINUE_ADDRESS"]
    second = subprocess.run(
        [sys.executable, "-m", "retinue_server", "--listen", listen, "--http", "none", "--data-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert second.returncode == 1
    assert "pid" in second.stderr, second.stderr
    assert "Traceback" not in second.stderr
