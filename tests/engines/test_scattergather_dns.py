"""Claims on discovery by DNS beyond the exercise. Those with `names` run in namespaces that have a name server."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from servers import environment
from support import names as name_servers
from support.names import Mode, Names

from retinue_server.runtime.discovery.dns import DnsDiscovery

HERE = Path(__file__).parent
MANY = [f"10.1.{n // 250}.{n % 250 + 1}" for n in range(1000)]


def test_every_claim_on_dns_holds_where_the_systems_resolver_asks_a_name_server(tmp_path: Path) -> None:
    if not name_servers.can_be():
        pytest.skip("needs namespaces: apt-get install util-linux, and run as root or allow user namespaces")
    done = name_servers.run_there(tmp_path, HERE / "test_scattergather_discovery.py", Path(__file__))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@asynccontextmanager
async def looking(poll_s: float = 0.05) -> AsyncIterator[DnsDiscovery]:
    discovery = DnsDiscovery(poll_s)
    try:
        yield discovery
    finally:
        await discovery.stop()


async def first(discovery: DnsDiscovery, name: str) -> Sequence[str]:
    """What is found at first."""
    found: asyncio.Future[Sequence[str]] = asyncio.get_running_loop().create_future()
    unwatch = discovery.watch(name, found.set_result)
    try:
        return await asyncio.wait_for(found, 60)
    finally:
        unwatch()


async def test_more_addresses_than_a_datagram_has_room_for_are_all_found(names: Names) -> None:
    names.hosts["many.example"] = MANY
    async with looking() as discovery:
        assert await first(discovery, "many.example:9000") == sorted(f"{host}:9000" for host in MANY)


async def test_what_stands_in_the_hosts_file_is_found_without_a_name_server(names: Names) -> None:
    names.mode = Mode.SILENT
    async with looking() as discovery:
        assert await first(discovery, "of-hosts.example:9000") == ["10.0.0.9:9000"]
    names.mode = Mode.ANSWER


async def test_a_name_with_addresses_of_another_kind_only_has_those(names: Names) -> None:
    names.hosts["six.example"] = ["2001:db8::2", "2001:db8::1"]
    names.hosts["none.example"] = []
    async with looking() as discovery:
        assert await first(discovery, "six.example:9000") == ["[2001:db8::1]:9000", "[2001:db8::2]:9000"]
        assert await first(discovery, "none.example:9000") == []


async def test_what_all_else_does_on_threads_does_not_wait_for_a_silent_name_server(
    names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    names.mode = Mode.SILENT
    async with looking() as discovery:
        for number in range(100):
            discovery.watch(f"{number}.example:9000", lambda _: None)
        await asyncio.sleep(0)
        await asyncio.to_thread(lambda: None)
        assert "cannot look up" not in caplog.text
        async with asyncio.timeout(60):
            while "cannot look up" not in caplog.text:
                await asyncio.sleep(0.05)
    names.mode = Mode.ANSWER


async def test_localhost_is_found() -> None:
    async with looking() as discovery:
        assert "127.0.0.1:9000" in await first(discovery, "localhost:9000")
        assert await first(discovery, "127.0.0.1:9000") == ["127.0.0.1:9000"]
        assert await first(discovery, "[::1]:9000") == ["[::1]:9000"]


@pytest.mark.parametrize("name", [f"{'a' * 64}.example:1", "a..example:1", "unix:/run/leaf"])
async def test_what_can_be_no_name_is_told_and_hurts_no_other(name: str, caplog: pytest.LogCaptureFixture) -> None:
    async with looking() as discovery:
        discovery.watch(name, lambda _: None)
        assert "127.0.0.1:1" in await first(discovery, "localhost:1")
        async with asyncio.timeout(60):
            while f"cannot look up {name}" not in caplog.text:
                await asyncio.sleep(0.01)


async def test_so_many_names_are_looked_up_at_a_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most = 0, 0
    asked: set[str] = set()
    loop, all_asked, go_on = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def answer(host: str, *_: object, **__: object) -> list[object]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(60)
        at_once -= 1
        asked.add(host)
        if len(asked) == 40:
            loop.call_soon_threadsafe(all_asked.set)
        return [(socket.AF_INET, 1, 6, "", ("10.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    async with looking(60) as discovery:
        for number in range(40):
            discovery.watch(f"{number}.example:9000", lambda _: None)
        async with asyncio.timeout(60):
            while at_once < 16:
                await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait_for(all_asked.wait(), 60)
    assert most == 16


def test_the_end_of_the_process_does_not_wait_for_a_look_up() -> None:
    program = """
import asyncio, socket, threading
from retinue_server.runtime.discovery.dns import DnsDiscovery

asked = threading.Event()

def hang(*_, **__):
    asked.set()
    threading.Event().wait()

async def main():
    socket.getaddrinfo = hang
    discovery = DnsDiscovery(5)
    discovery.watch("leaf.example:9000", print)
    await asyncio.to_thread(asked.wait)
    await discovery.stop()

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=250, env=environment())
