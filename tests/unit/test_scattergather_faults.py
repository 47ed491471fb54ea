"""Claims that faults have made: what leaves, callers and files may do without a request telling less than the truth."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.scattergather_core import Played, answer_of, error_of, played, rest, shard

from retinue_server.runtime.discovery import dns
from retinue_server.runtime.errors import Code, Reason
from retinue_server.scattergather import poolfile
from retinue_server.scattergather.core import merges
from retinue_server.scattergather.core.requests import Coverage, Malformed, Policy, Reply
from retinue_server.scattergather.core.topology import MergeKind, Merging, PoolLimits
from retinue_server.scattergather.engine import Target
from retinue_server.scattergather.engines.grpc import GrpcLeaves


@pytest.fixture
async def play() -> Played:
    return played()


@pytest.mark.parametrize("percent", [7, 14, 28, 29, 55, 56, 70])
async def test_a_minimum_that_is_met_exactly_is_met(percent: int, play: Played) -> None:
    """0.55 of 100 is a little more than 55 in doubles."""
    play.serve(*(shard(f"s{i}") for i in range(100)))
    asked = play.ask(Policy(min_coverage=percent / 100))
    await rest()
    for number, call in enumerate(play.leaves.open_calls):
        await (call.reply() if number < percent else call.fail(Code.UNAVAILABLE))
    assert (await answer_of(asked)).gathered.coverage == Coverage(100, percent, complete=False)


async def test_a_hung_replica_that_soft_deadlines_give_up_is_not_asked_for_ever(play: Played) -> None:
    """It never fails and never loses to a hedge, so what it kept waiting must count by itself."""
    play.serve(shard("a", "good:1", "hung:1"), shard("b"))
    hung = 0
    for _ in range(20):
        asked = play.ask(Policy(min_coverage=0.5, soft_deadline_s=0.1))
        await rest()
        for call in play.leaves.open_calls:
            if call.address == "hung:1":
                hung += 1
            else:
                await play.clock.advance(0.001)
                await call.reply()
        await play.clock.advance(0.1)
        await answer_of(asked)
    assert hung <= 2
    play.is_clean()


async def test_the_shard_that_refused_is_named_with_its_code(play: Played) -> None:
    play.serve(shard("a"), shard("b"))
    asked = play.ask()
    await rest()
    await play.leaves.to("b:1").fail(Code.INVALID_ARGUMENT, "no such field")
    known = (await error_of(asked)).gathered
    assert known is not None
    assert [(f.shard_id, f.code, f.message) for f in known.failures] == [("b", 3, "no such field"), ("a", 1, "")]
    assert known.failed_by_code == {"INVALID_ARGUMENT": 1, "CANCELLED": 1}


async def test_the_shard_whose_reply_was_too_much_is_named_with_its_code(play: Played) -> None:
    play.serve(shard("a"), shard("b"), limits=PoolLimits(max_gathered_bytes=10))
    asked = play.ask()
    await rest()
    await play.leaves.to("a:1").reply(b"12345678")
    await play.leaves.to("b:1").reply(b"12345678")
    known = (await error_of(asked)).gathered
    assert known is not None
    assert [(f.shard_id, f.code) for f in known.failures] == [("b", 8)]


async def test_a_part_is_not_enough_where_the_first_reply_must_be_complete(play: Played) -> None:
    play.serve(shard("a"), shard("b"), merging=Merging(MergeKind.FIRST))
    asked = play.ask(question=InPart())
    await rest()
    await play.leaves.to("a:1").reply(b"half")
    assert not asked.done(), "another may have all of it"
    await play.leaves.to("b:1").reply(b"half")
    error = await error_of(asked)
    assert (error.code, error.reason) == (Code.INTERNAL, Reason.COVERAGE_NOT_MET)
    play.is_clean()


class InPart:
    """Every reply stands for half of its shard."""

    def data(self, shards: object, attempt: int) -> bytes:
        return b""

    def metadata(self, shards: object, attempt: int) -> tuple[tuple[str, str], ...]:
        return ()

    def read(self, data: bytes) -> Reply:
        return Reply(data, Coverage(2, 1, complete=False))


async def test_a_request_that_is_too_late_already_asks_nobody(play: Played) -> None:
    play.serve(shard("a"), shard("b"))
    error = await error_of(play.ask(timeout_s=0.004))
    assert (error.code, error.reason) == (Code.DEADLINE_EXCEEDED, Reason.COVERAGE_NOT_MET)
    assert play.leaves.calls == []
    play.is_clean()


async def test_what_is_remembered_has_no_payloads(play: Played) -> None:
    play.serve(shard("a"))
    asked = play.ask(payload=b"question" * 1000)
    await rest()
    await play.leaves.to("a:1").reply(b"answer" * 1000)
    await answer_of(asked)
    await error_of(play.ask(timeout_s=0.001))
    [first, second] = play.root.recent
    assert (first.code, second.code) == (Code.OK, Code.DEADLINE_EXCEEDED)
    assert not any(isinstance(one, bytes) for recent in play.root.recent for one in held_by(recent))


def held_by(root: object) -> list[object]:
    """All that can be reached from it, but through lines and classes."""
    import gc  # noqa: PLC0415 - for this alone

    found: dict[int, object] = {}
    waiting = [root]
    while waiting:
        one = waiting.pop()
        if id(one) in found or isinstance(one, type) or type(one).__module__ in ("builtins.module", "asyncio"):
            continue
        if type(one).__name__ in ("PlayedLine", "module", "function"):
            continue
        found[id(one)] = one
        waiting += gc.get_referents(one)
    return list(found.values())


@pytest.mark.parametrize(
    "reply",
    [b"[" * 32 + b"]" * 32, b"9" * 400, b'{"a": [' + b"9" * 400 + b"]}"],
    ids=["too deep", "too large", "too large within"],
)
def test_json_that_no_message_can_hold_is_malformed(reply: bytes) -> None:
    merge = merges.CollectJson()
    with pytest.raises(Malformed):
        merge.add(0, reply)
    assert merge.result() == []
    top = merges.TopK(2)
    with pytest.raises(Malformed):
        top.add(0, b'[{"score": 1, "id": 1, "more": ' + reply + b"}]")
    assert top.result() == []


def test_json_at_the_limits_passes() -> None:
    merge = merges.CollectJson()
    for place, reply in enumerate((b"[" * 30 + b"]" * 30, b"9" * 308, b'"' + b"[" * 400 + b"9" * 400 + b'"')):
        merge.add(place, reply)
    assert len(merge.result()) == 3


def test_sums_that_no_double_holds_are_malformed() -> None:
    count = merges.Count()
    count.add(0, b"1" + b"0" * 308)
    with pytest.raises(Malformed):
        count.add(1, b"1" + b"0" * 308)
    bars = merges.Histogram()
    with pytest.raises(Malformed):
        bars.add(0, b'{"bounds": [], "counts": [' + b"9" * 400 + b"]}")


async def test_a_line_that_was_closed_is_forgotten() -> None:
    """Endpoints that come and go would fill the memory, and new certificates would connect them again."""
    leaves = GrpcLeaves()
    await leaves.start()
    for number in range(3):
        leaves.open(Target(f"127.0.0.1:{9 + number}", "/a.B/C", 1000), lambda: None).close()
    assert not leaves._lines
    await leaves.stop()


@pytest.mark.parametrize(
    "text",
    [
        "pools: 2024-13-45",
        "pools: {a: !!int x}",
        "pools: {a: !!float x}",
        "pools: {a: " + "[" * 5000 + "]" * 5000 + "}",
        "pools: &a {a: *a}",
        "pools: {? [a] : 1}",
        "pools:\n  p: {shards: [{shard_id: s, endpoints: ['dns:unix:/x']}]}",
        "pools:\n  p: {shards: [{shard_id: s, endpoints: ['dns:[::1]']}]}",
        "\x00",
        "pools: [",
    ],
)
def test_a_pool_file_that_is_wrong_in_whatever_way_is_an_error_of_the_pool_file(text: str, tmp_path: Path) -> None:
    """Another exception would end the watching of the file."""
    path = tmp_path / "pools.yaml"
    path.write_text(text)
    with pytest.raises(poolfile.PoolFileError):
        poolfile.read(path)


@pytest.mark.parametrize("name", ["a..b:9000", "x" * 70 + ":9000"])
async def test_a_name_that_no_resolver_takes_is_looked_up_again(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: asyncio.Queue[str] = asyncio.Queue()
    look_up = dns._look_up

    async def noted(name: str) -> Sequence[str]:
        looked.put_nowait(name)
        return await look_up(name)

    monkeypatch.setattr(dns, "_look_up", noted)
    discovery = dns.DnsDiscovery(poll_s=0.01)
    discovery.watch(name, lambda _: None)
    for _ in range(3):
        await looked.get()
    assert len(caplog.records) == 1, "it is said once"
    await discovery.stop()
