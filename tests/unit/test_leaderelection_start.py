"""The scope of an election: what reaches no other pod refuses to start in one, and says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from servers import environment, start_server

POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
"""What a kubelet gives to every container."""


def refused(where: Path, *patterns: str, engine: str = "") -> str:
    """What a server says that does not start with defaults in a pod."""
    chosen = {"RETINUE_LEADERELECTION__ENGINE": engine} if engine else {}
    command = [sys.executable, "-m", "retinue_server", *patterns, "--listen", "127.0.0.1:0", "--http", "none"]
    done = subprocess.run(
        [*command, "--data-dir", str(where / "data")],
        env=environment(**POD, **chosen),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("engine", ["sqlite", "memory"])
def test_an_engine_that_reaches_no_other_pod_refuses_to_start_in_one_and_names_those_that_do(
    tmp_path: Path, engine: str
) -> None:
    said = refused(tmp_path, "leaderelection", engine=engine)
    assert f"cannot elect with engine {engine} in a pod" in said
    for word in ("etcd", "kubernetes", "postgres", "leaderelection.scope: pod"):
        assert word in said


def test_the_whole_suite_with_defaults_refuses_to_start_in_a_pod(tmp_path: Path) -> None:
    said = refused(tmp_path)
    assert "cannot elect with engine sqlite in a pod" in said
    assert "name the patterns" in said, "who wants no elections is told how"


def test_other_patterns_start_in_a_pod(tmp_path: Path) -> None:
    assert start_server(tmp_path, "workqueue", env=POD).stop() == 0


@pytest.mark.parametrize("engine", ["sqlite", "memory"])
@pytest.mark.parametrize("patterns", [["leaderelection"], []])
def test_it_starts_where_one_leader_a_pod_is_said_to_be_meant(tmp_path: Path, engine: str, patterns: list[str]) -> None:
    said = {"RETINUE_LEADERELECTION__SCOPE": "pod", "RETINUE_LEADERELECTION__ENGINE": engine}
    assert start_server(tmp_path, *patterns, env=POD | said).stop() == 0


def test_an_engine_that_spans_pods_starts_in_one_though_it_is_away(tmp_path: Path) -> None:
    nowhere = {
        "RETINUE_LEADERELECTION__ENGINE": "etcd",
        "RETINUE_LEADERELECTION__ETCD__ENDPOINTS": "127.0.0.1:1",
    }
    assert start_server(tmp_path, "leaderelection", env=POD | nowhere).stop() == 0


def test_a_relay_starts_in_a_pod_since_it_elects_nobody(tmp_path: Path) -> None:
    assert start_server(tmp_path, "leaderelection", "--upstream", "127.0.0.1:1", env=POD).stop() == 0
