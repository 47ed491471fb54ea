"""Every fault in every mode: what the caller saw, and what coverage was reported."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from google.rpc import code_pb2

from support.faults.proxy import Mode as Link
from support.history.recorder import boot_ns
from support.scatter_faults.behaviour import Behaviour
from support.scatter_faults.callers import Caller, Pending
from support.scatter_faults.hosts import Hosts
from support.scatter_faults.pools import Pool
from support.scatter_faults.scenes import (
    HEDGED,
    HIT,
    IN_TURN,
    LATE_S,
    MODES,
    ROWS,
    TWIN_S,
    Cell,
    Cells,
    Mode,
    Row,
    Scene,
)
from support.scatter_faults.stage import Stage

_TRIES = 300


class Matrix:
    """Plays it; a context that ends it."""

    def __init__(self, where: Path, rows: Sequence[Row] = ROWS) -> None:
        self._rows, self._where = rows, where
        self._open = ExitStack()
        self._hosts = Hosts(where / "hosts")
        self._began: dict[str, int] = {}
        self.stage: Stage
        self.scenes: dict[str, Scene] = {}
        self.asked: dict[tuple[str, str], list[Pending]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.stage = stack.enter_context(Stage(self._where, before=self._hosts.before))
            dead = stack.enter_context(socket.socket())
            dead.bind(("127.0.0.1", 0))  # and never listens: its port is nobody's
            self._build(f"127.0.0.1:{dead.getsockname()[1]}")
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _build(self, dead: str) -> None:
        village = self.stage.village
        village.build("h0", "h1", "twin").tell(Behaviour(delay_s=TWIN_S), "twin")
        plain = {f"v{i}": row for i, row in enumerate(self._rows) if not (row.own_process or row.named)}
        shared = village.build(*plain, late_s=LATE_S) if plain else None
        pools: list[Pool] = []
        for i, row in enumerate(self._rows):
            name = f"v{i}"
            house = shared if name in plain else village.build(name, host="127.0.0.2" if row.named else "127.0.0.1")
            assert house is not None
            scene = self.scenes[row.name] = Scene(self.stage, row.name, house, name, dead=dead, hosts=self._hosts)
            source = name
            if row.named:
                self._hosts.move(name, "127.0.0.2")
                source = f"dns:{self._hosts.name(name)}:{house.addresses[name].rpartition(':')[2]}"
            pools += scene.make(source, max_calls=row.max_calls)
        self.stage.open(*pools)

    def play(self) -> Cells:
        """The cells by fault and mode; most have one, a fault that is not always there has two.

        Whatever does not wait for a victim goes one after the other: a busy machine must not look like a fault.
        """
        caller = self.stage.caller()
        self._begin_early(caller)
        self._warm(caller, [row for row in self._rows if not row.early])
        for row in self._rows:
            if not row.early:
                self._begin(caller, row)
            self._play(caller, row)
        cells = {key: [_cell(one) for one in pending] for key, pending in self.asked.items()}
        self._end()
        return cells

    def _begin_early(self, caller: Caller) -> None:
        early = [row for row in self._rows if row.early]
        for row in early:
            self._begin(caller, row)
        for row in early:
            self.scenes[row.name].await_applied()

    def _begin(self, caller: Caller, row: Row) -> None:
        self._began[row.name] = boot_ns()
        row.begin(self.scenes[row.name], caller)

    def _warm(self, caller: Caller, rows: Iterable[Row]) -> None:
        """Until of each victim and its twin the root knows which is the faster."""
        for row in rows:
            pool = self.scenes[row.name].pools[HEDGED.pool]
            for _ in range(_TRIES):
                pending = caller.ask(pool, mode="warm")
                assert pending.told.code == 0, pending.told
                if self._prefers_victim(pool):
                    break
            else:
                raise AssertionError(f"{row.name}: the victim is not preferred")

    def _prefers_victim(self, pool: Pool) -> bool:
        """Whether the latencies that the root has seen say so; the twin's delay is in them."""
        [shard] = [shard for shard in self.stage.topology(pool.name).shards if shard.shard_id == HIT]
        latency = {one.address: one.latency_duration.ToMicroseconds() for one in shard.endpoints}
        twin = latency.pop(self.stage.village.address("twin"))
        [victim] = latency.values()
        return bool(0 < victim < twin)

    def _play(self, caller: Caller, row: Row) -> None:
        scene = self.scenes[row.name]
        if row.flaps:
            for mode in IN_TURN:
                self.asked[row.name, mode.name] = [self._ask(caller, row, mode, wait=True) for _ in range(2)]
            return
        for mode in MODES:
            if mode is HEDGED and row.reached and row.under_way is None:
                self._hit(caller, row)
            else:
                self.asked[row.name, mode.name] = [self._ask(caller, row, mode)]
        if row.under_way:
            scene.await_got([self.asked[row.name, mode.name][0] for mode in MODES])
            row.under_way(scene)

    def _ask(self, caller: Caller, row: Row, mode: Mode, *, wait: bool = False) -> Pending:
        scene = self.scenes[row.name]
        pending = caller.begin(scene.pools[mode.pool], mode.policy, mode=mode.name)
        if wait:
            pending.result()
        else:
            scene.await_rest(pending)
        return pending

    def _hit(self, caller: Caller, row: Row) -> None:
        """Asks in the mode `hedged` until the victim was the first who was asked."""
        scene = self.scenes[row.name]
        for _ in range(_TRIES):
            self.asked[row.name, HEDGED.name] = [self._ask(caller, row, HEDGED, wait=True)]
            [latest] = caller.recent(pool_id=scene.pools[HEDGED.pool].name, page_size=1)
            if scene.was_first(latest.attempts):
                return
        raise AssertionError(f"{row.name}: the victim is not asked")

    def _end(self) -> None:
        """Undoes what would keep the victims from telling how their calls ended, and waits until they have."""
        for row in self._rows:
            scene = self.scenes[row.name]
            for pending in scene.occupants:
                pending.result()
            if row.own_process and row.holds:
                scene.house.resume()
            if scene.victim in self.stage.village.links:
                scene.link(Link.PASS)
            hit = {leaf for pool in scene.pools.values() for leaf in pool.replicas[HIT]} - {"twin"}
            self.stage.fault(row.name, self._began[row.name], *hit, scene.victim, holds=row.holds, kills=row.kills)
        self.stage.await_idle()
        self.stage.await_ended()


def _cell(pending: Pending) -> Cell:
    told, asked = pending.result(), pending.asked
    known = told.coverage
    hit = told.failures.get(HIT)
    return Cell(
        code_pb2.Code.Name(told.code),
        told.reason,
        known.answered if known else 0,
        known.expected if known else 0,
        bool(known and known.complete),
        "" if hit is None else code_pb2.Code.Name(hit),
        (told.at - asked.at) / asked.timeout_ns,
    )


def table(cells: Cells) -> Iterator[str]:
    """For people, as Markdown: each cell with the share of the deadline that it took."""
    rows = list(dict.fromkeys(row for row, _ in cells))
    yield "| fault | " + " | ".join(mode.name for mode in MODES) + " |"
    yield "| --- " * (len(MODES) + 1) + "|"
    for row in rows:
        shown = (", then ".join(cell.brief for cell in cells[row, mode.name]) for mode in MODES)
        yield f"| {row} | " + " | ".join(shown) + " |"
