"""The command `retinue-server`: flags, settings, patterns, and the line that says it serves."""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from retinue_server import __version__
from retinue_server.runtime import config, logs

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from retinue_server.runtime.dispatch import Pattern
    from retinue_server.runtime.lifecycle import Process

PATTERNS = {
    "adapter": "retinue_server.adapter.wiring",
    "ambassador": "retinue_server.ambassador.wiring",
    "leaderelection": "retinue_server.leaderelection.wiring",
    "scattergather": "retinue_server.scattergather.wiring",
    "workqueue": "retinue_server.workqueue.wiring",
}
"""The patterns of this release, with the modules that wire them."""

PORTS = {
    "container": 7071,
    "logsaver": 7072,
    "ambassador": 7073,
    "adapter": 7074,
    "leaderelection": 7075,
    "workqueue": 7076,
    "scattergather": 7077,
}
SUITE_PORT = 7070
_OLDEST_KNOWN, _NEWEST_KNOWN = (1, 76), (1, 85)
"""The releases of grpcio whose experiments were tried."""
HTTP_PORT = 7080
_HELP_WIDTH = 110
"""Given, since argparse would load shutil and the compressions to ask the terminal, at every start."""

_EXAMPLES = """\
examples:
  retinue-server                                  all patterns on 127.0.0.1:7070, HTTP on 127.0.0.1:7080
  retinue-server workqueue                        the work queue alone, on 127.0.0.1:7076
  retinue-server workqueue --listen unix:/run/retinue/workqueue.sock --data-dir /var/lib/retinue
  retinue-server workqueue --upstream queue.example:7076    relays to a queue elsewhere
  retinue-server --listen 127.0.0.1:0             a free port; the line `ready` on stdout tells which

Settings come from --config FILE (YAML), then RETINUE_… variables, then flags: `--data-dir D` is
`data_dir: D` in the file and RETINUE_DATA_DIR=D in the environment.
"""

_ABOUT = {
    "adapter": """\

The file of targets says which apps are collected, and counts anew when it changes. adapter.targets names it, or
RETINUE_ADAPTER__TARGETS; otherwise it is DATA_DIR/adapter/targets.yaml:

  targets:
    - {target_id: cache, kind: REDIS, endpoint: "127.0.0.1:6379"}
    - {target_id: shop, kind: PROMETHEUS, endpoint: "http://127.0.0.1:8000/metrics", interval_duration: 5s}

Rule packs of your own stand in the directory adapter.rule_packs; look one over before it is used:

  retinue-server --check-pack shop.yaml
""",
    "scattergather": """\

The pool file says which shards there are, and counts anew when it changes. scattergather.pools names it, or
RETINUE_SCATTERGATHER__POOLS; otherwise it is DATA_DIR/scattergather/pools.yaml:

  pools:
    search:
      merge: top_k
      top_k: 10
      shards:
        - {shard_id: s0, endpoints: ["10.0.0.1:9000", "10.0.0.2:9000"]}
        - {shard_id: s1, endpoints: ["dns:search-1.example.:9000"]}
        - {shard_id: s2, endpoints: ["kubernetes:search-2:grpc"]}

All keys, where endpoints are found, and TLS: deploy/scattergather/README.md
""",
}
"""What the help says of a pattern that is named beside it."""


class Loaded(msgspec.Struct):
    """A pattern that was asked for, with its settings."""

    name: str
    module: Any
    section: msgspec.Struct


def parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The command line; a flag that was not given is None. The help is about the patterns among the arguments."""
    p = argparse.ArgumentParser(
        prog="retinue-server",
        description="Serves the container design patterns over gRPC.",
        epilog=_EXAMPLES + "".join(text for name, text in _ABOUT.items() if name in arguments),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=_HELP_WIDTH),
    )
    p.add_argument("patterns", nargs="*", metavar="PATTERN", help=f"{', '.join(PATTERNS)} (default: all)")
    address, flag = "HOST:PORT", {"action": "store_true", "default": None}
    p.add_argument(
        "--listen",
        action="append",
        metavar="HOST:PORT|unix:PATH",
        help="where apps dial; may be repeated (default: 127.0.0.1:7070, of one pattern its own port)",
    )
    p.add_argument("--control", metavar="unix:PATH", help="where operators dial (default: DATA_DIR/control.sock)")
    p.add_argument(
        "--http",
        metavar=address,
        help="JSON by the Connect protocol (default: 127.0.0.1:7080 when no pattern is named; `none` for no listener)",
    )
    p.add_argument("--probe", metavar=address, help="grpc.health.v1 and nothing else; any address")
    p.add_argument("--metrics", metavar=address, help="/metrics and /healthz and nothing else; any address")
    p.add_argument("--data-dir", metavar="DIR", help="where state lives (default: .retinue)")
    p.add_argument("--config", metavar="FILE", help="a YAML file with settings")
    p.add_argument("--insecure", **flag, help="serve beyond loopback without TLS and tokens")  # type: ignore[arg-type] # a dict of keywords
    p.add_argument("--upstream", metavar="ADDRESS", help="relay to this server instead of serving")
    p.add_argument("--token-file", metavar="FILE", help="lines `ROLE TOKEN`; ROLE is app, diagnostics or operator")
    p.add_argument("--ready-file", metavar="FILE", help="write the line `ready` there too, when ready")
    p.add_argument(
        "--check-pack",
        action="append",
        metavar="FILE",
        help="look over a rule pack of the adapter, or all of a directory, and end: 0 = nothing is wrong",
    )
    p.add_argument("--version", action="version", version=f"retinue-server {__version__}")
    return p


def load(flags: argparse.Namespace, environment: dict[str, str]) -> tuple[config.Settings, list[Loaded]]:
    """Settings with the defaults that depend on which patterns run; raises ConfigError."""
    names = flags.patterns or list(PATTERNS)
    unknown = [name for name in names if name not in PATTERNS]
    if unknown:
        raise config.ConfigError(f"unknown pattern {unknown[0]}: this release has {', '.join(PATTERNS)}")
    modules = {name: importlib.import_module(PATTERNS[name]) for name in names}
    sections = {name: module.SETTINGS for name, module in modules.items()}
    settings, loaded = config.load(flags, environment, sections, frozenset(PORTS) - set(names))
    settings = with_defaults(settings, flags.patterns)
    return settings, [Loaded(name, modules[name], loaded[name]) for name in modules]


def with_defaults(settings: config.Settings, patterns: Sequence[str]) -> config.Settings:
    """Fills in the addresses that nobody chose."""
    port = PORTS[patterns[0]] if len(patterns) == 1 else SUITE_PORT
    http = settings.http or (None if patterns else f"127.0.0.1:{HTTP_PORT}")
    return msgspec.structs.replace(
        settings,
        listen=settings.listen or (f"127.0.0.1:{port}",),
        control=settings.control or f"unix:{settings.data_dir / 'control.sock'}",
        http=None if http == "none" else http,
    )


async def serve(settings: config.Settings, loaded: Sequence[Loaded], ready_file: str | None) -> None:
    """Wires the patterns and runs them until a signal."""
    from retinue_server.runtime import lifecycle, wiring  # noqa: PLC0415 - grpc loads after the settings are right

    patterns = [await entry.module.wire(settings, entry.section) for entry in loaded]
    process = await wiring.build(settings, patterns)
    _calm_the_collector()
    await lifecycle.run(process, lambda: announce(process, patterns, ready_file))


def _calm_the_collector() -> None:
    """Leaves out what lives as long as the process, and looks less often: messages and rows form no cycles."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def announce(process: Process, patterns: Sequence[Pattern], ready_file: str | None) -> None:
    """The banner for people on stderr, the line for programs on stdout."""
    lines = [f"  {name:9}{' '.join(bound)}" for name, bound in process.addresses.items()]
    lines += [f"  {pattern.name}: {notice}" for pattern in patterns for notice in pattern.notices()]
    names = ", ".join(pattern.name for pattern in patterns)
    say(f"retinue-server {__version__}, pid {os.getpid()}, serves {names}", *lines)
    ready = msgspec.json.encode(ready_event(process)).decode()
    if ready_file:
        write_ready(Path(ready_file), ready)
    print(ready, flush=True)  # noqa: T201 - the line is for programs that read our stdout


def write_ready(path: Path, ready: str) -> None:
    """Raises StartError: whoever waits for the file would wait for ever."""
    from retinue_server.runtime.addresses import StartError  # noqa: PLC0415 - after the settings are right

    try:
        path.write_text(ready + "\n")
    except OSError as error:
        raise StartError(f"cannot write the ready file {path}: {error.strerror}") from None


def ready_event(process: Process) -> dict[str, object]:
    """Addresses with their actual ports; `listen` is a list, the others one address or null."""
    single = dict.fromkeys(("control", "http", "probe", "metrics"))
    bound = {name: where if name == "listen" else where[0] for name, where in process.addresses.items()}
    return {"event": "ready", "pid": os.getpid(), "listen": [], **single, **bound}


def say(*lines: str) -> None:
    """For people, on stderr."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)  # noqa: T201 - a command speaks


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 after a signal, 1 when it cannot start or a pack is wrong, 2 for wrong settings."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = parser(arguments).parse_args(arguments)
    if flags.check_pack:
        from retinue_server.adapter import lint  # noqa: PLC0415 - for who writes packs

        return lint.check(flags.check_pack, say)
    _choose_transport(os.environ)
    try:
        settings, loaded = load(flags, dict(os.environ))
        logs.setup(settings.log)
        return run(settings, loaded, flags.ready_file)
    except config.ConfigError as error:
        say(f"retinue-server: {error}")
        return 2


def _choose_transport(environment: MutableMapping[str, str]) -> None:
    """Has gRPC poll its sockets in the older, cheaper way, where that is known to be there; decision 0009 has figures.

    Must come before grpc is imported. Releases that are not known keep their default; so does who chose for himself.
    """
    environment.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # children are programs of their own
    if _OLDEST_KNOWN <= _grpc_release() <= _NEWEST_KNOWN:
        environment.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener,-event_engine_client")


def _grpc_release() -> tuple[int, ...]:
    """As its own metadata say; (0,) if they are not there. (importlib.metadata would load more than gRPC itself.)"""
    found = importlib.util.find_spec("grpc")
    try:
        text = Path(str(found and found.origin)).with_name("_grpcio_metadata.py").read_text()
        return tuple(int(part) for part in text.split('"""')[1].split(".")[:2])
    except (OSError, ValueError, IndexError):
        return (0,)


def run(settings: config.Settings, loaded: Sequence[Loaded], ready_file: str | None) -> int:
    """Serves on uvloop where it is installed."""
    from retinue_server.runtime.addresses import StartError  # noqa: PLC0415 - after the settings are right

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(settings, loaded, ready_file))
    except StartError as error:
        say(f"retinue-server: {error}")
        return 1
    return 0


def _loop_factory() -> Any:
    try:
        import uvloop  # noqa: PLC0415 - optional, and needed here only
    except ImportError:
        return None
    return uvloop.new_event_loop
