"""A root between callers and leaves; a context that ends them all."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import grpc
from servers import RunningServer, start_server

from retinue.scattergather.v1 import topology_service_pb2 as api
from retinue.scattergather.v1 import topology_service_pb2_grpc as rpc
from support.faults.clients import PATH
from support.history.recorder import boot_ns
from support.scatter_faults import pools as pool_file
from support.scatter_faults.callers import Caller, Notes, metrics
from support.scatter_faults.checks import ROOT
from support.scatter_faults.history import Call, Fault, Reader, Story
from support.scatter_faults.leaves import Village
from support.scatter_faults.pools import Pool
from support.scatter_faults.pulse import NO_PROCESSOR, Pulse

_STUCK_S = 60.0
_LOG_ERRORS = ('"level": "error"', '"level": "critical"', "Traceback", "never retrieved")


class Stage:
    """See the module. Build leaves in `village`, then `open` with pools of them."""

    def __init__(self, where: Path, *, defect: str = "", module: str = "", before: tuple[str, ...] = ()) -> None:
        """`defect` is the rule that the root breaks (see tests/faults/broken_scatters.py)."""
        self.where = where
        self.village = Village(where)
        self.notes = Notes(where)
        self.reader = Reader(where / "history")
        self.pools: dict[str, Pool] = {}
        self.roots = 1
        self._stalls = 0
        self.root: RunningServer
        self._module = module or ("faults.broken_scatters" if defect else "retinue_server")
        self._defect, self._before = defect, before
        self._pulse = Pulse(self._note_stall)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._open.enter_context(self.village)
        self._pulse.start()
        self._open.callback(self._pulse.stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def _path(self) -> Path:
        return self.where / "pools.yaml"

    def open(self, *pools: Pool, env: Mapping[str, str] = {}, connected: bool = True) -> None:
        """Starts the root with these pools, and waits until it is connected with all leaves."""
        self.write(pools)
        env = {
            "RETINUE_SCATTERGATHER__POOLS": str(self._path),
            "PYTHONPATH": PATH,
            "DEFECT": self._defect,
            "RETINUE_SCATTERGATHER__DNS_POLL_SECONDS": "1",
            **env,
        }
        self.root = start_server(
            self.where, "scattergather", "--metrics", "127.0.0.1:0", env=env, module=self._module, before=self._before
        )
        self._open.callback(self._end_root)
        if connected:
            self.await_connected()

    def _end_root(self) -> None:
        self.root.kill()

    def write(self, pools: Iterable[Pool]) -> None:
        """Writes the pool file; pools of the same name are replaced."""
        self.pools |= {pool.name: pool for pool in pools}
        links = self.village.links
        pool_file.write(self._path, self.pools.values(), lambda name: links[name].address if name in links else name)

    def caller(self) -> Caller:
        """Another one; ended with the stage."""
        return self._open.enter_context(Caller(self.root.address, self.notes))

    def restart(self) -> None:
        """Kills the root, and starts another on its port."""
        self.root.kill()
        self.roots += 1
        self.root = self.root.restart()

    def topology(self, pool: str) -> Any:
        """As the root sees it."""
        with grpc.insecure_channel(self.root.address) as channel:
            ask = rpc.TopologyServiceStub(channel).GetTopology
            return ask(api.GetTopologyRequest(pool_id=pool), timeout=30, wait_for_ready=True).pool

    def await_connected(self, *names: str) -> None:
        """The root is connected with every endpoint of these pools, or all."""
        end = time.monotonic() + _STUCK_S
        for name in names or list(self.pools):
            while not all(e.connected for s in self.topology(name).shards for e in s.endpoints):
                assert time.monotonic() < end, f"pool {name} is not connected: {self.topology(name)}"
                time.sleep(0.02)

    def await_endpoints(self, pool: str, shard: str, *addresses: str) -> None:
        """The root takes these for the endpoints of a shard."""
        end = time.monotonic() + _STUCK_S
        while (found := self._endpoints(pool, shard)) != sorted(addresses):
            assert time.monotonic() < end, f"{pool}/{shard} has {found}"
            time.sleep(0.05)

    def _endpoints(self, pool: str, shard: str) -> list[str]:
        shards = self.topology(pool).shards
        return sorted(e.address for s in shards if s.shard_id == shard for e in s.endpoints)

    def metrics(self, pool: str | None = None) -> dict[str, float]:
        """What the root counts."""
        with urllib.request.urlopen(f"http://{self.root.ready['metrics']}/metrics", timeout=30) as page:
            return metrics(page.read().decode(), pool)

    def await_idle(self) -> None:
        """Nothing is under way at the root any more."""
        end = time.monotonic() + _STUCK_S
        while any((found := self.metrics())[name] for name in ("running", "open_calls", "unsent_calls")):
            assert time.monotonic() < end, f"the root still has {found}"
            time.sleep(0.02)

    def await_ended(self, slack_s: float = 10.0) -> None:
        """Every call has ended at its leaf; after the slack the checks will say which has not."""
        end = time.monotonic() + slack_s
        while any(self._open_calls()) and time.monotonic() < end:
            time.sleep(0.05)

    def _open_calls(self) -> Iterator[Call]:
        story = self.story()
        return (call for call in story.calls if call.gave is None and not story.died(call, story.read_at))

    def fault(self, kind: str, begin: int, *leaves: str, holds: bool = False, kills: bool = False) -> None:
        """Notes one that is over."""
        self.notes.add(Fault(kind, begin, boot_ns(), leaves, holds, kills))

    @property
    def has_stalled(self) -> bool:
        """Whether the machine has had no time for anybody."""
        return self._stalls > 0 or self._pulse.began is not None

    def _note_stall(self, begin: int) -> None:
        self._stalls += 1
        self.notes.add(self._stall(begin, boot_ns()))

    def _stall(self, begin: int, end: int) -> Fault:
        """It hits everybody."""
        leaves = (name for house in self.village.houses for name in house.names)
        return Fault(NO_PROCESSOR, begin, end, (ROOT, *leaves), holds=True)

    def story(self) -> Story:
        """What happened until now."""
        for pool in self.pools.values():
            self.notes.add(pool.ran(self.roots))
        began = self._pulse.began
        stall = [] if began is None else [self._stall(began, 0)]
        return Story([*self.reader.look(), *stall], boot_ns())

    def log_errors(self) -> list[str]:
        """What no server may write into its log."""
        lines = (self.where / "server.log").read_text().splitlines()
        found = (line for line in lines if any(sign in line for sign in _LOG_ERRORS))
        return [line for line in found if "opentelemetry.exporter" not in line]  # our collector takes no metrics
