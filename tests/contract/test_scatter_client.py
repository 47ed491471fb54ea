"""The Python client's scatter/gather against a real root and real leaves."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from leaves import SHARDS, leaves, pool, write_pools
from servers import RunningServer, environment, start_server
from workers import PATIENCE

from retinue.client import Answer, Pool, ScatterFailed, ShardFailure, ShardReply, errors, sync, trace
from retinue.scattergather.v1 import coverage_pb2 as pb
from retinue.scattergather.v1 import topology_pb2

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the leaves a, b, c are served."""
    where = tmp_path_factory.mktemp("leaves")
    with leaves(where, *SHARDS):
        yield where


@pytest.fixture(scope="module")
def server(sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    where = tmp_path_factory.mktemp("server")
    known = {
        "top": pool(sockets, *SHARDS, merge="top_k", top_k=10, forward_metadata=["tenant"]),
        "stream": pool(sockets, *SHARDS, merge="top_k", top_k=10, transport="stream"),
        "collect": pool(sockets, *SHARDS, merge="collect", replies="json"),
        "concat": pool(sockets, *SHARDS, merge="concat"),
        "merged": pool(sockets, *SHARDS, merge="service", merge_address=f"unix:{sockets}/a.sock"),
        "missing": pool(sockets, *SHARDS, "gone", merge="top_k", top_k=10),
        "once": pool(sockets, *SHARDS, merge="top_k", top_k=10, idempotent=False),
        "narrow": pool(sockets, *SHARDS, merge="top_k", top_k=10, limits={"max_calls": 3}),
    }
    write_pools(where / "data", known)
    running = start_server(where, "scattergather")
    yield running
    assert running.stop() == 0


@pytest.fixture
def of(server: RunningServer) -> Callable[..., Pool]:
    """Makes a pool; whoever uses it closes it."""
    return lambda pool_id, **options: Pool(pool_id, address=server.address, timeout=PATIENCE, **options)


async def report(pool: Pool) -> dict[str, Any]:
    """What each leaf of a pool was told."""
    return {hit["id"]: hit for hit in (await pool.scatter(json={"report": True})).json}


async def told(pool: Pool, name: str, often: int) -> None:
    """Waits until a leaf was told so often that nobody waits any more."""
    async with asyncio.timeout(PATIENCE):
        while (await report(pool))[name]["told"] < often:
            await asyncio.sleep(0.01)


def names(answer: Answer) -> list[str]:
    return [hit["id"] for hit in answer.json]


# Answers


async def test_a_complete_answer_is_merged_of_all(of: Callable[..., Pool]) -> None:
    async with of("top") as pool:
        answer = await pool.scatter(json={"asked": "ä"})
    assert answer.complete
    assert str(answer.coverage) == "3 of 3"
    assert (names(answer), answer.failures) == (["c", "b", "a"], [])
    assert {hit["asked"] for hit in answer.json} == {"ä"}
    assert answer.message.stats.attempts == 3
    assert answer.elapsed > 0


@pytest.mark.parametrize(
    ("question", "answered"),
    [({"shards": ["b"]}, {"b"}), ({"keys": ["cyd"]}, {"b"}), ({"inputs": {"a": b"{}", "c": {}}}, {"a", "c"})],
)
async def test_shards_are_selected_by_name_by_key_and_by_their_inputs(
    of: Callable[..., Pool], question: dict[str, Any], answered: set[str]
) -> None:
    async with of("top") as pool:
        answer, plan = await pool.scatter(**question), await pool.explain(**question)
    assert set(names(answer)) == answered == {shard.shard_id for shard in plan.shards}
    assert answer.coverage == (len(answered), len(answered), True)


async def test_each_merge_has_its_face(of: Callable[..., Pool]) -> None:
    async with of("collect") as collect, of("concat") as concat, of("merged") as merged:
        assert [reply.json[0]["id"] for reply in (await collect.scatter()).replies] == list(SHARDS)
        assert (await concat.scatter()).payload.count(b"score") == 3
        assert (await merged.scatter()).json == {"replied": list(SHARDS), "coverage": "3 of 3"}
        part = await merged.scatter(json={"b": {"fail": "UNAVAILABLE"}}, min_coverage=0.5)
    assert part.json == {"replied": ["a", "c"], "coverage": "2 of 3"}
    assert not part.complete


async def test_a_partial_answer_names_what_is_missing_and_what_answered_in_part(of: Callable[..., Pool]) -> None:
    async with of("top") as pool:
        question = {"a": {"fail": "UNAVAILABLE"}, "b": {"part": [1, 2]}}
        answer = await pool.scatter(json=question, min_coverage=0.3)
    assert not answer.complete
    assert set(names(answer)) == {"b", "c"}
    assert {(one.shard_id, one.code) for one in answer.failures} == {
        ("a", grpc.StatusCode.UNAVAILABLE),
        ("b", grpc.StatusCode.OK),
    }


async def test_an_answer_that_is_enough_does_not_wait_and_tells_the_others(of: Callable[..., Pool]) -> None:
    async with of("top") as pool:
        before = (await report(pool))["c"]["told"]
        first = await pool.scatter(json={"c": {"hang": True}}, min_coverage=0.5, first_k=2)
        soft = await pool.scatter(json={"c": {"hang": True}}, min_coverage=0.5, soft_deadline=0.05)
        await told(pool, "c", before + 2)
    assert [str(answer.coverage) for answer in (first, soft)] == ["2 of 3"] * 2
    assert [answer.failures[0].code for answer in (first, soft)] == [grpc.StatusCode.CANCELLED] * 2


# Failures


async def test_too_few_shards_are_an_error_that_says_which_failed(of: Callable[..., Pool]) -> None:
    async with of("missing") as pool:
        with pytest.raises(ScatterFailed) as caught:
            await pool.scatter()
    failed = caught.value
    assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "COVERAGE_NOT_MET")
    assert (failed.failures[0].shard_id, failed.failures[0].code) == ("gone", grpc.StatusCode.UNAVAILABLE)
    assert failed.coverage.expected == 4
    assert not failed.coverage.complete
    assert failed.failed_by_code["UNAVAILABLE"] == 1
    assert failed.scatter_id


async def test_a_refusal_of_a_leaf_is_the_answer(of: Callable[..., Pool]) -> None:
    async with of("top") as pool:
        with pytest.raises(ScatterFailed, match="b was told to fail") as caught:
            await pool.scatter(json={"b": {"fail": "PERMISSION_DENIED"}}, min_coverage=0.1)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.PERMISSION_DENIED, "LEAF_REFUSED")


async def test_what_the_root_refuses_has_its_own_class_and_fields(of: Callable[..., Pool]) -> None:
    async with of("nobody-knows") as pool:
        with pytest.raises(errors.NotFound) as unknown:
            await pool.scatter()
    assert unknown.value.reason == "POOL_NOT_FOUND"
    async with of("top") as pool:
        with pytest.raises(errors.InvalidArgument) as invalid:
            await pool.scatter(shards=["x"], min_coverage=0.5)
    assert [violation.field for violation in invalid.value.violations] == ["shard_ids[0]"]
    async with of("once") as pool:
        with pytest.raises(errors.FailedPrecondition) as once:
            await pool.scatter(min_coverage=0.5)
    assert once.value.reason == "POOL_NOT_IDEMPOTENT"


async def test_what_may_have_reached_a_leaf_is_asked_once(of: Callable[..., Pool]) -> None:
    async with of("once") as pool:
        before = (await report(pool))["a"]["asked"]
        with pytest.raises(ScatterFailed, match="a was told to fail"):
            await pool.scatter(json={"a": {"fail": "UNAVAILABLE"}})
        assert (await report(pool))["a"]["asked"] == before + 1


async def test_what_the_root_has_no_room_for_is_asked_again_until_it_has(of: Callable[..., Pool]) -> None:
    async with of("narrow") as pool:
        slow = asyncio.create_task(pool.scatter(json={"a": {"sleep": 3}}))
        await asyncio.wait_for(busy(pool), PATIENCE)
        assert (await pool.scatter()).complete
        assert (await slow).complete
        hanging = asyncio.create_task(pool.scatter(json={"a": {"hang": True}}, timeout=PATIENCE))
        await asyncio.wait_for(busy(pool), PATIENCE)
        with pytest.raises(errors.ResourceExhausted) as caught:
            await pool.scatter(timeout=3)
        assert caught.value.reason == "SCATTER_LIMIT"
        hanging.cancel()


async def busy(pool: Pool) -> None:
    """Waits until a leaf is being asked."""
    while not any(endpoint.in_flight for shard in (await pool.topology()).shards for endpoint in shard.endpoints):
        await asyncio.sleep(0.005)


async def test_a_root_that_is_away_is_waited_for_unless_one_is_impatient(tmp_path: Path) -> None:
    nowhere = f"unix:{tmp_path}/none.sock"
    async with Pool("p", address=nowhere) as pool:
        with pytest.raises(errors.Unavailable, match="cannot reach"):
            await pool.scatter(timeout=2)
    async with Pool("p", address=nowhere, patient=False) as pool:
        with pytest.raises(errors.Unavailable):
            await pool.scatter(timeout=PATIENCE)
        with pytest.raises(errors.Unavailable):
            _ = [event async for event in pool.stream(timeout=PATIENCE)]


async def test_a_root_that_comes_up_is_asked_what_waited_for_it(sockets: Path, tmp_path: Path) -> None:
    write_pools(tmp_path / "data", {"p": pool(sockets, *SHARDS, merge="top_k", top_k=3)})
    first = start_server(tmp_path, "scattergather")
    first.stop()
    async with Pool("p", address=first.address, timeout=PATIENCE) as one:
        waiting = asyncio.create_task(one.scatter())
        again = await asyncio.to_thread(first.restart)
        try:
            assert (await waiting).complete
        finally:
            again.kill()


# Streams


async def test_events_come_as_shards_do_and_the_answer_last(of: Callable[..., Pool]) -> None:
    async with of("top") as pool:
        question = {"a": {"fail": "UNAVAILABLE"}, "b": {"sleep": 2}}
        events = [event async for event in pool.stream(json=question, min_coverage=0.5)]
    *shards, answer = events
    assert isinstance(answer, Answer)
    assert str(answer.coverage) == "2 of 3"
    [failure] = [event for event in shards if isinstance(event, ShardFailure)]
    assert (failure.shard_id, failure.code) == ("a", grpc.StatusCode.UNAVAILABLE)
    replies = [event for event in shards if isinstance(event, ShardReply)]
    assert [reply.shard_id for reply in replies] == ["c", "b"], "b is the slow one"
    assert replies[0].elapsed < replies[1].elapsed
    assert replies[0].json == [{"id": "c", "score": 99, "asked": None}]
    assert replies[0].address.endswith("c.sock")


async def test_a_stream_may_leave_out_what_was_said(of: Callable[..., Pool]) -> None:
    async with of("top") as pool:
        events = [event async for event in pool.stream(omit_payloads=True)]
    assert [event.payload for event in events[:-1] if isinstance(event, ShardReply)] == [b""] * 3
    assert isinstance(events[-1], Answer)
    assert names(events[-1]) == ["c", "b", "a"]


async def test_who_leaves_a_stream_early_cancels_what_is_under_way(of: Callable[..., Pool]) -> None:
    async with of("top") as pool:
        before = (await report(pool))["b"]["told"]
        async with aclosing(pool.stream(json={"b": {"hang": True}})) as events:
            async for _ in events:
                break
        await told(pool, "b", before + 1)


async def test_a_stream_that_fails_says_what_failed(of: Callable[..., Pool]) -> None:
    async with of("missing") as pool:
        with pytest.raises(ScatterFailed) as caught:
            _ = [event async for event in pool.stream()]
    assert "gone" in [failure.shard_id for failure in caught.value.failures]


async def test_leaves_serve_roots_that_ask_over_streams(of: Callable[..., Pool]) -> None:
    async with of("stream") as pool:
        assert names(await pool.scatter()) == ["c", "b", "a"]
        before = (await report(pool))["c"]["told"]
        part = await pool.scatter(json={"a": {"fail": "UNAVAILABLE"}, "c": {"hang": True}}, min_coverage=0.3, first_k=1)
        assert names(part) == ["b"]
        await told(pool, "c", before + 1)


# What goes with a question


async def test_the_trace_and_what_the_pool_lets_through_reach_the_leaves(
    of: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEPARENT", TRACE)
    async with of("top") as pool:
        answer = await pool.scatter(json={"report": True}, metadata={"tenant": "ada", "secret": "x"})
        async for scatter in pool.recent(answer.scatter_id):
            assert scatter.trace_id == TRACE.split("-")[1]
    for hit in answer.json:
        assert hit["metadata"]["tenant"] == "ada"
        assert "secret" not in hit["metadata"]
        assert hit["traceparent"].split("-")[1] == TRACE.split("-")[1]
        assert hit["attempt"] == 1
    assert trace.current() == TRACE


# Looking


async def test_past_requests_are_remembered_with_their_calls(of: Callable[..., Pool]) -> None:
    async with of("top") as pool:
        answer = await pool.scatter(json={"a": {"fail": "UNAVAILABLE"}}, min_coverage=0.5)
        [found] = [scatter async for scatter in pool.recent(answer.scatter_id)]
        latest = [scatter.scatter_id async for scatter in pool.recent(page_size=1)]
    outcomes = {attempt.shard_id: attempt.outcome for attempt in found.attempts}
    assert outcomes == {
        "a": pb.ATTEMPT_OUTCOME_FAILED,
        "b": pb.ATTEMPT_OUTCOME_WON,
        "c": pb.ATTEMPT_OUTCOME_WON,
    }
    assert latest[0] == answer.scatter_id
    assert len(latest) == len(set(latest)) > 1, "pages follow each other"


async def test_all_pools_are_listed(of: Callable[..., Pool]) -> None:
    async with of("") as pool:
        found = {one.pool_id: one async for one in pool.pools()}
    assert {"top", "collect", "missing"} <= found.keys()
    assert found["missing"].shards == 4


async def test_a_watch_sees_leaves_come_and_go_and_outlives_its_root(sockets: Path, tmp_path: Path) -> None:
    write_pools(tmp_path / "data", {"p": pool(tmp_path, "d")})
    first = running = start_server(tmp_path, "scattergather")
    async with Pool("p", address=first.address, timeout=PATIENCE) as one, aclosing(one.watch()) as seen:
        assert not connected(await anext(seen))
        with leaves(tmp_path, "d"):
            await until_connected(seen, wanted=True)
            first.kill()
            running = await asyncio.to_thread(first.restart)
            await until_connected(seen, wanted=True)
        await until_connected(seen, wanted=False)
    running.kill()


def connected(found: topology_pb2.Pool) -> bool:
    return any(endpoint.connected for shard in found.shards for endpoint in shard.endpoints)


async def until_connected(seen: AsyncIterator[topology_pb2.Pool], *, wanted: bool) -> None:
    async with asyncio.timeout(PATIENCE):
        async for found in seen:
            if connected(found) is wanted:
                return


# Without a loop


def test_code_without_a_loop_asks_the_same(server: RunningServer) -> None:
    with sync.Pool("top", address=server.address) as pool:
        assert names(pool.scatter(json={})) == ["c", "b", "a"]
        assert isinstance(list(pool.stream())[-1], Answer)
        before = pool.scatter(json={"report": True}).json
        for _ in pool.stream(json={"a": {"hang": True}}):
            break
        with pytest.raises(ScatterFailed):
            pool.scatter(json={"a": {"fail": "INTERNAL"}})
        assert pool.topology().pool_id == "top"
        assert len(before) == 3


PROGRAM = """
import sys
from retinue.client import serve_leaf
serve_leaf(lambda query: [{"id": query.shard_id, "score": query.json["score"]}], listen="unix:" + sys.argv[1])
"""


def test_a_leaf_of_three_lines_is_served_until_sigterm(tmp_path: Path) -> None:
    write_pools(tmp_path / "data", {"p": pool(tmp_path, "d", merge="top_k", top_k=1)})
    running = start_server(tmp_path, "scattergather")
    try:
        with (
            subprocess.Popen([sys.executable, "-c", PROGRAM, f"{tmp_path}/d.sock"], env=environment()) as leaf,
            sync.Pool("p", address=running.address) as one,
        ):
            next(found for found in one.watch() if connected(found))
            assert one.scatter(json={"score": 7}).json == [{"id": "d", "score": 7}]
            leaf.send_signal(signal.SIGTERM)
            assert leaf.wait(PATIENCE) == 0
    finally:
        running.kill()


def test_the_examples_pools_are_those_of_its_transcript() -> None:
    file = Path(__file__).parents[2] / "clients/examples/scattergather.yaml"
    pools = yaml.safe_load(file.read_text())["pools"]
    assert set(pools) == {"transcript", "transcript-merged"}
    assert pools["transcript"]["shards"] == pools["transcript-merged"]["shards"]
