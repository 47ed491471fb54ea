"""A leaf to try scatter/gather with: full-text search in its part of Python's library and of the installed packages.

    python leaf.py --shard 0 --of 2 --listen 127.0.0.1:9000

It answers JSON with JSON, for pools with `merge: group_sum` and `merge: top_k`:

    {"count": ["asyncio"]}             {"documents": 3003, "tokens": 2710322, "with asyncio": 83}
    {"find": ["asyncio"], "k": 2}      [{"score": 7.9, "id": "python3.11/asyncio/tasks.py"}, ...]

How rare a term is, a shard knows of its own documents alone, so that scores of two shards do not compare. Who wants
the answer of one large index asks twice: for the sums of all counts, and then with `weights` and `average_length` made
of them. Of equal scores the lower number comes first; numbers are dealt out to shards in blocks, so that the merge's
rule for ties (the earlier shard, then the shard's own order) is the same order.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import sysconfig
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import apsw
import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from retinue.client.leaf import LeafService, Query, Refusal
from retinue.scattergather.v1 import leaf_service_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

SUFFIXES = frozenset({".md", ".proto", ".py", ".pyi", ".rst", ".toml", ".txt"})
LARGEST_BYTES = 64 * 1024
GRACE_S = 5.0
K1, B = 1.2, 0.75
"""Of BM25 (Robertson and Zaragoza, 2009), as most engines have them."""


# The documents


class Document(NamedTuple):
    """A file of the corpus."""

    name: str
    path: Path


def corpus() -> list[Document]:
    """The texts of Python's library and of the installed packages, well mixed; equal files make an equal corpus."""
    places = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")}
    found = [document for place in places for document in _texts(place)]
    return sorted(found, key=lambda document: sha256(document.name.encode()).digest())


def _texts(place: Path) -> Iterator[Document]:
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if name not in ("__pycache__", "site-packages", "dist-packages")]
        for path in (Path(folder, name) for name in files if Path(name).suffix in SUFFIXES):
            if path.is_file() and 0 < path.stat().st_size <= LARGEST_BYTES:
                yield Document(str(path.relative_to(place.parent)), path)


def block(count: int, shard: int, of: int) -> range:
    """The numbers of the documents that a shard has."""
    return range(count * shard // of, count * (shard + 1) // of)


# The index


class Hit(msgspec.Struct):
    """A document that was found."""

    score: float
    id: str


class Index:
    """Some documents in SQLite's FTS5, in memory. For one thread at a time."""

    def __init__(self, documents: Sequence[Document], numbers: range) -> None:
        self._db = apsw.Connection(":memory:")
        self._db.register_fts5_function("score", _score)  # type: ignore[arg-type] # its arguments are floats
        self._db.execute(
            "CREATE VIRTUAL TABLE docs USING fts5(name UNINDEXED, body, content='', contentless_unindexed=1,"
            " tokenize=\"unicode61 tokenchars '_'\");"
            "CREATE VIRTUAL TABLE terms USING fts5vocab(docs, row)"
        )
        with self._db:
            for number in numbers:
                name, path = documents[number]
                self._insert(number, name, path.read_text(errors="replace"))
        self.documents = len(numbers)
        self.tokens = int(self._db.execute("SELECT coalesce(sum(cnt), 0) FROM terms").get)

    def _insert(self, number: int, name: str, body: str) -> None:
        self._db.execute("INSERT INTO docs(rowid, name, body) VALUES (?, ?, ?)", (number, name, body))

    def vocabulary(self) -> list[tuple[str, int]]:
        """Every term, and how many documents have it."""
        return list(self._db.execute("SELECT term, doc FROM terms"))

    def count(self, terms: Sequence[str]) -> dict[str, int]:
        """What the weights are made of; adds up over shards."""
        found = {"documents": self.documents, "tokens": self.tokens}
        for term in terms:
            row = self._db.execute("SELECT count(*) FROM docs WHERE docs MATCH ?", (_phrase(term),))
            found[f"with {term}"] = int(row.get)
        return found

    def find(
        self, terms: Sequence[str], weights: Sequence[float], average_length: float, k: int, without: range = range(0)
    ) -> list[Hit]:
        """The k best documents that have any of the terms; but for those with numbers in `without`."""
        marks = "".join(", ?" for _ in weights)
        rows = self._db.execute(
            f"SELECT score(docs, ?{marks}) AS score, name FROM docs WHERE docs MATCH ?"  # noqa: S608 - question marks
            " AND rowid NOT BETWEEN ? AND ? ORDER BY score DESC, rowid LIMIT ?",
            (average_length, *weights, " OR ".join(map(_phrase, terms)), without.start, without.stop - 1, k),
        )
        return [Hit(score, name) for score, name in rows]


def _phrase(term: str) -> str:
    return '"' + term.replace('"', '""') + '"'


def _score(api: apsw.FTS5ExtensionApi, average_length: Any, *weights: Any) -> float:
    """BM25 of one document; the terms are added in the order of the question, so that equal inputs give equal bits."""
    shortness = K1 * (1 - B + B * api.column_size(1) / average_length)
    total = 0.0
    for phrase, weight in enumerate(weights):
        often = len(api.phrase_column_offsets(phrase, 1))
        total += weight * often * (K1 + 1) / (often + shortness)
    return total


def weights(terms: Sequence[str], counts: Mapping[str, float]) -> tuple[list[float], float]:
    """The inverse document frequency of each term, and the average length in tokens, of counts that were added up."""
    documents = counts["documents"]
    rare = [math.log(1 + (documents - counts[f"with {t}"] + 0.5) / (counts[f"with {t}"] + 0.5)) for t in terms]
    return rare, counts["tokens"] / documents


# The leaf


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """What a leaf is asked: one of `count` and `find`."""

    count: list[str] = []
    find: list[str] = []
    weights: list[float] | None = None
    """One for each term; without them the shard's own."""
    average_length: float = 0.0
    k: int = 10

    def __post_init__(self) -> None:
        if bool(self.count) == bool(self.find):
            raise ValueError("one of `count` and `find` must have terms")
        if not all(any(map(str.isalnum, term)) for term in self.count + self.find):
            raise ValueError("every term must have letters or digits")
        if self.weights is not None and (len(self.weights) != len(self.find) or self.average_length <= 0):
            raise ValueError("there must be a weight for each term, and an average_length above 0")


def answerer(index: Index) -> Callable[[Query], Any]:
    """What answers a question: counts, or the documents that were found."""

    def answer(query: Query) -> Any:
        try:
            question = msgspec.json.decode(query.payload, type=Question)
        except msgspec.MsgspecError as error:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"cannot answer: {error}") from None
        if question.count:
            return index.count(question.count)
        found, length = question.weights, question.average_length
        if found is None:
            found, length = weights(question.find, index.count(question.find))
        return msgspec.to_builtins(index.find(question.find, found, length, question.k))

    return answer


async def serve(index: Index, address: str) -> None:
    """Until SIGTERM, with the health that a kubelet asks for; SQLite has one thread."""
    leaf, server, alive = LeafService(answerer(index), threads=1), grpc.aio.server(), health.aio.HealthServicer()
    rpc.add_LeafServiceServicer_to_server(leaf, server)
    health_pb2_grpc.add_HealthServicer_to_server(alive, server)
    server.add_insecure_port(address)
    await server.start()
    await alive.set("", health_pb2.HealthCheckResponse.SERVING)
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    print(f"serves {index.documents} documents at {address}", flush=True)
    await told.wait()
    leaf.stop()
    await server.stop(GRACE_S)
    leaf.close()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shard", type=int, required=True, metavar="N", help="which part of the documents, from 0")
    parser.add_argument("--of", type=int, required=True, metavar="M", help="how many parts there are")
    parser.add_argument("--listen", default="127.0.0.1:9000", metavar="ADDRESS", help="HOST:PORT or unix:PATH")
    said = parser.parse_args()
    if not 0 <= said.shard < said.of:
        parser.error("--shard must be from 0 to one less than --of")
    documents = corpus()
    index = Index(documents, block(len(documents), said.shard, said.of))
    asyncio.run(serve(index, said.listen))


if __name__ == "__main__":
    main()
