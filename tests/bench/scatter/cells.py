"""The cells: what is measured, on what, and how often."""

from __future__ import annotations

from bench.scatter.many import processes, tree
from bench.scatter.overhead import overhead
from bench.scatter.overload import overload
from bench.scatter.slowness import brown_out, stragglers
from bench.turns import Cell, Player

ALL = "all"
"""Cells that play several systems in turns name them themselves."""
FAN_OUTS = 8, 32, 128
OVERLOADED = 32, 128
_TURNS = 4


CELLS = {
    **{
        f"overhead_{fan_out}": Cell(
            f"What the root costs, fan-out {fan_out}",
            f"4 callers, 100 bytes there and back, {_TURNS} turns of a second each",
            {ALL: Player(overhead(fan_out), _TURNS)},
        )
        for fan_out in FAN_OUTS
    },
    "stragglers": Cell(
        "1 % of calls take a second more",
        "100 shards of 2 replicas, leaves take 2 ms (exponentially distributed), open loop at 25/s for 20 s",
        {ALL: Player(stragglers, 1)},
        rounds=2,
    ),
    "brown_out": Cell(
        "All replicas become slow",
        "20 shards of 2 replicas that serve one query after the other, 2 ms each and then 27 ms (exponentially "
        "distributed), open loop at 60/s for 10 s, callers wait for a second",
        {ALL: Player(brown_out, 1)},
    ),
    **{
        f"overload_{fan_out}": Cell(
            f"Three times as much as it can, fan-out {fan_out}",
            "open loop for 8 s at three times the peak of 4 and 8 callers",
            {"retinue": Player(overload(fan_out), 8)},
        )
        for fan_out in OVERLOADED
    },
    "tree": Cell(
        "1,000 leaves: one root, and one with 25 parents of 40 leaves each",
        "one caller; all roots and parents share a core, as the leaves and the load do another",
        {ALL: Player(tree, 6)},
        rounds=2,
    ),
    "processes": Cell(
        "More root processes",
        "fan-out 32, 4 callers for each process; the second has the core of leaves and load",
        {ALL: Player(processes, 3)},
        rounds=2,
    ),
}
