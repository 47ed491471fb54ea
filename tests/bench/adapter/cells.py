"""The cells: what is measured, on what, and how often."""

from __future__ import annotations

from bench.adapter.collecting import cost, hung, scrapes, start
from bench.adapter.statsd import statsd
from bench.adapter.watching import watchers
from bench.turns import Cell, Player

ALL = "all"
"""Cells that play several systems in turns name them themselves."""
_FIVE = "five apps of 2,000 lines, once a second"


CELLS = {
    "scrapes": Cell(
        "Scrapes while collections run",
        f"{_FIVE}; 8 s of each kind of scraper",
        {ALL: Player(scrapes, 8)},
    ),
    "cost": Cell(
        "CPU of a collected series",
        f"{_FIVE}, and the parser alone over the same pages in the same 15 s",
        {ALL: Player(cost, 15)},
    ),
    "statsd": Cell(
        "StatsD",
        "UDP, 40 lines of 30 to 45 bytes in a datagram, 120 series; 4 s of each",
        {ALL: Player(statsd, 4)},
    ),
    "hung": Cell(
        "Ten hung apps among five good ones",
        f"{_FIVE}, timeout 1 s; 3 turns of 4 s each",
        {ALL: Player(hung, 3)},
    ),
    "watchers": Cell(
        "100 watchers of one match",
        f"{_FIVE}; a match of 100 series in two apps, each of which is told once a second; 2 turns of 4 s each",
        {ALL: Player(watchers, 2)},
    ),
    "start": Cell(
        "Start and memory",
        "the server alone, then with its worker and all of five apps of 2,000 lines",
        {"retinue": Player(start, 1)},
    ),
}
