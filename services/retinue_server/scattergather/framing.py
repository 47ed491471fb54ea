"""LeafService's messages as bytes: written once but for some bytes of each shard, and read without being parsed.

Field numbers are those of `leaf_service.proto`, and a test holds the two together. A foreign method gets the bytes that
the caller gave.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf.message import DecodeError

from retinue.scattergather.v1 import leaf_service_pb2 as pb
from retinue_server.scattergather.core.requests import Coverage, Malformed, Reply
from retinue_server.scattergather.varints import field, read_varint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from retinue_server.scattergather.core.topology import Shard
    from retinue_server.scattergather.engine import Metadata

_PAYLOAD, _SHARD_ID, _SHARDS, _PARENT = b"\x0a", b"\x12", b"\x22", b"\x2a"
_ATTEMPT = tuple(b"\x18" + bytes((number,)) for number in range(128))
_SMALL = 0x80
"""A varint below it is one byte."""


@lru_cache(maxsize=65536)
def _shard_id(shard_id: str) -> bytes:
    """The field; the same shards are asked again and again."""
    return field(_SHARD_ID, shard_id.encode())


class Inputs(NamedTuple):
    """What each shard is asked."""

    payload: bytes = b""
    by_shard: Mapping[str, bytes] | None = None

    def of(self, shard: Shard) -> bytes:
        """The input of a shard."""
        return self.payload if self.by_shard is None else self.by_shard[shard.shard_id]


class Parent(NamedTuple):
    """What a leaf that is a root itself must know."""

    path: tuple[str, ...]
    accept_partial: bool
    scatter_id: str


class LeafQuestion:
    """Asks LeafService.Query."""

    def __init__(self, inputs: Inputs, parent: Parent, forwarded: Metadata = (), *, batch: bool = False) -> None:
        self._inputs, self._forwarded, self._batch = inputs, forwarded, batch
        self._payload = field(_PAYLOAD, inputs.payload) if inputs.payload else b""
        said = pb.ParentQuery(path=parent.path, accept_partial=parent.accept_partial, scatter_id=parent.scatter_id)
        self._parent = said.SerializeToString()
        self._plain_parent = field(_PARENT, self._parent)

    def data(self, shards: Sequence[Shard], attempt: int) -> bytes:
        if self._batch:
            return self._payload + _ATTEMPT[attempt & 0x7F] + self._plain_parent + self._batched(shards)
        [shard] = shards
        payload = self._payload
        if self._inputs.by_shard is not None:
            payload = field(_PAYLOAD, self._inputs.of(shard))
        parent = self._plain_parent
        if shard.pool:
            parent = field(_PARENT, self._parent + field(b"\x0a", shard.pool.encode()))
        return payload + _shard_id(shard.shard_id) + _ATTEMPT[attempt & 0x7F] + parent

    def _batched(self, shards: Sequence[Shard]) -> bytes:
        own = self._inputs.by_shard is not None
        queries = (pb.ShardQuery(shard_id=s.shard_id, payload=self._inputs.of(s) if own else None) for s in shards)
        return b"".join(field(_SHARDS, query.SerializeToString()) for query in queries)

    def metadata(self, shards: Sequence[Shard], attempt: int) -> Metadata:  # noqa: ARG002 - Question has it
        return self._forwarded

    def read(self, data: bytes) -> Reply:
        """The common reply is one field, which is cut out; others are parsed."""
        if not data:
            return Reply(b"")
        try:
            if data[:1] == _PAYLOAD:
                size, at = (data[1], 2) if len(data) > 1 and data[1] < _SMALL else read_varint(data, 1)
                if at + size == len(data):
                    return Reply(data[at:])
            reply = pb.QueryResponse.FromString(data)
        except (DecodeError, ValueError):
            raise Malformed("it is no QueryResponse") from None
        if not reply.HasField("coverage"):
            return Reply(reply.payload)
        said = reply.coverage
        if said.expected < 0 or said.answered < 0 or 0 < said.expected < said.answered:
            raise Malformed("its coverage contradicts itself")
        return Reply(reply.payload, Coverage(said.expected, said.answered, said.complete))


class PlainQuestion:
    """Asks a method that knows nothing of Retinue."""

    def __init__(self, inputs: Inputs, forwarded: Metadata = ()) -> None:
        self._inputs, self._forwarded = inputs, forwarded

    def data(self, shards: Sequence[Shard], attempt: int) -> bytes:  # noqa: ARG002 - Question has it
        return self._inputs.of(shards[0])

    def metadata(self, shards: Sequence[Shard], attempt: int) -> Metadata:
        return (*self._forwarded, ("retinue-shard", shards[0].shard_id), ("retinue-attempt", str(attempt)))

    def read(self, data: bytes) -> Reply:
        return Reply(data)
