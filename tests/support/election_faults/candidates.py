"""A candidate: an app with a server of its own, and a proxy before each of them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from servers import RunningServer, environment, start_server

from support.election_faults.clocks import Clock
from support.election_faults.engines import ELECTION, Engine
from support.faults.clients import PATH
from support.faults.proxy import Proxy
from support.history.recorder import boot_ns

_ENDS_S = 20.0
_LATE_S = 0.15
"""By how much late replies are late."""
_TRUE = Clock()


class Candidate:
    """One of those who stand; a context that ends it."""

    def __init__(
        self, where: Path, number: int, engine: Engine, app_lease_s: float, *, server: str = "", app: str = ""
    ) -> None:
        """`server` and `app` are the defects that they have."""
        self.where = where / f"candidate-{number}"
        self.where.mkdir()
        self._history, self._register = where / "history", where / "register"
        self._number, self._engine, self._app_lease_s = number, engine, app_lease_s
        self._module, self._defects = "faults.broken_elections" if server else "retinue_server", (server, app)
        self._numbers = itertools.count(1)
        self.deaths: dict[str, int] = {}
        """When apps were killed, by name; stamped before."""
        self.engine_link: Proxy | None = None
        self.app_link: Proxy
        self.server: RunningServer
        self.app: subprocess.Popen[bytes]
        self.name = ""
        """Of the present app."""
        self.proof = False
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._engine.address:
                self.engine_link = stack.enter_context(Proxy(self._engine.address, _LATE_S))
            at = self.engine_link.address if self.engine_link else ""
            self._env = self._engine.settings(at)
            self.start_server(_TRUE)
            stack.callback(self._kill_server)
            self.app_link = stack.enter_context(Proxy(self.server.address, _LATE_S))
            self.start_app(_TRUE, proof=self._number % 2 == 0)
            stack.callback(self._end_app)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # The server

    def start_server(self, clock: Clock) -> None:
        """On the address and data of the one before."""
        env = {**self._env, **clock.env, "PYTHONPATH": PATH, "DEFECT": self._defects[0]}
        listen = self.server.address if hasattr(self, "server") else "127.0.0.1:0"
        args = {"module": self._module, "before": clock.prefix}
        self.server = start_server(self.where, "leaderelection", listen=listen, env=env, **args)  # type: ignore[arg-type] # as they are

    def _kill_server(self) -> None:
        self.server.kill()

    # The app

    def start_app(self, clock: Clock, *, proof: bool) -> None:
        """Another process, with a name of its own."""
        self.name, self.proof = f"app-{self._number}-{next(self._numbers)}", proof
        command = [*clock.prefix, sys.executable, "-m", "support.election_faults.app", "--name", self.name]
        command += ["--election", ELECTION, "--history", str(self._history), "--register", str(self._register)]
        command += ["--lease", str(self._engine.lease_s), "--app-lease", str(self._app_lease_s)]
        command += ["--rate", str(clock.rate), "--offset", str(clock.offset_s), *(["--proof"] if proof else [])]
        env = {**clock.env, "PYTHONPATH": PATH, "RETINUE_ADDRESS": self.app_link.address, "DEFECT": self._defects[1]}
        with (self.where / f"{self.name}.log").open("ab") as log:
            self.app = subprocess.Popen(command, env=environment(**env), stdout=log, stderr=log)

    def kill_app(self) -> None:
        """SIGKILL."""
        self.check_app()
        self.deaths[self.name] = boot_ns()
        self._end_app()

    def check_app(self) -> None:
        """It has not ended by itself."""
        code = self.app.poll()
        assert code is None, f"{self.name}: {code}\n{(self.where / f'{self.name}.log').read_text()[-3000:]}"

    def _end_app(self) -> None:
        self.app.kill()
        self.app.wait(_ENDS_S)
