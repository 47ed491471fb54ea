"""What `retinue scatter` shows of shards and calls, and whom it asks for it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from rich.console import Console

from retinue.cli import common, recent, waterfall
from retinue.cli.shards import Shards
from retinue.client.pool import ShardFailure
from retinue.scattergather.v1 import coverage_pb2 as pb
from retinue.scattergather.v1 import scattergather_service_pb2 as api
from retinue.scattergather.v1 import scattergather_service_pb2_grpc as rpc
from retinue.scattergather.v1 import topology_pb2 as topology


def text(content: Any) -> list[str]:
    said = io.StringIO()
    Console(file=said, width=80).print(content)
    return said.getvalue().splitlines()


def test_of_many_shards_those_that_failed_are_seen_first_and_the_others_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("COLUMNS", "80")
    plan = api.ExplainScatterResponse(shards=[topology.Shard(shard_id=f"s{n}") for n in range(100)])
    table = Shards("p", plan)
    table.show(ShardFailure("s77", grpc.StatusCode.UNAVAILABLE, "gone", 2, None))
    lines = text(table._shown())
    assert "0 of 100 shards answered  1 failed" in lines[0]
    assert ["UNAVAILABLE gone" in line for line in lines if line.startswith("s77 ")] == [True]
    assert lines[-1] == "... and 84 more"
    assert len(lines) < 24


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0µs"),
        (0.00085, "850µs"),
        (0.001, "1.00ms"),
        (0.0123, "12.3ms"),
        (0.85, "850ms"),
        (1.25, "1.25s"),
        (90, "90.0s"),
    ],
)
def test_short_times_have_three_digits(seconds: float, said: str) -> None:
    assert common.spent(seconds) == said


def attempt(shard_id: str, start: float, took: float, **fields: Any) -> api.RecentAttempt:
    known: dict[str, Any] = {"kind": pb.ATTEMPT_KIND_PRIMARY, "outcome": pb.ATTEMPT_OUTCOME_WON, "shards": 1}
    found = api.RecentAttempt(shard_id=shard_id, **(known | fields))
    found.start_duration.FromMilliseconds(int(start * 1000))
    found.elapsed_duration.FromMilliseconds(int(took * 1000))
    return found


def begun(scatter_id: str, second: int, **fields: Any) -> api.RecentScatter:
    found = api.RecentScatter(scatter_id=scatter_id, **fields)
    found.start_time.FromSeconds(second)
    return found


def test_calls_to_one_root_are_told_apart_by_the_order_of_their_beginning() -> None:
    attempts = [attempt("a", 0, 1, address="x"), attempt("b", 0, 1, address="y"), attempt("c", 0, 1, address="x")]
    children = {"x": [begun("late", 20), begun("early", 10)], "y": [begun("only", 5)]}
    paired = {place: child.scatter_id for place, child in recent._paired(attempts, children)}
    assert paired == {0: "early", 1: "only", 2: "late"}


def test_what_is_beneath_is_put_in_the_middle_of_its_call_since_clocks_differ() -> None:
    below = begun("below", 10_000, attempts=[attempt("x", 0, 0.2)])
    below.stats.elapsed_duration.FromMilliseconds(200)
    top = begun("top", 5, attempts=[attempt("a", 0.1, 0.4), attempt("b +", 0, 0.1, shards=3)])
    lines = list(waterfall._lines(recent.Node(top, {0: recent.Node(below)}), 0.0, ""))
    assert [(line.label, round(line.start, 3)) for line in lines] == [("a", 0.1), ("  x", 0.2), ("b + +2", 0)]


class Root(rpc.ScatterGatherServiceServicer):
    """A leaf that is a root, of two pages."""

    def __init__(self) -> None:
        self.metadata: list[str] = []

    async def ListRecentScatters(  # noqa: N802 - the contract's name
        self, request: api.ListRecentScattersRequest, context: Any
    ) -> api.ListRecentScattersResponse:
        self.metadata += [key for key, _ in context.invocation_metadata()]
        if not request.page_token:
            scatters = [begun("1", 1, parent_scatter_id="mine"), begun("2", 2, parent_scatter_id="another's")]
            return api.ListRecentScattersResponse(scatters=scatters, next_page_token="more")
        return api.ListRecentScattersResponse(scatters=[begun("3", 3, parent_scatter_id="mine")])


async def test_a_leaf_is_asked_for_what_it_did_beneath_and_gets_no_token_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv("RETINUE_TOKEN_FILE", str(tmp_path / "token"))
    root = Root()  # type: ignore[abstract] # its other RPCs stay UNIMPLEMENTED
    server = grpc.aio.server()
    rpc.add_ScatterGatherServiceServicer_to_server(root, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    found = await recent._below({address, f"unix:{tmp_path}/none.sock"}, "mine")
    await server.stop(0)
    assert [one.scatter_id for one in found.pop(address)] == ["1", "3"]  # type: ignore[union-attr] # a root
    [why] = found.values()
    assert isinstance(why, str)
    assert why.startswith("UNAVAILABLE")
    assert "authorization" not in root.metadata
