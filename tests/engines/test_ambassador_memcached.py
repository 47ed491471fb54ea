"""Claims about memcached behind the native data plane, held to real memcached servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pylibmc  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.upstreams import assignment, memcached, spec

from retinue_server.ambassador.core.spec import Endpoint, OutlierDetection, Protocol, Spec, Timeouts
from retinue_server.ambassador.engines.native.plane import NativePlane


@pytest.fixture(scope="module")
def shards() -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(memcached()) for _ in range(3)]


@pytest.fixture
async def plane(shards: list[str]) -> AsyncIterator[NativePlane]:
    for shard in shards:
        await talk(shard, b"flush_all\r\n", b"OK\r\n")
    made = NativePlane()
    await made.start()
    yield made
    await made.stop()


async def talk(address: str, data: bytes, until: bytes, pieces: int = 1) -> bytes:
    """What is answered, up to what it ends with; sent in so many pieces."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        size = -(-len(data) // pieces)
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(30):
            found = b""
            while not found.endswith(until):
                part = await reader.read(65536)
                if not part:
                    break
                found += part
            return found
    finally:
        writer.close()


async def served(plane: NativePlane, *shards: str, **policy: Any) -> tuple[Spec, str]:
    policy.setdefault("timeouts", Timeouts(request_s=30.0))  # a machine that stands still is no shard that hangs
    wanted = spec(Protocol.MEMCACHED, **policy)
    await plane.put(assignment(wanted, *(Endpoint(shard) for shard in shards)))
    return wanted, f"127.0.0.1:{wanted.listen.port}"


async def test_memccapable_finds_all_that_it_looks_for(plane: NativePlane, shards: list[str]) -> None:
    if shutil.which("memccapable") is None:
        pytest.skip("needs memccapable: apt-get install libmemcached-tools")
    wanted, _ = await served(plane, *shards)
    command = ["memccapable", "-h", "127.0.0.1", "-p", str(wanted.listen.port), "-a"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("[pass]") == 27


COMMANDS = b"".join(
    command + b"\r\n"
    for command in (
        b"set a 5 0 3\r\nabc",
        b"get a",
        b"gets a b a",
        b"add a 0 0 1\r\nx",
        b"add b 0 0 0\r\n",
        b"get a b nothing",
        b"append a 0 0 2\r\nde",
        b"prepend a 0 0 2 noreply\r\n--",
        b"get a",
        b"incr n 1",
        b"set n 0 0 1\r\n9",
        b"incr n 5",
        b"decr n 100",
        b"incr a 1",
        b"touch a 100",
        b"gat 100 a n",
        b"delete a",
        b"delete a noreply",
        b"cas n 0 0 1 1\r\n7",
        b"verbosity 1",
        b"bogus",
        b"get",
        b"set a b c",
        b"mg n v k f t",
        b"mg none v",
        b"mg none v q",
        b"ms m 3 T0 F7\r\nxyz",
        b"ms m 1 q\r\nz",
        b"mg m v f O123 k",
        b"md m q",
        b"md m q",
        b"md m",
        b"ma n D5",
        b"ma none q",
        b"ma n N0 J13 v",
        b"me n",
        b"mn",
    )
)


REFUSED = [
    b"set " + b"k" * 251 + b" 0 0 7",
    b"set a x 0 7",
    b"set a -1 0 7",
    b"set a 0 soon 7",
    b"set a 0 0 7 two words",
    b"cas a 0 0 7 x",
    b"cas a 0 0 7 18446744073709551616",
    b"cas a 0 0 7",
    b"ms " + b"k" * 251 + b" 7",
    b"ms a 7" + b" k" * 17,
]
"""What memcached does not even read the value of: it takes it for a command."""


@pytest.mark.parametrize("pieces", [1, 7, 100, 100_000])
async def test_one_shard_answers_through_it_as_it_does_directly(
    plane: NativePlane, shards: list[str], pieces: int
) -> None:
    _, address = await served(plane, shards[0])
    direct = await talk(shards[0], COMMANDS, b"MN\r\n")
    await talk(shards[0], b"flush_all\r\n", b"OK\r\n")
    through = await talk(address, COMMANDS, b"MN\r\n", min(pieces, len(COMMANDS)))
    assert _comparable(through) == _comparable(direct)


def _comparable(said: bytes) -> list[bytes]:
    """Without what differs from time to time: tokens of cas, and seconds of `me`."""
    lines = []
    for line in said.split(b"\r\n"):
        words = line.split(b" ")
        if line.startswith(b"VALUE") and len(words) == 5:
            words = words[:4]
        if line.startswith(b"ME "):
            words = words[:2]
        lines.append(b" ".join(words))
    return lines


@pytest.mark.parametrize("refused", REFUSED, ids=range(len(REFUSED)))
async def test_a_value_that_is_taken_for_a_command_is_answered_to_nobody_else(
    plane: NativePlane, shards: list[str], refused: bytes
) -> None:
    _, address = await served(plane, shards[0])
    said = refused + b"\r\nget all\r\nmn\r\n"
    direct = await talk(shards[0], said, b"MN\r\n")
    assert direct.count(b"\r\n") == 3, "it answers twice"
    many = asyncio.gather(*(talk(address, b"get other\r\nmn\r\n", b"MN\r\n") for _ in range(20)))
    assert await talk(address, said * 20 + b"quit\r\n", b"until it closes") == direct * 20
    assert set(await many) == {b"END\r\nMN\r\n"}
    assert (await plane.counts())["it"].errors == 0


@pytest.mark.parametrize(
    "line",
    [b"delete " + b"k" * 3000, b"mg a O" + b"x" * 3000, b"gat 0" + b" key" * 1000, b"set a 0 0 1 " + b"x" * 3000],
)
async def test_a_line_for_which_a_shard_ends_its_connection_is_not_sent(
    plane: NativePlane, shards: list[str], line: bytes
) -> None:
    _, address = await served(plane, shards[0])
    said = await talk(address, b"get a\r\n" + line + b"\r\n", b"until it closes", 50)
    assert said == b"END\r\nCLIENT_ERROR line too long\r\n"
    assert await talk(address, b"get" + b" key" * 1000 + b"\r\nmn\r\n", b"MN\r\n", 50) == b"END\r\nMN\r\n"
    assert (await plane.counts())["it"].errors == 0


async def test_commands_that_need_no_closer_look_are_taken_among_others(plane: NativePlane, shards: list[str]) -> None:
    _, address = await served(plane, *shards)
    value = b"get inner\r\nset inner 0 0 1\r\nx\r\n"
    said = b"".join(
        b"set k%d 0 0 %d\r\n%s\r\nadd k%d 0 0 1\r\nx\r\nget k%d\r\nget  k%d\r\n" % (n, len(value), value, n, n, n)
        for n in range(20)
    )
    wanted = b"".join(
        b"STORED\r\nNOT_STORED\r\n" + 2 * (b"VALUE k%d 0 %d\r\n%s\r\nEND\r\n" % (n, len(value), value))
        for n in range(20)
    )
    for pieces in (1, 13, len(said)):
        assert await talk(address, said + b"mn\r\n", b"MN\r\n", pieces) == wanted + b"MN\r\n"
    assert await talk(address, b"get inner\r\n", b"END\r\n") == b"END\r\n"


async def test_keys_are_where_libmemcached_looks_for_them(plane: NativePlane, shards: list[str]) -> None:
    """What a client of libmemcached stored on the shards is found through us, and what we stored by the client."""
    _, address = await served(plane, *shards)
    client = pylibmc.Client(shards, behaviors={"ketama_weighted": True})
    for number in range(200):
        await asyncio.to_thread(client.set, f"theirs{number}", str(number))
        said = await talk(address, f"get theirs{number}\r\n".encode(), b"END\r\n")
        assert said.split(b"\r\n")[1:2] == [str(number).encode()]
        await talk(address, f"set ours{number} 0 0 1\r\nx\r\n".encode(), b"STORED\r\n")
        assert await asyncio.to_thread(client.get, f"ours{number}") == b"x"
    assert all(one.requests > 50 for one in (await plane.counts())["it"].endpoints.values()), "each has its share"


async def test_a_shard_that_is_added_takes_its_share_and_no_other_keys(plane: NativePlane, shards: list[str]) -> None:
    wanted, address = await served(plane, *shards[:2])
    for number in range(300):
        assert await talk(address, f"set k{number} 0 0 1\r\nx\r\n".encode(), b"\r\n") == b"STORED\r\n"
    before = await _where(shards)
    endpoints = tuple(Endpoint(shard) for shard in shards)
    await plane.put(msgspec.structs.replace(assignment(wanted), endpoints=endpoints, generation=2))
    for number in range(300):
        await talk(address, f"set k{number} 0 0 1\r\nx\r\n".encode(), b"\r\n")
    moved = {key for key, at in (await _where(shards)).items() if shards[2] in at}
    assert 40 < len(moved) < 180
    after = await _where(shards)
    assert all(before[key] <= after[key] for key in before), "what stayed is where it was"
    counts = (await plane.counts())["it"]
    assert counts.requests == 600
    assert sum(one.requests for one in counts.endpoints.values()) == 600


async def _where(shards: list[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for shard in shards:
        for number in range(300):
            if (await talk(shard, f"get k{number}\r\n".encode(), b"END\r\n")).startswith(b"VALUE"):
                found.setdefault(f"k{number}", set()).add(shard)
    return found


async def test_many_keys_are_gathered_from_their_shards(plane: NativePlane, shards: list[str]) -> None:
    _, address = await served(plane, *shards)
    for number in range(30):
        await talk(address, f"set k{number} 0 0 2\r\n{number:02}\r\n".encode(), b"\r\n")
    said = await talk(address, b"get " + b" ".join(f"k{n}".encode() for n in range(30)) + b" none\r\n", b"END\r\n")
    values = said.removesuffix(b"END\r\n").split(b"\r\n")
    assert {(values[at], values[at + 1]) for at in range(0, 60, 2)} == {
        (f"VALUE k{n} 0 2".encode(), f"{n:02}".encode()) for n in range(30)
    }


async def test_a_dead_shard_costs_its_own_keys_alone(plane: NativePlane, shards: list[str]) -> None:
    with memcached() as dying:
        _, address = await served(plane, shards[0], dying, timeouts=Timeouts(request_s=1.0, connect_s=1.0))
        keys = [f"k{number}" for number in range(60)]
        for key in keys:
            await talk(address, f"set {key} 0 0 1\r\nx\r\n".encode(), b"\r\n")
    said = [await talk(address, f"get {key}\r\n".encode(), b"\r\n") for key in keys]
    failed = [one for one in said if one.startswith(b"SERVER_ERROR")]
    assert 0 < len(failed) < len(keys)
    assert all(dying.encode() in one for one in failed)
    assert all(one.startswith(b"VALUE") for one in said if one not in failed)


async def test_with_outlier_detection_the_keys_of_a_dead_shard_go_elsewhere(
    plane: NativePlane, shards: list[str]
) -> None:
    outliers = OutlierDetection(1, 1.0, 60.0, 100)
    with memcached() as dying:
        _, address = await served(plane, shards[0], dying, outlier_detection=outliers)
        await talk(address, b"version\r\n", b"\r\n")
    keys = [f"k{number}" for number in range(60)]
    async with asyncio.timeout(30):
        while True:
            said = [await talk(address, f"set {key} 0 0 1\r\nx\r\n".encode(), b"\r\n") for key in keys]
            if all(one == b"STORED\r\n" for one in said):
                break
    assert [one.healthy for one in plane.health("it")] == [True, False]


async def test_a_shard_that_hangs_is_not_waited_for(plane: NativePlane) -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    hanging = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    _, address = await served(plane, hanging, timeouts=Timeouts(request_s=0.2))
    said = await talk(address, b"get a\r\nget b\r\n", b"in time\r\n")
    assert said.count(b"SERVER_ERROR") == 2
    assert (await plane.counts())["it"].timeouts == 1
    server.close()


async def test_what_many_say_at_once_is_answered_to_each(plane: NativePlane, shards: list[str]) -> None:
    _, address = await served(plane, *shards)
    chance = random.Random(7)

    async def one(name: int) -> None:
        for turn in range(30):
            value = bytes(chance.choice(b"abc\r\n ") for _ in range(chance.randrange(2000)))
            key = f"c{name}-{turn}".encode()
            data = b"set " + key + b" 0 0 " + str(len(value)).encode() + b"\r\n" + value + b"\r\n"
            assert await talk(address, data, b"\r\n", 3) == b"STORED\r\n"
            said = await talk(address, b"get " + key + b"\r\n", b"END\r\n")
            assert said == b"VALUE " + key + b" 0 " + str(len(value)).encode() + b"\r\n" + value + b"\r\nEND\r\n"

    await asyncio.gather(*(one(name) for name in range(20)))


async def test_garbage_ends_no_more_than_its_own_connection(plane: NativePlane, shards: list[str]) -> None:
    _, address = await served(plane, *shards)
    for garbage in (
        b"\r\n",
        b"set a 0 0 -1\r\n",
        b"set a 0 0 99999999999\r\nx",
        b"ms a x\r\n",
        b"\x80\x00\r\n",
        b"x" * 3000 + b"\r\n",
    ):
        said = await talk(address, garbage, b"\r\n")
        assert said.startswith((b"ERROR", b"CLIENT_ERROR", b"SERVER_ERROR"))
    assert await talk(address, b"set a 0 0 1\r\nx\r\n", b"\r\n") == b"STORED\r\n"


async def test_figures_are_those_of_all_shards(plane: NativePlane, shards: list[str]) -> None:
    _, address = await served(plane, *shards)
    for number in range(50):
        await talk(address, f"set k{number} 0 0 1\r\nx\r\n".encode(), b"\r\n")
    each = [_items(await talk(shard, b"stats\r\n", b"END\r\n")) for shard in shards]
    assert all(each)
    assert _items(await talk(address, b"stats\r\n", b"END\r\n")) == sum(each)


def _items(said: bytes) -> int:
    """How many have been stored, since it was started."""
    (line,) = (line for line in said.split(b"\r\n") if line.startswith(b"STAT total_items "))
    return int(line.split()[2])


async def test_a_value_that_comes_in_parts_after_another_command_is_waited_for_no_longer_than_needed(
    plane: NativePlane, shards: list[str]
) -> None:
    _, address = await served(plane, *shards)
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"get none\r\nset a 0 0 4\r\nab")
    assert await reader.readline() == b"END\r\n"
    writer.write(b"cd\r\n")
    assert await reader.readline() == b"STORED\r\n"
    writer.close()


KEYS = st.sampled_from([b"a", b"b", b"n", b"key-with-more"])
VALUES = st.binary(max_size=40) | st.sampled_from([b"1", b"18446744073709551615", b"\r\nEND\r\n", b"x" * 5000])
QUIET = st.sampled_from([b"", b" q"])
NOREPLY = st.sampled_from([b"", b" noreply"])


@st.composite
def command(draw: st.DrawFn) -> bytes:  # noqa: C901, PLR0911 - one case each
    """One that memcached understands, of those that are the same at any time."""
    key, value = draw(KEYS), draw(VALUES)
    kind = draw(
        st.sampled_from(
            ["store", "refused", "get", "gets", "delete", "count", "touch", "gat", "mg", "ms", "md", "ma", "mn"]
        )
    )
    quiet, noreply = draw(QUIET), draw(NOREPLY)
    size = b"%d" % len(value)
    match kind:
        case "store":
            verb = draw(st.sampled_from([b"set", b"add", b"replace", b"append", b"prepend"]))
            return verb + b" " + key + b" 3 0 " + size + noreply + b"\r\n" + value + b"\r\n"
        case "refused":
            return draw(st.sampled_from(REFUSED)) + b"\r\nget b a\r\n"
        case "get" | "gets":
            return b"get " + b" ".join(draw(st.lists(KEYS, min_size=1, max_size=5))) + b"\r\n"
        case "delete":
            return b"delete " + key + noreply + b"\r\n"
        case "count":
            return draw(st.sampled_from([b"incr ", b"decr "])) + key + b" 7" + noreply + b"\r\n"
        case "touch":
            return b"touch " + key + b" 0" + noreply + b"\r\n"
        case "gat":
            return b"gat 0 " + key + b" " + draw(KEYS) + b"\r\n"
        case "mg":
            return b"mg " + key + draw(st.sampled_from([b"", b" v", b" v k f s", b" O7 v"])) + quiet + b"\r\n"
        case "ms":
            mode = draw(st.sampled_from([b"", b" ME", b" MA", b" F9", b" k O1"]))
            return b"ms " + key + b" " + size + mode + quiet + b"\r\n" + value + b"\r\n"
        case "md":
            return b"md " + key + quiet + b"\r\n"
        case "ma":
            if draw(st.booleans()):
                return b"ma " + key + b" N0 J13 v\r\n"  # a quiet one that creates is silent here, not there
            return b"ma " + key + draw(st.sampled_from([b"", b" D5 v", b" MD"])) + quiet + b"\r\n"
    return b"mn\r\n"


@pytest.mark.timeout(180)
@given(st.lists(command(), max_size=30), st.lists(st.integers(0, 4000), max_size=8))
@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_commands_cut_anywhere_are_answered_as_one_server_answers_them(
    shards: list[str], commands: list[bytes], cuts: list[int]
) -> None:
    async def answers() -> tuple[bytes, bytes]:
        plane = NativePlane()
        await plane.start()
        _, address = await served(plane, shards[0])
        said = b"".join(commands) + b"bogus\r\nget last\r\n"
        both = []
        for where, at in ((shards[0], []), (address, sorted(cuts))):
            await talk(shards[0], b"flush_all\r\n", b"OK\r\n")
            both.append(await exchanged(where, said, at))
        await plane.stop()
        return both[0], both[1]

    direct, through = asyncio.run(answers())
    assert through == direct


async def exchanged(address: str, said: bytes, cuts: list[int]) -> bytes:
    """All that is answered to what is sent in pieces, each a segment of its own."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
    try:
        for begin, end in itertools.pairwise([0, *cuts, len(said)]):
            writer.write(said[begin:end])
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(30):
            return await reader.readuntil(b"ERROR\r\nEND\r\n")
    finally:
        writer.close()
