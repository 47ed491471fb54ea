"""Settings: a YAML file, then `RETINUE_…` environment, then flags; each later one wins, key by key.

Keys are nested in the file (`limits: {max_concurrent_calls: 64}`) and joined by two underscores in the
environment (`RETINUE_LIMITS__MAX_CONCURRENT_CALLS=64`). A key that nothing knows is an error that names the
nearest one.
"""
# Annotations are no text here: of text, msgspec would compile every one when the server starts.

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import inspect

from retinue_server.runtime import addresses

PREFIX = "RETINUE_"

_OTHERS = (
    r"ADDRESS|[A-Z]+_ADDRESS"  # where clients dial
    r"|(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)"  # what Kubernetes sets for a Service
)
"""Variables with our prefix that are not settings."""


class ConfigError(Exception):
    """Settings that can't be used; the message names the key and where it was set."""


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """Serves every TCP listener for apps with TLS; a client CA makes it mTLS."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one process takes at once."""

    max_concurrent_calls: int = 1024
    """Unary calls; 1 or more."""
    max_concurrent_streams: int = 4096
    """Streams; 1 or more."""
    max_message_bytes: int = 4 * 1024 * 1024
    """The largest request; at least 64 KiB."""


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """What goes to stderr."""

    format: Literal["auto", "json", "text"] = "auto"
    """auto is text on a terminal and json elsewhere."""
    level: Literal["debug", "info", "warning", "error"] = "info"


class UpstreamTls(msgspec.Struct, frozen=True, kw_only=True):
    """How a relay checks its upstream, and by which certificate it shows itself."""

    ca_file: Path | None = None
    """None takes the system's certificate authorities."""
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str | None = None
    """The name that the certificate must have, when it is not the address's host."""


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """The server to which a relay forwards."""

    address: str
    """HOST:PORT or unix:PATH."""
    token_file: Path | None = None
    """A file whose content is the bearer token; read again when it changes."""
    tls: UpstreamTls | None = None
    """None is plaintext."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What every server understands; patterns add sections of their own."""

    listen: tuple[str, ...] = ()
    """HOST:PORT or unix:PATH, for apps."""
    control: str | None = None
    """unix:PATH, for operators."""
    http: str | None = None
    """HOST:PORT of the Connect protocol."""
    probe: str | None = None
    """HOST:PORT of grpc.health.v1 and nothing else."""
    metrics: str | None = None
    """HOST:PORT of /metrics and /healthz."""
    data_dir: Path = Path(".retinue")
    insecure: bool = False
    """Lets listeners for apps bind other than loopback without TLS and tokens."""
    tls: Tls | None = None
    token_file: Path | None = None
    """Lines `ROLE TOKEN`."""
    require_token: bool = False
    """Refuses calls without a token, on loopback too."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names besides loopback's under which --http may be called."""
    limits: Limits = Limits()
    drain_seconds: float = 10.0
    """How long open calls may take after SIGTERM; 0 or more."""
    log: Log = Log()
    upstream: Upstream | None = None


Naming = Callable[[tuple[str, ...]], str]
"""Says of the path of a setting what the user wrote."""


class _Layer(msgspec.Struct, frozen=True):
    """Settings of one origin, and how it names them."""

    values: dict[str, Any]
    name: Naming


Sections = Mapping[str, type[msgspec.Struct]]


def load(
    flags: Namespace,
    environment: Mapping[str, str],
    sections: Sections,
    ignored: frozenset[str] = frozenset(),
) -> tuple[Settings, dict[str, msgspec.Struct]]:
    """The settings and each pattern's section; raises ConfigError.

    `flags.config` names the file; attributes of `flags` that are None were not given. Sections in `ignored`,
    of patterns that don't run here, are skipped.
    """
    schema = _schema(sections)
    file = getattr(flags, "config", None) or environment.get(PREFIX + "CONFIG")
    layers = [
        *([_file_layer(Path(file), schema, ignored)] if file else []),
        _environment_layer(environment, schema, ignored),
        _flag_layer(flags),
    ]
    loaded = _convert(_merge(layer.values for layer in layers), schema, layers)
    settings = Settings(**{name: getattr(loaded, name) for name in Settings.__struct_fields__})
    _check(settings)
    return settings, {name: getattr(loaded, name) for name in sections}


def _schema(sections: Sections) -> type[msgspec.Struct]:
    """Settings with the sections as further fields."""
    fields = [(name, kind, msgspec.field(default_factory=kind)) for name, kind in sections.items()]
    return msgspec.defstruct("Settings", fields, bases=(Settings,), frozen=True, kw_only=True)


def _file_layer(path: Path, schema: type[msgspec.Struct], ignored: frozenset[str]) -> _Layer:
    import yaml  # noqa: PLC0415 - most servers run without a file

    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read {path}: it is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"cannot read {path}: it must be a mapping of settings")
    values = {key: value for key, value in values.items() if key not in ignored}

    def name(key: tuple[str, ...]) -> str:
        return f"{'.'.join(key)} in {path}"

    _check_keys(values, schema, (), name, ".".join)
    return _Layer(values, name)


def _environment_layer(environment: Mapping[str, str], schema: type[msgspec.Struct], ignored: frozenset[str]) -> _Layer:
    values: dict[str, Any] = {}
    for name, text in environment.items():
        path = tuple(name.removeprefix(PREFIX).lower().split("__"))
        if name.startswith(PREFIX) and name != PREFIX + "CONFIG" and not _is_other(name, path, schema, ignored):
            _put(values, path, text, name)
    _check_keys(values, schema, (), _variable, _variable)
    return _Layer(_lists(values, schema), _variable)


def _is_other(name: str, path: tuple[str, ...], schema: type[msgspec.Struct], ignored: frozenset[str]) -> bool:
    if path[0] in schema.__struct_fields__:
        return False
    return path[0] in ignored or bool(re.fullmatch(_OTHERS, name.removeprefix(PREFIX)))


def _flag_layer(flags: Namespace) -> _Layer:
    values: dict[str, Any] = {}
    for name in Settings.__struct_fields__:
        if (value := getattr(flags, name, None)) is not None:
            _put(values, ("upstream", "address") if name == "upstream" else (name,), value, name)
    return _Layer(values, lambda path: "--" + path[0].replace("_", "-"))


def _variable(path: tuple[str, ...]) -> str:
    return PREFIX + "__".join(path).upper()


def _put(values: dict[str, Any], path: tuple[str, ...], value: object, name: str) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"cannot use {name}: another variable sets the whole of {key}")
    if isinstance(values.get(path[-1]), dict):
        raise ConfigError(f"cannot use {name}: other variables set parts of it")
    values[path[-1]] = value


def _structs(kind: object) -> type[msgspec.Struct] | None:
    """The struct in a field's type, `X` or `X | None`."""
    for part in getattr(kind, "types", (kind,)):
        if isinstance(part, inspect.StructType):
            return part.cls
    return None


def _fields(schema: type[msgspec.Struct]) -> dict[str, inspect.Field]:
    described = inspect.type_info(schema)
    assert isinstance(described, inspect.StructType)
    return {field.encode_name: field for field in described.fields}


def _check_keys(
    values: Mapping[Any, Any],
    schema: type[msgspec.Struct],
    prefix: tuple[str, ...],
    where: Naming,
    spell: Naming,
) -> None:
    fields = _fields(schema) if values else {}  # few servers have any, and describing a schema takes a while
    for key, value in values.items():
        path = (*prefix, str(key))
        if key not in fields:
            raise ConfigError(_unknown(path, sorted(fields), where, spell))
        inner = _structs(fields[key].type)
        if inner is not None and isinstance(value, dict):
            _check_keys(value, inner, path, where, spell)


def _unknown(
    path: tuple[str, ...],
    known: list[str],
    where: Naming,
    spell: Naming,
) -> str:
    import difflib  # noqa: PLC0415 - for mistakes only

    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    names = [spell((*path[:-1], name)) for name in (near or known)]
    hint = f"did you mean {names[0]}?" if near else f"known are {', '.join(names)}"
    return f"unknown setting {where(path)}: {hint}"


def _lists(values: dict[str, Any], schema: type[msgspec.Struct]) -> dict[str, Any]:
    """Splits at commas what the environment gives for a list."""
    fields = _fields(schema) if values else {}
    return {key: _split(value, fields[key].type) for key, value in values.items()}


def _split(value: object, kind: object) -> object:
    inner = _structs(kind)
    if isinstance(value, dict):
        return _lists(value, inner) if inner is not None else value
    parts = getattr(kind, "types", (kind,))
    if any(isinstance(part, inspect.VarTupleType | inspect.ListType) for part in parts):
        return [word.strip() for word in str(value).split(",") if word.strip()]
    return value


def _merge(layers: Iterator[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for values in layers:
        for key, value in values.items():
            before = merged.get(key)
            both = isinstance(before, dict) and isinstance(value, dict)
            merged[key] = _merge(iter((before, value))) if both and before is not None else value
    return merged


def _convert(values: dict[str, Any], schema: type[msgspec.Struct], layers: list[_Layer]) -> Any:
    try:
        return msgspec.convert(values, schema, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        text, _, at = str(error).partition(" - at `$.")
        path = tuple(re.sub(r"\[.*?\]", "", at.removesuffix("`")).split(".")) if at else ()
        raise ConfigError(f"cannot use {_origin(path, layers)}: {text}") from None


def _decode(kind: type, value: object) -> object:
    """Reads what msgspec does not know: paths."""
    if kind is Path and isinstance(value, str) and value:
        return Path(value).expanduser()
    raise ValueError("expected a path")


def _origin(path: tuple[str, ...], layers: list[_Layer]) -> str:
    """Where the value at a path was set: the last layer that has it or something within it."""
    for layer in reversed(layers):
        values: Any = layer.values
        for key in path:
            values = values.get(key) if isinstance(values, dict) else None
        if values is not None and path:
            return str(layer.name(path))
    return f"the settings at {'.'.join(path)}" if path else "the settings"


def _check(settings: Settings) -> None:
    """Limits that types don't state."""
    limits = settings.limits
    _require(limits.max_concurrent_calls >= 1, "limits.max_concurrent_calls must be 1 or more")
    _require(limits.max_concurrent_streams >= 1, "limits.max_concurrent_streams must be 1 or more")
    _require(limits.max_message_bytes >= 65536, "limits.max_message_bytes must be 65536 or more")  # noqa: PLR2004 - as said
    _require(settings.drain_seconds >= 0, "drain_seconds must be 0 or more")
    _require(not settings.require_token or settings.token_file is not None, "require_token needs token_file")
    for text in (*settings.listen, settings.control, settings.http, settings.probe, settings.metrics):
        _check_address(text)
    _check_address(settings.upstream.address if settings.upstream else None)
    _require(settings.control is None or settings.control.startswith("unix:"), "control must be unix:PATH")


def _check_address(text: str | None) -> None:
    try:
        if text not in (None, "none"):
            addresses.parse(text)
    except addresses.AddressError as error:
        raise ConfigError(f"cannot use the settings: {error}") from None


def _require(holds: bool, message: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise ConfigError(f"cannot use the settings: {message}")
