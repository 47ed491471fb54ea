"""The exercise of the port UserMerges, for both ways: all replies in one request, and each as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from retinue.client import LeafServer, Merging, Refusal
from retinue_server.runtime.errors import Code, Reason
from retinue_server.scattergather.core.scatter import ScatterError
from retinue_server.scattergather.engine import UserMerge
from retinue_server.scattergather.engines.merging import MergeCalls


class Service:
    """Merges as the request tells it to."""

    def __init__(self) -> None:
        self.entered, self.cancelled = asyncio.Event(), asyncio.Event()

    async def __call__(self, merging: Merging) -> bytes:
        if merging.payload == b"hang":
            self.entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        await merging.gather()
        if merging.payload.startswith(b"fail "):
            raise Refusal(grpc.StatusCode[merging.payload[5:].decode()], "it was told to")
        if merging.payload.startswith(b"size "):
            return b"x" * int(merging.payload[5:])
        return b" ".join(
            [merging.pool_id.encode(), *(f"{r.shard_id}={r.payload.decode()}".encode() for r in merging.replies)]
        )


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def server(service: Service) -> AsyncIterator[LeafServer]:
    async with LeafServer(merge=service) as made:
        yield made


@pytest.fixture
async def calls() -> AsyncIterator[MergeCalls]:
    made = MergeCalls(ScatterError)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture(params=[False, True], ids=["at once", "as they come"])
def begin(request: pytest.FixtureRequest, calls: MergeCalls, server: LeafServer) -> Any:
    def begun(payload: bytes = b"", timeout_s: float = 60.0, address: str = "") -> UserMerge:
        return calls.begin(address or server.address, "p", payload, timeout_s=timeout_s, stream=request.param)

    return begun


async def finished(merge: UserMerge, *replies: tuple[str, bytes]) -> bytes:
    for shard_id, payload in replies:
        merge.add(shard_id, payload)
    async with asyncio.timeout(60):
        return await merge.finish(len(replies), len(replies), complete=True)


async def failure(merge: UserMerge) -> ScatterError:
    with pytest.raises(ScatterError) as caught:
        await finished(merge, ("a", b"1"))
    assert caught.value.reason == Reason.MERGE_FAILED
    return caught.value


async def test_replies_arrive_in_the_order_in_which_they_are_added(begin: Any) -> None:
    assert await finished(begin(), ("b", b"2"), ("a", b"1"), ("c", b"")) == b"p b=2 a=1 c="


async def test_no_reply_is_merged_too(begin: Any) -> None:
    assert await finished(begin()) == b"p"


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"])
async def test_what_the_caller_can_mend_is_passed_on(begin: Any, code: str) -> None:
    error = await failure(begin(f"fail {code}".encode()))
    assert error.code == Code[code]
    assert "it was told to" in error.message


@pytest.mark.parametrize("code", ["UNAVAILABLE", "PERMISSION_DENIED", "NOT_FOUND"])
async def test_every_other_error_is_internal_and_named(begin: Any, code: str) -> None:
    error = await failure(begin(f"fail {code}".encode()))
    assert error.code == Code.INTERNAL
    assert code in error.message


async def test_a_service_that_is_not_there_fails_the_merge(begin: Any) -> None:
    assert "UNAVAILABLE" in (await failure(begin(address="127.0.0.1:1"))).message


async def test_a_service_that_takes_too_long_fails_the_merge(begin: Any) -> None:
    assert "DEADLINE_EXCEEDED" in (await failure(begin(b"hang", 0.3))).message


async def test_a_request_that_ends_reaches_the_service(begin: Any, service: Service) -> None:
    merge = begin(b"hang")
    finishing = asyncio.create_task(finished(merge, ("a", b"1")))
    await asyncio.wait_for(service.entered.wait(), 60)
    finishing.cancel()
    merge.cancel()
    await asyncio.wait_for(service.cancelled.wait(), 60)


async def test_an_answer_may_be_larger_than_grpc_usually_lets_through(begin: Any) -> None:
    assert len(await finished(begin(b"size 6000000"), ("a", b"1"))) == 6_000_000


async def test_a_merge_can_be_dropped_after_its_answer_and_before_any_reply(begin: Any) -> None:
    done = begin()
    await finished(done, ("a", b"1"))
    done.cancel()
    begin().cancel()
    assert await finished(begin(), ("a", b"1")) == b"p a=1"
