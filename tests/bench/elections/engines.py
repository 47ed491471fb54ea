"""Real engines in directories of their own, how servers find them, and what has been written to them."""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import apsw
from servers import RunningServer, start_server
from support.etcd import Etcd
from support.kubernetes import Kubernetes
from support.kubernetes.build import are_built
from support.postgres import Postgres

from bench.brokers import fresh
from bench.processes import Failure, Syncs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Written:
    """What an engine has written since it began, by its own account."""

    rows: float
    commits: float
    writing: float = 0
    """Of the commits, those that wrote something, where commits of those who only read are counted, too."""

    def __sub__(self, other: Written) -> Written:
        return Written(self.rows - other.rows, self.commits - other.commits, self.writing - other.writing)


def _nothing() -> Written:
    raise Failure("nobody counts what this engine writes")


@dataclass
class Store:
    """An engine: what a server's environment must say, and what has been written."""

    where: Path
    environment: dict[str, str]
    address: str = ""
    written: Callable[[], Written] = _nothing
    _servers: list[RunningServer] = field(default_factory=list)

    def serve(self, name: str) -> RunningServer:
        """Starts a server of that name, or starts it again with the data it had."""
        (self.where / name).mkdir(exist_ok=True)
        server = start_server(self.where / name, "leaderelection", env=self.environment)
        self._servers.append(server)
        return server

    def close(self) -> None:
        for server in self._servers:
            if server.process.poll() is None:
                server.kill()


@contextmanager
def store(engine: str, cell: str) -> Iterator[Store]:
    """The engine with nothing in it; servers that were started on it end with it."""
    with ExitStack() as stack:
        made = _STORES[engine](fresh(f"le-{cell}-{engine}"), stack)
        made.environment["RETINUE_LEADERELECTION__ENGINE"] = engine
        stack.callback(made.close)
        yield made


def _sqlite(where: Path, stack: ExitStack) -> Store:
    path = where / "elections.db"
    syncs = Syncs(where / "syncs")
    watch = _Rows(path)
    environment = {"RETINUE_LEADERELECTION__SQLITE__PATH": str(path), **syncs.environment}
    return Store(where, environment, written=lambda: Written(watch.changed(), syncs.count))


class _Rows:
    """Counts the rows whose deadline has moved; to be asked more often than a row is renewed."""

    def __init__(self, path: Path) -> None:
        self._path, self._known, self._changed = path, set[tuple[str, int]](), 0

    def changed(self) -> int:
        connection = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            rows = set(connection.execute("SELECT election_id, deadline_ms FROM election"))
        finally:
            connection.close()
        self._changed += len(rows - self._known)
        self._known = rows
        return self._changed


def _etcd(where: Path, stack: ExitStack) -> Store:
    server = Etcd.create(where / "etcd")
    stack.callback(server.kill)

    def written() -> Written:
        [found] = json.loads(server.ctl("endpoint", "status", "--write-out=json"))
        return Written(found["Status"]["header"]["revision"], found["Status"]["raftIndex"])

    environment = {"RETINUE_LEADERELECTION__ETCD__ENDPOINTS": server.endpoint}
    return Store(where, environment, server.endpoint, written)


def _postgres(where: Path, stack: ExitStack) -> Store:
    where.parent.chmod(0o755)
    server = Postgres.create(where / "postgres")
    stack.callback(server.stop, "immediate")

    def written() -> Written:
        sql = (
            "SELECT (SELECT coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0) FROM pg_stat_user_tables),"
            " (SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()),"
            " pg_snapshot_xmax(pg_current_snapshot())::text"
        )
        [row] = server.run(sql)
        return Written(*(float(str(value)) for value in row))

    return Store(where, {"RETINUE_LEADERELECTION__POSTGRES__URL": server.url}, server.url, written)


def _kubernetes(where: Path, stack: ExitStack) -> Store:
    if not are_built():
        raise Failure("the API server is not built: make kubernetes")
    server = Kubernetes.create(where / "kubernetes")
    stack.callback(server.stop)
    namespace = server.namespace()
    settings = {"KUBECONFIG": str(server.kubeconfig), "NAMESPACE": namespace, "CREATE": "true"}
    environment = {f"RETINUE_LEADERELECTION__KUBERNETES__{key}": value for key, value in settings.items()}
    return Store(where, environment, f"{server.kubeconfig} {namespace}")


_STORES: dict[str, Callable[[Path, ExitStack], Store]] = {
    "sqlite": _sqlite,
    "etcd": _etcd,
    "postgres": _postgres,
    "kubernetes": _kubernetes,
}
