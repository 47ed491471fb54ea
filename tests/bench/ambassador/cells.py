"""The cells: what is measured, on what, and how often."""

from __future__ import annotations

from bench.ambassador.declaring import ENVOY, NATIVE, first_byte, many
from bench.ambassador.memcached import memcached
from bench.ambassador.others import http, redis, tcp
from bench.turns import Cell, Player

ALL = "all"
"""Cells that play several systems in turns name them themselves."""
CLIENTS = 8, 64
_TURNS = 2


CELLS = {
    **{
        f"memcached_{kind}_{clients}": Cell(
            f"memcached: {kind} over three shards, {clients} clients",
            f"100 bytes, 100,000 keys, {_TURNS} turns of 1.5 s each",
            {ALL: Player(memcached(kind, clients), _TURNS)},
        )
        for kind in ("get", "set")
        for clients in CLIENTS
    },
    "http": Cell(
        "HTTP: GET, 16 clients",
        f"100 bytes, {_TURNS} turns of 1.5 s each",
        {ALL: Player(http(16), _TURNS)},
    ),
    **{
        f"redis_{command}": Cell(
            f"Redis: {command} over three servers, 50 clients",
            f"100 bytes, 100,000 keys, {_TURNS} turns of 40,000 commands each",
            {ALL: Player(redis(command, 50), _TURNS)},
        )
        for command in ("get", "set")
    },
    "tcp": Cell(
        "TCP: 100 bytes there and back, 16 clients",
        f"{_TURNS} turns of 1.5 s each",
        {ALL: Player(tcp(16), _TURNS)},
    ),
    "first_byte": Cell(
        "From declaring an upstream to the first byte through it",
        "100 upstreams of each, in turns; each is removed before the next",
        {ALL: Player(first_byte, 101)},
        rounds=2,
    ),
    "many": Cell(
        "500 upstreams",
        "declared one after the other; figures per upstream are for those from 101 to 500",
        {name: Player(many, 500) for name in (NATIVE, ENVOY)},
        rounds=2,
    ),
}
