"""Leaves as a process, for tests: `python leaves.py DIR SHARD...` serves each SHARD at the socket DIR/SHARD.sock.

What a leaf does stands in the question, by the shard: {"a": {"fail": "UNAVAILABLE"}, "b": {"hang": true}}; `part` is
how much of it answers, [1, 2]; `sleep` is in seconds; with `first` it does so only when it is asked first. Nobody
answers before those hang that are to. Otherwise it says its name, and of `report` what it was told.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
from servers import ROOT, environment

from retinue.client import LeafServer, Merging, Partial, Query, Refusal, trace

SHARDS = ("a", "b", "c")


class Leaf:
    """One shard's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked = self.told = 0
        """How often, and how often it was told that nobody waits any more."""
        self.hangs = asyncio.Event()

    async def __call__(self, query: Query) -> Any:
        content = query.json if query.payload else {}
        if content.get("report"):
            return self.report(query)
        self.asked += 1
        do = content.get(query.shard_id, {})
        if do.get("first") and query.attempt > 1:
            do = {}
        if "fail" in do:
            await asyncio.sleep(do.get("sleep", 0))
            raise Refusal(grpc.StatusCode[do["fail"]], f"{self.name} was told to fail")
        for shard in content.keys() & LEAVES.keys() - {query.shard_id}:
            if content[shard].get("hang"):
                await LEAVES[shard].hangs.wait()
        await asyncio.sleep(do.get("sleep", 0))
        if do.get("hang"):
            await self.hang()
        hits = [{"id": self.name, "score": ord(self.name[0]), "asked": content.get("asked")}]
        return Partial(hits, *do["part"]) if "part" in do else hits

    async def hang(self) -> None:
        self.hangs.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.hangs.clear()
            self.told += 1

    def report(self, query: Query) -> list[dict[str, Any]]:
        known = {"asked": self.asked, "told": self.told, "traceparent": trace.current(), "metadata": query.metadata}
        return [{"id": self.name, "score": 0, "attempt": query.attempt} | known]


LEAVES: dict[str, Leaf] = {}


def fuse(merging: Merging) -> dict[str, Any]:
    """The merge: who replied, and of what it stands for."""
    return {"replied": [reply.shard_id for reply in merging.replies], "coverage": str(merging.coverage)}


async def serve(where: Path, names: Iterable[str]) -> None:
    async with AsyncExitStack() as stack:
        for name in names:
            LEAVES[name] = Leaf(name)
            await stack.enter_async_context(LeafServer(LEAVES[name], merge=fuse, listen=f"unix:{where}/{name}.sock"))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


@contextmanager
def leaves(where: Path, *names: str) -> Iterator[subprocess.Popen[str]]:
    """A process that serves them, once it is ready."""
    env = environment() | {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{ROOT / 'tests'}"}
    command = [sys.executable, __file__, str(where), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def pool(where: Path, *shards: str, **settings: Any) -> dict[str, Any]:
    """A pool of the pool file over leaves at these sockets; `SHARD|OTHER` has both as replicas."""
    entries = [
        {"shard_id": shard.split("|")[0], "endpoints": [f"unix:{where}/{name}.sock" for name in shard.split("|")]}
        for shard in shards
    ]
    return {"shards": entries} | settings


def write_pools(data_dir: Path, pools: dict[str, Any]) -> None:
    """The pool file of a server that is about to start; JSON is YAML."""
    file = data_dir / "scattergather/pools.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"pools": pools}))


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2:]))
