"""The cells: what is measured, on what, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from bench.elections.calls import acquire, keep_alive
from bench.elections.failures import app_crash, server_crash
from bench.elections.handover import client_go, etcd_election, handover
from bench.elections.many import many
from bench.processes import Failure
from bench.results import Played

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.elections.players import Figures

    Play = Callable[[str, int], Mapping[str, Figures]]

_DURABLE = ("sqlite", "etcd", "postgres")
_ALL = (*_DURABLE, "kubernetes")


@dataclass(frozen=True)
class Player:
    """Plays a cell once: given a name and how often to do it, it gives the figures of one system or several."""

    play: Play
    count: int


@dataclass(frozen=True)
class Cell:
    """A workload and who plays it; `rounds` at most."""

    title: str
    note: str
    systems: Mapping[str, Player]
    rounds: int = 100


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


def play(cell: Cell, names: Sequence[str], rounds: int) -> dict[str, Played]:
    """Round by round, in an order that turns; a system that fails is void and plays no more."""
    played: dict[str, Played] = {}
    for number in range(min(rounds, cell.rounds)):
        turn = number % max(len(names), 1)
        for name in [*names[turn:], *names[:turn]]:
            if not (name in played and played[name].void):
                _play(name, cell.systems[name], played)
    return {name: played[name] for name in sorted(played, key=lambda name: [*names, name].index(name))}


def _play(name: str, player: Player, played: dict[str, Played]) -> None:
    try:
        for system, figures in player.play(name, player.count).items():
            played.setdefault(system, Played(player.count)).rounds.append(dict(figures))
            print(f"  {system}: " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    except (Failure, AssertionError, OSError, TimeoutError, grpc.RpcError) as error:
        reason = " ".join(str(error).split())[:200].replace("|", "/") or type(error).__name__
        played.setdefault(name, Played(player.count)).void = reason
        print(f"  {name}: void: {reason}", flush=True)
