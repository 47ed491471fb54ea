"""Scatter/gather from end to end; prints clients/transcripts/scattergather.txt.

It asks a pool and serves the pool's leaves itself, at the addresses that the root expects them at. Start the root with
the pools of clients/examples/scattergather.yaml: `RETINUE_SCATTERGATHER__POOLS=$PWD/clients/examples/scattergather.yaml
make run`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from grpc import StatusCode

from retinue.client import Answer, LeafServer, Merging, Pool, Query, Refusal, RetinueError, ScatterFailed, ShardReply
from retinue.scattergather.v1 import coverage_pb2, topology_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

TIMEOUT = 10.0
"""In seconds."""
SHELVES = {
    "a": {"Moby Dick": "sea whale ship sea", "Emma": "ball letter walk"},
    "b": {"Treasure Island": "sea map ship", "Dracula": "letter castle ship"},
    "c": {"Odyssey": "sea ship sea home sea", "Walden": "pond walk"},
}
SEA = {"word": "sea"}


class Shelf:
    """A leaf: it finds the books of its shelf that have the word `word`, most often first.

    The shelf `hangs` hangs, and the others answer when it does.
    """

    def __init__(self, name: str, hung: asyncio.Event) -> None:
        self.name, self.hung = name, hung
        self.server: LeafServer | None = None
        self.remaining = TIMEOUT
        self.told = asyncio.Event()
        """Set when it was told that nobody waits for its answer."""

    async def __call__(self, query: Query) -> list[dict[str, Any]]:
        word = query.json.get("word")
        if not word:
            raise Refusal(StatusCode.INVALID_ARGUMENT, "a word is needed")
        self.remaining = query.remaining or TIMEOUT
        if "hangs" in query.json:
            await (self.hang() if query.json["hangs"] == self.name else self.hung.wait())
        counts = {title: text.split().count(word) for title, text in SHELVES[self.name].items()}
        found = [{"id": title, "score": count, "shelf": self.name} for title, count in counts.items() if count]
        return sorted(found, key=lambda hit: -hit["score"])

    async def hang(self) -> None:
        self.hung.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.told.set()

    async def serve(self, address: str) -> None:
        self.server = LeafServer(self, merge=fuse if self.name == "a" else None, listen=address)
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0)


def fuse(merging: Merging) -> bytes:
    """A merge: the titles that were found, in their order."""
    titles = sorted(hit["id"] for reply in merging.replies for hit in reply.json)
    return f"{merging.coverage} shelves have {', '.join(titles)}".encode()


async def main(pool_id: str) -> None:
    async with Pool(pool_id, timeout=TIMEOUT) as pool, Pool(f"{pool_id}-merged", timeout=TIMEOUT) as merged:
        addresses = await expected(pool)
        hung = asyncio.Event()
        shelves = {name: Shelf(name, hung) for name in addresses}
        try:
            await nobody(pool)
            for shelf in shelves.values():
                await shelf.serve(addresses[shelf.name])
            await connected(merged, "a, b, c")
            print(f"all are served; connected: {await connected(pool, 'a, b, c')}")
            await ask(pool, shelves.values())
            await ask_other_ways(pool, merged)
            await refuse(pool)
            await hang(pool, shelves["c"])
            await lose(pool, shelves["c"], addresses["c"])
        finally:
            for shelf in shelves.values():
                await shelf.stop()


async def expected(pool: Pool) -> dict[str, str]:
    """Whom the root expects where: for each shard an address."""
    known = await pool.topology()
    merge = topology_pb2.Merge.Name(known.merge).removeprefix("MERGE_")
    names = ", ".join(shard.shard_id for shard in known.shards)
    print(f"the pool expects {names}, merges by {merge} the best {known.top_k}")
    return {shard.shard_id: shard.endpoints[0].address for shard in known.shards}


async def connected(pool: Pool, wanted: str) -> str:
    """Waits until the root is connected to these shards and no others."""
    async for known in pool.watch():
        names = [shard.shard_id for shard in known.shards if any(one.connected for one in shard.endpoints)]
        if (shown := ", ".join(names) or "none") == wanted:
            return shown
    raise AssertionError("the pool is gone")


async def nobody(pool: Pool) -> None:
    print(f"nobody serves it; connected: {await connected(pool, 'none')}")
    print(f"asked for sea: {told(await refused(pool.scatter(json=SEA)))}")


async def ask(pool: Pool, shelves: Iterable[Shelf]) -> None:
    show("asked for sea", await pool.scatter(json=SEA))
    print(f"each leaf had less time than we gave: {yes(all(0 < shelf.remaining < TIMEOUT for shelf in shelves))}")
    show("asked shelf b alone for ship", await pool.scatter(json={"word": "ship"}, shards=["b"]))
    inputs = {"a": {"word": "whale"}, "c": {"word": "pond"}}
    show("asked a for whale and c for pond", await pool.scatter(inputs=inputs))


async def ask_other_ways(pool: Pool, merged: Pool) -> None:
    question: dict[str, Any] = {"json": {"word": "ship"}, "keys": ["cyd"]}
    plan, answer = await pool.explain(**question), await pool.scatter(**question)
    planned = ", ".join(shard.shard_id for shard in plan.shards)
    answered = ", ".join(sorted({hit["shelf"] for hit in answer.json}))
    print(f"routed by the key cyd: {planned} would be asked, {answered} answered")
    events = [event async for event in pool.stream(json=SEA)]
    replied = sorted(event.shard_id for event in events if isinstance(event, ShardReply))
    [last] = [event for event in events[-1:] if isinstance(event, Answer)]
    print(f"streamed: {', '.join(replied)} replied, then came the answer: {state(last)}")
    print(f"merged by a service of ours: {(await merged.scatter(json=SEA)).payload.decode()}")


async def refuse(pool: Pool) -> None:
    async with Pool("no spaces, please", connection=pool.connection) as nonsense:
        refusal = await refused(nonsense.scatter(json=SEA, min_coverage=2, first_k=-1))
    print(f"asked with nonsense: {told(refusal)}")
    for field in sorted(violation.field for violation in refusal.violations):
        print(f"  {field}")
    async with Pool("nobody-knows", connection=pool.connection) as unknown:
        print(f"asked a pool that nobody knows: {told(await refused(unknown.scatter(json=SEA)))}")
    refusal = await refused(pool.scatter(json={"word": ""}))
    print(f"asked for no word: {told(refusal)}: {refusal.message}")


async def hang(pool: Pool, shelf: Shelf) -> None:
    answer = await pool.scatter(json=SEA | {"hangs": "c"}, min_coverage=0.5, first_k=2)
    show("asked for the first two, c hangs", answer)
    await asyncio.wait_for(shelf.told.wait(), TIMEOUT)
    print(f"c was told that nobody waits for it: {yes(shelf.told.is_set())}")
    async for scatter in pool.recent(answer.scatter_id):
        outcomes = sorted((one.shard_id, coverage_pb2.AttemptOutcome.Name(one.outcome)) for one in scatter.attempts)
        shown = ", ".join(f"{shard} {outcome.removeprefix('ATTEMPT_OUTCOME_')}" for shard, outcome in outcomes)
        print(f"remembered of it: {shown}")


async def lose(pool: Pool, shelf: Shelf, address: str) -> None:
    await shelf.stop()
    print(f"c stops; connected: {await connected(pool, 'a, b')}")
    print(f"asked for sea: {missed(await refused(pool.scatter(json=SEA)))}")
    show("asked for sea, two thirds are enough", await pool.scatter(json=SEA, min_coverage=0.66))
    refusal = await refused(pool.scatter(json=SEA, min_coverage=0.9))
    print(f"asked for sea, nine tenths are enough: {missed(refusal)}")
    await shelf.serve(address)
    print(f"c is back; connected: {await connected(pool, 'a, b, c')}")
    show("asked for sea", await pool.scatter(json=SEA))


async def refused(call: Awaitable[object]) -> RetinueError:
    try:
        await call
    except RetinueError as error:
        return error
    raise AssertionError("it was not refused")


def show(what: str, answer: Answer) -> None:
    print(f"{what}: {state(answer)}")
    for hit in answer.json:
        print(f"  {hit['score']} {hit['id']}, shelf {hit['shelf']}")


def state(answer: Answer) -> str:
    without = "".join(f", without {one.shard_id} ({one.code.name})" for one in answer.failures)
    return f"{'complete' if answer.complete else 'partial'}, {answer.coverage}{without}"


def told(refusal: RetinueError) -> str:
    return f"{refusal.code.name} {refusal.reason}"


def missed(refusal: RetinueError) -> str:
    """With the shards that failed; others were not waited for any more."""
    assert isinstance(refusal, ScatterFailed)
    failed = [one for one in refusal.failures if one.code is not StatusCode.CANCELLED]
    return told(refusal) + "".join(f", without {one.shard_id} ({one.code.name})" for one in failed)


def yes(value: object) -> str:
    return "true" if value else "false"


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "transcript"))
