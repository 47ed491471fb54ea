"""PgBouncer for tests, which gives each transaction another connection."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from support.postgres import Postgres, as_nobody, free_port


@contextlib.contextmanager
def pgbouncer(postgres: Postgres) -> Iterator[str]:
    """The url of a pooler of transactions before that server."""
    with tempfile.TemporaryDirectory() as where:
        Path(where).chmod(0o777)
        port = free_port()
        config = Path(where) / "pgbouncer.ini"
        config.write_text(
            f"[databases]\npostgres = host=127.0.0.1 user=retinue port={postgres.port}\n[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = transaction\ndefault_pool_size = 3\nmax_client_conn = 50\nlogfile = {where}/log\n"
        )
        process = subprocess.Popen([*as_nobody(), "pgbouncer", "-q", str(config)], cwd="/", stderr=subprocess.DEVNULL)
        url = f"postgresql://retinue@127.0.0.1:{port}/postgres"
        try:
            _wait_for(url)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _wait_for(url: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("pgbouncer does not answer")
