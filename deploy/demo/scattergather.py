"""`make demo DEMO=scattergather`: full-text search in eight shards of two replicas, with the answers of one big index.

Each query scatters twice: for the counts that say how rare its terms are, then for the ten best documents. All answers
are compared with those of one index over everything, while replicas are stopped and killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import msgspec
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from retinue.client.pool import Answer, Pool, ScatterFailed
from retinue.scattergather.v1.coverage_pb2 import ATTEMPT_OUTCOME_LOST

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "scattergather"))

from leaf import Hit, Index, block, corpus, weights  # noqa: E402 - it is beside the manifests that use it

if TYPE_CHECKING:
    from retinue.scattergather.v1 import scattergather_service_pb2 as pb

SHARDS, REPLICAS, K = 8, 2, 10
QUERIES = int(os.environ.get("DEMO_QUERIES", "400"))
STOPPED, KILLED = 2, 5
"""The shard that loses one replica, and the one that loses both."""
TIMEOUT_S = 5.0
PATIENCE_S = 150.0
LEAF = HERE.parent / "scattergather/leaf.py"

console = Console(highlight=False)


def main() -> int:
    """Runs the demo; 0 if every answer was as it had to be."""
    root = Path(".retinue/demo-scattergather")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    cluster = Cluster(root)
    try:
        cluster.start()
        story = Story(cluster, Whole.built())
        hedged = asyncio.run(story.told())
        story.report()
        print_tree(root, hedged, cluster.root.address)
        return 0 if story.true else 1
    finally:
        cluster.stop()


# The processes


class Leaf:
    """One replica of a shard."""

    def __init__(self, root: Path, shard: int, replica: int) -> None:
        self._root, self.shard, self.name = root, shard, f"shard-{shard}{'ab'[replica]}"
        self.address = f"unix:{self.name}.sock"
        self.start()

    def start(self) -> None:
        """It answers once it has indexed its documents."""
        words = ["--shard", str(self.shard), "--of", str(SHARDS), "--listen", self.address]
        self.process = spawn(self._root, self.name, str(LEAF), *words)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


class Root:
    """A server with scatter/gather; `pools` is its pool file."""

    def __init__(self, root: Path, name: str, pools: Mapping[str, object]) -> None:
        data = root / name
        (data / "scattergather").mkdir(parents=True)
        (data / "scattergather/pools.yaml").write_text(yaml.safe_dump({"pools": pools}, sort_keys=False))
        ready = data / "ready.json"
        words = ["--listen", "127.0.0.1:0", "--data-dir", name, "--ready-file", f"{name}/ready.json"]
        self.process = spawn(root, name, "-m", "retinue_server", "scattergather", *words)
        await_true(lambda: ready.exists() and ready.read_text().endswith("\n"), f"{name} is ready", root)
        self.address: str = json.loads(ready.read_text())["listen"][0]


def spawn(root: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    """A Python process that lives in a folder, with its output in a file there."""
    with (root / f"{name}.log").open("ab") as file:
        command = [sys.executable, *words]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=root)


def await_true(claim: Callable[[], bool], what: str, root: Path) -> None:
    """Asks until it holds."""
    end = time.monotonic() + PATIENCE_S
    while not claim():
        if time.monotonic() > end:
            raise SystemExit(f"cannot see that {what}: look into {root}")
        time.sleep(0.05)


class Cluster:
    """Sixteen leaves, a root over them, and two roots with half of them each that a third pool has as its leaves."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.leaves: list[Leaf] = []
        self.roots: list[Root] = []

    def start(self) -> None:
        """Returns when every root is ready."""
        self.leaves += [Leaf(self._root, shard, replica) for shard in range(SHARDS) for replica in range(REPLICAS)]
        shards = [
            {"shard_id": f"shard-{s}", "endpoints": [leaf.address for leaf in self.leaves if leaf.shard == s]}
            for s in range(SHARDS)
        ]
        halves = {"half-0": shards[: SHARDS // 2], "half-1": shards[SHARDS // 2 :]}
        for name, half in halves.items():
            self.roots.append(Root(self._root, name, pools_over("", half)))
        trees = [
            {"shard_id": name, "weight": len(half), "endpoints": [parent.address]}
            for (name, half), parent in zip(halves.items(), self.roots, strict=True)
        ]
        self.roots.append(Root(self._root, "root", pools_over("", shards) | pools_over("tree-", trees)))
        console.print(f"{len(self.leaves)} leaves ({SHARDS} shards of {REPLICAS} replicas) index their documents")

    @property
    def root(self) -> Root:
        """The one that is asked."""
        return self.roots[-1]

    async def connected(self) -> None:
        """Until every root is connected to every endpoint of its pools."""
        for root in self.roots:
            async with Pool("", address=root.address) as any_pool:
                names = [known.pool_id async for known in any_pool.pools()]
            for name in names:
                async with Pool(name, address=root.address) as pool, aclosing(pool.watch()) as states:
                    async for state in states:
                        if all(endpoint.connected for shard in state.shards for endpoint in shard.endpoints):
                            break

    def replicas(self, shard: int) -> list[Leaf]:
        """Those of a shard."""
        return [leaf for leaf in self.leaves if leaf.shard == shard]

    def stop(self) -> None:
        """All that was started."""
        processes = [root.process for root in self.roots] + [leaf.process for leaf in self.leaves]
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in processes:
            process.wait()


def pools_over(prefix: str, shards: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The two pools of the pool file over some shards: for the counts, and for the search."""

    def over(pool: str) -> dict[str, object]:
        named = [{**shard, "pool": pool} if prefix else shard for shard in shards]
        return {"timeout_seconds": TIMEOUT_S, "shards": named}

    return {
        f"{prefix}counts": {"merge": "group_sum", **over("counts")},
        f"{prefix}search": {"merge": "top_k", "top_k": K, **over("search")},
    }


# The app


class Found(NamedTuple):
    """What a query got."""

    hits: list[Hit]
    took_s: float
    rounds: tuple[Answer, ...]

    @property
    def hedges(self) -> int:
        """Calls that were made beside slow ones."""
        return sum(answer.message.stats.hedges for answer in self.rounds)


class Search:
    """What an app does that wants the answer of one big index: the ten best documents that have any of the terms."""

    def __init__(self, address: str, prefix: str = "") -> None:
        self.counts = Pool(f"{prefix}counts", address=address)
        self.documents = Pool(f"{prefix}search", address=address)

    async def __call__(self, terms: Sequence[str], min_coverage: float = 1.0) -> Found:
        """Raises ScatterFailed if too few shards answer."""
        begun = time.perf_counter()
        counts = await self.counts.scatter(json={"count": terms}, min_coverage=min_coverage)
        rare, average = weights(terms, counts.json)
        question = {"find": terms, "weights": rare, "average_length": average, "k": K}
        found = await self.documents.scatter(json=question, min_coverage=min_coverage)
        return Found(_hits(found), time.perf_counter() - begun, (counts, found))

    async def by_own_counts(self, terms: Sequence[str]) -> list[Hit]:
        """In one round: each shard weighs the terms by its own documents."""
        return _hits(await self.documents.scatter(json={"find": terms, "k": K}))

    async def in_part(self, terms: Sequence[str]) -> Found:
        """Half of the shards are enough."""
        return await self(terms, min_coverage=0.5)

    async def first_asked(self, shard_id: str) -> str:
        """The address of the replica that the next request to the shard would go to."""
        plan = await self.documents.explain(shards=[shard_id])
        return str(plan.shards[0].endpoints[0].address)

    async def aclose(self) -> None:
        """Ends the connections."""
        await self.counts.close()
        await self.documents.close()


def _hits(answer: Answer) -> list[Hit]:
    return msgspec.convert(answer.json, list[Hit])


def _ids(hits: Sequence[Hit]) -> list[str]:
    return [hit.id for hit in hits]


# What the answers must be


@dataclass
class Whole:
    """One index over all documents."""

    index: Index
    documents: int
    lost: Index
    """Those of the shard that is going to be killed."""

    @classmethod
    def built(cls) -> Whole:
        """Indexes everything."""
        started = time.monotonic()
        documents = corpus()
        whole = Index(documents, range(len(documents)))
        size = sum(document.path.stat().st_size for document in documents)
        console.print(
            f"{len(documents):,} documents of Python's library and the installed packages ({size / 1e6:.0f} MB, "
            f"{len(whole.vocabulary()):,} terms) in one index beside them, in {since(started)}",
            soft_wrap=True,
        )
        return cls(whole, len(documents), Index(documents, block(len(documents), KILLED, SHARDS)))

    def __call__(self, terms: Sequence[str]) -> list[Hit]:
        """The ten best documents."""
        return self.index.find(terms, *weights(terms, self.index.count(terms)), K)

    def without_lost(self, terms: Sequence[str]) -> list[Hit]:
        """As if those documents had never been."""
        counts, lost = self.index.count(terms), self.lost.count(terms)
        left = {name: count - lost[name] for name, count in counts.items()}
        return self.index.find(terms, *weights(terms, left), K, block(self.documents, KILLED, SHARDS))

    def queries(self, count: int) -> list[list[str]]:
        """One to four terms each: frequent ones often, the most frequent never, as they tell documents least apart."""
        draw = random.Random(5)  # noqa: S311 - the same in each run
        most = self.documents // 10
        known = [(term, often) for term, often in self.index.vocabulary() if 1 < often <= most and term.isidentifier()]
        terms, often = zip(*known, strict=True)
        return [list(dict.fromkeys(draw.choices(terms, often, k=1 + n % 4))) for n in range(count)]


# The story


@dataclass
class Phase:
    """What was asked under some circumstance, and what came."""

    what: str
    found: list[Found] = field(default_factory=list)
    exact: int = 0
    ties: int = 0

    def add(self, found: Found, wanted: list[Hit]) -> None:
        """Compares documents, order and scores, bit by bit."""
        self.found.append(found)
        self.exact += found.hits == wanted
        self.ties += len({hit.score for hit in wanted}) < len(wanted)

    @property
    def all_exact(self) -> bool:
        """Whether every answer was."""
        return self.exact == len(self.found)


class Story:
    """Asks, strikes, asks again."""

    def __init__(self, cluster: Cluster, whole: Whole) -> None:
        self._cluster, self._whole = cluster, whole
        self._queries = whole.queries(QUERIES)
        self._few = self._queries[: max(QUERIES // 4, 30)]
        self._phases: list[Phase] = []
        self._truthful = False

    @property
    def true(self) -> bool:
        """Whether every answer was as it had to be, and what was missing was told."""
        return self._truthful and all(phase.all_exact for phase in self._phases)

    async def told(self) -> str:
        """From the beginning to the end; the name of a request beneath which a hedge won."""
        begun = time.monotonic()
        await self._cluster.connected()
        console.print(f"three roots are connected to them, {time.monotonic() - begun:.1f} s later")
        root = self._cluster.root.address
        async with aclosing(Search(root)) as flat, aclosing(Search(root, "tree-")) as tree:
            await self._ask("all leaves are well", self._queries, flat, self._whole)
            await self._by_own_counts(flat)
            await self._one_replica_stops("one is stopped", flat, flat)
            await self._a_shard_is_lost(flat)
            await self._ask("two levels", self._few, tree, self._whole)
            return await self._one_replica_stops_below(tree)

    async def _ask(
        self,
        what: str,
        queries: Sequence[Sequence[str]],
        search: Callable[[Sequence[str]], Awaitable[Found]],
        wanted: Callable[[Sequence[str]], list[Hit]],
    ) -> Phase:
        phase = Phase(what)
        for terms in progress(what, queries):
            phase.add(await search(terms), wanted(terms))
        self._phases.append(phase)
        return phase

    async def _by_own_counts(self, search: Search) -> None:
        """Shows that the first round is needed; not a phase, since it is wrong by intent."""
        pairs = [(await search.by_own_counts(terms), self._whole(terms)) for terms in self._few]
        same = sum(_ids(found) == _ids(wanted) for found, wanted in pairs)
        console.print(f"by each shard's own counts, {same} of {len(pairs)} answers would be the same documents")

    async def _one_replica_stops(self, what: str, search: Search, chooser: Search) -> Leaf:
        """The one that the chooser would ask next."""
        address = await chooser.first_asked(f"shard-{STOPPED}")
        [leaf] = [leaf for leaf in self._cluster.replicas(STOPPED) if leaf.address == address]
        with stopped(leaf.process):
            console.print(f"SIGSTOP to {leaf.name}: it keeps its connections and answers nobody")
            await self._ask(what, self._few, search, self._whole)
        return leaf

    async def _one_replica_stops_below(self, tree: Search) -> str:
        """The name of a request of the upper root beneath which a hedge won."""
        async with aclosing(Search(self._cluster.roots[STOPPED * 2 // SHARDS].address)) as parent:
            leaf = await self._one_replica_stops("two levels, one stopped", tree, parent)
            hedged = [one async for one in parent.documents.recent() if one.stats.hedges_won]
        return next((one.parent_scatter_id for one in hedged if leaf.address in _losers(one)), "")

    async def _a_shard_is_lost(self, search: Search) -> None:
        """And comes back."""
        replicas = self._cluster.replicas(KILLED)
        for leaf in replicas:
            leaf.kill()
        console.print(f"SIGKILL to {' and '.join(leaf.name for leaf in replicas)}")
        self._truthful = await self._strict_refuses(search) and await self._partial_is_truthful(search)
        for leaf in replicas:
            leaf.start()
        await self._cluster.connected()
        await self._ask("both are back", self._few, search, self._whole)

    async def _strict_refuses(self, search: Search) -> bool:
        """And names the shard."""
        try:
            await search(self._queries[0])
        except ScatterFailed as failed:
            gone = [failure.shard_id for failure in failed.failures if failure.code is grpc.StatusCode.UNAVAILABLE]
            console.print(f"strict: {failed.code.name}, without {', '.join(gone)}")
            return gone == [f"shard-{KILLED}"]
        return False

    async def _partial_is_truthful(self, search: Search) -> bool:
        """Says what is missing, and answers exactly for the rest."""
        phase = await self._ask("in part, without both", self._few, search.in_part, self._whole.without_lost)
        said = {answer.coverage for found in phase.found for answer in found.rounds}
        console.print(f"half is enough: partial, {', '.join(map(str, said))}")
        return said == {(SHARDS - 1, SHARDS, False)}

    def report(self) -> None:
        """What came; the times are of both rounds together."""
        table = Table(title=f"the {K} best of {self._whole.documents:,} documents for one to four terms")
        for column in ("", "queries", "exact", "ties", "p50 ms", "p99 ms", "hedges"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for phase in self._phases:
            took = sorted(found.took_s for found in phase.found)
            p50, p99 = (f"{took[int(q * len(took))] * 1000:.1f}" for q in (0.5, 0.99))
            same = "all" if phase.all_exact else f"[red]{phase.exact}"
            hedges = "below" if "levels" in phase.what else sum(found.hedges for found in phase.found)
            table.add_row(phase.what, str(len(took)), same, str(phase.ties), p50, p99, str(hedges))
        console.print(table)
        asked = sum(len(phase.found) for phase in self._phases)
        exact = sum(phase.exact for phase in self._phases)
        console.print(f"{exact} of {asked} answers as of one index: same documents, same order, same scores")


def print_tree(root: Path, scatter_id: str, address: str) -> None:
    """A past request, as the roots remember it; from where the leaves' sockets are."""
    console.print(f"$ retinue scatter recent {scatter_id}")
    words = ["scatter", "recent", scatter_id, "--address", address, "--output", "table"]
    subprocess.run([sys.executable, "-m", "retinue.cli", *words], cwd=root, check=True)


def _losers(known: pb.RecentScatter) -> set[str]:
    return {attempt.address for attempt in known.attempts if attempt.outcome == ATTEMPT_OUTCOME_LOST}


def progress(what: str, items: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
    """Shows how far it is."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(items, description=what)


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGSTOP, and SIGCONT in the end."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def since(started: float) -> str:
    """How long ago."""
    return f"{time.monotonic() - started:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
