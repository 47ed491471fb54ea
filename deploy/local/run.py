"""`make run`: the whole suite on loopback with embedded defaults, and lines to try, until Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(".venv/bin")
ALLOWED = {"RETINUE_AMBASSADOR__ENDPOINTS__ALLOW": "127.0.0.1:1024-65535"}
"""On a laptop what stands behind an ambassador is often on loopback, too, which is forbidden otherwise."""


def main() -> int:
    """Starts the server, prints the guide when it is ready, and ends with it."""
    command = [sys.executable, "-m", "retinue_server", *sys.argv[1:]]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ALLOWED | os.environ)
    assert server.stdout is not None
    try:
        ready = server.stdout.readline()
        if ready:
            print(guide(json.loads(ready)), flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return 0 if server.wait() in (0, 130) else 1


def guide(ready: dict[str, object]) -> str:
    """The lines of guide.txt with the addresses that are in force; without those whose program is not here."""
    listen = ready["listen"]
    assert isinstance(listen, list)
    control = os.path.relpath(str(ready["control"]).removeprefix("unix:"))
    state = str(Path(control).parent)
    words = {
        "{listen}": listen[0],
        "{http}": str(ready["http"]),
        "{control}": control,
        "{state}": state,
        "{grpcurl}": str(BIN / "grpcurl"),
        "{retinue}": str(BIN / "retinue"),
        "{curl}": "curl",
    }
    lines = (HERE / "guide.txt").read_text().splitlines()
    if not shutil.which("curl"):
        lines = [line for line in lines if not line.startswith("{curl}")]
    text = "\n".join(lines)
    for word, value in words.items():
        text = text.replace(word, value)
    page = f"http://{words['{http}']}/"
    return f"\n{text}\n\n{page} lists every method with a curl line; all state is in {state}/. Ctrl-C stops it.\n"


if __name__ == "__main__":
    sys.exit(main())
