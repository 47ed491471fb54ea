"""The ambassador from end to end; prints clients/transcripts/ambassador.txt.

It declares upstreams over servers of its own and uses them as any app would: by ports of localhost. It wants an
ambassador that has Envoy and may dial loopback, as that of `make run` may, and RETINUE_CONTROL_ADDRESS, its control
socket, unless `make run` has put one above the working directory. Give another name to run it twice: counts stay.
"""

from __future__ import annotations

import asyncio
import http.client
import sys
import threading
from collections import Counter
from contextlib import AsyncExitStack, aclosing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple

from retinue.ambassador.v1 import policy_pb2 as policy
from retinue.ambassador.v1 import upstream_pb2 as pb
from retinue.client import Ambassador, RetinueError
from retinue.client.address import control_address
from retinue.client.ambassador import upstream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable

    from retinue.client.ambassador import Change

WAIT = 20.0
"""In seconds, for what takes a moment."""
ASKED = 9 + 12
"""How many requests are counted."""
CANARY = {"x-canary": "1"}


class Server(ThreadingHTTPServer):
    """What stands behind: it answers with its name; nothing is at `/nowhere`, and `/held` waits for its release."""

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.address = name, f"127.0.0.1:{self.server_port}"
        self.held, self.released = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request to a connection."""

    server: Server

    def do_GET(self) -> None:
        if self.path == "/held":
            self.server.held.set()
            self.server.released.wait(WAIT)
        body = self.server.name.encode()
        self.send_response(HTTPStatus.NOT_FOUND if self.path == "/nowhere" else HTTPStatus.OK)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class Answer(NamedTuple):
    status: int
    text: str


class Shop:
    """The upstream of the story, and who has to do with it."""

    def __init__(self, name: str, app: Ambassador, operator: Ambassador) -> None:
        self.id, self.canary_id, self.app, self.operator = f"{name}-shop", f"{name}-canary", app, operator
        self.servers: dict[str, Server] = {}
        self.address = self.etag = ""

    def wanted(self, weights: dict[str, int], *splits: policy.Split) -> pb.Upstream:
        """It over these servers; a request that did not reach one is tried at another."""
        endpoints = [pb.Endpoint(address=self.servers[name].address, weight=weights[name]) for name in weights]
        found = pb.Upstream(
            upstream_id=self.id, protocol=pb.PROTOCOL_HTTP, static=pb.StaticEndpoints(endpoints=endpoints)
        )
        found.policy.retry.on.extend([policy.RETRY_CONDITION_CONNECT_FAILURE, policy.RETRY_CONDITION_RESET])
        found.policy.splits.extend(splits)
        return found

    async def declare(self, weights: dict[str, int], *splits: policy.Split) -> pb.Upstream:
        found = await self.operator.declare(self.wanted(weights, *splits), wait=WAIT)
        self.address, self.etag = found.status.address, found.etag
        return found

    async def get(self, path: str = "/", headers: dict[str, str] | None = None) -> Answer:
        """As any app does: it knows nothing but a port of localhost."""

        def ask() -> Answer:
            connection = http.client.HTTPConnection(self.address, timeout=WAIT)
            try:
                connection.request("GET", path, headers={"connection": "close", **(headers or {})})
                answer = connection.getresponse()
                return Answer(answer.status, answer.read().decode())
            finally:
                connection.close()

        return await asyncio.to_thread(ask)

    async def tally(self, requests: int, headers: dict[str, str] | None = None) -> str:
        """Who answered how many."""
        answers = [await self.get(headers=headers) for _ in range(requests)]
        counts = Counter(answer.text if answer.status == HTTPStatus.OK else str(answer.status) for answer in answers)
        return ", ".join(f"{name} {counts[name]}" for name in sorted(counts))


async def main(name: str) -> None:
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(Ambassador())
        operator = await stack.enter_async_context(Ambassador(control_address()))
        shop = Shop(name, app, operator)
        for letter in "abcd":
            shop.servers[letter] = Server(letter)
            stack.callback(shop.servers[letter].stop)
        watching = await stack.enter_async_context(aclosing(app.watch(shop.id)))
        await look(shop)
        await refuse(shop)
        await declare(shop, watching)
        await weigh(shop)
        await split(shop)
        await change(shop)
        await lose(shop)
        await drain(shop, watching)
        await remove(shop, watching)


async def look(shop: Shop) -> None:
    can = {(one.protocol, one.name) for plane in await shop.app.data_planes() for one in plane.capabilities}
    http, tcp = ((protocol, "policy.splits") in can for protocol in (pb.PROTOCOL_HTTP, pb.PROTOCOL_TCP))
    print(f"HTTP can be split: {yes(http)}, TCP: {yes(tcp)}")


async def refuse(shop: Shop) -> None:
    declare = shop.operator.declare
    print(f"an app declares: {told(await refused(shop.app.declare(shop.wanted({'a': 1}))))}")
    nonsense = upstream(shop.id, "TCP", ["example.com:80"], port=70_000)
    nonsense.policy.mirror.upstream_id = shop.canary_id
    refusal = await refused(declare(nonsense))
    print(f"declared nonsense: {told(refusal)}")
    for field in sorted(violation.field for violation in refusal.violations):
        print(f"  {field}")
    cache = upstream(shop.id, "MEMCACHED", ["10.0.0.1:11211"])
    cache.policy.rate_limit.requests = 100
    refusal = await refused(declare(cache))
    print(f"declared what nobody can do: {told(refusal)}: {refusal.metadata['capability']} of MEMCACHED")
    for address in ("169.254.169.254:80", "[::ffff:169.254.169.254]:80"):
        refusal = await refused(declare(upstream(shop.id, "HTTP", [address])))
        print(f"declared over {address}: {told(refusal)}")
    print(f"  {refusal.message}")
    print(f"nothing came of it: {told(await refused(shop.app.get(shop.id)))}")


async def declare(shop: Shop, watching: AsyncGenerator[Change]) -> None:
    await anext(watching)  # all there are were told: it is not among them
    waiting = asyncio.create_task(shop.app.wait(shop.id, timeout=WAIT))
    first = await shop.declare({"a": 1, "b": 1, "c": 1})
    await waiting
    local = shop.address.startswith("127.0.0.1:")
    print(f"declared over a, b, c: {state(first)}, on localhost: {yes(local)}; an app that waited goes on")
    print(f"the app sees it: {await seen(watching, pb.UPSTREAM_STATE_ACTIVE)}")
    print(f"9 requests: {await shop.tally(9)}")
    again = await shop.declare({"a": 1, "b": 1, "c": 1})
    print(f"declared again: nothing changes: {yes(again.etag == first.etag)}")


async def weigh(shop: Shop) -> None:
    before, etag = shop.address, shop.etag
    await shop.declare({"a": 2, "b": 1, "c": 1})
    print(f"a weighs 2, at the same address: {yes(shop.address == before)}")
    print(f"12 requests: {await shop.tally(12)}")
    stale = shop.operator.declare(shop.wanted({"a": 1}), etag=etag)
    print(f"declared by the etag from before: {told(await refused(stale))}")
    async with aclosing(shop.app.stats(shop.id, interval=0.1)) as snapshots:
        async for [stats] in snapshots:
            if min(stats.requests, sum(one.requests for one in stats.endpoints)) >= ASKED:
                break
    names = {server.address: server.name for server in shop.servers.values()}
    shares = ", ".join(sorted(f"{names[one.address]} {one.requests}" for one in stats.endpoints))
    print(f"counted: {stats.requests} requests, {stats.errors} errors; {shares}")


async def split(shop: Shop) -> None:
    some = policy.Split(upstream_id=shop.canary_id, header=policy.HeaderMatch(name="x-canary"))
    unknown = shop.operator.declare(shop.wanted({"a": 1}, some))
    print(f"split to one that is not there: {told(await refused(unknown))}")
    await shop.operator.declare(upstream(shop.canary_id, "HTTP", [shop.servers["d"].address]))
    await shop.app.wait(shop.canary_id, timeout=WAIT)
    await shop.declare({"a": 1, "b": 1, "c": 1}, some)
    print(f"split by a header: 9 requests with it: {await shop.tally(9, CANARY)}")
    print(f"9 without it: {await shop.tally(9)}")
    found, missing = [await shop.app.invoke(shop.id, path, headers=CANARY) for path in ("/", "/nowhere")]
    print(f"invoked by gRPC: {found.status} {found.body.decode()}, of nothing: {missing.status}")


async def change(shop: Shop) -> None:
    """While requests go on."""
    stop = asyncio.Event()

    async def ask() -> list[Answer]:
        answers = []
        while not stop.is_set():
            answers.append(await shop.get())
        return answers

    asking = asyncio.create_task(ask())
    await shop.declare({"a": 1, "b": 1, "c": 1}, policy.Split(upstream_id=shop.canary_id, percent=100))
    print(f"all is split: 9 requests: {await shop.tally(9)}")
    some = policy.Split(upstream_id=shop.canary_id, header=policy.HeaderMatch(name="x-canary"))
    await shop.declare({"a": 1, "b": 1}, some)
    stop.set()
    answers = await asking
    failed = sum(answer.status != HTTPStatus.OK for answer in answers)
    print(f"nothing is, and c leaves: 10 requests: {await shop.tally(10)}")
    print(f"others went on meanwhile: {yes(answers)}, failed: {failed}")


async def lose(shop: Shop) -> None:
    shop.servers["b"].stop()
    print(f"b stops: 9 requests: {await shop.tally(9)}")
    async with aclosing(shop.app.stats(shop.id, interval=0.1)) as snapshots:
        async for [stats] in snapshots:
            if stats.retries:
                break
    print(f"counted: retries: {yes(stats.retries)}, errors: {stats.errors}")


async def drain(shop: Shop, watching: AsyncGenerator[Change]) -> None:
    asking = asyncio.create_task(shop.get("/held", CANARY))
    await asyncio.to_thread(shop.servers["d"].held.wait)
    drained = await shop.operator.drain(shop.id)
    print(f"drained with a request under way: {state(drained)}")
    print(f"the app sees it: {await seen(watching, pb.UPSTREAM_STATE_DRAINING)}")
    print(f"it dials anew: refused: {yes(await is_refused(shop))}")
    print(f"it invokes by gRPC: {told(await refused(shop.app.invoke(shop.id)))}")
    shop.servers["d"].released.set()
    status, text = await asking
    print(f"the request under way is answered: {status} {text}")
    drained = await shop.operator.drain(shop.id, wait=WAIT)
    print(f"connections left: {drained.status.active_connections}")


async def remove(shop: Shop, watching: AsyncGenerator[Change]) -> None:
    print(f"removed what it splits to: {told(await refused(shop.operator.remove(shop.canary_id)))}")
    removed, again = [await shop.operator.remove(shop.id, drain=0) for _ in range(2)]
    print(f"removed it: {yes(removed)}, again: {yes(again)}")
    while (await anext(watching)).removed != shop.id:
        pass
    print("the app sees it: gone")
    print(f"removed the other: {yes(await shop.operator.remove(shop.canary_id, drain=0))}")


async def seen(watching: AsyncGenerator[Change], wanted: pb.UpstreamState.ValueType) -> str:
    """Waits until the app has been told that it is so."""
    async for change in watching:
        if change.upstream is not None and change.upstream.status.state == wanted:
            return state(change.upstream)
    raise AssertionError("the watch ended")


async def is_refused(shop: Shop) -> bool:
    try:
        await shop.get()
    except ConnectionRefusedError:
        return True
    return False


async def refused(call: Awaitable[object]) -> RetinueError:
    try:
        await call
    except RetinueError as error:
        return error
    raise AssertionError("it was not refused")


def state(found: pb.Upstream) -> str:
    return pb.UpstreamState.Name(found.status.state).removeprefix("UPSTREAM_STATE_")


def told(refusal: RetinueError) -> str:
    return f"{refusal.code.name} {refusal.reason}"


def yes(value: object) -> str:
    return "true" if value else "false"


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "transcript"))
