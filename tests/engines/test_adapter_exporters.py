"""The adapter's values side by side with those of the exporters that operators use today, of one app at one time.

What counts is read from the exporter before and after, and ours must lie between; the two agree to the digit where
nothing happens meanwhile. Names differ, which the tables say; units are the same after theirs are turned into base
units.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import apps
from support.apps import App
from support.postgres import Postgres, free_port

from retinue_server.adapter import packfile
from retinue_server.adapter.core.points import AnyFamily
from retinue_server.adapter.core.spec import Spec
from retinue_server.adapter.engines import sources
from retinue_server.adapter.worker import Declare, Take, Taken, Worker

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Like(NamedTuple):
    """Whose value ours is."""

    theirs: str
    factor: float = 1.0
    """From their unit to ours."""
    labels: Mapping[str, str] = {}
    """Their names of our labels."""
    near: float = 0.0
    """How much it may differ, in parts of it: of what changes by being looked at."""
    off: float = 0.0
    """How much it may differ: each of the two counts its own connection, and that of the other if it stays open."""


def same(*names: str) -> dict[str, Like]:
    """Those that have the same name there."""
    return {name: Like(name) for name in names}


REDIS = {
    **same(
        "redis_blocked_clients",
        "redis_memory_max_bytes",
        "redis_expired_keys_total",
        "redis_evicted_keys_total",
        "redis_keyspace_hits_total",
        "redis_keyspace_misses_total",
        "redis_rdb_changes_since_last_save",
        "redis_aof_enabled",
        "redis_commands_processed_total",
        "redis_connections_received_total",
        "redis_net_input_bytes_total",
        "redis_net_output_bytes_total",
        "redis_cpu_user_seconds_total",
        "redis_db_keys",
        "redis_db_keys_expiring",
    ),
    "redis_uptime_seconds": Like("redis_uptime_in_seconds"),
    "redis_connected_clients": Like("redis_connected_clients", off=1),
    "redis_max_clients": Like("redis_config_maxclients"),
    "redis_memory_used_bytes": Like("redis_memory_used_bytes", near=0.2),
    "redis_memory_used_rss_bytes": Like("redis_memory_used_rss_bytes", near=0.2),
    "redis_memory_fragmentation_ratio": Like("redis_mem_fragmentation_ratio", near=0.5),
    "redis_connections_rejected_total": Like("redis_rejected_connections_total"),
    "redis_rdb_last_save_ok": Like("redis_rdb_last_bgsave_status"),
    "redis_connected_replicas": Like("redis_connected_slaves"),
    "redis_cpu_system_seconds_total": Like("redis_cpu_sys_seconds_total"),
    "redis_command_calls_total": Like("redis_commands_total", labels={"command": "cmd"}),
    "redis_command_time_seconds_total": Like("redis_commands_duration_seconds_total", labels={"command": "cmd"}),
}
NO_REDIS = {
    "redis_instance_info",  # one has more labels
    "redis_error_replies_total",  # this release of the exporter does not show them
}
NGINX = {
    "nginx_connections_active": Like("nginx_connections_active", off=1),
    "nginx_connections_accepted_total": Like("nginx_connections_accepted"),
    "nginx_connections_handled_total": Like("nginx_connections_handled"),
    "nginx_connections_reading": Like("nginx_connections_reading", off=1),
    "nginx_connections_writing": Like("nginx_connections_writing", off=1),
    "nginx_connections_waiting": Like("nginx_connections_waiting", off=1),
    "nginx_http_requests_total": Like("nginx_http_requests_total"),
}
_DATABASE = {
    "postgresql_commits_total": "xact_commit",
    "postgresql_rollbacks_total": "xact_rollback",
    "postgresql_blocks_read_total": "blks_read",
    "postgresql_blocks_hit_total": "blks_hit",
    "postgresql_rows_returned_total": "tup_returned",
    "postgresql_rows_fetched_total": "tup_fetched",
    "postgresql_rows_inserted_total": "tup_inserted",
    "postgresql_rows_updated_total": "tup_updated",
    "postgresql_rows_deleted_total": "tup_deleted",
    "postgresql_conflicts_total": "conflicts",
    "postgresql_deadlocks_total": "deadlocks",
    "postgresql_temporary_bytes_total": "temp_bytes",
}
POSTGRESQL = {
    **{name: Like(f"pg_stat_database_{column}") for name, column in _DATABASE.items()},
    "postgresql_block_read_time_seconds_total": Like("pg_stat_database_blk_read_time", 0.001),
    "postgresql_block_write_time_seconds_total": Like("pg_stat_database_blk_write_time", 0.001),
    "postgresql_database_size_bytes": Like("pg_database_size_bytes", near=0.2),
    "postgresql_max_connections": Like("pg_settings_max_connections"),
}
NO_POSTGRESQL = {
    "postgresql_server_info",  # one has other labels
    "postgresql_uptime_seconds",  # this release of the exporter does not show it
    "postgresql_in_recovery",  # nor this
    "postgresql_backends",  # theirs counts background processes, too
    "postgresql_locks",  # by database there, of the whole server here
}


@contextlib.contextmanager
def exporter(package: str, *args: str, listen: str, **env: str) -> Iterator[str]:
    """The address of its page."""
    program = shutil.which(package)
    if program is None:
        pytest.skip(f"needs {package}: apt-get install {package}")
    url = f"http://127.0.0.1:{(port := free_port())}/metrics"
    command = [program, *args, f"{listen}=127.0.0.1:{port}"]
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                page(url)
                break
            assert time.monotonic() < end, f"{package} does not answer"
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def page(url: str) -> Series:
    """All samples."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


async def ours(app: App) -> Series:
    """All samples as `/metrics` has them, without the labels that are the adapter's own."""
    spec = Spec("it", app.kind, app.endpoint)
    pack = packfile.shipped()[app.kind.name.lower()]
    source: Any = sources.make(lambda _: "", spec, pack)
    answer = await source.collect()
    await source.close()
    worker = Worker()
    worker.told(Declare("it", spec.own_labels, spec.limits, pack))
    taken = worker.answer(Take(1, "it", answer.text, answer.content_type, answer.document, None, 1))
    assert isinstance(taken, Taken)
    assert not taken.rejected
    return {key: value for family in taken.families for key, value in _samples(family).items()}


def _samples(family: AnyFamily) -> Series:
    own = {"service", "instance", "target", "kind"}
    parsed = text_string_to_metric_families(family.text.decode())
    return {
        (one.name, frozenset((key, value) for key, value in one.labels.items() if key not in own)): one.value
        for made in parsed
        for one in made.samples
    }


def compare(before: Series, mine: Series, after: Series, table: Mapping[str, Like], *, without: set[str]) -> set[str]:
    """What was compared; every family of ours is in the table or named as one that has no like."""
    names = {name for name, _ in mine}
    assert names == {*table, *without} & names
    assert set(table) <= names, set(table) - names
    compared = set()
    for (name, labels), value in mine.items():
        like = table.get(name)
        if like is None:
            continue
        wanted = {(like.labels.get(key, key), text) for key, text in labels}
        bounds = [
            found * like.factor
            for page_ in (before, after)
            for (theirs, theirs_labels), found in page_.items()
            if theirs.removesuffix("_total") == like.theirs.removesuffix("_total") and wanted <= theirs_labels
        ]
        if not bounds:
            assert name.startswith("redis_command"), f"{name}{dict(labels)} has no like"
            continue  # a command that the adapter alone makes
        slack = like.near * max(bounds) + like.off + 1e-9
        assert min(bounds) - slack <= value <= max(bounds) + slack, (name, dict(labels), value, bounds)
        compared.add(name)
    return compared


async def test_redis_is_as_its_exporter_says() -> None:
    with apps.redis("--maxmemory", "64mb") as app:
        for command in (b"SET a 1\r\n", b"SET b 2 EX 1000\r\n"):
            apps.talk(app.endpoint, command, 5, b"+OK\r\n")
        apps.talk(app.endpoint, b"GET a\r\n", 7, b"$1\r\n1\r\n")
        apps.talk(app.endpoint, b"GET none\r\n", 3, b"$-1\r\n")
        url = f"redis://{app.endpoint}"
        with exporter("prometheus-redis-exporter", f"--redis.addr={url}", listen="--web.listen-address") as theirs:
            before = await asyncio.to_thread(page, theirs)
            mine = await ours(app)
            after = await asyncio.to_thread(page, theirs)
    assert compare(before, mine, after, REDIS, without=NO_REDIS) == set(REDIS)
    assert mine["redis_keyspace_hits_total", frozenset()] == 7
    assert mine["redis_db_keys", frozenset({("db", "db0")})] == 2


async def test_nginx_is_as_its_exporter_says() -> None:
    with apps.nginx() as app:
        app.use(5)
        uri = f"-nginx.scrape-uri={app.endpoint}"
        with exporter("prometheus-nginx-exporter", uri, listen="-web.listen-address") as theirs:
            before = await asyncio.to_thread(page, theirs)
            mine = await ours(app)
            after = await asyncio.to_thread(page, theirs)
    assert compare(before, mine, after, NGINX, without=set()) == set(NGINX)


async def test_postgresql_is_as_its_exporter_says(postgres: Postgres) -> None:
    app = apps.postgresql(postgres)
    env = {"DATA_SOURCE_NAME": f"{postgres.url}?sslmode=disable"}
    with exporter("prometheus-postgres-exporter", listen="--web.listen-address", **env) as theirs:
        await asyncio.to_thread(app.use, 20)
        before = await asyncio.to_thread(page, theirs)
        mine = await ours(app)
        after = await asyncio.to_thread(page, theirs)
    assert compare(before, mine, after, POSTGRESQL, without=NO_POSTGRESQL) == set(POSTGRESQL)
