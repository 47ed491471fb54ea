"""`retinue scatter` and `retinue topology` against real roots and real leaves."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from leaves import SHARDS, leaves, pool, write_pools
from pace import undisturbed
from servers import RunningServer, environment, start_server
from workers import PATIENCE, eventually, retinue, rows

from retinue.client import Answer, sync

COMPLETE, USAGE, UNREACHABLE, REFUSED, PARTIAL, FAILED = 0, 2, 3, 4, 6, 7


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where leaves are served; `gone` is not."""
    where = tmp_path_factory.mktemp("leaves")
    with leaves(where, *SHARDS, "spare"):
        yield where


@pytest.fixture(scope="module")
def beneath(sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A root that is a leaf of the other."""
    where = tmp_path_factory.mktemp("beneath")
    write_pools(where / "data", {"west": pool(sockets, *SHARDS, merge="top_k", top_k=5)})
    running = start_server(where, "scattergather")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def server(sockets: Path, beneath: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    where = tmp_path_factory.mktemp("server")
    world = pool(sockets, "a", merge="top_k", top_k=5)
    world["shards"].append({"shard_id": "west", "endpoints": [beneath.address], "weight": 3, "pool": "west"})
    known = {
        "top": pool(sockets, *SHARDS, merge="top_k", top_k=10),
        "collect": pool(sockets, *SHARDS),
        "concat": pool(sockets, "a", merge="concat"),
        "missing": pool(sockets, "a", "b", "gone", merge="top_k", top_k=10),
        "hedged": pool(
            sockets, "a|spare", merge="top_k", top_k=1, hedging={"min_samples": 0, "min_delay_seconds": 0.02}
        ),
        "nobody": pool(sockets, "gone"),
        "world": world,
        "recent": pool(sockets, "a"),
    }
    write_pools(where / "data", known)
    running = start_server(where, "scattergather")
    yield running
    assert running.stop() == 0


def scatter(server: RunningServer, *args: str, code: int = COMPLETE, **options: Any) -> dict[str, Any]:
    """The one JSON line of a command that ends so."""
    done = retinue(server, "scatter", *args, **options)
    assert done.returncode == code, done.stderr.decode()
    [line] = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def asked(server: RunningServer, pool_id: str, **question: Any) -> str:
    """The id of a request that was made by other means: a command costs a second on a busy machine."""
    with sync.Pool(pool_id, address=server.address) as pool:
        answer: Answer = pool.scatter(**question)
        return answer.scatter_id


def names(answer: dict[str, Any]) -> list[str]:
    return [hit["id"] for hit in answer["json"]]


# Asking


def test_a_complete_answer_is_a_line_of_json_and_ends_with_0(server: RunningServer) -> None:
    found = scatter(server, "top", "--json", '{"asked": "ä"}')
    assert (found["complete"], found["answered"], found["expected"]) == (True, 3, 3)
    assert names(found) == ["c", "b", "a"]
    assert found["json"][0]["asked"] == "ä"
    assert (found["attempts"], found["failures"]) == (3, [])
    assert found["elapsed_seconds"] > 0


def test_options_may_come_first(server: RunningServer) -> None:
    assert names(scatter(server, "--shard", "b", "top")) == ["b"]


@pytest.mark.parametrize(
    ("args", "answered"),
    [
        (["--shard", "a", "--shard", "c"], ["c", "a"]),
        (["--key", "cyd"], ["b"]),
        (["--inputs", '{"b": {"asked": 1}}'], ["b"]),
    ],
)
def test_shards_are_selected(server: RunningServer, args: list[str], answered: list[str]) -> None:
    assert names(scatter(server, "top", *args)) == answered


def test_the_question_may_be_a_file_or_standard_input(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('{"asked": "file"}')
    assert scatter(server, "top", "--json", f"@{tmp_path}/q.json")["json"][0]["asked"] == "file"
    assert scatter(server, "top", "--json", "-", stdin=b'{"asked": "pipe"}')["json"][0]["asked"] == "pipe"
    assert scatter(server, "top", "--payload", '{"asked": "raw"}')["json"][0]["asked"] == "raw"


def test_collected_replies_have_their_shards_and_bytes_are_text(server: RunningServer) -> None:
    found = scatter(server, "collect")
    assert [reply["shard_id"] for reply in found["replies"]] == list(SHARDS)
    assert json.loads(found["replies"][0]["text"])[0]["id"] == "a"
    assert json.loads(scatter(server, "concat")["text"])[0]["id"] == "a"


def test_raw_prints_the_answer_alone(server: RunningServer) -> None:
    done = retinue(server, "scatter", "top", "--raw")
    assert [hit["id"] for hit in json.loads(done.stdout)] == ["c", "b", "a"]
    assert (done.returncode, done.stderr) == (0, b"")
    lines = retinue(server, "scatter", "collect", "--raw").stdout.splitlines()
    assert [json.loads(line)[0]["id"] for line in lines] == list(SHARDS)


def test_a_partial_answer_ends_with_6_and_names_what_is_missing(server: RunningServer) -> None:
    found = scatter(server, "missing", "--min-coverage", "0.6", code=PARTIAL)
    assert (found["complete"], found["answered"], found["expected"]) == (False, 2, 3)
    assert [failure["shard_id"] for failure in found["failures"]] == ["gone"]
    assert found["failed_by_code"] == {"UNAVAILABLE": 1}
    raw = retinue(server, "scatter", "missing", "--min-shards", "1", "--min-coverage", "0", "--raw")
    assert raw.returncode == PARTIAL
    assert b"gone: UNAVAILABLE" in raw.stderr


def test_too_few_shards_end_with_7_and_say_which_failed_and_what_to_do(server: RunningServer) -> None:
    done = retinue(server, "scatter", "missing")
    assert (done.returncode, done.stdout) == (FAILED, b"")
    said = done.stderr.decode()
    assert "shard  gone: UNAVAILABLE" in said
    assert "COVERAGE_NOT_MET" in said
    scatter_id = re.search(r"scatter_id=(\S+)", said)
    assert scatter_id is not None
    assert f"retinue scatter recent {scatter_id[1]}" in said


def test_not_to_wait_for_the_rest_is_partial(server: RunningServer) -> None:
    question = '{"b": {"hang": true}}'
    first = scatter(server, "top", "--json", question, "--min-coverage", "0.5", "--first-k", "2", code=PARTIAL)
    soft = ["--min-coverage", "0.5", "--soft-deadline", "50ms"]
    for found in (first, scatter(server, "top", "--json", question, *soft, code=PARTIAL)):
        assert found["failures"][0]["shard_id"] == "b"
        assert found["failed_by_code"] == {"CANCELLED": 1}


def test_what_a_leaf_or_the_root_refuses_ends_with_4(server: RunningServer) -> None:
    leaf = retinue(server, "scatter", "top", "--json", '{"a": {"fail": "INVALID_ARGUMENT"}}')
    assert leaf.returncode == REFUSED
    assert b"a was told to fail" in leaf.stderr
    unknown = retinue(server, "scatter", "nobody-knows")
    assert unknown.returncode == REFUSED
    assert b"retinue topology ls" in unknown.stderr
    shard = retinue(server, "scatter", "top", "--shard", "x")
    assert shard.returncode == REFUSED
    assert b"shard_ids[0]" in shard.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["top", "--json", "{"],
        ["top", "--json", "1", "--payload", "x"],
        ["top", "--min-coverage", "2"],
        ["top", "--inputs", "[]"],
        ["top", "--json", "@/nowhere/at/all"],
        ["top", "--header", "x"],
        ["recent", "--json", "1"],
        ["--first-k", "1"],
    ],
)
def test_wrong_usage_ends_with_2(server: RunningServer, args: list[str]) -> None:
    done = retinue(server, "scatter", *args)
    assert done.returncode == USAGE, done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("args", ["scatter p", "scatter recent", "topology ls", "topology watch p"])
def test_a_root_that_cannot_be_reached_ends_with_3_and_says_where_it_was_looked_for(tmp_path: Path, args: str) -> None:
    env = environment(RETINUE_SCATTERGATHER_ADDRESS=f"unix:{tmp_path}/none.sock")
    command = [sys.executable, "-m", "retinue.cli", *args.split()]
    done = subprocess.run(command, capture_output=True, env=env, timeout=PATIENCE, check=False)
    assert done.returncode == UNREACHABLE
    assert b"none.sock) or --address" in done.stderr


def test_a_pool_may_be_named_like_a_command(server: RunningServer) -> None:
    [reply] = scatter(server, "ask", "recent")["replies"]
    assert reply["shard_id"] == "a"


def test_explain_asks_nobody(server: RunningServer) -> None:
    before = asked(server, "top")
    plan = scatter(server, "top", "--explain", "--key", "cyd", "--timeout", "2s")
    assert [shard["shard_id"] for shard in plan["shards"]] == ["b"]
    assert plan["merge"] == "MERGE_TOP_K"
    assert 0 < float(plan["timeout_duration"].rstrip("s")) <= 2
    assert float(plan["leaf_timeout_duration"].rstrip("s")) < float(plan["timeout_duration"].rstrip("s"))
    with sync.Pool("", address=server.address) as pool:
        latest = next(pool.recent())
    assert latest.scatter_id == before


def test_help_tells_the_exit_codes_and_the_way_to_past_requests() -> None:
    command = [sys.executable, "-m", "retinue.cli", "scatter"]
    short = subprocess.run(command, capture_output=True, env=environment(), check=True)
    long = subprocess.run([*command, "--help"], capture_output=True, env=environment(), check=True)
    assert short.stdout == long.stdout
    for word in (b"6  partial", b"7  failed", b"retinue scatter recent [POOL|ID]", b"retinue scatter ask recent"):
        assert word in long.stdout


# Past requests


def recent(server: RunningServer, *args: str) -> list[dict[str, Any]]:
    return rows(retinue(server, "scatter", "recent", *args))


def test_a_past_request_is_found_by_its_id_and_as_the_latest_of_its_pool(server: RunningServer) -> None:
    first, second = asked(server, "top"), asked(server, "top")
    assert [row["scatter_id"] for row in recent(server, first)] == [first]
    assert [row["scatter_id"] for row in recent(server, "top")] == [second]


def test_past_requests_are_listed_the_latest_first(server: RunningServer) -> None:
    first, second, other = asked(server, "top"), asked(server, "top"), asked(server, "concat")
    assert [row["scatter_id"] for row in recent(server, "top", "--list", "--limit", "2")] == [second, first]
    assert [row["scatter_id"] for row in recent(server, "--limit", "3")] == [other, second, first]


def test_what_is_no_request_and_no_pool_is_not_found(server: RunningServer) -> None:
    unknown = retinue(server, "scatter", "recent", "nobody-knows")
    assert unknown.returncode == REFUSED
    assert b"cannot find nobody-knows" in unknown.stderr


def test_a_past_request_has_its_calls_with_what_became_of_them(server: RunningServer) -> None:
    [found] = recent(server, asked(server, "missing", min_coverage=0.5))
    outcomes = {attempt["shard_id"]: attempt["outcome"] for attempt in found["attempts"]}
    assert outcomes == {
        "a": "ATTEMPT_OUTCOME_WON",
        "b": "ATTEMPT_OUTCOME_WON",
        "gone": "ATTEMPT_OUTCOME_FAILED",
    }
    assert list(found["not_asked"]) == [a["address"] for a in found["attempts"] if a["shard_id"] == "gone"]


def test_what_a_leaf_did_that_is_a_root_stands_beneath_its_call(server: RunningServer) -> None:
    scatter_id = asked(server, "world")
    [found] = recent(server, scatter_id)
    calls = {attempt["shard_id"]: attempt for attempt in found["attempts"]}
    assert "scatter" not in calls["a"]
    below = calls["west"]["scatter"]
    assert (below["pool_id"], below["parent_scatter_id"]) == ("west", scatter_id)
    assert [attempt["shard_id"] for attempt in below["attempts"]] == list(SHARDS)
    assert "not_asked" not in found
    [flat] = recent(server, scatter_id, "--depth", "0")
    assert not any("scatter" in attempt for attempt in flat["attempts"])


def test_a_waterfall_shows_a_hedge_later_than_what_it_was_made_beside(server: RunningServer) -> None:
    eventually(lambda: connected(server, "hedged") == 2, "both replicas are connected")

    def is_shown() -> None:
        lines = waterfall(server, asked(server, "hedged", json={"a": {"first": True, "hang": True}}))
        [first] = [line for line in lines if line.startswith("a ")]
        [hedge] = [line for line in lines if line.startswith("└ hedge")]
        assert ("lost" in first, "━" in first) == (True, True)
        assert ("won" in hedge, "╍" in hedge) == (True, True)
        assert first.index("━") < hedge.index("╍"), "of a long time it would be the same place"

    undisturbed(is_shown, within_s=0)


def test_a_waterfall_shows_a_retry_beneath_what_failed(server: RunningServer) -> None:
    lines = waterfall(server, asked(server, "hedged", json={"a": {"first": True, "fail": "UNAVAILABLE"}}, hedge=False))
    assert [("UNAVAILABLE" in line, "━" in line) for line in lines if line.startswith("a ")] == [(True, True)]
    assert [("won" in line, "═" in line) for line in lines if line.startswith("└ retry")] == [(True, True)]


def test_a_waterfall_is_a_tree(server: RunningServer) -> None:
    lines = waterfall(server, asked(server, "world"))
    assert lines[0].startswith("world  ")
    assert "complete  4 of 4 leaves" in lines[0]
    west = next(place for place, line in enumerate(lines) if line.startswith("west "))
    assert [line.split()[0] for line in lines[west + 1 : west + 4]] == list(SHARDS)
    assert all(line.startswith("  ") for line in lines[west + 1 : west + 4])


def waterfall(server: RunningServer, scatter_id: str) -> list[str]:
    return shown(server, "scatter", "recent", scatter_id, "--output", "table")


def connected(server: RunningServer, name: str) -> int:
    """How many endpoints of a pool the root is connected to."""
    with sync.Pool(name, address=server.address) as one:
        return sum(endpoint.connected for shard in one.topology().shards for endpoint in shard.endpoints)


def shown(server: RunningServer, *args: str) -> list[str]:
    """The lines for people, of a command that succeeds."""
    done = retinue(server, *args, COLUMNS="120")
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


# Topology


def test_pools_are_listed_and_shown(server: RunningServer) -> None:
    found = {row["pool"]: row for row in rows(retinue(server, "topology", "ls"))}
    assert found["missing"]["shards"] == 3
    assert found["world"]["merge"] == "top_k"
    [one] = rows(retinue(server, "topology", "show", "missing"))
    assert [shard["shard_id"] for shard in one["shards"]] == ["a", "b", "gone"]
    table = shown(server, "topology", "show", "missing", "--output", "table")
    assert [line.split()[3] for line in table if line.startswith("gone")] == ["away"]
    assert retinue(server, "topology", "show", "nope").returncode == REFUSED


def test_a_watch_tells_each_change(tmp_path: Path) -> None:
    write_pools(tmp_path / "data", {"p": pool(tmp_path, "d")})
    server = start_server(tmp_path, "scattergather")
    command = [sys.executable, "-m", "retinue.cli", "topology", "watch", "p", "--output", "table"]
    env = environment(RETINUE_ADDRESS=server.address)
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as watching:
            assert watching.stdout is not None
            lines = iter(watching.stdout.readline, "")
            assert "0 of 1 shards reachable" in next(lines)
            assert next(lines).split()[2] == "away"
            with leaves(tmp_path, "d"):
                assert "1 of 1 shards reachable" in next(lines)
                assert next(lines).split()[2] == "connected"
            assert "0 of 1 shards reachable" in next(lines)
            watching.kill()
    finally:
        server.kill()


def test_status_shows_the_services_of_the_root(server: RunningServer) -> None:
    found = {row["service"]: row["status"] for row in rows(retinue(server, "status"))}
    for name in ("ScatterGatherService", "TopologyService", "LeafService"):
        assert found[f"retinue.scattergather.v1.{name}"] == "serving"


# On a terminal


def on_a_terminal(server: RunningServer, *args: str, code: int = COMPLETE) -> str:
    """What a command shows at last on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    env = environment(RETINUE_ADDRESS=server.address, COLUMNS="80", LINES="24", TERM="xterm")
    command = [sys.executable, "-m", "retinue.cli", *args]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as running:
        os.close(theirs)
        said = b""
        try:
            while data := os.read(ours, 65536):
                said += data
        except OSError:  # how a terminal ends
            pass
        assert running.wait(PATIENCE) == code, said.decode()
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode()).replace("\r", "")


def test_a_terminal_shows_each_shard_and_then_the_answer(server: RunningServer) -> None:
    said = on_a_terminal(server, "scatter", "missing", "--min-coverage", "0.5", code=PARTIAL)
    assert re.search(r"^a +answered ", said, re.MULTILINE)
    assert re.search(r"^gone +failed .*UNAVAILABLE", said, re.MULTILINE)
    assert "partial, 2 of 3 in" in said
    assert '"id": "a"' in said


def test_a_terminal_shows_what_failed(server: RunningServer) -> None:
    said = on_a_terminal(server, "scatter", "nobody", code=FAILED)
    assert re.search(r"^gone +failed ", said, re.MULTILINE)
    assert "COVERAGE_NOT_MET" in said


def test_a_terminal_shows_who_was_not_waited_for(server: RunningServer) -> None:
    args = ["--json", '{"b": {"hang": true}}', "--min-coverage", "0.5", "--first-k", "2"]
    said = on_a_terminal(server, "scatter", "top", *args, code=PARTIAL)
    assert re.search(r"^b +left ", said, re.MULTILINE)
    assert "b: not waited for any more" in said


@pytest.mark.parametrize("args", [["top", "--explain"], ["recent"], ["recent", "top"], ["recent", "top", "--list"]])
def test_a_terminal_shows_plans_lists_and_waterfalls_as_tables(server: RunningServer, args: list[str]) -> None:
    asked(server, "top")
    said = on_a_terminal(server, "scatter", *args)
    assert "{" not in said
    assert "SHARD" in said or "SCATTER ID" in said
