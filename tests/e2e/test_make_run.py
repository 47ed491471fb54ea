"""`make run` as a newcomer meets it: every line that it prints works as printed, and Ctrl-C ends it cleanly."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile
from pathlib import Path

import pytest
from support.upstreams import envoy_or_skip

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(300)  # there are many lines


class Running:
    """The suite as `make run` starts it, on free ports."""

    def __init__(self, data_dir: Path, data_plane: str) -> None:
        command = [sys.executable, "deploy/local/run.py", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            [*command, "--data-dir", str(data_dir)],
            cwd=ROOT,
            env={**os.environ, "RETINUE_AMBASSADOR__DATA_PLANE": data_plane},
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


@contextmanager
def started(data_dir: Path, data_plane: str) -> Iterator[Running]:
    running = Running(data_dir, data_plane)
    with running.process:
        yield running
        if running.process.poll() is None:
            running.interrupt()


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[Running]:
    with started(tmp_path / "state", "native") as running:
        yield running


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


def run_all(suite: Running) -> str:
    """What the printed lines say that do not stay, as one script; none of them fails, and nothing of theirs is left."""
    lines = [line for line in printed(suite) if line not in campaigns(suite)]
    assert len(lines) >= 12
    script = "set -eo pipefail\ntrap 'kill $SERVERS 2>/dev/null || true' EXIT\n" + "\n".join(lines)
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
    assert "ERROR" not in done.stderr
    return done.stdout


def pages(said: str) -> list[Counter[str]]:
    """How often each server answered, for each time that the ports of the ambassador were asked."""
    runs = re.findall(r"(?:^ +\d+ from \d+\n)+", said, re.MULTILINE)
    return [Counter({page: int(n) for n, page in re.findall(r"(\d+) from (\d+)", run)}) for run in runs]


def test_every_printed_line_works_as_printed_and_without_envoy_connections_are_split(suite: Running) -> None:
    assert_said_of_the_others(said := run_all(suite))
    before, after = pages(said)
    assert (len(before), before.total()) == (3, 12)
    assert sorted(after.values()) == [10, 20, 20]
    assert_told(said, "native", 62)


def test_every_printed_line_works_as_printed_and_with_envoy_requests_are_split(tmp_path: Path) -> None:
    envoy_or_skip()
    with started(tmp_path / "state", "envoy") as suite:
        assert_said_of_the_others(said := run_all(suite))
        before, after = pages(said)
        assert (len(before), before.total()) == (3, 12)
        assert after.total() == 50
        (new,) = (set(re.findall(r"for n in \d+ \d+ (\d+);", line)) for line in suite.guide if "http.server" in line)
        assert 1 <= after[new.pop()] <= 25, "a fifth, by chance"
        assert_told(said, "envoy_child", 50)


def test_what_envoy_would_add_is_said_where_there_is_none_and_only_there(suite: Running, tmp_path: Path) -> None:
    envoy_or_skip()
    with started(tmp_path / "with", "auto") as other:
        assert not any("pip install" in line for line in other.guide)
    said = " ".join(line for line in suite.guide if line.startswith("#"))
    assert "Envoy adds HTTP, gRPC and Redis" in said
    assert "pip install 'retinue-server[envoy]'" in said


def assert_said_of_the_others(said: str) -> None:
    """What the lines of the other patterns must say."""
    assert '"status"' not in said.partition('"upstream"')[0], "the completion was accepted"
    assert re.search(r'"coverage": {\s+"expected": "2",\s+"answered": "1"\s+}', said), "a leaf is missing"
    assert re.search(r'"failures": \[\s+{\s+"shard_id": "gone",\s+"code": 14,', said), "and named"


def assert_told(said: str, data_plane: str, requests: int) -> None:
    """What is served, counted and drained, as the printed lines show it."""
    assert '"state": "UPSTREAM_STATE_ACTIVE"' in said, "the upstream is served"
    rows = [json.loads(line) for line in said.splitlines() if line.startswith('{"upstream_id": "web"')]
    (listed, counted, removed) = rows
    assert (listed["state"], listed["endpoints"], listed["data_plane"]) == ("active", 3, data_plane)
    assert counted["requests"] >= requests
    assert '"state": "UPSTREAM_STATE_DRAINING"' in said
    assert removed["removed"] is True


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


# The adapter


@pytest.fixture(autouse=True)
def _metrics_at_a_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINUE_METRICS", "127.0.0.1:0")


@pytest.fixture
def without_redis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that has all that this one has, but Redis."""
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).glob("*"):
            link = tmp_path / program.name
            if not program.name.startswith("redis-") and not link.is_symlink():
                link.symlink_to(program.absolute())
    monkeypatch.setenv("PATH", str(tmp_path))


def run_those_of_the_adapter(suite: Running) -> str:
    """What they say; none of them fails, and the app that they start is gone."""
    lines = list(dropwhile(lambda line: not line.startswith("# The adapter"), suite.guide))
    lines = [line for line in lines if not line.startswith("http://")]
    script = "set -eo pipefail\ntrap 'kill $SERVERS 2>/dev/null || true' EXIT\n" + "\n".join(lines)
    words = ["bash", "-c", script]
    done = subprocess.run(
        words, cwd=ROOT, env=environment(suite), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_printed_lines_watch_the_golden_signals_of_a_redis_whose_end_is_told(suite: Running) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server: apt-get install redis-server")
    said = run_those_of_the_adapter(suite)
    assert '"state": "TARGET_STATE_UP"' in said
    rates = [
        float(rate) for rate in re.findall(r'"kind": "SIGNAL_KIND_REQUESTS",\s+"number": \S+\s+"rate": (\S+),', said)
    ]
    assert max(rates) > 1, "Redis is asked for more than what it says of itself"
    assert "which cannot be added up to a histogram" in said, "why there is no duration"
    assert_told_to_prometheus(said, "redis", {"requests", "errors", "saturation"}, errors=1)


def test_the_printed_lines_need_no_redis(without_redis: None, suite: Running) -> None:
    said = run_those_of_the_adapter(suite)
    assert re.search(r'"kind": "SIGNAL_KIND_DURATION",\s+"histogram"', said)
    assert_told_to_prometheus(said, "prometheus", {"requests", "errors", "request_duration", "saturation"}, errors=0)


def assert_told_to_prometheus(said: str, kind: str, signals: set[str], errors: int) -> None:
    """What the pages have, and that the app's end is seen."""
    lines = re.findall(r"^app_([a-z_]+?)(?:_total|_seconds\w*|_ratio)\{(.*)\} (\S+)$", said, re.MULTILINE)
    assert {name for name, _, _ in lines} == signals
    assert all(f'kind="{kind}"' in labels and 'target="cache"' in labels for _, labels, _ in lines)
    assert [float(value) for name, _, value in lines if name == "errors"] == [errors], "as many as were provoked"
    assert re.search(r'^retinue_adapter_up\{.*target="cache".*\} 1.0$', said, re.MULTILINE)
    assert '"state": "TARGET_STATE_STALE"' in said
    assert '"deleted": true' in said
