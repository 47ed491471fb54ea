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


class LeaderElectionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may set."""

    engine: Literal["sqlite", "etcd", "memory"] = "sqlite"
    """Who decides who leads."""
    sqlite: SqliteSettings = SqliteSettings()
    etcd: EtcdSettings = EtcdSettings()
    scope: Literal["pod"] | None = None
    """`pod` says that an election within one pod or host is meant, where an engine that reaches no further would refuse
    to start because it runs in a pod."""
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
