"""`make run`: the whole suite on loopback with embedded defaults, and lines to try, until Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import grpc

from retinue.ambassador.v1.ambassador_service_pb2 import GetDataPlaneRequest
from retinue.ambassador.v1.ambassador_service_pb2_grpc import AmbassadorServiceStub
from retinue.ambassador.v1.upstream_pb2 import DATA_PLANE_KIND_NATIVE

HERE = Path(__file__).parent
BIN = Path(".venv/bin")
ALLOWED = {"RETINUE_AMBASSADOR__ENDPOINTS__ALLOW": "127.0.0.1:1024-65535"}
"""On a laptop what stands behind an ambassador is often on loopback, too, which is forbidden otherwise."""
METRICS = {"RETINUE_METRICS": "127.0.0.1:7090"}


def main() -> int:
    """Starts the server, prints the guide when it is ready, and ends with it."""
    command = [sys.executable, "-m", "retinue_server", *sys.argv[1:]]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ALLOWED | METRICS | os.environ)
    assert server.stdout is not None
    try:
        ready = server.stdout.readline()
        if ready:
            print(guide(json.loads(ready)), flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return 0 if server.wait() in (0, 130) else 1


def guide(ready: dict[str, object]) -> str:
    """The lines to try with the addresses that are in force; without those whose program is not here."""
    listen = ready["listen"]
    assert isinstance(listen, list)
    control = os.path.relpath(str(ready["control"]).removeprefix("unix:"))
    state = str(Path(control).parent)
    words = {
        "{listen}": listen[0],
        "{http}": str(ready["http"]),
        "{metrics}": str(ready["metrics"]),
        "{control}": control,
        "{state}": state,
        "{grpcurl}": str(BIN / "grpcurl"),
        "{retinue}": str(BIN / "retinue"),
        "{python}": str(BIN / "python"),
        "{curl}": "curl",
    }
    words |= dict(zip(("{one}", "{two}", "{three}", "{web}", "{app}", "{other}"), free_ports(6), strict=True))
    lines = [line for file in files(str(ready["control"])) for line in [*(HERE / file).read_text().splitlines(), ""]]
    if not shutil.which("curl"):
        lines = [line for line in lines if "{curl}" not in line]
    text = "\n".join(lines)
    for word, value in words.items():
        text = text.replace(word, value)
    page = f"http://{words['{http}']}/"
    return f"\n{text}\n{page} lists every method with a curl line; all state is in {state}/. Ctrl-C stops it.\n"


def files(control: str) -> tuple[str, ...]:
    """Those of the guide: what can be tried of the ambassador depends on what carries the bytes, and of the adapter on
    which app is here."""
    with grpc.insecure_channel(control) as channel:
        planes = AmbassadorServiceStub(channel).GetDataPlane(GetDataPlaneRequest(), timeout=10).data_planes
    has_envoy = any(plane.kind != DATA_PLANE_KIND_NATIVE for plane in planes)
    has_redis = shutil.which("redis-server") and shutil.which("redis-cli")
    return (
        "guide.txt",
        "guide-envoy.txt" if has_envoy else "guide-native.txt",
        "guide-adapter-redis.txt" if has_redis else "guide-adapter.txt",
    )


def free_ports(count: int) -> list[str]:
    """Ports of loopback that nobody has."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [str(one.getsockname()[1]) for one in sockets]


if __name__ == "__main__":
    sys.exit(main())
