"""One exercise for every source of the adapter, on the real app.

Signals that a source has not are absent with a reason; what this table says is what operators get.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import apps
from support.apps import App
from support.postgres import Postgres, free_port

from retinue_server.adapter import packfile
from retinue_server.adapter.core.points import SIGNALS, Histogram
from retinue_server.adapter.core.spec import Kind, Spec, State
from retinue_server.adapter.core.targets import Targets
from retinue_server.adapter.engine import Answer, SourceError, Unexpected
from retinue_server.adapter.engines import sources
from retinue_server.adapter.engines.work import ProcessWork
from retinue_server.adapter.worker import Declare, Take, Taken, Worker

PACKS = packfile.shipped()


class Expected(NamedTuple):
    """Of an app that was used."""

    grows: str
    """A counter of requests: by one for each."""
    families: tuple[str, ...]
    absent: Mapping[str, str]
    """Signals that are not there, and words of the reason; the others are."""


NO_EXPVAR = "a rule pack of its own says which counts"
EXPECTED = {
    "redis": Expected(
        "redis_commands_processed",
        ("redis_uptime_seconds", "redis_memory_used_bytes", "redis_cpu_user_seconds", "redis_instance"),
        {"duration": "percentiles"},
    ),
    "memcached": Expected(
        "memcached_gets", ("memcached_uptime_seconds", "memcached_limit_bytes"), {"duration": "measures no times"}
    ),
    "nginx": Expected(
        "nginx_http_requests",
        ("nginx_connections_active", "nginx_connections_waiting"),
        {"errors": "access log", "duration": "access log", "saturation": "worker_connections"},
    ),
    "postgresql": Expected(
        "postgresql_commits",
        ("postgresql_server", "postgresql_backends", "postgresql_database_size_bytes", "postgresql_locks"),
        {"duration": "no histogram"},
    ),
    "openmetrics": Expected("http_requests", ("temperature_celsius", "build", "process_cpu_seconds"), {}),
    "text": Expected("http_requests", ("temperature_celsius", "build_info", "process_cpu_seconds"), {}),
    "expvar": Expected(
        "",
        ("go_memory_heap_allocated_bytes", "go_gc_pause_seconds"),
        {"requests": NO_EXPVAR, "errors": NO_EXPVAR, "duration": "no histograms"},
    ),
    "jolokia": Expected(
        "",
        ("jvm_memory_heap_used_bytes", "jvm_uptime_seconds", "jvm_cpu_seconds", "jvm_gc_time_seconds"),
        {"requests": "MBean", "errors": "MBean", "duration": "MBean"},
    ),
}
"""By the app."""


@pytest.fixture(scope="module")
def app(request: pytest.FixtureRequest) -> Iterator[App]:
    """The real one."""
    started: Mapping[str, Callable[[], contextlib.AbstractContextManager[App]]] = {
        "redis": apps.redis,
        "memcached": apps.memcached,
        "nginx": apps.nginx,
        "postgresql": lambda: contextlib.nullcontext(apps.postgresql(request.getfixturevalue("postgres"))),
        "openmetrics": lambda: apps.prometheus("openmetrics"),
        "text": lambda: apps.prometheus("text"),
        "expvar": apps.expvar,
        "jolokia": apps.jolokia,
    }
    with started[request.param]() as running:
        yield running


ALL = pytest.mark.parametrize(("app", "name"), [(name, name) for name in EXPECTED], indirect=["app"], scope="module")
KINDS = {
    Kind.PROMETHEUS: "http://{}/metrics",
    Kind.JSON: "http://{}/",
    Kind.NGINX: "http://{}/",
    Kind.REDIS: "{}",
    Kind.MEMCACHED: "{}",
    Kind.POSTGRESQL: "postgresql://retinue@{}/postgres",
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def spec(kind: Kind, endpoint: str, **more: Any) -> Spec:
    return Spec("it", kind, endpoint, **{"rule_pack": "expvar" if kind is Kind.JSON else "", **more})


def source(wanted: Spec, objection: Callable[[str], str] = lambda _: "") -> Any:
    return sources.make(objection, wanted, PACKS.get(wanted.rule_pack or wanted.kind.name.lower()))


class Taking:
    """A source with the worker's part of the work, in this process."""

    def __init__(self, wanted: Spec) -> None:
        self._source = source(wanted)
        self._worker = Worker()
        pack = PACKS.get(wanted.rule_pack or wanted.kind.name.lower())
        self._worker.told(Declare("it", wanted.own_labels, wanted.limits, pack))

    async def __call__(self) -> Taken:
        answer: Answer = await self._source.collect()
        taken = self._worker.answer(Take(1, "it", answer.text, answer.content_type, answer.document, None, 1))
        assert isinstance(taken, Taken)
        return taken

    async def close(self) -> None:
        await self._source.close()


@contextlib.asynccontextmanager
async def taking(app: App) -> AsyncIterator[Taking]:
    made = Taking(spec(app.kind, app.endpoint, rule_pack=app.rule_pack))
    yield made
    await made.close()


def total(taken: Taken, name: str) -> float:
    return sum(one.value for family in taken.families if family.name == name for one in family.series)  # type: ignore[misc]


@ALL
async def test_an_app_is_collected_and_nothing_of_it_is_refused(app: App, name: str) -> None:
    async with taking(app) as take:
        taken = await take()
    assert (taken.failure, taken.rejected, taken.limited) == ("", {}, False)
    found = {family.name for family in taken.families}
    assert found >= set(EXPECTED[name].families)
    assert all(family.text for family in taken.families)


@ALL
async def test_requests_are_counted_as_they_are_made(app: App, name: str) -> None:
    wanted = EXPECTED[name].grows
    if not wanted:  # this app counts none, and says so: see the test of signals
        return
    async with taking(app) as take:
        before = total(await take(), wanted)
        await asyncio.to_thread(app.use, 7)
        async with asyncio.timeout(30):  # PostgreSQL tells what it did with some delay
            while total(taken := await take(), wanted) < before + 7:
                await asyncio.sleep(0.05)
    signal = taken.signals[SIGNALS.index("requests")]
    assert isinstance(signal.value, float)
    assert signal.value >= before + 7
    assert wanted in signal.source


@ALL
async def test_a_signal_is_there_or_says_why_not(app: App, name: str) -> None:
    await asyncio.to_thread(app.use, 1)
    async with taking(app) as take:
        taken = await take()
    signals = dict(zip(SIGNALS, taken.signals, strict=True))
    absent = {kind: one.absent for kind, one in signals.items() if one.value is None}
    assert absent.keys() == EXPECTED[name].absent.keys()
    for kind, words in EXPECTED[name].absent.items():
        assert words in absent[kind]
    for kind, one in signals.items():
        assert bool(one.source) == (one.value is not None)
        assert isinstance(one.value, Histogram if kind == "duration" else float) or one.value is None
    saturation = signals["saturation"].value
    assert saturation is None or (isinstance(saturation, float) and 0 <= saturation <= 1)


async def test_a_counter_counts_since_its_app_says() -> None:
    began = time.time() * 1000
    with apps.prometheus("openmetrics") as app:
        app.use(1)
        async with taking(app) as take:
            taken = await take()
    found = {family.name: family for family in taken.families}
    for name in ("http_requests", "http_request_duration_seconds"):
        for one in found[name].series:
            assert began - 1000 < one.start_ms < time.time() * 1000 + 1000


async def test_errors_are_those_of_the_app(postgres: Postgres) -> None:
    with apps.redis() as app:
        async with taking(app) as take:
            assert (await take()).signals[1].value == 0
            apps.talk(
                app.endpoint, b"NONSENSE\r\n", 3, b"-ERR unknown command 'NONSENSE', with args beginning with: \r\n"
            )
            assert (await take()).signals[1].value == 3
    with apps.prometheus("text") as app:
        async with taking(app) as take:
            assert (await take()).signals[1].value == 2


async def test_how_full_redis_is_is_how_full_its_fullest_resource_is() -> None:
    with apps.redis("--maxmemory", "64mb", "--maxclients", "2") as app:
        async with taking(app) as take:
            taken = await take()
    saturation = taken.signals[3]
    assert (saturation.value, saturation.source) == (0.5, "redis_connected_clients / redis_max_clients")


async def test_a_password_is_read_from_its_file(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    with apps.redis("--requirepass", "sesame") as app:
        closed = source(spec(app.kind, app.endpoint))
        with pytest.raises(SourceError, match="it refuses: NOAUTH"):
            await closed.collect()
        there = source(spec(app.kind, app.endpoint, credentials_file=str(secret)))
        with pytest.raises(SourceError, match="cannot read the credentials file"):
            await there.collect()
        secret.write_text("sesame\n")
        answer = await there.collect()
        assert answer.document["server"]["redis_version"]


@EACH_KIND
async def test_an_app_that_is_gone_is_an_error_of_the_source(kind: Kind) -> None:
    asked = source(spec(kind, KINDS[kind].format(f"127.0.0.1:{free_port()}")))
    with pytest.raises(SourceError, match=r"cannot connect to 127\.0\.0\.1") as error:
        await asked.collect()
    assert not error.value.misconfigured
    await asked.close()


@EACH_KIND
async def test_a_forbidden_address_is_not_dialled(kind: Kind) -> None:
    dialled: list[object] = []
    server = await asyncio.start_server(lambda *_: dialled.append(1), "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    asked: list[str] = []

    def objection(shown: str) -> str:
        asked.append(shown)
        return "it is not for you"

    host = f"localhost:{address[1]}"
    with pytest.raises(SourceError, match=r"endpoint policy forbids .* it is not for you"):
        await source(spec(kind, KINDS[kind].format(host)), objection).collect()
    assert f"127.0.0.1:{address[1]}" in asked
    assert not dialled
    server.close()


@contextlib.asynccontextmanager
async def answering(what: bytes | None) -> AsyncIterator[str]:
    """A server that answers anything with that, and ends; with None it never answers."""
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read(1)
            if what is None:
                await over.wait()
            else:
                writer.write(what)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        yield f"{host}:{port}"
    finally:
        over.set()
        server.close()


@pytest.fixture
async def targets() -> AsyncIterator[Targets]:
    work = ProcessWork()
    made = Targets(work, lambda wanted, pack: sources.make(lambda _: "", wanted, pack), PACKS)
    yield made
    await made.stop()
    await work.stop()


@EACH_KIND
async def test_an_app_that_hangs_costs_its_own_timeout(kind: Kind, targets: Targets) -> None:
    with apps.redis() as well:
        async with answering(None) as address:
            hung = spec(kind, KINDS[kind].format(address), interval_s=60.0, timeout_s=0.2)
            first = await targets.create(hung)
            second = await targets.create(Spec("well", Kind.REDIS, well.endpoint))
            async with asyncio.timeout(30):
                await first.collected.wait()
                await second.collected.wait()
    assert (first.status.state, first.status.message) == (State.DOWN, "it did not answer within 0.2 s")
    assert second.status.state is State.UP


PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s"
GARBAGE = {
    Kind.PROMETHEUS: (b"\xff\x00 nonsense\r\n", PAGE % (8, b"a b c d{"), PAGE % (2, b"\xff\xfe")),
    Kind.JSON: (b"\xff\x00 nonsense\r\n", PAGE % (5, b"{1: 2"), PAGE % (200_000, b"[" * 200_000)),
    Kind.NGINX: (b"\xff\x00 nonsense\r\n", PAGE % (5, b"hello")),
    Kind.REDIS: (b"nonsense\r\n", b"$many\r\n", b"$999999999999\r\n", b"$-1\r\n", b"x" * 200_000),
    Kind.MEMCACHED: (b"nonsense\r\n", b"\r\n", b"x" * 200_000, b"STAT a b\r\n" * 2_000_000),
}
"""Nothing that the kind answers. PostgreSQL's own library reads its answers and tells no nonsense from an outage."""


@pytest.mark.parametrize(("kind", "what"), [(kind, what) for kind, each in GARBAGE.items() for what in each])
async def test_an_app_that_says_nonsense_is_misconfigured(kind: Kind, what: bytes) -> None:
    async with answering(what) as address:
        take = Taking(spec(kind, KINDS[kind].format(address)))
        try:
            taken = await take()
        except Unexpected:
            return
        assert taken.failure
        assert not taken.families


async def test_postgresql_that_says_nonsense_is_an_error_of_the_source() -> None:
    async with answering(b"nonsense") as address:
        with pytest.raises(SourceError):
            await source(spec(Kind.POSTGRESQL, KINDS[Kind.POSTGRESQL].format(address))).collect()


@pytest.mark.parametrize(
    ("kind", "what"), [(Kind.REDIS, b"$100\r\nhalf"), (Kind.MEMCACHED, b"STAT a 1\r\n"), (Kind.JSON, b"")]
)
async def test_an_answer_that_breaks_off_is_an_error_and_no_half_of_it_is_taken(kind: Kind, what: bytes) -> None:
    async with answering(what) as address:
        with pytest.raises(SourceError) as error:
            await source(spec(kind, KINDS[kind].format(address))).collect()
        assert not error.value.misconfigured


async def test_a_longer_answer_than_its_limit_is_not_read_on() -> None:
    async with answering(PAGE % (50_000_000, b"a 1\n" * 3_000_000)) as address:
        with pytest.raises(Unexpected, match="longer than 10485760 bytes"):
            await source(spec(Kind.PROMETHEUS, f"http://{address}/")).collect()


async def test_a_status_that_is_not_ok_is_told() -> None:
    with apps.nginx() as app, pytest.raises(SourceError, match=r"answers 400"):
        await source(spec(Kind.JSON, app.endpoint.replace("/status", "/%zz"))).collect()


async def test_a_query_without_its_table_costs_itself(postgres: Postgres) -> None:
    pack = PACKS["postgresql"]
    queries = {**pack.queries, "missing": "SELECT * FROM there_is_no_such_table"}
    from msgspec.structs import replace  # noqa: PLC0415 - here alone

    asked: Any = sources.make(lambda _: "", spec(Kind.POSTGRESQL, postgres.url), replace(pack, queries=queries))
    answer = await asked.collect()
    assert answer.document["server"][0]["max_connections"] == 200
    assert "missing" not in answer.document
    assert asked.reject.counts == {"query_failed": 1}
    assert "there_is_no_such_table" in asked.reject.examples["query_failed"]
    await asked.close()


async def test_postgresql_lets_nobody_write_and_cuts_what_takes_too_long(postgres: Postgres) -> None:
    pack = packfile.read(
        "p", b"kind: postgresql\nqueries: {a: CREATE TABLE t (x int), b: SELECT pg_sleep(60) AS x, c: SELECT 1 AS x}\n"
    )
    began = time.monotonic()
    asked: Any = sources.make(lambda _: "", spec(Kind.POSTGRESQL, postgres.url, timeout_s=0.5), pack)
    answer = await asked.collect()
    assert answer.document == {"c": [{"x": 1}]}
    assert asked.reject.counts == {"query_failed": 2}
    assert "b: canceling statement due to statement timeout" in asked.reject.examples["query_failed"]
    assert not postgres.run("SELECT 1 FROM pg_tables WHERE tablename = 't'")
    assert time.monotonic() - began < 30
    await asked.close()


async def test_a_connection_that_was_cut_is_made_anew(postgres: Postgres) -> None:
    async with taking(apps.postgresql(postgres)) as take:
        await take()
        await asyncio.to_thread(
            postgres.run,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'retinue-adapter'",
        )
        with contextlib.suppress(SourceError):
            await take()
        assert (await take()).families


def test_every_shipped_rule_is_for_something_that_the_app_says() -> None:
    assert set(PACKS) == {
        *("redis", "memcached", "nginx", "postgresql", "prometheus", "expvar", "jolokia", "otlp", "statsd", "report")
    }
    for name, pack in PACKS.items():
        assert set(pack.signals) == set(SIGNALS), name
