"""Prometheus, and its tool that checks what is exposed."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.postgres import free_port

_CONFIG = """\
global: {{scrape_interval: 300ms, scrape_timeout: 300ms}}
scrape_configs:
- job_name: adapter
  static_configs: [{{targets: ['{address}']}}]
"""


def promtool(text: str) -> list[str]:
    """What `promtool check metrics` complains of."""
    done = subprocess.run(
        [_found("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    complaints = done.stderr.splitlines() + done.stdout.splitlines()
    assert done.returncode == 0 or complaints
    return complaints


class Prometheus:
    """A real one, that scrapes one address."""

    def __init__(self, address: str, log: Path) -> None:
        self._address, self._log = address, log

    @property
    def log(self) -> str:
        """All that it said."""
        return self._log.read_text()

    def query(self, text: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of an instant query; nothing while it does not answer."""
        url = f"http://{self._address}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                found: Any = json.load(answer)
        except OSError:
            return []
        return [(one["metric"], float(one["value"][1])) for one in found["data"]["result"]]


@contextlib.contextmanager
def scraping(address: str, where: Path) -> Iterator[Prometheus]:
    """Scrapes the address every 300 ms."""
    config, log, port = where / "prometheus.yml", where / "prometheus.log", free_port()
    config.write_text(_CONFIG.format(address=address))
    command = [_found("prometheus"), f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    command.append(f"--storage.tsdb.path={where}/tsdb")
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            yield Prometheus(f"127.0.0.1:{port}", log)
        finally:
            process.terminate()
            process.wait(60)


def _found(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}: apt-get install prometheus")
    return path
