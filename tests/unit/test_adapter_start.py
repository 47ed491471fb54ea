"""Claims about starting an adapter: what can't be used is one message and exit code 1, and nothing loads before it is
needed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from servers import environment, start_server

REDIS = "targets:\n  - {target_id: cache, kind: REDIS, endpoint: '127.0.0.1:6379'}\n"


def start(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "retinue_server", "adapter", "--listen", "127.0.0.1:0", "--data-dir", "data"]
    settings = {f"RETINUE_ADAPTER__{name.upper()}": value for name, value in env.items()}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path, env=environment(**settings)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("targets: [", "cannot use targets.yaml: "),
        ("target: []", "it must have `targets:`, a list, and nothing else"),
        (REDIS.replace("REDIS", "REDISS"), "targets[0]: "),
        (REDIS.replace("cache", "Cache"), "target.target_id must be 1 to 63 of a-z 0-9 -"),
        (REDIS.replace("127.0.0.1:6379", "cache"), "target.endpoint must be HOST:PORT"),
        (REDIS.replace("endpoint", "rule_pack: none, endpoint"), "cannot use rule pack none for REDIS"),
    ],
)
def test_a_file_of_targets_that_is_wrong_is_one_message_and_exit_code_1(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "targets.yaml").write_text(text)
    refused(start(tmp_path, targets="targets.yaml"), message)


def test_a_file_of_targets_that_is_named_must_exist(tmp_path: Path) -> None:
    refused(start(tmp_path, targets="targets.yaml"), "cannot use targets.yaml: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: [", "own.yaml: "),
        ("kind: telnet", "own.yaml: kind must be one of prometheus, json, "),
        ("kind: json\nmetric: []", "unknown field `metric`"),
        ("kind: json\nmetrics: [{metric: a, path: b}]", "metrics[0].path must begin with /"),
        ("kind: json\nmetrics: [{metric: a, path: /b, labels: {c: $1}}]", "names $1, but the path has 0 *"),
        ("kind: json\nsignals: {errors: {absent: a, sums: [['b{c=d}']]}}", "is not NAME{label=~pattern}"),
    ],
)
def test_a_rule_pack_that_is_wrong_is_one_message_and_exit_code_1(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "own.yaml").write_text(text)
    refused(start(tmp_path, rule_packs="packs"), "cannot use the rule packs in packs: ", message)


def test_an_endpoint_rule_that_is_none_is_one_message(tmp_path: Path) -> None:
    done = start(tmp_path, endpoints__allow="everywhere")
    assert done.returncode != 0
    assert "cannot use adapter.endpoints: 'everywhere' is no CIDR" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_starts_with_targets_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "targets.yaml").write_text(REDIS.replace("6379", "1"))
    assert start_server(tmp_path, "adapter", env={"RETINUE_ADAPTER__TARGETS": "targets.yaml"}).stop() == 0


def test_no_parser_no_driver_and_no_worker_loads_before_there_is_a_target() -> None:
    code = """
import sys
import retinue_server.adapter.wiring
heavy = {"prometheus_client", "h11", "psycopg", "opentelemetry", "lightkube", "uvicorn", "httpx"}
print(sorted({name.partition(".")[0] for name in sys.modules} & heavy))
print(sorted(name for name in sys.modules if name.startswith("retinue_server.adapter.engines.")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(), timeout=60
    )
    heavy, engines = done.stdout.splitlines()
    assert heavy == "[]"
    for name in ("http", "lines", "postgres", "statsd"):
        assert f"engines.{name}'" not in engines, "which loads with the first target of its kind"


def refused(done: subprocess.CompletedProcess[str], *messages: str) -> None:
    assert done.returncode == 1, done.stderr
    for message in messages:
        assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2, done.stderr
