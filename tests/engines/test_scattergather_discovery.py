"""The exercise of discovery's port: every way of finding endpoints runs every claim."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml
from support.faults.proxy import Mode, Proxy
from support.kubernetes import Api, slices
from support.names import Mode as Answering
from support.names import Names

from retinue_server.runtime.discovery.dns import DnsDiscovery
from retinue_server.runtime.discovery.kubernetes import KubernetesDiscovery
from retinue_server.scattergather.engine import Discovery

PATIENCE_S = 60
STANDS, OVER = "what was found last stands", "again"
"""What the log says."""


class World(Protocol):
    """What can be found, and by what; its methods return when it is so."""

    name: str
    asks: int
    """How often one try asks at most."""

    def discovery(self) -> Discovery:
        """Not started."""

    def serve(self, *hosts: str) -> None:
        """These IP addresses, at port 9000."""

    def remove(self) -> None:
        """Nothing has the name any more."""

    def fail(self) -> None:
        """Nothing can be found out."""

    def heal(self) -> None:
        """It can again."""

    def tries(self) -> int:
        """How often somebody asked in vain."""


class DnsWorld:
    """A name server that the system's resolver asks."""

    name = "leaf.example.:9000"
    asks = 4  # for two kinds of addresses, and once more after a failure

    def __init__(self, names: Names) -> None:
        self._names = names
        self.remove()

    def discovery(self) -> Discovery:
        return DnsDiscovery(0.05)

    def serve(self, *hosts: str) -> None:
        self._names.hosts["leaf.example"] = hosts

    def remove(self) -> None:
        self._names.hosts.pop("leaf.example", None)

    def fail(self) -> None:
        self._names.mode = Answering.FAIL

    def heal(self) -> None:
        self._names.mode = Answering.ANSWER

    def tries(self) -> int:
        return self._names.failed


class PlayedDnsWorld:
    """What the system's resolver would say; for machines that have no room for a name server."""

    name = "leaf.example:9000"
    asks = 1

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._error: int | None = socket.EAI_NONAME
        self._hosts: Sequence[str] = ()
        self._failing, self._failed = False, 0
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host: str, *_: object, **__: object) -> list[Any]:
        assert host == "leaf.example"
        self._failed += self._failing
        error = socket.EAI_AGAIN if self._failing else self._error
        if error is not None:
            raise socket.gaierror(error, "it is so")
        return [(socket.AF_INET6 if ":" in one else socket.AF_INET, 1, 6, "", (one, 0)) for one in self._hosts]

    def discovery(self) -> Discovery:
        return DnsDiscovery(0.05)

    def serve(self, *hosts: str) -> None:
        self._hosts, self._error = hosts, None if hosts else socket.EAI_NODATA

    def remove(self) -> None:
        self._error = socket.EAI_NONAME

    def fail(self) -> None:
        self._failing = True

    def heal(self) -> None:
        self._failing = False

    def tries(self) -> int:
        return self._failed


class KubernetesWorld:
    """A Service whose endpoints are in several slices, behind a proxy that may refuse us."""

    name = "leaf:9000"
    asks = 1

    def __init__(self, api: Api, namespace: str, proxy: Proxy, kubeconfig: Path) -> None:
        self._api, self._namespace, self._proxy, self._kubeconfig = api, namespace, proxy, kubeconfig
        said = yaml.safe_load(api.kubeconfig.read_text())
        said["clusters"][0]["cluster"]["server"] = f"https://{proxy.address}"
        kubeconfig.write_text(json.dumps(said))

    def discovery(self) -> Discovery:
        return KubernetesDiscovery(self._kubeconfig, self._namespace, "scattergather")

    def serve(self, *hosts: str) -> None:
        of_four, of_six = [h for h in hosts if ":" not in h], [h for h in hosts if ":" in h]
        for name, some, family in (("a", of_four[::2], "IPv4"), ("b", of_four[1::2], "IPv4"), ("c", of_six, "IPv6")):
            ends = [slices.endpoint(host) for host in some]
            slices.put(self._api, self._namespace, slices.body(name, "leaf", ends, [{"port": 9000}], family))

    def remove(self) -> None:
        for name in "abc":
            slices.remove(self._api, self._namespace, name)

    def fail(self) -> None:
        self._proxy.set(Mode.REFUSE)
        self._proxy.cut()

    def heal(self) -> None:
        self._proxy.set(Mode.PASS)

    def tries(self) -> int:
        return self._proxy.refused


def dns(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    yield DnsWorld(request.getfixturevalue("names"))


def played_dns(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield PlayedDnsWorld(monkeypatch)


def kubernetes(request: pytest.FixtureRequest, tmp_path: Path, fixture: str) -> Iterator[World]:
    api: Api = request.getfixturevalue(fixture)
    namespace = api.namespace()
    server = yaml.safe_load(api.kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
    with Proxy(server.removeprefix("https://")) as proxy:
        yield KubernetesWorld(api, namespace, proxy, tmp_path / "kubeconfig")
    api.remove(namespace)


WORLDS: dict[str, Callable[[pytest.FixtureRequest, Path], Iterator[World]]] = {
    "dns": dns,
    "dns-played": played_dns,
    "kubernetes": partial(kubernetes, fixture="cluster"),
    "kubernetes-emulated": partial(kubernetes, fixture="emulator"),
}


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with contextlib.contextmanager(WORLDS[request.param])(request, tmp_path) as made:
        yield made
        made.heal()


@pytest.fixture
async def discovery(world: World) -> AsyncIterator[Discovery]:
    made = world.discovery()
    await made.start()
    yield made
    await made.stop()


class Heard:
    """What one who watches is told, on the event loop."""

    def __init__(self) -> None:
        self.told: list[Sequence[str]] = []
        self._more = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.watching = False

    def __call__(self, addresses: Sequence[str]) -> None:
        assert asyncio.get_running_loop() is self._loop
        assert self.watching, "it is not told within `watch`"
        self.told.append(list(addresses))
        self._more.set()

    async def until(self, *addresses: str) -> None:
        """Returns when these are what was told last."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.told or self.told[-1] != list(addresses):
                self._more.clear()
                await self._more.wait()


def watch(discovery: Discovery, name: str) -> tuple[Heard, Callable[[], None]]:
    heard = Heard()
    unwatch = discovery.watch(name, heard)
    heard.watching = True
    return heard, unwatch


async def does(what: Callable[..., None], *args: str) -> None:
    """Beside the event loop."""
    await asyncio.to_thread(what, *args)


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Returns when the log has it."""
    async with asyncio.timeout(PATIENCE_S):
        while text not in caplog.text:
            await asyncio.sleep(0.01)


async def failed_again(world: World) -> None:
    """Returns when another try has failed, and the one after it has begun."""
    before = world.tries()
    async with asyncio.timeout(PATIENCE_S):
        while world.tries() < before + world.asks + 1:
            await asyncio.sleep(0.01)


async def test_all_are_found_at_first_sorted_and_each_once(world: World, discovery: Discovery) -> None:
    await does(world.serve, "10.0.0.3", "10.0.0.1", "2001:db8::1", "10.0.0.2", "10.0.0.1")
    heard, _ = watch(discovery, world.name)
    await heard.until("10.0.0.1:9000", "10.0.0.2:9000", "10.0.0.3:9000", "[2001:db8::1]:9000")
    assert len(heard.told) == 1


async def test_every_change_is_told(world: World, discovery: Discovery) -> None:
    await does(world.serve, "10.0.0.1")
    heard, _ = watch(discovery, world.name)
    await heard.until("10.0.0.1:9000")
    await does(world.serve, "10.0.0.1", "10.0.0.2")
    await heard.until("10.0.0.1:9000", "10.0.0.2:9000")
    await does(world.serve, "10.0.0.3")
    await heard.until("10.0.0.3:9000")


async def test_what_has_not_changed_is_not_told_again(world: World, discovery: Discovery) -> None:
    await does(world.serve, "10.0.0.1", "10.0.0.2")
    heard, _ = watch(discovery, world.name)
    await heard.until("10.0.0.1:9000", "10.0.0.2:9000")
    await does(world.serve, "10.0.0.1", "10.0.0.2")
    await does(world.serve, "10.0.0.1", "10.0.0.2", "10.0.0.3")
    await heard.until("10.0.0.1:9000", "10.0.0.2:9000", "10.0.0.3:9000")
    assert len(heard.told) == 2


async def test_a_name_that_nobody_has_has_no_endpoints_until_somebody_has_it(
    world: World, discovery: Discovery
) -> None:
    heard, _ = watch(discovery, world.name)
    await heard.until()
    await does(world.serve, "10.0.0.1")
    await heard.until("10.0.0.1:9000")


async def test_that_nothing_is_left_is_told(world: World, discovery: Discovery) -> None:
    await does(world.serve, "10.0.0.1", "10.0.0.2")
    heard, _ = watch(discovery, world.name)
    await heard.until("10.0.0.1:9000", "10.0.0.2:9000")
    await does(world.serve)
    await heard.until()
    await does(world.serve, "10.0.0.1")
    await heard.until("10.0.0.1:9000")
    await does(world.remove)
    await heard.until()


async def test_while_nothing_can_be_found_out_what_was_found_stands_and_the_log_says_so_once(
    world: World, discovery: Discovery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await does(world.serve, "10.0.0.1")
    heard, _ = watch(discovery, world.name)
    await heard.until("10.0.0.1:9000")
    for turn in range(2):
        caplog.clear()
        await does(world.fail)
        await logged(caplog, STANDS)
        await does(world.serve, f"10.0.0.{turn + 2}")
        await failed_again(world)
        assert heard.told[-1] == [f"10.0.0.{turn + 1}:9000"]
        assert caplog.text.count(STANDS) == 1
        assert [record.levelno for record in caplog.records if STANDS in record.message] == [logging.WARNING]
        await does(world.heal)
        await heard.until(f"10.0.0.{turn + 2}:9000")
        await logged(caplog, OVER)


async def test_what_cannot_be_found_out_at_first_is_found_later(
    world: World, discovery: Discovery, caplog: pytest.LogCaptureFixture
) -> None:
    await does(world.serve, "10.0.0.1")
    await does(world.fail)
    heard, _ = watch(discovery, world.name)
    await logged(caplog, STANDS)
    assert heard.told == []
    await does(world.heal)
    await heard.until("10.0.0.1:9000")


async def test_who_no_longer_watches_is_told_nothing(world: World, discovery: Discovery) -> None:
    await does(world.serve, "10.0.0.1")
    gone, unwatch = watch(discovery, world.name)
    stays, _ = watch(discovery, world.name)
    for heard in (gone, stays):
        await heard.until("10.0.0.1:9000")
    unwatch()
    unwatch()
    never, unwatch_at_once = watch(discovery, world.name)
    unwatch_at_once()
    await does(world.serve, "10.0.0.2")
    await stays.until("10.0.0.2:9000")
    again, _ = watch(discovery, world.name)
    await again.until("10.0.0.2:9000")
    assert gone.told == [["10.0.0.1:9000"]]
    assert never.told == []


async def test_after_it_was_stopped_nothing_of_it_runs(world: World, discovery: Discovery) -> None:
    await does(world.serve, "10.0.0.1")
    before = asyncio.all_tasks()
    heard, _ = watch(discovery, world.name)
    await heard.until("10.0.0.1:9000")
    await discovery.stop()
    await discovery.stop()
    assert asyncio.all_tasks() == before


async def test_it_may_be_stopped_amid_a_failure_and_before_it_was_started(world: World) -> None:
    await world.discovery().stop()
    discovery = world.discovery()
    await discovery.start()
    await does(world.fail)
    watch(discovery, world.name)
    await asyncio.sleep(0)
    await discovery.stop()
