"""`retinue adapter` and `retinue-server --check-pack` as processes, against real servers and a real page."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page import Page
from servers import RunningServer, environment, start_server
from workers import PATIENCE, retinue, rows

from retinue.client import sync
from retinue.client.adapter import target

NONE_THERE, USAGE, UNREACHABLE, REFUSED, NOT_COLLECTED, INTERRUPTED = 1, 2, 3, 4, 5, 130
PAGE = """\
# TYPE http_requests_total counter
http_requests_total{code="200"} 90
http_requests_total{code="500"} 10
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds_bucket{le="0.1"} 50
http_request_duration_seconds_bucket{le="+Inf"} 100
http_request_duration_seconds_sum 12
http_request_duration_seconds_count 100
# TYPE jobs_total counter
jobs_total -3
# TYPE odd gauge
odd NaN
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = start_server(tmp_path_factory.mktemp("server"), "adapter")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with Page(PAGE) as served:
        yield served


@pytest.fixture(scope="module")
def web(server: RunningServer, page: Page) -> str:
    """A target that is collected."""
    with sync.Adapter(server.control) as operator:
        operator.create(target("web", "PROMETHEUS", page.endpoint, interval=1, service="shop"), wait=10)
    return "web"


@pytest.fixture
def name() -> str:
    """A target that no other test uses."""
    return f"t-{uuid.uuid4().hex[:20]}"


def adapter(server: RunningServer, *args: str, code: int = 0) -> Any:
    done = retinue(server, "adapter", *args)
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


# Targets


def test_a_target_is_created_replaced_listed_and_deleted(server: RunningServer, page: Page, name: str) -> None:
    words = ["create", name, "prometheus", page.endpoint]
    [row] = rows(adapter(server, *words, "--interval", "1s", "--max-series", "3"))
    assert (row["target_id"], row["kind"], row["state"], row["series"]) == (name, "prometheus", "limited", 3)
    assert b"add --replace to change it" in adapter(server, *words, code=REFUSED).stderr
    [row] = rows(adapter(server, *words, "--replace"))
    assert row["every"] == "10s"
    assert name in [row["target_id"] for row in rows(adapter(server, "targets"))]
    assert rows(adapter(server, "delete", name)) == [{"target_id": name, "deleted": True}]
    assert b'"deleted": false' in adapter(server, "delete", name, code=NONE_THERE).stdout


def test_a_target_in_full_has_why_its_points_were_refused(server: RunningServer, web: str) -> None:
    [found] = rows(adapter(server, "targets", web))
    [refused] = found["status"]["rejections"]
    assert (refused["reason"], refused["example"]) == ("negative_counter", "jobs -3")
    assert isinstance(refused["points"], int)
    assert (found["service"], found["interval_duration"]) == ("shop", "1s")


def test_an_app_that_is_not_there_is_a_target_and_the_exit_code_says_so(server: RunningServer, name: str) -> None:
    done = adapter(server, "create", name, "redis", "127.0.0.1:1", code=NOT_COLLECTED)
    assert b"Connection refused" in done.stdout
    adapter(server, "delete", name)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["create", "a", "smoke-signals"], USAGE, "smoke-signals"),
        (["create", "A B", "redis", "nowhere"], REFUSED, "target.target_id"),
        (["create", "a", "json", "http://127.0.0.1:1/", "--rule-pack", "nope"], REFUSED, "adapter.rule_packs"),
        (["create", "a", "redis", "127.0.0.1:1", "--interval", "soon"], USAGE, "is not a duration"),
        (["test", "nowhere"], REFUSED, "retinue adapter targets"),
        (["test", "nowhere", "--rule-pack", "redis"], USAGE, "KIND must be given"),
        (["targets", "nowhere"], REFUSED, "TARGET_NOT_FOUND"),
        (["signals", "nowhere"], REFUSED, "TARGET_NOT_FOUND"),
        (["metrics", "http{code"], USAGE, "is no match"),
        (["metrics", "a*b"], REFUSED, "matches[0].name"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(server: RunningServer, args: list[str], code: int, said: str) -> None:
    assert said in adapter(server, *args, code=code).stderr.decode()


def test_a_server_that_is_not_there_is_not_waited_for() -> None:
    command = [sys.executable, "-m", "retinue.cli", "adapter", "signals"]
    env = environment(RETINUE_ADDRESS="127.0.0.1:1")
    done = subprocess.run(command, capture_output=True, env=env, timeout=60, check=False)
    assert done.returncode == UNREACHABLE
    assert b"retinue-server" in done.stderr


# Trying


def test_a_dry_run_is_a_line_of_json_with_every_field(server: RunningServer, page: Page, name: str) -> None:
    [found] = rows(adapter(server, "test", name, "prometheus", page.endpoint))
    assert (found["failure"], found["omitted_points"]) == ("", 0)
    points = {point["raw"]: point for point in found["points"]}
    assert points["jobs{} -3.0"] == {"raw": "jobs{} -3.0", "normalised": "", "rejection": "negative_counter"}
    assert points["http_requests{code='200'} 90.0"]["normalised"].startswith('http_requests_total{code="200",')
    assert [signal["signal"] for signal in found["signals"]] == ["requests", "errors", "duration", "saturation"]
    adapter(server, "targets", name, code=REFUSED)


def test_on_a_terminal_a_dry_run_is_raw_beside_normalised(server: RunningServer, web: str) -> None:
    lines = on_terminal(server, "adapter", "test", web).splitlines()
    assert sides(lines, "http_requests{code='200'} 90.0") == 'http_requests_total{code="200"} 90.0'
    assert sides(lines, "jobs{} -3.0") == "refused: negative_counter"
    assert "5 points, 1 refused" in lines
    assert any("process_open_fds" in line and "absent" in line for line in lines)
    shown = on_terminal(server, "adapter", "test", web, "--refused")
    assert "jobs{}" in shown
    assert "http_requests{code='200'}" not in shown


def test_a_dry_run_of_an_app_that_is_away_says_so(server: RunningServer, name: str) -> None:
    shown = on_terminal(server, "adapter", "test", name, "redis", "127.0.0.1:1", code=NOT_COLLECTED)
    assert "not collected: cannot connect to 127.0.0.1:1" in shown


def sides(lines: list[str], raw: str) -> str:
    """What stands beside it."""
    return next(line.removeprefix(raw).strip() for line in lines if line.startswith(raw))


# Reading


def test_signals_are_lines_of_json_and_what_is_absent_has_no_value(server: RunningServer, web: str) -> None:
    found = {row["signal"]: row for row in rows(adapter(server, "signals", web, "--once"))}
    assert (found["requests"]["value"], found["errors"]["value"]) == (100, 10)
    duration = found["duration"]
    assert (duration["value"], duration["p50_seconds"], duration["p99_seconds"]) == (100, 0.1, None)
    assert found["saturation"]["value"] is None
    assert "process_open_fds" in found["saturation"]["absent_reason"]


def test_metrics_are_lines_of_json_that_every_parser_reads(server: RunningServer, web: str) -> None:
    found = rows(adapter(server, "metrics", "http_requests{code=500}", "odd", "--target", web))
    assert {row["name"]: row["number"] for row in found} == {"http_requests": 10, "odd": "NaN"}
    assert found[0]["labels"] == {
        "code": "500",
        "instance": found[0]["labels"]["instance"],
        "kind": "prometheus",
        "service": "shop",
        "target": web,
    }
    [histogram] = rows(adapter(server, "metrics", "http_request_*", "--target", web))
    assert histogram["histogram"]["buckets"][-1] == {"upper_bound": "Infinity", "cumulative_count": 100}


def test_what_there_is_is_described(server: RunningServer, web: str) -> None:
    described = rows(adapter(server, "metrics", "--describe", "--target", web))
    assert {row["name"]: row["type"] for row in described} == {
        "http_request_duration_seconds": "histogram",
        "http_requests": "counter",
        "odd": "gauge",
    }


def test_a_watch_tells_each_change_on_a_line(server: RunningServer, page: Page, web: str) -> None:
    with watching(server, "http_requests{code=200}", "--target", web) as lines:
        assert '"number": 90.0' in next(lines)
        page.text = PAGE.replace("} 90", "} 91")
        assert '"number": 91.0' in next(lines)
        page.text = PAGE.replace('code="200"', 'code="204"')
        assert '"stale": true' in next(lines)
        page.text = PAGE
        assert '"number": 90.0' in next(lines)


class watching:  # noqa: N801 - a context, as a function would be
    """The lines of a running `retinue adapter watch`."""

    def __init__(self, server: RunningServer, *args: str) -> None:
        command = [sys.executable, "-m", "retinue.cli", "adapter", "watch", *args]
        env = environment(RETINUE_ADDRESS=server.address)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)

    def __enter__(self) -> Iterator[str]:
        assert self._process.stdout is not None
        return iter(self._process.stdout.readline, "")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def test_on_a_terminal_signals_metrics_and_targets_are_tables(server: RunningServer, web: str) -> None:
    shown = on_terminal(server, "adapter", "signals", web, "--once")
    for words in ("PER SECOND", "http_requests{code=~5..}", "p50 ≤100ms  p99 >100ms", "absent"):
        assert words in shown
    shown = on_terminal(server, "adapter", "metrics", "--target", web)
    for words in ("METRIC", "code=200", "nan", "p50 ≤100ms"):
        assert words in shown
    assert "instance=" not in shown
    shown = on_terminal(server, "adapter", "targets", web)
    for words in ("TARGET ID", "degraded", "negative_counter"):
        assert words in shown


def on_terminal(server: RunningServer, *args: str, code: int = 0) -> str:
    """What a command shows on a wide terminal, without colours."""
    ours, theirs = pty.openpty()
    addresses = {"RETINUE_ADDRESS": server.address, "RETINUE_CONTROL_ADDRESS": server.control}
    env = environment(**addresses, TERM="xterm", COLUMNS="160", LINES="40")
    command = [sys.executable, "-m", "retinue.cli", *args]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # the other end is closed
            pass
        os.close(ours)
        assert process.wait() == code, shown
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "")


def test_on_a_terminal_signals_live_until_ctrl_c(server: RunningServer, page: Page, web: str) -> None:
    ours, theirs = pty.openpty()
    env = environment(RETINUE_ADDRESS=server.address, TERM="xterm", COLUMNS="160", LINES="40")
    command = [sys.executable, "-m", "retinue.cli", "adapter", "signals", web]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=env) as process:
        os.close(theirs)
        try:
            until(ours, "http_requests")
            page.text = PAGE.replace("} 90", "} 4321")
            until(ours, "4,331")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == INTERRUPTED
        finally:
            page.text = PAGE
            process.kill()
            os.close(ours)


def until(terminal: int, words: str) -> None:
    """Reads what is shown until the words are there."""
    shown = b""
    while words.encode() not in shown:
        assert select.select([terminal], [], [], PATIENCE)[0], shown
        shown += os.read(terminal, 65536)


# Rule packs


def check_packs(*paths: Path) -> tuple[int, list[str]]:
    flags = [word for path in paths for word in ("--check-pack", str(path))]
    command = [sys.executable, "-m", "retinue_server", *flags]
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=60, check=False, text=True)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def test_a_rule_pack_is_looked_over_without_a_server(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    absent = ", ".join(f"{name}: {{absent: none}}" for name in ("requests", "errors", "duration", "saturation"))
    good.write_text(f"kind: json\nmetrics:\n- {{metric: a, path: /a, help: A.}}\nsignals: {{{absent}}}\n")
    bad.write_text("kind: jsn\nmetrics:\n- {metric: a, path: a}\n")
    assert check_packs(good) == (0, [])
    code, said = check_packs(tmp_path)
    assert code == 1
    assert len(said) == 1
    assert "bad.yaml" in said[0]
    assert "kind must be one of" in said[0]
    assert "metrics[0].path must begin with /" in said[0]
    code, said = check_packs(good, tmp_path / "nowhere.yaml")
    assert (code, said) == (1, [f"{tmp_path}/nowhere.yaml: No such file or directory"])
