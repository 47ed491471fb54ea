"""What decides who leads: how servers reach it, through a proxy each, and the faults that it alone can suffer."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.election_faults.schedule import Kind
from support.etcd import Etcd
from support.faults.engines import terminate_backends
from support.kubernetes import Kubernetes
from support.postgres import Postgres

ELECTION = "nightly-report"
Pause = Callable[[float], None]
"""Sleeps for so many seconds."""


@dataclass(frozen=True)
class Engine:
    """An engine that is ready for servers."""

    name: str
    settings: Callable[[str], Mapping[str, str]]
    """A server's, who reaches it at that address: the proxy's."""
    address: str = ""
    """Where it listens; empty = there is no connection."""
    lease_s: float = 1.0
    faults: Mapping[Kind, Callable[[Callable[[], None]], None]] = field(default_factory=dict)
    """Each is told how to wait for as long as the fault lasts, and returns when the engine runs again."""
    one_kernel: bool = False
    """It compares the boot clocks of servers."""


Prepare = Callable[[Path], AbstractContextManager[Engine]]
"""Makes an engine ready in an empty directory."""


def _named(engine: str, **settings: str) -> dict[str, str]:
    names = {f"RETINUE_LEADERELECTION__{key}": value for key, value in settings.items()}
    return {"RETINUE_LEADERELECTION__ENGINE": engine, **names}


@contextmanager
def sqlite(where: Path) -> Iterator[Engine]:
    """One file of all servers."""
    path = str(where / "elections.db")
    yield Engine("sqlite", lambda _: _named("sqlite", SQLITE__PATH=path), one_kernel=True)


@contextmanager
def etcd(where: Path) -> Iterator[Engine]:
    """A member of its own."""
    member = Etcd.create(where / "etcd")

    def stop(wait: Callable[[], None]) -> None:
        member.signal(signal.SIGSTOP)
        wait()
        member.signal(signal.SIGCONT)

    def again(end: Callable[[], None]) -> Callable[[Callable[[], None]], None]:
        def play(wait: Callable[[], None]) -> None:
            end()
            wait()
            member.start()

        return play

    faults = {Kind.STOP_ENGINE: stop, Kind.RESTART_ENGINE: again(member.stop), Kind.CRASH_ENGINE: again(member.kill)}
    try:
        yield Engine("etcd", lambda at: _named("etcd", ETCD__ENDPOINTS=at), member.endpoint, 2.0, faults)
    finally:
        member.kill()


@contextmanager
def postgres(_: Path) -> Iterator[Engine]:
    """A database of its own."""
    directory = Path(tempfile.mkdtemp(prefix="retinue-postgres-"))
    directory.chmod(0o755)  # root's database belongs to another
    database = Postgres.create(directory / "server")

    def again(mode: str) -> Callable[[Callable[[], None]], None]:
        def play(wait: Callable[[], None]) -> None:
            database.stop(mode)
            wait()
            database.start()

        return play

    def terminate(_: Callable[[], None]) -> None:
        terminate_backends(database)

    faults = {
        Kind.RESTART_ENGINE: again("fast"),
        Kind.CRASH_ENGINE: again("immediate"),
        Kind.TERMINATE_BACKENDS: terminate,
    }
    address = f"127.0.0.1:{database.port}"
    try:
        yield Engine(
            "postgres",
            lambda at: _named("postgres", POSTGRES__URL=database.url.replace(address, at)),
            address,
            faults=faults,
        )
    finally:
        database.stop("immediate")
        shutil.rmtree(directory)


@contextmanager
def kubernetes(where: Path) -> Iterator[Engine]:
    """An API server and its etcd."""
    cluster = Kubernetes.create(where / "kubernetes")

    def stop(wait: Callable[[], None]) -> None:
        cluster.signal("kube-apiserver", signal.SIGSTOP)
        wait()
        cluster.signal("kube-apiserver", signal.SIGCONT)

    def restart(wait: Callable[[], None]) -> None:
        cluster.kill("kube-apiserver")
        wait()
        cluster.start_api()

    def crash(wait: Callable[[], None]) -> None:
        cluster.kill("etcd")
        wait()
        cluster.start_etcd()

    def settings(at: str) -> Mapping[str, str]:
        said = json.loads(cluster.kubeconfig.read_text())
        said["clusters"][0]["cluster"]["server"] = f"https://{at}"
        path = where / f"kubeconfig-{at.rpartition(':')[2]}"
        path.write_text(json.dumps(said))
        return _named(
            "kubernetes",
            KUBERNETES__KUBECONFIG=str(path),
            KUBERNETES__NAMESPACE=namespace,
            KUBERNETES__CREATE="true",
        )

    try:
        namespace = cluster.namespace()
        faults = {Kind.STOP_ENGINE: stop, Kind.RESTART_ENGINE: restart, Kind.CRASH_ENGINE: crash}
        yield Engine("kubernetes", settings, f"127.0.0.1:{cluster.api_port}", faults=faults)
    finally:
        cluster.stop()


ENGINES: Mapping[str, Prepare] = {"sqlite": sqlite, "etcd": etcd, "postgres": postgres, "kubernetes": kubernetes}
