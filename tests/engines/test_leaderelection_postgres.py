"""Claims on PostgreSQL beyond the exercise: losing and finding the server, poolers, migrations, roles, failover."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psycopg
import pytest
from support.pgbouncer import pgbouncer
from support.postgres import Postgres

from retinue_server.leaderelection.engine import Claim, EndReason, Granted, Hold, Refused
from retinue_server.leaderelection.engines.postgres import PostgresEngine, news
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import Reason, Unavailable

TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'retinue leaderelection%'
"""

ELECTIONS = "retinue.leaderelection_election"
REST = (
    "domain, epoch, version, first_version, candidate_id, session_id, value, lease_ms, release_delay_ms, wait_ms,"
    " acquire_ms, step_down"
)


@pytest.fixture
def schema(postgres: Postgres) -> Iterator[str]:
    name = postgres.schema()
    yield name
    postgres.drop(name)


@pytest.fixture
def own_server() -> Iterator[Postgres]:
    """A server that the test may hurt."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as where:
        Path(where).chmod(0o755)
        server = Postgres.create(Path(where) / "server", "autovacuum = off")
        yield server
        server.stop("immediate")


@asynccontextmanager
async def servers(url: str, schema: str, count: int = 2, **options: object) -> AsyncIterator[list[PostgresEngine]]:
    async with AsyncExitStack() as stack:
        engines = []
        for _ in range(count):
            engine = PostgresEngine(url, schema=schema, **options)  # type: ignore[arg-type] # as they are
            await engine.start()
            stack.push_async_callback(engine.stop)
            engines.append(engine)
        yield engines


def claim(session: str, election: str = "e") -> Claim:
    return Claim(election, f"candidate-{session}", session, "", 60_000, 0, 1_700_000_000_000)


async def won(engine: PostgresEngine, wanted: Claim, watched: str | None = None) -> Hold:
    outcome = await engine.claim(wanted, watched)
    assert isinstance(outcome, Granted), outcome
    return Hold(wanted.election_id, wanted.session_id, outcome.record.epoch)


async def until(holds: object, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # type: ignore[operator] # a coroutine function
            await asyncio.sleep(0.02)


async def test_the_planner_takes_no_statement_for_a_large_one(own_server: Postgres) -> None:
    """A server compiles what it thinks dear (jit_above_cost), and a claim would take a quarter of a second. The tables
    are not analyzed: so small ones never are."""
    async with servers(own_server.url, "retinue", count=1) as (engine,):
        connection = await psycopg.AsyncConnection.connect(own_server.url, autocommit=True)
        async with connection:
            await connection.execute("SET jit_above_cost = 1000")
            for name in ("claim", "renew", "release", "proclaim", "ask_step_down", "read"):
                text = re.sub(r"\$\d+", "NULL", engine._statements[name])
                plan = await (await connection.execute(f"EXPLAIN {text}".encode())).fetchall()
                assert not [line for (line,) in plan if "JIT" in line], name


# Losing the server


async def test_backends_that_are_terminated_cost_nothing(own_server: Postgres) -> None:
    async with servers(own_server.url, "retinue") as (one, other):
        held = await won(one, claim("a"))
        for _ in range(5):
            own_server.run(TERMINATE)
            assert (await one.renew([held])) != [None]
            assert isinstance(await other.claim(claim("b")), Refused)
        own_server.run(TERMINATE)
        assert await one.release(held, EndReason.RESIGNED, 1)
        own_server.run(TERMINATE)
        assert (await won(other, claim("b"))).epoch == held.epoch + 1


async def test_a_server_that_restarts_is_unavailable_and_is_found_again(own_server: Postgres) -> None:
    async with servers(own_server.url, "retinue") as (one, other):
        held = await won(one, claim("a"))
        await asyncio.to_thread(own_server.stop)
        for call in (one.renew([held]), one.read("e"), other.claim(claim("b"))):
            with pytest.raises(Unavailable) as refused:
                await call
            assert refused.value.reason == Reason.ENGINE_UNAVAILABLE
            assert refused.value.retry_ms > 0
        await asyncio.to_thread(own_server.start)
        assert (await one.renew([held])) != [None]
        assert isinstance(await other.claim(claim("b")), Refused)
        heard = asyncio.Event()
        other.listen(lambda _: heard.set())
        other.watch("e")

        async def hears() -> bool:
            hold = await won(one, claim("a"))
            await one.release(hold, EndReason.RESIGNED, 1)
            return heard.is_set() and other.capabilities.poll_ms == 1_000

        await until(hears)


async def test_what_hangs_is_unavailable_and_does_no_harm_when_it_comes_back(own_server: Postgres) -> None:
    async with servers(own_server.url, "retinue", 1) as (engine,):
        held = await won(engine, claim("a"))
        with psycopg.connect(own_server.url) as locker:
            locker.execute("LOCK TABLE retinue.leaderelection_election")
            with pytest.raises(Unavailable):
                await engine.renew([held])
            with pytest.raises(Unavailable):
                await engine.read("e")
        assert (await engine.renew([held])) != [None]

        async def none_wait() -> bool:
            return own_server.run("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == []

        await until(none_wait)


# Many servers


async def test_servers_that_start_at_once_make_one_schema(postgres: Postgres, schema: str) -> None:
    engines = [PostgresEngine(postgres.url, schema=schema) for _ in range(4)]
    await asyncio.gather(*(engine.start() for engine in engines))
    domains = {(await engine.claim(claim("a"))).record.domain for engine in engines}  # type: ignore[union-attr] # granted
    for engine in engines:
        await engine.stop()
    assert len(domains) == 1
    assert postgres.run(f"SELECT version FROM {schema}.leaderelection_version") == [(1,)]


async def test_a_newer_schema_is_refused(postgres: Postgres, schema: str) -> None:
    async with servers(postgres.url, schema, 1):
        postgres.run(f"INSERT INTO {schema}.leaderelection_version (version) VALUES (99)")
    with pytest.raises(StartError, match="version 99, newer than"):
        await PostgresEngine(postgres.url, schema=schema).start()


async def test_a_database_that_is_away_is_told_at_start() -> None:
    with pytest.raises(StartError, match="cannot use the database"):
        await PostgresEngine("postgresql://retinue@127.0.0.1:1/postgres").start()


async def test_behind_a_pooler_of_transactions_everything_works(postgres: Postgres, schema: str) -> None:
    with pgbouncer(postgres) as url:
        async with servers(url, schema, prepared_statements=False, listen_url=postgres.url) as (one, other):
            heard = asyncio.Event()
            other.listen(lambda _: heard.set())
            other.watch("e")
            for turn in range(10):
                held = await won(one, claim(f"a{turn}"))
                assert isinstance(await other.claim(claim("b")), Refused)
                assert (await one.renew([held])) != [None]
                assert await one.release(held, EndReason.RESIGNED, 1)
            await asyncio.wait_for(heard.wait(), 60)
            assert len(list(await other.terms("e", None, 50))) == 10


async def test_behind_a_pooler_that_swallows_news_servers_look_more_often(postgres: Postgres, schema: str) -> None:
    with pgbouncer(postgres) as url:
        async with servers(url, schema, 1, prepared_statements=False) as (engine,):
            assert engine.capabilities.poll_ms == 250
    async with servers(postgres.url, schema, 1) as (engine,):
        assert engine.capabilities.poll_ms == 1_000


async def test_no_word_of_many_is_missed(postgres: Postgres, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news, "_PROVE_S", 0.001)
    names = {f"e{number}" for number in range(200)}
    async with servers(postgres.url, schema, 1) as (engine,):
        heard: set[str] = set()
        engine.listen(heard.add)
        for name in names:
            engine.watch(name)
        heard.clear()
        for turn in range(20):
            words = f"SELECT pg_notify('retinue:{schema}', 'x e' || n) FROM generate_series({turn}, 199, 20) n"
            await asyncio.to_thread(postgres.run, words)

        async def all_came() -> bool:
            return heard == names

        await until(all_came)


# What it costs


async def test_no_claim_is_so_heavy_to_the_planner_that_it_is_compiled(postgres: Postgres, schema: str) -> None:
    async with servers(postgres.url, schema, 1) as (engine,):
        sql = engine._statements["claim"]
    values = ", ".join(f"'{value}'" for value in ("e", "c", "s", "", 1, 0, 1, "", 9, 64, "channel", "news"))
    with psycopg.connect(postgres.url) as connection:
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.execute(f"PREPARE claim AS {sql}".encode())
        [(plan,)] = connection.execute(f"EXPLAIN (FORMAT json) EXECUTE claim ({values})".encode()).fetchall()
    assert plan[0]["Plan"]["Total Cost"] < 1_000, "from 100,000 on it would take a tenth of a second"


async def test_a_thousand_renewals_are_one_commit_and_touch_no_index(own_server: Postgres) -> None:
    async with servers(own_server.url, "retinue", 1) as (engine,):
        await won(engine, claim("a", "e0"))
        own_server.run(f"INSERT INTO {ELECTIONS} SELECT 'e' || n, {REST} FROM {ELECTIONS}, generate_series(1, 999) n")
        before = written(own_server)
        assert None not in await engine.renew([Hold(f"e{number}", "a", 1) for number in range(1_000)])
        assert written(own_server)[0] - before[0] == 1

        async def counted() -> bool:
            _, rows, hot = (now - then for now, then in zip(written(own_server), before, strict=True))
            return rows == 1_000 and hot >= 900

        await until(counted)


def written(server: Postgres) -> tuple[int, int, int]:
    """Transactions that wrote, rows that were updated, and those whose update touched no index."""
    server.run("SELECT pg_stat_force_next_flush()")
    sql = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'leaderelection_election'"
    [(rows, hot)] = server.run(sql)
    [(written,)] = server.run("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    return written, rows, hot  # type: ignore[return-value] # numbers


async def test_who_is_refused_writes_nothing(own_server: Postgres) -> None:
    async with servers(own_server.url, "retinue") as (one, other):
        await won(one, claim("a"))
        before = written(own_server)
        for _ in range(10):
            assert isinstance(await other.claim(claim("b")), Refused)
        assert written(own_server)[0] == before[0]


# Roles, domains


async def test_an_ordinary_role_that_may_use_a_schema_is_enough(postgres: Postgres, schema: str) -> None:
    role = f"r_{schema}"
    postgres.run(f"CREATE ROLE {role} LOGIN")
    postgres.run(f"CREATE SCHEMA {schema} AUTHORIZATION {role}")
    url = f"postgresql://{role}@127.0.0.1:{postgres.port}/postgres"
    async with servers(url, schema) as (one, other):
        held = await won(one, claim("a"))
        record = await other.read("e")
    [(system,)] = postgres.run("SELECT to_hex(system_identifier) FROM pg_control_system()")
    assert record is not None
    assert record.domain.startswith(f"postgres-{system}-00000001-")
    assert record.epoch == held.epoch
    postgres.drop(schema)
    postgres.run(f"DROP ROLE {role}")


async def test_a_restored_dump_and_an_emptied_table_do_not_repeat_tokens(postgres: Postgres, schema: str) -> None:
    async with servers(postgres.url, schema, 1) as (engine,):
        first = (await engine.claim(claim("a"))).record
    table = f"{schema}.leaderelection_election"
    postgres.run(f"ALTER TABLE {table} RENAME TO old; CREATE TABLE {table} (LIKE {schema}.old INCLUDING ALL)")
    async with servers(postgres.url, schema, 1) as (engine,):
        again = (await engine.claim(claim("a"))).record
    assert first is not None
    assert again is not None
    assert first.domain != again.domain, "a table that was made anew has another domain"
    assert again.epoch > first.epoch, "terms that are remembered are not led again"


async def test_a_promoted_standby_has_another_domain_and_knows_no_watched_version(own_server: Postgres) -> None:
    async with servers(own_server.url, "retinue", 1) as (engine,):
        held = await won(engine, claim("a"))
        seen = await engine.read("e")
        await asyncio.to_thread(own_server.stop)
        (own_server.data / "standby.signal").touch()
        await asyncio.to_thread(own_server.start)
        own_server.run("SELECT pg_promote()")
        assert seen is not None
        refused = await engine.claim(claim("b"), seen.version)
        assert isinstance(refused, Refused), "versions of the old timeline may be forgotten ones"
        assert refused.record is not None
        assert refused.record.domain == seen.domain, "the term goes on under its token"
        next_hold = await won(engine, claim("b"), refused.record.version)
        after = await engine.read("e")
    assert after is not None
    assert after.domain != seen.domain
    assert next_hold.epoch > held.epoch


async def test_a_commit_waits_for_the_disk_whatever_the_database_says(own_server: Postgres) -> None:
    own_server.run("ALTER DATABASE postgres SET synchronous_commit = off")
    async with servers(own_server.url, "retinue", 1) as (engine,):
        held = await won(engine, claim("a"))
        for _ in range(3):
            assert (await engine.renew([held])) != [None]
            record = await engine.read("e")
            await asyncio.to_thread(own_server.stop, "immediate")
            await asyncio.to_thread(own_server.start)
            assert await engine.read("e") == record


@pytest.mark.parametrize("url", ["", "postgresql://u:secret@h:port/x?no=way", "secret"])
def test_a_wrong_url_is_told_without_what_is_in_it(url: str) -> None:
    with pytest.raises(ValueError, match="url") as told:
        PostgresEngine(url)
    assert "secret" not in str(told.value)
