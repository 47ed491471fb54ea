"""The settings of leader election (`leaderelection:` in the file, RETINUE_LEADERELECTION__… in the environment)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]


class SqliteSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the engine `sqlite` has its file."""

    path: Path | None = None
    """The file, the same for all servers of the host that elect together; None = DATA_DIR/leaderelection/elections.db.
    Never on a network file system."""


class EtcdSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the engine `etcd` finds its cluster."""

    endpoints: tuple[str, ...] = ("127.0.0.1:2379",)
    """HOST:PORT of its members; the next is called when one does not answer."""
    prefix: str = "retinue/elections"
    """What its keys begin with; servers that share it elect together, and
    `etcdctl elect --listen PREFIX/ELECTION` shows who leads."""
    ca_file: Path | None = None
    """The certificate authority of the members; with it TLS is spoken, without it plaintext."""
    cert_file: Path | None = None
    """The certificate by which this server shows itself; with key_file and ca_file."""
    key_file: Path | None = None


class PostgresSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the engine `postgres` finds its database."""

    url: str = ""
    """postgresql://USER@HOST:PORT/DATABASE?…, as libpq takes it; several hosts are tried for one that takes writes.
    Give a password by the environment or by a file."""
    password_file: Path | None = None
    """A file whose content is the password; read at every connect."""
    schema: str = "retinue"
    """Where its tables are; servers that share a schema elect together."""
    prepared_statements: bool = True
    """false behind a pooler that gives each transaction another connection and does not follow them (PgBouncer)."""
    listen_url: str = ""
    """A way to the database past the pooler, to hear of others' changes at once; empty = the url."""


class KubernetesSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the engine `kubernetes` finds its Leases."""

    namespace: str = ""
    """Where they are; empty = the pod's own."""
    kubeconfig: Path | None = None
    """How to reach the API server; None = by the pod's service account."""
    create: bool = False
    """Makes a missing Lease, which needs a role that may. Otherwise they must have been applied."""
    watch_namespace: bool = False
    """Watches all Leases of the namespace at once, which needs a role that may list them: for more than 64 elections on
    one server. Otherwise each is watched by name."""


class LeaderElectionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may set."""

    engine: Literal["sqlite", "etcd", "postgres", "kubernetes", "memory"] = "sqlite"
    """Who decides who leads."""
    sqlite: SqliteSettings = SqliteSettings()
    etcd: EtcdSettings = EtcdSettings()
    postgres: PostgresSettings = PostgresSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    scope: Literal["pod"] | None = None
    """`pod` says that an election within one pod or host is meant, where an engine that reaches no further would refuse
    to start because it runs in a pod."""
    pod_labels: tuple[str, ...] = ()
    """`ELECTION=LABEL`: in Kubernetes, with whatever engine, the pod of the server whose app leads gets the label with
    the value `true`, so that a Service can select it. The API server is reached as `kubernetes` says."""
    pod_name: str = ""
    """The pod that is labelled; empty = the host's name, which in a pod is its own."""
    elections: tuple[str, ...] = ()
    """The elections that this server serves; empty = all."""
    lease_seconds: Annotated[float, msgspec.Meta(ge=1, le=600)] = 15.0
    """The engine's lease of those who ask for none: how soon others take over when this server is gone."""
    app_lease_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=300)] = 2.0
    """The app's lease of those who ask for none."""
    proof_dir: Path | None = None
    """Where proof files are; in a pod a volume that app and server share. None = DATA_DIR/leaderelection/proofs."""
    max_sessions: Count = 10_000
    """How many candidates this server takes at once."""
    max_observers: Count = 10_000
    """How many observers this server takes at once."""
