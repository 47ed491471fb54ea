"""The file of upstreams: YAML, read again when it changes; a wrong one leaves the last good one.

    upstreams:
      - upstream_id: cache
        protocol: PROTOCOL_REDIS
        listen: {port: 6379}
        dns: {hostname: redis.cache.svc, port: 6379}
        policy: {timeouts: {request_duration: 0.2s}}

Its entries are messages `retinue.ambassador.v1.Upstream` as JSON has them, with the field names of the proto; names of
enums may go without their prefix.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from retinue.ambassador.v1 import upstream_pb2 as pb
from retinue_server.ambassador import translate
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import InvalidArgument, RetinueError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from google.protobuf.descriptor import Descriptor, EnumDescriptor

    from retinue_server.ambassador.core.spec import Spec
    from retinue_server.ambassador.core.upstreams import Upstreams

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_DRAIN_S = 30.0
"""What connections of an upstream have that is gone from the file."""


class UpstreamFileError(Exception):
    """A file that can't be used; the message has all that is wrong with it."""


class UpstreamFile:
    """A part: declares what the file has when it starts, and again when it changes."""

    def __init__(self, path: Path, upstreams: Upstreams, *, must_exist: bool) -> None:
        self._path, self._upstreams, self._must_exist = path, upstreams, must_exist
        self._stamp: tuple[int, int, int] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._declared: set[str] = set()
        self._wrong = ""

    @property
    def ok(self) -> bool:
        """Whether the file, as it is now, is what is declared."""
        return not self._wrong

    async def start(self) -> None:
        """Raises StartError for a file that is wrong, or is missing although it was named."""
        if self._looking is not None:
            return
        self._stamp = await asyncio.to_thread(_stamp, self._path)
        if self._stamp is not None or self._must_exist:
            try:
                await self._declare(await asyncio.to_thread(read, self._path))
            except UpstreamFileError as error:
                raise StartError(f"cannot use {self._path}: {error}") from None
        self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.cancel()
            await asyncio.wait({looking})

    async def _look(self) -> None:
        """What could not be declared, since a port was taken or a name is still leaving, may be the next time."""
        while True:
            await asyncio.sleep(_LOOK_S)
            stamp = await asyncio.to_thread(_stamp, self._path)
            if stamp != self._stamp or self._wrong:
                self._stamp = stamp
                await self._again()

    async def _again(self) -> None:
        try:
            specs = await asyncio.to_thread(read, self._path)
            await self._declare(specs)
        except UpstreamFileError as error:
            if str(error) != self._wrong:
                log.error("cannot use %s: %s; what it does not change stays", self._path, error)  # noqa: TRY400 - said
            self._wrong = str(error)
            return
        self._wrong = ""
        log.info("read %d upstreams from %s", len(specs), self._path)

    async def _declare(self, specs: Sequence[Spec]) -> None:
        """Those that others name first; then those go that are gone, in the opposite order.

        One that is refused keeps no other from being served. Raises UpstreamFileError with all that were.
        """
        wrong: list[str] = []
        ordered = list(_referenced_first(specs))
        for spec in ordered:
            with _noted(wrong):
                await self._upstreams.declare(spec, from_file=True)
                self._declared.add(spec.upstream_id)
        for spec in reversed(list(_referenced_first(self._gone(ordered)))):
            with _noted(wrong):
                await self._upstreams.remove(spec.upstream_id, _DRAIN_S, from_file=True)
                self._declared.discard(spec.upstream_id)
        if wrong:
            raise UpstreamFileError("; ".join(wrong))

    def _gone(self, specs: Sequence[Spec]) -> Sequence[Spec]:
        """What the file declared and does no more; what an RPC has removed is not missed."""
        gone = self._declared - {spec.upstream_id for spec in specs}
        known = self._upstreams.names()
        self._declared -= gone.difference(known)
        return [self._upstreams.get(upstream_id).declared for upstream_id in gone.intersection(known)]


@contextlib.contextmanager
def _noted(wrong: list[str]) -> Iterator[None]:
    try:
        yield
    except RetinueError as error:
        wrong.append(str(error))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes with the content: time, size and file number; None while there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read(path: Path) -> Sequence[Spec]:
    """The upstreams of a file; raises UpstreamFileError."""
    import yaml  # noqa: PLC0415 - most servers run without a file

    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UpstreamFileError(f"it can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise UpstreamFileError(f"it is no YAML: {error}") from None
    if (
        not isinstance(values, dict)
        or set(values) - {"upstreams"}
        or not isinstance(values.get("upstreams") or [], list)
    ):
        raise UpstreamFileError("it must be a mapping with the one key `upstreams`, a list")
    wrong: list[str] = []
    found = list(_specs(values.get("upstreams") or [], wrong))
    names = [spec.upstream_id for spec in found]
    wrong += [f"{name} is there twice" for name in sorted({name for name in names if names.count(name) > 1})]
    if wrong:
        raise UpstreamFileError("; ".join(wrong))
    return found


def _specs(entries: Sequence[Any], wrong: list[str]) -> Iterator[Spec]:
    for index, entry in enumerate(entries):
        at = f"upstreams[{index}]"
        try:
            said = json_format.ParseDict(_spelt_out(entry, pb.Upstream.DESCRIPTOR), pb.Upstream())
            yield translate.Reader("").upstream(said)
        except json_format.ParseError as error:
            wrong.append(f"{at}: {error}")
        except InvalidArgument as error:
            wrong += [f"{at}.{violation.field} {violation.description}" for violation in error.violations]


def _spelt_out(value: Any, message: Descriptor) -> Any:
    """With the prefixes of enums that were left out; and with the field `on`, which YAML takes for `true`."""
    if isinstance(value, list):
        return [_spelt_out(one, message) for one in value]
    if not isinstance(value, dict):
        return value
    fields = message.fields_by_name
    named = {"on" if key is True else key: one for key, one in value.items()}
    return {key: _field(one, fields[key]) if key in fields else one for key, one in named.items()}


def _field(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return _spelt_out(value, field.message_type)
    if field.enum_type is None:
        return value
    if isinstance(value, list):
        return [_named(one, field.enum_type) for one in value]
    return _named(value, field.enum_type)


def _named(value: Any, enum: EnumDescriptor) -> Any:
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    full = f"{prefix}{value}"
    return full if isinstance(value, str) and full in enum.values_by_name else value


def _referenced_first(specs: Sequence[Spec]) -> Iterator[Spec]:
    """A reference in a circle is refused later, by the core."""
    left = {spec.upstream_id: spec for spec in specs}
    while left:
        ready = [one for one in left.values() if not left.keys() & set(one.policy.references)]
        for spec in ready or list(left.values()):
            del left[spec.upstream_id]
            yield spec
