"""Envoy's messages, in a pool of their own: the process's default pool has those of others, and none of these."""

from __future__ import annotations

import hashlib
import lzma
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format
from google.protobuf.message_factory import GetMessageClass

_FILE = Path(__file__).with_name("descriptors.binpb.xz")
_PREFIX = "type.googleapis.com/"

Json = dict[str, Any]
"""A message as JSON has it, by the field names of the proto."""


@cache
def pool() -> descriptor_pool.DescriptorPool:
    """All that Envoy is told; made when it is first needed, in some 60 ms."""
    files = descriptor_pb2.FileDescriptorSet.FromString(lzma.decompress(_FILE.read_bytes()))
    made = descriptor_pool.DescriptorPool()
    for file in files.file:
        made.Add(file)
    return made


@cache
def message(name: str) -> Any:
    """The class of a message, by its full name; raises KeyError."""
    return GetMessageClass(pool().FindMessageTypeByName(name))


def parsed(name: str, said: Json) -> Any:
    """A message of what was said; raises json_format.ParseError for a field that it has not."""
    return json_format.ParseDict(said, message(name)(), descriptor_pool=pool())


def plain(found: Any) -> Json:
    """A message as JSON has it."""
    return json_format.MessageToDict(found, preserving_proto_field_name=True, descriptor_pool=pool())


def type_url(name: str) -> str:
    """How an Any names a message."""
    return _PREFIX + name


def typed(name: str, said: Json | None = None) -> Json:
    """As JSON has an Any."""
    return {"@type": type_url(name), **(said or {})}


def digest(content: bytes) -> str:
    """The version of a resource: the same for the same content, so that an Envoy that is back is told nothing new."""
    return hashlib.sha256(content).hexdigest()[:16]
