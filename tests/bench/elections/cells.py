"""The cells: what is measured, on what, and how often."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.elections.calls import acquire, keep_alive
from bench.elections.failures import app_crash, server_crash
from bench.elections.handover import client_go, etcd_election, handover
from bench.elections.many import many
from bench.turns import Cell, Player

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.turns import Play

_DURABLE = ("sqlite", "etcd", "postgres")
_ALL = (*_DURABLE, "kubernetes")


def _engines(play: Play, count: int, names: Sequence[str] = _DURABLE) -> dict[str, Player]:
    return {name: Player(play, count) for name in names}


CELLS = {
    "handover": Cell(
        "Graceful hand-over between two servers",
        "the leader resigns, a candidate on the other server is elected; etcd's Election API and client-go "
        "(ReleaseOnCancel, default timings) without servers between",
        {
            **_engines(handover, 200),
            "kubernetes": Player(handover, 50),
            "etcd's Election API": Player(etcd_election, 200),
            "client-go": Player(client_go, 6),
        },
    ),
    "app_crash": Cell(
        "SIGKILL of the app that leads",
        "a candidate on another server is elected; 40 times with proof of death and an app lease of 2 s, 10 times "
        "without and with one of 500 ms",
        _engines(app_crash, 40, _ALL),
    ),
    "server_crash": Cell(
        "SIGKILL of the leader's server",
        "a candidate on another server is elected; engine lease 2 s",
        _engines(server_crash, 5, _ALL),
    ),
    "acquire": Cell(
        "To acquire, called from Python",
        "TryAcquire and Resign on a server with SQLite; Txn (create revision is 0: put with a lease that is there) and "
        "Txn (delete) on etcd; one after the other",
        {"sqlite": Player(acquire, 400)},
    ),
    "keep_alive": Cell(
        "To keep it, called from Python",
        "heartbeat and its answer on a Campaign stream; LeaseKeepAlive and its answer on etcd's stream; one after the "
        "other",
        {"sqlite": Player(keep_alive, 1_000)},
    ),
    "many": Cell(
        "1,000 elections led on one server for 60 s",
        "default leases, all apps alive by open streams; client-go's defaults would write 500 rows in 500 commits a "
        "second",
        _engines(many, 1_000),
        rounds=1,
    ),
}
