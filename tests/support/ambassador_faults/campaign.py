"""One run: a steady load of every protocol, endpoints that flip each second, faults by seed, and the history."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from cryptography.hazmat.primitives.asymmetric import ec

from retinue.ambassador.v1 import upstream_pb2 as pb
from support.ambassador_faults.callers import Caller
from support.ambassador_faults.checks import Finding, check
from support.ambassador_faults.history import Fault, Kept, Story
from support.ambassador_faults.schedule import Kind, Step, schedule
from support.ambassador_faults.stage import Declared, Side, Stage, declared
from support.history.recorder import boot_ns
from support.postgres import Postgres
from support.upstreams import HealthServer, LineServer, WebServer, memcached, running

SLACK_NS = 1_000_000_000
_PATIENCE_S = 30.0
_FLIP_S = 1.0
_FILES_S = 1.6
"""Files are looked at each second."""
_SLOW_S = 0.5
_TLS = "tls"
_DRAINED = frozenset({"http", "grpc"})
"""What an Envoy that ends lets come to an end."""
KINDS = {
    "child": frozenset(Kind) - {Kind.KILL_CONTROL},
    "attach": frozenset(Kind) - {Kind.KILL_ENVOY},
}
"""A child ends with its parent, and who is attached is started again by somebody else."""


class Frail(WebServer):
    """A server that can be made to break off, too."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.cuts = False

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.cuts:
            await reader.read(1)
            writer.transport.abort()
            return
        await super()._talk(reader, writer)


class Servers(NamedTuple):
    """What stands behind the ambassadors."""

    webs: list[WebServer]
    secure: list[WebServer]
    rpcs: list[HealthServer]
    lines: list[LineServer]
    frail: Frail
    frail_line: LineServer
    caches: list[str]
    databases: list[str]


class Campaign:
    """See the module; a context that ends it."""

    def __init__(
        self, where: Path, seed: int, mode: str, *, kinds: Collection[Kind] = (), databases: bool = True
    ) -> None:
        """`mode` is how Envoy is run: child or attach; `kinds` are all that go with it unless they are given."""
        self._where, self._seed, self._mode, self._databases = where, seed, mode, databases
        self._kinds = kinds or KINDS[mode]
        self.stage = Stage(where)
        self.faults: Counter[str] = Counter()
        self.flips = 0
        self._over, self._settled, self._drained = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._files = {name: where / f"client.{name}" for name in ("ca", "crt", "key")}
        self._issued = itertools.count()

    async def __aenter__(self) -> Self:
        await self.stage.__aenter__()
        try:
            self.servers = await self.stage.open.enter_async_context(self._serving())
            self.envoy, self.native = await self.stage.side(self._mode), await self.stage.side("native")
            await self._declare()
        except BaseException:
            await self.stage.open.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stage.__aexit__()

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[Servers]:
        webs, secure = [WebServer(f"web{n}") for n in (1, 2)], [WebServer(f"secure{n}") for n in (1, 2)]
        lines, frail, frail_line = [LineServer(f"line{n}") for n in (1, 2)], Frail("frail"), LineServer("frail")
        rpcs = [HealthServer(f"rpc{n}") for n in (1, 2)]
        with contextlib.ExitStack() as stack:
            caches = [stack.enter_context(memcached()) for _ in range(3)]
            databases = [stack.enter_context(self._postgres())] if self._databases else []
            async with running(*webs, *lines, frail, frail_line):
                for one in secure:
                    await one.start(self._server_context(one.name))
                for rpc in rpcs:
                    await rpc.start()
                try:
                    yield Servers(webs, secure, rpcs, lines, frail, frail_line, caches, databases)
                finally:
                    for one in secure:
                        one.stop()
                    for rpc in rpcs:
                        await rpc.stop()

    @contextlib.contextmanager
    def _postgres(self) -> Iterator[str]:
        """One database at two addresses: both are the same, but it can be told who was asked."""
        server = Postgres.create(self._where / "postgres", "listen_addresses = '127.0.0.1,127.0.0.2'", "fsync = off")
        try:
            yield str(server.port)
        finally:
            server.stop("immediate")

    def _server_context(self, name: str) -> ssl.SSLContext:
        """Lets in only those whose certificate is of our authority."""
        pair = self.stage.authority.issue(name)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.cert_file, pair.key_file)
        context.load_verify_locations(self.stage.authority.file)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    async def _declare(self) -> None:
        self._write_certificates()
        found = self.servers

        def addresses(servers: list[WebServer] | list[HealthServer] | list[LineServer]) -> dict[str, str]:
            return {one.name: one.address for one in servers}

        databases = {f"127.0.0.{n}": f"127.0.0.{n}:{port}" for port in found.databases for n in (1, 2)}
        tls = {
            "server_name": "localhost",
            "ca_file": str(self._files["ca"]),
            "cert_file": str(self._files["crt"]),
            "key_file": str(self._files["key"]),
        }
        for side in (self.envoy, self.native):
            caches = {address: address for address in found.caches}
            known = [
                declared("line", "tcp", addresses(found.lines)),
                declared("cache", "memcached", caches, policy={"timeouts": {"request_duration": "5s"}}),
                declared("frail-line", "tcp", {"frail": found.frail_line.address}),
            ]
            if side is self.envoy:
                known += [
                    declared("web", "http", addresses(found.webs)),
                    declared(_TLS, "http", addresses(found.secure), tls=tls),
                    declared("rpc", "grpc", addresses(found.rpcs)),
                    declared("frail", "http", {"frail": found.frail.address}),
                ]
            if databases:
                known.append(declared("database", "postgresql", databases))
            for one in known:
                named = one if side is self.envoy else _renamed(one)
                await side.declare(named, list(named.servers)[:2])

    def _callers(self) -> list[Caller]:
        return [
            Caller(self.stage.notes, one.name, one.protocol, one.port, stays=stays)
            for side in (self.envoy, self.native)
            for one in side.upstreams.values()
            for stays in ((True,) if one.protocol == "grpc" else (True, False))
        ]

    async def run(self, seconds: float) -> None:
        """Plays the faults of the seed so long, but each at least once, with all callers, and ends with SIGTERM."""
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for caller in self._callers():
                ends = self._drained if caller.protocol in _DRAINED else self._settled
                group.create_task(caller.run(ends))
            flipping = [group.create_task(self._flip(side)) for side in (self.envoy, self.native)]
            for step in schedule(self._seed, self._kinds):
                if time.monotonic() >= end and self.faults.total() >= len(self._kinds):
                    break
                await asyncio.sleep(step.pause_s)  # the load goes on
                self.faults[step.kind] += 1
                await self._play(step)
            self._over.set()
            await asyncio.wait(flipping)
            await self._settle()
            self._settled.set()
            if self._mode == "child":
                await self._drain()
            self._drained.set()

    # Changes that nobody may notice

    async def _flip(self, side: Side) -> None:
        """Each second every upstream is served by others."""
        for turn in itertools.count():
            if self._over.is_set():
                return
            for one in list(side.upstreams.values()):
                async with side.changing:
                    await side.serve(one.name, dict.fromkeys(_some(one, turn), 1))
                    self.flips += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), _FLIP_S)

    async def _weights(self, step: Step) -> None:
        for side in (self.envoy, self.native):
            for one in side.upstreams.values():
                weights = {name: 1 + int(step.pick * 97 * (n + 1)) % 9 for n, name in enumerate(one.servers)}
                async with side.changing:
                    await side.serve(one.name, weights)

    async def _policy(self, step: Step) -> None:
        """Others, so that clusters, routes and, of TCP, listeners are not what they were."""
        for side in (self.envoy, self.native):
            for name, one in list(side.upstreams.items()):
                wanted = pb.Upstream()
                wanted.CopyFrom(one.upstream)
                wanted.policy.timeouts.idle_duration.FromSeconds(600 + int(step.pick * 1000))
                if one.protocol != "memcached":
                    wanted.policy.circuit_breaker.max_connections = 500 + int(step.pick * 1000)
                async with side.changing:
                    found = await side.client.declare(wanted, wait=20)
                    assert not found.status.HasField("rejection"), found.status.rejection.message
                    side.upstreams[name] = one._replace(upstream=wanted)

    async def _certificates(self, _: Step) -> None:
        self._write_certificates()
        await asyncio.sleep(_FILES_S)

    def _write_certificates(self, curve: ec.EllipticCurve | None = None) -> None:
        """Another client certificate of the same authority, and one authority more."""
        pair = self.stage.authority.issue(f"client{next(self._issued)}", curve)
        for name, content in (
            ("key", pair.key_file.read_bytes()),
            ("crt", pair.cert_file.read_bytes()),
            ("ca", self.stage.authority.file.read_bytes() * (1 + next(self._issued) % 2)),
        ):
            self._replace(name, content)

    def _replace(self, name: str, content: bytes) -> None:
        beside = self._where / "beside"
        beside.write_bytes(content)
        beside.replace(self._files[name])

    async def _unreadable(self, _: Step) -> None:
        """What was good last goes on."""
        self._replace("ca", b"-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
        self._replace("crt", b"")
        await asyncio.sleep(_FILES_S)
        self._write_certificates()

    async def _refused(self, _: Step) -> None:
        """Python takes a key of this curve, Envoy does not; in files that change, and in a declaration."""
        self._write_certificates(ec.SECP224R1())
        await asyncio.sleep(_FILES_S)
        pair = self.stage.authority.issue("refused", ec.SECP224R1())
        async with self.envoy.changing:
            wanted = pb.Upstream()
            wanted.CopyFrom(self.envoy.upstreams[_TLS].upstream)
            wanted.tls.cert_file, wanted.tls.key_file = str(pair.cert_file), str(pair.key_file)
            found = await self.envoy.client.declare(wanted, wait=20)
            assert found.status.HasField("rejection"), "it is refused"
            assert found.status.state == pb.UPSTREAM_STATE_ACTIVE, "and the former is served"
            await self.envoy.client.declare(self.envoy.upstreams[_TLS].upstream, wait=20)
        self._write_certificates()

    # What hits some

    async def _server(self, kind: Kind, step: Step) -> None:
        """Upstreams of their own; all others go on."""
        hit = ("frail", "frail-line", "native-frail-line")
        begin = boot_ns()
        frail, line = self.servers.frail, self.servers.frail_line
        frail.status, frail.delay_s, frail.cuts = 200, 0.0, False
        if kind is Kind.FAILS:
            frail.status = 500
        elif kind is Kind.HANGS:
            frail.delay_s = step.lasts_s
        elif kind is Kind.CUTS:
            frail.cuts = True
        else:
            frail.stop()
        line.stop()
        await asyncio.sleep(step.lasts_s)
        frail.status, frail.delay_s, frail.cuts = 200, 0.0, False
        if kind is Kind.GONE:
            await frail.start(port=_port(frail.address))
        await line.start(port=_port(line.address))
        self.stage.fault(kind, begin, *hit, slack_ns=SLACK_NS)

    async def _kill_envoy(self, _: Step) -> None:
        async with self.envoy.changing:
            hit = [one.name for one in self.envoy.upstreams.values() if not one.is_native]
            begin, pid = boot_ns(), self.envoy.envoy_pid
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(_PATIENCE_S):
                while self.envoy.envoy_pid in (0, pid) or not await self._accepts(hit):
                    await asyncio.sleep(0.01)
            self.stage.fault(Kind.KILL_ENVOY, begin, *hit, slack_ns=SLACK_NS)

    async def _accepts(self, names: list[str]) -> bool:
        for name in names:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.envoy.upstreams[name].port)
            except OSError:
                return False
            writer.close()
        return True

    async def _kill_control(self, step: Step) -> None:
        side = self.envoy
        async with side.changing:
            async with asyncio.timeout(_PATIENCE_S):
                while not await self._has_certificate():
                    await asyncio.sleep(0.1)
            before, begin = await side.has(), boot_ns()
            native = [one.name for one in side.upstreams.values() if one.is_native]
            assert side.server is not None
            await asyncio.to_thread(side.server.kill)
            await asyncio.sleep(step.lasts_s)  # the load goes on
            await side.start_control()
            await side.declare_again()
            self.stage.notes.add(Kept(boot_ns(), before, await side.has()))
            self.stage.fault(Kind.KILL_CONTROL, begin, *native, slack_ns=SLACK_NS)

    async def _has_certificate(self) -> bool:
        """Whether what stands in the file has come to Envoy, so that nothing is on its way."""
        said = json.dumps(self._files["crt"].read_text())
        return any(said in has for has in (await self.envoy.has()).values())

    async def _drain(self) -> None:
        """SIGTERM, while all requests take their time: those that are under way are answered."""
        for one in self.servers.webs + self.servers.secure:
            one.delay_s = _SLOW_S
        await asyncio.sleep(_SLOW_S)
        hit = [one.name for one in self.envoy.upstreams.values() if one.protocol in _DRAINED]
        begin = boot_ns()
        self.stage.notes.add(Fault("SIGTERM", begin, tuple(hit), spares=True))
        self.faults["SIGTERM"] += 1
        assert self.envoy.server is not None
        assert await asyncio.to_thread(self.envoy.server.stop) == 0

    async def _play(self, step: Step) -> None:
        played: dict[Kind, Callable[[Step], object]] = {
            Kind.WEIGHTS: self._weights,
            Kind.POLICY: self._policy,
            Kind.CERTIFICATES: self._certificates,
            Kind.UNREADABLE: self._unreadable,
            Kind.REFUSED: self._refused,
            Kind.KILL_ENVOY: self._kill_envoy,
            Kind.KILL_CONTROL: self._kill_control,
        }
        if step.kind in played:
            await played[step.kind](step)  # type: ignore[misc] # they are coroutines
        else:
            await self._server(step.kind, step)

    # The end

    async def _settle(self) -> None:
        """Without faults everybody is answered again."""
        asked = boot_ns()
        wanted = {one.name for side in (self.envoy, self.native) for one in side.upstreams.values()}
        async with asyncio.timeout(_PATIENCE_S):
            while wanted - {
                call.sent.upstream
                for call in self.stage.story().calls
                if call.sent.at > asked and call.told and not call.told.failure
            }:
                await asyncio.sleep(0.2)

    def story(self) -> Story:
        return self.stage.story()

    def findings(self) -> list[Finding]:
        """What the rules say, and what a server may not write into its log."""
        log = [Finding("log", 0, line) for side in self.stage.sides for line in side.log()]
        return [*check(self.story(), SLACK_NS), *log]


def _renamed(one: Declared) -> Declared:
    """Names are unique among all sides."""
    one.upstream.upstream_id = f"native-{one.upstream.upstream_id}"
    return one


def _some(one: Declared, turn: int) -> list[str]:
    """Who serves it in turn: one of two, or two of three."""
    names = list(one.servers)
    if len(names) == 1:
        return names
    return [name for n, name in enumerate(names) if n != turn % len(names)]


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
