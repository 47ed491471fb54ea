"""The pool file: what is expected of whom. YAML, read again when it changes; a wrong one leaves the last good one.

    pools:
      search:
        merge: top_k
        top_k: 10
        shards:
          - {shard_id: s0, endpoints: ["10.0.0.1:9000", "10.0.0.2:9000"]}
          - {shard_id: s1, endpoints: ["dns:search-1.example:9000"]}

The classes below are its schema. Keys that nobody knows are errors that name the nearest one.
"""
# Annotations are no text here: of text, msgspec would compile every one.

import difflib
import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from retinue_server.runtime import addresses, strict_yaml
from retinue_server.scattergather.core import limits
from retinue_server.scattergather.core.topology import (
    LEAF_METHOD,
    Budget,
    Hedging,
    MergeKind,
    Merging,
    Pool,
    PoolLimits,
    Shard,
)
from retinue_server.scattergather.engine import Tls

_MAX_BYTES = 8 * 1024 * 1024
_LAST_PORT = 65535
_TOLD = 20
"""So many mistakes are told at once."""
_METHOD = re.compile(r"/[A-Za-z_][\w.]*/[A-Za-z_]\w*")
_KEY = re.compile(r"[0-9a-z_.-]+")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`")
_OWN_PREFIXES = ("grpc-", "retinue-")
_OWN_KEYS = frozenset({"traceparent", "content-type", "user-agent", "te", "host", "connection", "content-length"})
"""What each call has of its own; the trace goes along in any case."""
_HOST = re.compile(
    r"(?=.{1,254}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\.?"
)
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_SERVICE = re.compile(rf"{_LABEL}(\.{_LABEL})?:(?P<port>{_LABEL})")
_IDENTIFIER = "1 to 128 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]
_Count = Annotated[int, msgspec.Meta(ge=1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class ShardEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`shards:` of a pool, one entry."""

    shard_id: str
    endpoints: tuple[str, ...]
    """The replicas: HOST:PORT, unix:PATH, dns:NAME:PORT, kubernetes:SERVICE[.NAMESPACE]:PORT."""
    weight: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1
    """How many leaves are beneath it."""
    pool: str = ""
    """Of a shard that is a root itself: the pool that it is to ask."""


class HedgingEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`hedging:` of a pool."""

    enabled: bool = True
    quantile: Annotated[float, msgspec.Meta(ge=0.5, lt=1)] = 0.975
    min_delay_seconds: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.002
    min_samples: Annotated[int, msgspec.Meta(ge=0, le=2048)] = 100
    max_hedges: Annotated[int, msgspec.Meta(ge=1, le=4)] = 2


class BudgetEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`budget:` of a pool: of hedges and retries together."""

    ratio: _Share = 0.05
    burst: Annotated[float, msgspec.Meta(ge=0, le=100_000)] = 50.0


class LimitsEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`limits:` of a pool."""

    max_calls: _Count = 8192
    max_unsent: _Count = 512
    max_calls_per_endpoint: _Count = 1024
    max_reply_bytes: _Count = 3 * 1024 * 1024
    max_gathered_bytes: _Count = 64 * 1024 * 1024


class PoolEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`pools:`, one entry."""

    shards: tuple[ShardEntry, ...]
    merge: str = "collect"
    top_k: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0
    merge_address: str = ""
    commutative: bool = False
    replies: Literal["bytes", "json"] = "bytes"
    method: str = LEAF_METHOD
    transport: Literal["unary", "stream"] = "unary"
    timeout_seconds: _Seconds = 10.0
    idempotent: bool = True
    max_retries: Annotated[int, msgspec.Meta(ge=0, le=16)] = 2
    batch: bool = False
    hedging: HedgingEntry = HedgingEntry()
    budget: BudgetEntry = BudgetEntry()
    limits: LimitsEntry = LimitsEntry()
    forward_metadata: tuple[str, ...] = ()
    tls: Tls | None = None
    slow_log_seconds: _Seconds | None = None
    max_traced_attempts: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 64


class PoolFileError(Exception):
    """A pool file that can't be used; the message has all that is wrong with it."""


class UnreadableError(PoolFileError):
    """It can't be read now, whatever it says."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"cannot read the pool file {path}: {error.strerror or error}")


def read(path: Path) -> Sequence[Pool]:
    """The pools of a file; raises PoolFileError."""
    try:
        values = strict_yaml.load(_content(path))
    except OSError as error:
        raise UnreadableError(path, error) from None
    except ValueError as error:
        raise PoolFileError(f"cannot use the pool file {path}: {error}") from None
    wrong: list[str] = []
    found = list(_pools(values, wrong))
    if wrong:
        more = f"; and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise PoolFileError(f"cannot use the pool file {path}: {'; '.join(wrong[:_TOLD])}{more}")
    return found


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ValueError("it is no file")
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES >> 20} MiB")
    return data


def _pools(values: object, wrong: list[str]) -> Iterator[Pool]:
    """Those that are right; what is not is said in `wrong`."""
    pools = values.get("pools") if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(pools, dict) or set(values) - {"pools"}:
        wrong.append("it must be a mapping with the one key `pools`, a mapping of names to pools; `pools: {}` is none")
        return
    for pool_id, value in pools.items():
        at = f"pools.{pool_id}"
        if not isinstance(pool_id, str):
            wrong.append(f"{at}: the name must be text; put it in quotes")
        elif not limits.IDENTIFIER.fullmatch(pool_id):
            wrong.append(f"{at}: the name must be {_IDENTIFIER}")
        else:
            yield from _one(at, pool_id, value, wrong)


def _one(at: str, pool_id: str, value: object, wrong: list[str]) -> Iterator[Pool]:
    try:
        entry = msgspec.convert(value, PoolEntry)
    except msgspec.ValidationError as error:
        wrong.append(_said(at, error))
        return
    found = [f"{at}.{text}" for text in _violations(entry)]
    wrong += found
    if not found:
        yield _pool(pool_id, entry)


def _said(at: str, error: msgspec.ValidationError) -> str:
    text, _, path = str(error).partition(" - at `$")
    where = at + path.removesuffix("`")
    if unknown := _UNKNOWN.match(text):
        return f"{where}: unknown key {unknown[1]}, {_hint(unknown[1], path)}"
    return f"{where}: {text}{'; put it in quotes' if text.startswith('Expected `str`, got') else ''}"


def _hint(unknown: str, path: str) -> str:
    """The nearest key of those that are known there, or all of them."""
    part = path.removesuffix("`").rpartition(".")[2].partition("[")[0]
    known = _PARTS.get(part, PoolEntry).__struct_fields__
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


_PARTS: Mapping[str, type[msgspec.Struct]] = {
    "shards": ShardEntry,
    "hedging": HedgingEntry,
    "budget": BudgetEntry,
    "limits": LimitsEntry,
    "tls": Tls,
}
"""Of a pool, by their keys."""


def _violations(entry: PoolEntry) -> Iterator[str]:
    """What types don't state."""
    if entry.merge.upper() not in MergeKind.__members__ or entry.merge != entry.merge.lower():
        yield f"merge: must be one of {', '.join(kind.name.lower() for kind in MergeKind)}"
        return
    yield from _merge_violations(entry, MergeKind[entry.merge.upper()])
    yield from _method_violations(entry)
    if entry.limits.max_reply_bytes > entry.limits.max_gathered_bytes:
        yield "limits.max_reply_bytes: must be at most max_gathered_bytes"
    for key in entry.forward_metadata:
        if not _KEY.fullmatch(key) or key.startswith(_OWN_PREFIXES) or key.endswith("-bin") or key in _OWN_KEYS:
            yield f"forward_metadata: {key!r} is no key of text metadata in lower case that may be forwarded"
    if entry.tls is not None and bool(entry.tls.cert_file) != bool(entry.tls.key_file):
        yield "tls: cert_file and key_file need each other"
    if entry.batch and any(shard.pool for shard in entry.shards):
        yield "batch: is not for shards that are roots (`pool`): each is one answer"
    yield from _shard_violations(entry.shards)


def _method_violations(entry: PoolEntry) -> Iterator[str]:
    streams = entry.transport == "stream"
    if not _METHOD.fullmatch(entry.method):
        yield "method: must be /package.Service/Method"
    for name, asked in (("batch", entry.batch), ("transport", streams)):
        if asked and entry.method != LEAF_METHOD:
            yield f"{name}: only leaves that serve LeafService have it, so leave out `method`"
    if entry.forward_metadata and streams:
        yield "forward_metadata: queries on a stream have no metadata of their own, so say transport: unary"


def _merge_violations(entry: PoolEntry, kind: MergeKind) -> Iterator[str]:
    by_service = kind is MergeKind.SERVICE
    if (kind is MergeKind.TOP_K) != (entry.top_k > 0):
        yield "top_k: must be 1 or more for merge top_k, and is for no other"
    if by_service != bool(entry.merge_address):
        yield "merge_address: must be there for merge service, and is for no other"
    elif by_service and not _is_address(entry.merge_address):
        yield "merge_address: must be HOST:PORT or unix:PATH"
    if entry.commutative and not by_service:
        yield "commutative: is for merge service"
    if entry.replies == "json" and kind is not MergeKind.COLLECT:
        yield "replies: is for merge collect; the others know what they read"


def _shard_violations(shards: Sequence[ShardEntry]) -> Iterator[str]:
    seen: set[str] = set()
    for index, shard in enumerate(shards):
        at = f"shards[{index}]"
        if not limits.IDENTIFIER.fullmatch(shard.shard_id):
            yield f"{at}.shard_id: must be {_IDENTIFIER}"
        if shard.shard_id in seen:
            yield f"{at}.shard_id: {shard.shard_id} is there already"
        seen.add(shard.shard_id)
        if shard.pool and not limits.IDENTIFIER.fullmatch(shard.pool):
            yield f"{at}.pool: is no name of a pool"
        if not shard.endpoints:
            yield f"{at}.endpoints: must be one or more"
        for text in shard.endpoints:
            if not _is_source(text):
                yield f"{at}.endpoints: {text!r} must be {_SOURCES}"


_SOURCES = "HOST:PORT, unix:PATH, dns:NAME:PORT or kubernetes:SERVICE[.NAMESPACE]:PORT"


def _is_source(text: str) -> bool:
    scheme, _, name = text.partition(":")
    match scheme:
        case "dns":
            return not name.startswith("unix:") and _is_address(name)
        case "kubernetes":
            named = _SERVICE.fullmatch(name)
            return named is not None and _is_port(named["port"])
    return _is_address(text)


def _is_port(text: str) -> bool:
    """A number, or what Kubernetes may call a port."""
    return not text.isdecimal() or 0 < int(text) <= _LAST_PORT


def _is_address(text: str) -> bool:
    try:
        address = addresses.parse(text)
    except addresses.AddressError:
        return False
    return not isinstance(address, addresses.Tcp) or (address.port > 0 and _is_host(address.host))


def _is_host(host: str) -> bool:
    """A name or an address: what is neither would be looked up for ever."""
    if ":" not in host:
        return _HOST.fullmatch(host) is not None
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _pool(pool_id: str, entry: PoolEntry) -> Pool:
    return Pool(
        pool_id,
        tuple(Shard(one.shard_id, one.endpoints, one.weight, one.pool) for one in entry.shards),
        method=entry.method,
        stream=entry.transport == "stream",
        merging=Merging(
            MergeKind[entry.merge.upper()],
            entry.top_k,
            entry.merge_address,
            commutative=entry.commutative,
            json_replies=entry.replies == "json",
        ),
        timeout_s=entry.timeout_seconds,
        idempotent=entry.idempotent,
        max_retries=entry.max_retries,
        hedging=_hedging(entry.hedging),
        budget=Budget(entry.budget.ratio, entry.budget.burst),
        limits=PoolLimits(**_plain(entry.limits)),
        forward_metadata=entry.forward_metadata,
        batch=entry.batch,
        tls=entry.tls,
        slow_s=entry.slow_log_seconds,
        max_traced_attempts=entry.max_traced_attempts,
    )


def _hedging(entry: HedgingEntry) -> Hedging:
    return Hedging(entry.enabled, entry.quantile, entry.min_delay_seconds, entry.min_samples, entry.max_hedges)


def _plain(entry: msgspec.Struct) -> Mapping[str, Any]:
    return msgspec.structs.asdict(entry)
