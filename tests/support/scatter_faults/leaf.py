"""Leaves in one process, each on a port of its own, which do what they are told and write down what they were asked.

python -m support.scatter_faults.leaf --number N --history DIRECTORY --leaves NAME=HOST:PORT,...

Says its addresses as a line of JSON on stdout, then takes `{"leaf": NAME, "behaviour": {...}}` on stdin, each answered
by a line `ok`. The Go leaf of tests/faults/leaves does the same.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import grpc
import msgspec
from grpc import aio

from retinue.scattergather.v1 import leaf_service_pb2 as pb
from retinue.scattergather.v1.coverage_pb2 import Coverage
from support.history.recorder import boot_ns
from support.scatter_faults.behaviour import Behaviour, Kind
from support.scatter_faults.history import Gave, Got

METHOD = "/retinue.scattergather.v1.LeafService/Query"
_PER_PROCESS = 1_000_000_000
_encode = msgspec.json.Encoder().encode
_behaviour = msgspec.json.Decoder(Behaviour).decode
GARBAGE = (
    b"\xff\xff\xff",  # no message
    b"\x0a\x05abc",  # a field that is longer than what is there
    pb.QueryResponse(coverage=Coverage(expected=1, answered=5)).SerializeToString(),  # a contradiction
)


class Book:
    """The history of one process; each line is handed to the kernel before the method returns."""

    def __init__(self, directory: Path, number: int) -> None:
        self._file = os.open(directory / f"leaf-{number}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._serials = itertools.count(number * _PER_PROCESS + 1)

    def got(self, leaf: str, query: pb.QueryRequest, left_s: float | None) -> int:
        """A call came; its number."""
        serial = next(self._serials)
        left = -1 if left_s is None else int(left_s * 1e9)
        request = query.payload.decode().partition(" ")[0]
        self._note(Got(boot_ns(), leaf, serial, request, query.shard_id, query.attempt, left))
        return serial

    def gave(self, serial: int, end: str) -> None:
        """It has ended."""
        self._note(Gave(boot_ns(), serial, end))

    def _note(self, event: Got | Gave) -> None:
        os.write(self._file, _encode(event) + b"\n")


class Leaf:
    """One of them: answers for whichever shard it is asked for."""

    def __init__(self, name: str, book: Book) -> None:
        self.name, self._book = name, book
        self._turn = itertools.count()
        self.behaviour = Behaviour()

    async def query(self, request: bytes, context: Any) -> bytes:
        """Serves a call, as bytes."""
        query = pb.QueryRequest.FromString(request)
        serial = self._book.got(self.name, query, context.time_remaining())
        try:
            return await self._behave(query, serial, context)
        except asyncio.CancelledError:
            self._book.gave(serial, "cancelled")
            raise

    async def _behave(self, query: pb.QueryRequest, serial: int, context: Any) -> bytes:
        does = self.behaviour
        if does.delay_s:
            await asyncio.sleep(does.delay_s)
        fails = does.kind is Kind.FAIL or (does.kind is Kind.FLAP and next(self._turn) % 2 == 0)
        if fails:
            code = next(code for code in grpc.StatusCode if code.value[0] == does.code)
            self._book.gave(serial, code.name)
            await context.abort(code, "as it was told")
        if does.kind is Kind.STALL:
            await context.send_initial_metadata(())
            await asyncio.Event().wait()
        return self._reply(query, serial, does)

    def _reply(self, query: pb.QueryRequest, serial: int, does: Behaviour) -> bytes:
        if does.kind is Kind.CORRUPT:
            self._book.gave(serial, "corrupt")
            return GARBAGE[next(self._turn) % len(GARBAGE)]
        payload = said(query, serial)
        if does.kind is Kind.OVERSIZE:
            payload += b" " * does.size
        reply = pb.QueryResponse(payload=payload)
        if does.kind is Kind.PART:
            reply.coverage.MergeFrom(Coverage(expected=2, answered=1))
        self._book.gave(serial, "part" if does.kind is Kind.PART else "answered")
        return reply.SerializeToString()


def said(query: pb.QueryRequest, serial: int) -> bytes:
    """The payload of a reply: a line, or for merges of JSON a group of its own."""
    request, _, form = query.payload.decode().partition(" ")
    if form == "groups":
        return json.dumps({query.shard_id: serial}).encode()
    return f"{request} {query.shard_id} {serial}\n".encode()


async def serve(leaf: Leaf, address: str) -> tuple[aio.Server, str]:
    """A server for it, and where it listens."""
    server = aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_send_message_length", -1)])
    handler: Any = grpc.unary_unary_rpc_method_handler(leaf.query)
    service, _, method = METHOD[1:].partition("/")
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
    host, _, port = address.rpartition(":")
    bound = server.add_insecure_port(f"{host}:{port}")
    await server.start()
    return server, f"{host}:{bound}"


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--history", type=Path, required=True)
    parser.add_argument("--leaves", required=True)
    flags = parser.parse_args()
    book = Book(flags.history, flags.number)
    leaves, servers, addresses = {}, [], {}
    for named in flags.leaves.split(","):
        name, _, address = named.partition("=")
        leaves[name] = Leaf(name, book)
        server, addresses[name] = await serve(leaves[name], address)
        servers.append(server)
    _say(json.dumps(addresses))
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        told = json.loads(line)
        leaves[told["leaf"]].behaviour = _behaviour(json.dumps(told["behaviour"]))
        _say("ok")
    for server in servers:
        await server.stop(0)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - for who started it


if __name__ == "__main__":
    asyncio.run(main())
