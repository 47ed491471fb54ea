"""The systems, how each is started, and how much each is given to do."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.processes import HERE, HOME, ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

PEERS = HOME / "venv" / "bin" / "python"
OURS = sys.executable


@dataclass(frozen=True)
class System:
    """One entrant. `share` is its part of a cell's number of tasks, so that a round takes seconds for each."""

    name: str
    broker: str
    program: str
    share: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    modes: frozenset[str] = frozenset({"one", "pipelined", "bulk"})
    durability: str = "D2"

    def command(self, role: str) -> list[str]:
        """The adapter's program; its own arguments follow."""
        path = HERE / "adapters" / self.program
        if path.suffix == ".mjs":
            return [shutil.which("node") or "node", str(path), role]
        if not path.suffix:  # built from go/
            return [str(HOME / "go" / self.program), role]
        return [str(OURS if self.program == "retinue_.py" else PEERS), str(path), role]

    def environment(self) -> dict[str, str]:
        """Where an adapter finds its peer's packages."""
        if self.program.endswith(".mjs"):
            return {"BENCH_NODE_MODULES": str(HOME / "node" / "node_modules")}
        ours = [str(ROOT / "clients" / "python")] if self.program == "retinue_.py" else []
        return {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *ours])}


_SINGLE = frozenset({"one", "pipelined"})
_ON_REDIS = ("redis-server", "python")


def _system(name: str, broker: str, program: str, share: float, needs: tuple[str, ...], *, bulk: bool = True) -> System:
    """A peer; `share` is about how fast it is beside Retinue, so that its rounds are about as long."""
    modes = frozenset({"one", "pipelined", "bulk"}) if bulk else _SINGLE
    return System(name, broker, program, {"": share, "enqueue_one": 0.3}, needs=needs, modes=modes)


SYSTEMS = {
    system.name: system
    for system in (
        System("retinue", "retinue", "retinue_.py"),
        System("retinue-metrics", "retinue-metrics", "retinue_.py"),
        System("retinue-tracing", "retinue-tracing", "retinue_.py"),
        System("retinue-postgres", "retinue-postgres", "retinue_.py", {"": 0.5}),
        _system("bullmq", "redis", "bullmq.mjs", 0.4, ("redis-server", "node")),
        _system("celery", "redis", "celery_.py", 0.03, _ON_REDIS, bulk=False),
        _system("beanstalkd", "beanstalkd", "beanstalkd_.py", 0.2, ("beanstalkd", "python"), bulk=False),
        _system("dramatiq", "redis", "dramatiq_.py", 0.1, _ON_REDIS, bulk=False),
        _system("huey", "redis", "huey_.py", 0.1, _ON_REDIS, bulk=False),
        _system("saq", "redis", "saq_.py", 0.05, _ON_REDIS, bulk=False),
        _system("rq", "redis", "rq_.py", 0.01, _ON_REDIS),
        _system("faktory", "faktory", "faktory_", 0.15, ("redis-server", "go")),
        _system("procrastinate", "postgres", "procrastinate_.py", 0.02, ("python",)),
        _system("river", "postgres", "river", 0.6, ("go",)),
        _system("pg-boss", "postgres", "pgboss.mjs", 0.2, ("node",)),
        _system("graphile-worker", "postgres", "graphile.mjs", 0.5, ("node",)),
    )
}
"""By name, in the order of the tables; Retinue is first, since ratios are to it."""
