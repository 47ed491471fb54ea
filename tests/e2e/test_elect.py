"""An ordinary command under `retinue elect`, three times with a server each on one engine: one lives at a time."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from elections import Elect, Life, alive, await_life, check_lives, lives
from servers import start_server
from workers import eventually

KILLS = int(os.environ.get("KILLS", "20"))
NAME = "one-alive"
VICTIMS = ("elect", "command", "stopped elect", "server")


class Place:
    """A server, and a command that stands for the election there."""

    def __init__(self, where: Path, number: int, file: Path) -> None:
        self.where = where / str(number)
        self.where.mkdir()
        self._candidate = f"c{number}"
        self._file = file
        store = {"RETINUE_LEADERELECTION__SQLITE__PATH": str(where / "elections.db")}
        self.server = start_server(self.where, "leaderelection", env=store)
        self.elect = self._start()

    def _start(self) -> Elect:
        leases = ("--lease", "6s", "--app-lease", "3s", "--release-delay", "0")
        arguments = (NAME, *leases, "--candidate", self._candidate, "--", *alive(self._file))
        return Elect(self.server, *arguments, cwd=self.where)

    def strike(self, victim: str, life: Life) -> None:
        """Kills one of what this leader consists of."""
        match victim:
            case "elect":
                self.elect.process.kill()
            case "command":
                os.kill(life.pid, signal.SIGKILL)
            case "stopped elect":
                self.elect.send(signal.SIGSTOP)
            case "server":
                self.server.kill()

    def mend(self, victim: str) -> None:
        """As it was before."""
        match victim:
            case "elect" | "command":
                self.elect.close()
                self.elect = self._start()
            case "stopped elect":
                self.elect.send(signal.SIGCONT)
            case "server":
                self.server = self.server.restart()

    def close(self) -> None:
        self.elect.close()
        self.server.kill()


class Takeover(NamedTuple):
    """What a kill cost: from the last sign of life of one to the first of the next."""

    victim: str
    seconds: float


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[Place]]:
    with ExitStack() as stack:
        found = []
        for number in range(3):
            found.append(Place(tmp_path, number, tmp_path / "lives"))
            stack.callback(found[-1].close)
        yield found


def leader(places: list[Place], file: Path) -> tuple[Place, Life]:
    """Who leads, once somebody does: the command of the highest token, if it lives, is the child of its elect."""
    parents = {place.elect.process.pid: place for place in places}
    found: list[tuple[Place, Life]] = []

    def look() -> bool:
        life = lives(file)[-1]
        with contextlib.suppress(OSError, KeyError):  # it has ended meanwhile, and another will lead
            stat = Path(f"/proc/{life.pid}/stat").read_text().rpartition(")")[2].split()
            found.append((parents[int(stat[1])], life))
        return bool(found)

    await_life(file, 0)
    eventually(look, "somebody leads")
    return found[0]


@pytest.mark.timeout(900)
def test_one_command_lives_at_a_time_through_kills(places: list[Place], tmp_path: Path) -> None:
    file = tmp_path / "lives"
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 - shown when it fails
    chance = random.Random(seed)
    victims = [VICTIMS[kill % len(VICTIMS)] for kill in range(KILLS)]
    chance.shuffle(victims)
    takeovers = []
    for victim in victims:
        place, life = leader(places, file)
        place.strike(victim, life)
        after = await_life(file, life.token)
        before = next(old for old in lives(file) if old.token == life.token)
        takeovers.append(Takeover(victim, (after.begin - before.end) / 1e9))
        place.mend(victim)
    found = lives(file)
    check_lives(found)
    assert len(found) > KILLS
    print("\n".join(figures(takeovers)))  # noqa: T201 - with -s


def figures(takeovers: list[Takeover]) -> Iterator[str]:
    for victim in VICTIMS:
        times = sorted(t.seconds for t in takeovers if t.victim == victim)
        if times:
            middle = statistics.median(times)
            yield f"{victim:14} {len(times):3} take-overs, median {middle:.3f} s, longest {times[-1]:.3f} s"
