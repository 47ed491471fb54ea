"""Servers that tell of themselves in lines: Redis by INFO, memcached by stats."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from retinue_server.adapter.core.spec import Kind
from retinue_server.adapter.engine import Answer, SourceError, Unexpected
from retinue_server.adapter.engines.dialling import connected, credentials

if TYPE_CHECKING:
    import asyncio

    from retinue_server.adapter.core.spec import Spec
    from retinue_server.adapter.engines.dialling import Objection

_PAIRS = re.compile(r"([a-z_0-9.]+)=([^,]*)")
_LENGTH = re.compile(r"\$[0-9]{1,12}", re.ASCII)
_MANY_FIELDS = {
    "keyspace": "",
    "commandstats": "cmdstat_",
    "errorstats": "errorstat_",
    "latencystats": "latency_percentiles_usec_",
}
"""Sections of INFO whose values are fields themselves, `keys=1,expires=0`, and what stands before their names."""


class LineSource:
    """One server."""

    def __init__(self, spec: Spec, objection: Objection) -> None:
        self._spec, self._objection = spec, objection
        host, _, port = spec.endpoint.rpartition(":")
        self._host, self._port = host.removeprefix("[").removesuffix("]"), int(port)

    async def collect(self) -> Answer:
        async with connected(self._host, self._port, self._objection) as (reader, writer):
            if self._spec.kind is Kind.MEMCACHED:
                return Answer(document=await self._memcached(reader, writer))
            return Answer(document=await self._redis(reader, writer))

    async def close(self) -> None:
        """Each collection has a connection of its own."""

    async def _redis(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> dict[str, Any]:
        if self._spec.credentials_file:
            words = ("AUTH", await credentials(self._spec.credentials_file))
            writer.write(_command(*words))
            _told(await _line(reader))
        writer.write(_command("INFO", "everything"))
        head = _told(await _line(reader))
        if not _LENGTH.fullmatch(head):
            raise Unexpected(f"it does not speak Redis: {head[:100]!r}")
        size = int(head[1:])
        if size > self._spec.limits.max_bytes:
            raise Unexpected(f"its answer is longer than {self._spec.limits.max_bytes} bytes")
        return info((await reader.readexactly(size)).decode(errors="replace"))

    async def _memcached(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> dict[str, Any]:
        found: dict[str, Any] = {}
        left = self._spec.limits.max_bytes
        for section in ("", "settings"):
            writer.write(f"stats {section}".rstrip().encode() + b"\r\n")
            values = found if not section else found.setdefault(section, {})
            while (line := await _line(reader)) != "END":
                left -= len(line)
                if left < 0:
                    raise Unexpected(f"its answer is longer than {self._spec.limits.max_bytes} bytes")
                word, _, rest = line.partition(" ")
                name, _, value = rest.partition(" ")
                if word != "STAT":
                    raise Unexpected(f"it answers {line[:100]!r} to stats")
                values[name] = value
        return found


def _command(*words: str) -> bytes:
    parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
    return f"*{len(words)}\r\n{''.join(parts)}".encode()


async def _line(reader: asyncio.StreamReader) -> str:
    try:
        line = await reader.readline()
    except ValueError:  # longer than the reader's limit
        raise Unexpected("it answers no lines") from None
    if not line:
        raise SourceError("it closed the connection")
    return line.decode(errors="replace").rstrip()


def _told(text: str) -> str:
    if text.startswith("-"):
        raise SourceError(f"it refuses: {text[1:200]}")
    return text


def info(text: str) -> dict[str, Any]:
    """The answer to INFO by section, in lower case; https://redis.io/docs/latest/commands/info."""
    found: dict[str, Any] = {}
    section: dict[str, Any] = {}
    before: str | None = None
    for line in text.splitlines():
        if line.startswith("#"):
            name = line[1:].strip().lower()
            section, before = found.setdefault(name, {}), _MANY_FIELDS.get(name)
        elif ":" in line:
            key, _, value = line.partition(":")
            section[key.removeprefix(before or "")] = value if before is None else dict(_PAIRS.findall(value))
    return found
