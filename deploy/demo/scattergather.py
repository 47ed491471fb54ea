"""`make demo DEMO=scattergather`: full-text search in eight shards of two replicas, with the answers of one big index.

Each query scatters twice: for the counts that say how rare its terms are, then for the ten best documents. All answers
are compared with those of one index over everything, while replicas are stopped and killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import msgspec
import yaml
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from retinue.scattergather.v1 import scattergather_service_pb2 as pb
from retinue.scattergather.v1 import topology_service_pb2 as topology_pb
from retinue.scattergather.v1.coverage_pb2 import ATTEMPT_OUTCOME_LOST, AttemptKind, AttemptOutcome
from retinue.scattergather.v1.scattergather_service_pb2_grpc import ScatterGatherServiceStub
from retinue.scattergather.v1.topology_service_pb2_grpc import TopologyServiceStub

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "scattergather"))

from leaf import Hit, Index, block, corpus, weights  # noqa: E402 - it is beside the manifests that use it

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

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
        story = Story(cluster, Search(cluster.root.address), Whole.built())
        return story.told()
    finally:
        cluster.stop()


# The processes


class Leaf:
    """One replica of a shard."""

    def __init__(self, root: Path, shard: int, replica: int) -> None:
        self.shard, self.name = shard, f"shard-{shard}{'ab'[replica]}"
        self.address = f"unix:{root / self.name}.sock"
        self._log = root / f"{self.name}.log"
        self.start()

    def start(self) -> None:
        """It answers once it has indexed its documents."""
        words = ["--shard", str(self.shard), "--of", str(SHARDS), "--listen", self.address]
        self.process = spawn(self._log, str(LEAF), *words)

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
        words = ["--listen", "127.0.0.1:0", "--data-dir", str(data), "--ready-file", str(ready)]
        self.process = spawn(root / f"{name}.log", "-m", "retinue_server", "scattergather", *words)
        await_true(lambda: ready.exists() and ready.read_text().endswith("\n"), f"{name} is ready", root)
        self.address: str = json.loads(ready.read_text())["listen"][0]


def spawn(log: Path, *words: str) -> subprocess.Popen[bytes]:
    """A Python process with its output in a file."""
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file)


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
        """Returns when every leaf can be asked."""
        started = time.monotonic()
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
        for parent in self.roots:
            self.await_connected(parent)
        console.print(f"{len(self.leaves)} leaves, {SHARDS} shards of {REPLICAS} replicas, started in {since(started)}")

    @property
    def root(self) -> Root:
        """The one that is asked."""
        return self.roots[-1]

    def await_connected(self, root: Root) -> None:
        """Until every endpoint of every pool is connected."""
        with grpc.insecure_channel(root.address) as channel:
            stub = TopologyServiceStub(channel)
            for pool in stub.ListPools(topology_pb.ListPoolsRequest()).pools:
                request = topology_pb.WatchTopologyRequest(pool_id=pool.pool_id)
                watch = stub.WatchTopology(request, timeout=PATIENCE_S)
                next(event for event in watch if all(e.connected for s in event.pool.shards for e in s.endpoints))
                watch.cancel()

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


class Answer(NamedTuple):
    """What a query got."""

    hits: list[Hit]
    took_s: float
    responses: tuple[pb.ScatterResponse, ...]
    """Of the two rounds."""

    @property
    def hedges(self) -> int:
        """Calls that were made beside slow ones."""
        return sum(response.stats.hedges for response in self.responses)


class Search:
    """What an app does that wants the answer of one large index."""

    def __init__(self, address: str) -> None:
        self._stub = ScatterGatherServiceStub(grpc.insecure_channel(address))

    def __call__(self, terms: Sequence[str], *, pools: str = "", min_coverage: float = 1.0) -> Answer:
        """The ten best documents that have any of the terms; raises grpc.RpcError."""
        begun = time.perf_counter()
        policy = pb.ScatterPolicy(min_coverage=min_coverage)
        counts = self._scatter(f"{pools}counts", {"count": terms}, policy)
        rare, average = weights(terms, MessageToDict(counts.json))
        question = {"find": terms, "weights": rare, "average_length": average, "k": K}
        found = self._scatter(f"{pools}search", question, policy)
        return Answer(_hits(found), time.perf_counter() - begun, (counts, found))

    def by_own_counts(self, terms: Sequence[str]) -> Answer:
        """In one round: each shard weighs the terms by its own documents."""
        begun = time.perf_counter()
        found = self._scatter("search", {"find": terms, "k": K}, pb.ScatterPolicy())
        return Answer(_hits(found), time.perf_counter() - begun, (found,))

    def _scatter(self, pool_id: str, question: object, policy: pb.ScatterPolicy) -> pb.ScatterResponse:
        payload = msgspec.json.encode(question)
        response = self._stub.Scatter(pb.ScatterRequest(pool_id=pool_id, payload=payload, policy=policy))
        assert isinstance(response, pb.ScatterResponse)
        return response

    def first_asked(self, shard_id: str) -> str:
        """The address of the replica that the next request to the shard would go to."""
        request = pb.ExplainScatterRequest(request=pb.ScatterRequest(pool_id="search", shard_ids=[shard_id]))
        return str(self._stub.ExplainScatter(request).shards[0].endpoints[0].address)

    def recent(self, scatter_id: str) -> pb.RecentScatter:
        """A past request."""
        request = pb.ListRecentScattersRequest(scatter_id=scatter_id)
        [found] = self._stub.ListRecentScatters(request).scatters
        assert isinstance(found, pb.RecentScatter)
        return found


def _hits(response: pb.ScatterResponse) -> list[Hit]:
    return msgspec.convert(MessageToDict(response.json), list[Hit])


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
    answers: list[Answer] = field(default_factory=list)
    exact: int = 0
    ties: int = 0

    def add(self, answer: Answer, wanted: list[Hit]) -> None:
        """Compares documents, order and scores, bit by bit."""
        self.answers.append(answer)
        self.exact += answer.hits == wanted
        self.ties += len({hit.score for hit in wanted}) < len(wanted)

    @property
    def all_exact(self) -> bool:
        """Whether every answer was."""
        return self.exact == len(self.answers)


class Story:
    """Asks, strikes, asks again."""

    def __init__(self, cluster: Cluster, search: Search, whole: Whole) -> None:
        self._cluster, self._search, self._whole = cluster, search, whole
        self._queries = whole.queries(QUERIES)
        self._few = self._queries[: max(QUERIES // 4, 1)]
        self._phases: list[Phase] = []

    def told(self) -> int:
        """0 if every answer was as it had to be."""
        self._ask("all leaves are well", self._queries, self._search, self._whole)
        self._by_own_counts()
        self._ask("two levels", self._few, lambda terms: self._search(terms, pools="tree-"), self._whole)
        hedged = self._one_replica_stops()
        truthful = self._a_shard_is_lost()
        self._report()
        self._print_tree(hedged)
        return 0 if truthful and all(phase.all_exact for phase in self._phases) else 1

    def _ask(
        self,
        what: str,
        queries: Sequence[Sequence[str]],
        ask: Callable[[Sequence[str]], Answer],
        wanted: Callable[[Sequence[str]], list[Hit]],
    ) -> Phase:
        phase = Phase(what)
        for terms in progress(what, queries):
            phase.add(ask(terms), wanted(terms))
        self._phases.append(phase)
        return phase

    def _by_own_counts(self) -> None:
        """Shows that the first round is needed; not a phase, since it is wrong by intent."""
        same = sum(_ids(self._search.by_own_counts(terms).hits) == _ids(self._whole(terms)) for terms in self._few)
        console.print(
            f"by each shard's own counts, {same} of {len(self._few)} answers would have been the same documents"
        )

    def _one_replica_stops(self) -> str:
        """The name of a request whose hedge won."""
        address = self._search.first_asked(f"shard-{STOPPED}")
        [leaf] = [leaf for leaf in self._cluster.replicas(STOPPED) if leaf.address == address]
        with stopped(leaf.process):
            console.print(f"SIGSTOP to {leaf.name}: it keeps its connections and answers nobody")
            phase = self._ask(f"{leaf.name} is stopped", self._few, self._search, self._whole)
        responses = (response for answer in phase.answers for response in answer.responses)
        hedged = (self._search.recent(one.scatter_id) for one in responses if one.stats.hedges_won)
        return next((one.scatter_id for one in hedged if leaf.address in _losers(one)), "")

    def _a_shard_is_lost(self) -> bool:
        """Whether both modes told the truth about it."""
        replicas = self._cluster.replicas(KILLED)
        for leaf in replicas:
            leaf.kill()
        console.print(f"SIGKILL to {' and '.join(leaf.name for leaf in replicas)}")
        told = self._strict_refuses()
        partly = self._ask("the others, in part", self._few, self._in_part, self._whole.without_lost)
        covered = [response.coverage for answer in partly.answers for response in answer.responses]
        told = told and all((c.answered, c.expected, c.complete) == (SHARDS - 1, SHARDS, False) for c in covered)
        console.print(f"min_coverage 0.5: coverage {covered[0].answered} of {covered[0].expected} in each answer")
        for leaf in replicas:
            leaf.start()
        self._cluster.await_connected(self._cluster.root)
        self._ask("both are back", self._few, self._search, self._whole)
        return told

    def _in_part(self, terms: Sequence[str]) -> Answer:
        return self._search(terms, min_coverage=0.5)

    def _strict_refuses(self) -> bool:
        """Names the shard, or the claim fails."""
        try:
            self._search(self._queries[0])
        except grpc.RpcError as error:
            console.print(f"strict: {error.code().name}: {error.details()}", soft_wrap=True)
            return f"shard-{KILLED}" in str(error.details())
        return False

    def _report(self) -> None:
        """What came; the times are of both rounds together."""
        table = Table(title=f"the {K} best of {self._whole.documents:,} documents for one to four terms")
        for column in ("", "queries", "exact", "with ties", "p50, ms", "p99, ms", "hedges"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for phase in self._phases:
            took = sorted(answer.took_s for answer in phase.answers)
            p50, p99 = (f"{took[int(q * len(took))] * 1000:.1f}" for q in (0.5, 0.99))
            same = "all" if phase.all_exact else f"[red]{phase.exact}"
            hedges = sum(answer.hedges for answer in phase.answers)
            table.add_row(phase.what, str(len(took)), same, str(phase.ties), p50, p99, str(hedges))
        console.print(table)
        asked = sum(len(phase.answers) for phase in self._phases)
        exact = sum(phase.exact for phase in self._phases)
        console.print(f"{exact} of {asked} answers as of one index: same documents, same order, same scores")

    def _print_tree(self, scatter_id: str) -> None:
        """A past request, as the root remembers it."""
        known = self._search.recent(scatter_id)
        stats, zero = known.stats, known.start_time.ToDatetime()
        console.print(f"request {scatter_id} to pool {known.pool_id}, {zero:%H:%M:%S}, {ms(stats.elapsed_duration)}")
        for attempt in known.attempts:
            kind, outcome = AttemptKind.Name(attempt.kind), AttemptOutcome.Name(attempt.outcome)
            console.print(
                f"  {attempt.shard_id:8} {kind.rpartition('_')[2].lower():8} {Path(attempt.address).stem:9}"
                f" from {ms(attempt.start_duration):>9} for {ms(attempt.elapsed_duration):>9}"
                f"  {outcome.rpartition('_')[2].lower()}"
            )


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


def ms(duration: Duration) -> str:
    """In milliseconds."""
    return f"{duration.ToMicroseconds() / 1000:.1f} ms"


def since(started: float) -> str:
    """How long ago."""
    return f"{time.monotonic() - started:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
