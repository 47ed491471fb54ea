"""What a campaign stands on: servers, ambassadors before them, and who declares."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec
from google.protobuf import json_format
from servers import ROOT, RunningServer, environment, start_server

from retinue.ambassador.v1 import upstream_pb2 as pb
from retinue.client.ambassador import Ambassador
from retinue_server.ambassador.engines.envoy.admin import Admin
from retinue_server.ambassador.engines.envoy.bootstrap import bootstrap
from support.ambassador_faults.history import Fault, Recorder, Served, Story, read
from support.certificates import Authority
from support.history.recorder import boot_ns
from support.postgres import free_port
from support.upstreams import envoy

_PREFIX = "RETINUE_AMBASSADOR__"
_WAIT_S = 30.0
_SECTIONS = (
    "dynamic_active_clusters",
    "dynamic_warming_clusters",
    "dynamic_listeners",
    "dynamic_route_configs",
    "dynamic_active_secrets",
)


class Declared(NamedTuple):
    """An upstream as the campaign knows it."""

    upstream: pb.Upstream
    protocol: str
    """As callers speak it."""
    servers: Mapping[str, str]
    """All that may serve it: addresses by name."""

    @property
    def name(self) -> str:
        return str(self.upstream.upstream_id)

    @property
    def port(self) -> int:
        return int(self.upstream.listen.port)

    @property
    def is_native(self) -> bool:
        """Whether no Envoy can serve it."""
        return self.protocol == "memcached"


def declared(name: str, protocol: str, servers: Mapping[str, str], **fields: Any) -> Declared:
    """Its endpoints are pushed; fields are the contract's."""
    speaks = {"postgresql": "tcp"}.get(protocol, protocol).upper()
    said = {"upstream_id": name, "protocol": f"PROTOCOL_{speaks}", "listen": {"port": free_port()}, "pushed": {}}
    return Declared(json_format.ParseDict(said | fields, pb.Upstream()), protocol, servers)


class Side:
    """An ambassador with its data planes: `child` or `attach` an Envoy, or `native`."""

    def __init__(self, where: Path, mode: str, notes: Recorder, module: str = "retinue_server") -> None:
        self.where, self.mode, self._notes, self._module = where, mode, notes, module
        self.upstreams: dict[str, Declared] = {}
        self._serving: dict[str, dict[str, int]] = {}
        """By upstream: weights by server."""
        self.changing = asyncio.Lock()
        """Held by who changes something, or has the control plane away."""
        self.server: RunningServer | None = None
        self._envoy: subprocess.Popen[bytes] | None = None
        self.client = Ambassador("unix:/nowhere")

    async def start(self) -> None:
        self.where.mkdir()
        if self.mode == "attach":
            self._attach()
        await self.start_control()

    def _attach(self) -> None:
        config = self.where / "bootstrap.json"
        config.write_bytes(msgspec.json.encode(bootstrap("retinue", self.where / "x.sock", self.where / "admin.sock")))
        command = [str(envoy()), "-c", str(config), "--disable-hot-restart", "--concurrency", "1"]
        with (self.where / "envoy.log").open("wb") as log:
            self._envoy = subprocess.Popen([*command, "--log-level", "error"], stdout=log, stderr=log)

    async def start_control(self) -> None:
        """A new process; it knows nothing of the former's declarations."""
        env = {
            f"{_PREFIX}DATA_PLANE": "native" if self.mode == "native" else "envoy",
            f"{_PREFIX}ENDPOINTS__ALLOW": "127.0.0.0/8",
            "PYTHONPATH": os.pathsep.join([environment()["PYTHONPATH"], str(ROOT / "tests")]),  # for broken ones
        }
        if self.mode == "attach":
            env |= {f"{_PREFIX}ENVOY__MODE": "attach", f"{_PREFIX}ENVOY__SOCKET": str(self.where / "x.sock")}
        self.server = await asyncio.to_thread(start_server, self.where, "ambassador", env=env, module=self._module)
        await self.client.close()
        self.client = Ambassador(self.server.control)

    async def stop(self) -> None:
        await self.client.close()
        if self.server is not None:
            await asyncio.to_thread(self.server.stop)
        if self._envoy is not None:
            self._envoy.kill()
            self._envoy.wait()

    # Declaring

    async def declare(self, one: Declared, serving: Iterable[str] = ()) -> pb.Upstream:
        """Says it, and who serves it, and waits until it is served."""
        self.upstreams[one.name] = one
        await self.client.declare(one.upstream)
        return await self.serve(one.name, dict.fromkeys(serving or one.servers, 1))

    async def declare_again(self) -> None:
        """All of it, as it is."""
        for name, one in self.upstreams.items():
            await self.client.declare(one.upstream)
            await self.client.set_endpoints(name, self._endpoints(name, self._serving[name]))
        for name in self.upstreams:
            await self._active(name)

    async def serve(self, name: str, weights: Mapping[str, int]) -> pb.Upstream:
        """These serve it from now on."""
        begin = boot_ns()
        changed = await self.client.set_endpoints(name, self._endpoints(name, weights))
        found = await self._active(name, changed.status.generation)
        self._serving[name] = dict(weights)
        known = tuple(weights) if self.upstreams[name].protocol != "memcached" else ()
        self._notes.add(Served(begin, boot_ns(), name, known))
        return found

    def _endpoints(self, name: str, weights: Mapping[str, int]) -> Sequence[pb.Endpoint]:
        servers = self.upstreams[name].servers
        return [pb.Endpoint(address=servers[server], weight=weight) for server, weight in weights.items()]

    async def _active(self, name: str, generation: int = 1) -> pb.Upstream:
        async with asyncio.timeout(_WAIT_S):
            while (found := await self.client.get(name)).status.active_generation < generation:
                assert not found.status.HasField("rejection"), found.status.rejection.message
                await asyncio.sleep(0.01)
        return found

    # Looking

    @property
    def envoy_pid(self) -> int:
        """Of the child; 0 while there is none."""
        assert self.server is not None
        pid = self.server.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/exe").readlink().name == "envoy":
                    return int(child)
        return 0

    async def has(self) -> dict[str, str]:
        """What an attached Envoy has, by name, each with when it came."""
        found = {}
        dump = await Admin(self.where / "admin.sock").get("/config_dump?include_eds")
        for section in dump["configs"]:
            kind = section["@type"].rpartition(".")[2]
            for one in (entry for name in _SECTIONS for entry in section.get(name, ())):
                said = one.get("active_state", one)
                found[f"{kind} {_name(said, one)}"] = json.dumps(said, sort_keys=True)
        return found

    def log(self) -> list[str]:
        """Lines of the server's log that tell of a defect."""
        text = (self.where / "server.log").read_text()
        return [line for line in text.splitlines() if "Traceback" in line or "the data plane failed" in line]


def _name(said: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    for key in ("cluster", "route_config", "secret"):
        if key in said:
            return str(said[key]["name"])
    return str(one["name"])


class Stage:
    """Sides and their history; a context that ends them."""

    def __init__(self, where: Path, module: str = "retinue_server") -> None:
        self.where, self._module = where, module
        self._path = where / "history.jsonl"
        self.notes = Recorder(self._path)
        self.authority = Authority(where)
        self.sides: list[Side] = []
        self.open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.open.aclose()
        finally:
            self.notes.close()

    async def side(self, mode: str) -> Side:
        """An ambassador that has started."""
        side = Side(self.where / mode, mode, self.notes, self._module)
        self.open.push_async_callback(side.stop)
        self.sides.append(side)
        await side.start()
        return side

    def fault(self, kind: str, begin: int, *upstreams: str, slack_ns: int = 0) -> None:
        """It is over; whom it hit may fail for so much longer."""
        self.notes.add(Fault(kind, begin, upstreams, boot_ns() + slack_ns))

    def story(self) -> Story:
        """All until now."""
        return Story(read(self._path), boot_ns())
