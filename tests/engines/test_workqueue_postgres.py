"""Claims on PostgreSQL beyond the exercise: many coordinators, losing and finding the server, SQL of the user's own."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psycopg
import pytest
from google.protobuf.json_format import MessageToDict
from msgspec.structs import replace
from psycopg.types.json import Jsonb
from support.pgbouncer import pgbouncer
from support.postgres import Postgres
from support.workqueue_core import NoBlobs

from retinue.workqueue.v1 import task_pb2
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import Reason, RetinueError, Unavailable
from retinue_server.runtime.postgres import Address
from retinue_server.workqueue.core.queue import WorkQueue
from retinue_server.workqueue.core.requests import (
    Complete,
    Enqueue,
    Extend,
    Fail,
    LeaseAsk,
    LeaseRef,
    NewTask,
    Release,
    Selection,
    SettingsPatch,
)
from retinue_server.workqueue.engine import (
    Durability,
    Failure,
    QueueRow,
    QueueSettings,
    QueueState,
    RetryOverrides,
    State,
    Task,
    TaskBody,
    TaskRow,
)
from retinue_server.workqueue.engines.postgres import PostgresEngine
from retinue_server.workqueue.engines.postgres.literals import blobs, escaped, texts, unescaped
from retinue_server.workqueue.engines.postgres.migrate import VERSION
from retinue_server.workqueue.engines.postgres.session import Session
from retinue_server.workqueue.engines.postgres.statements import Statements

DAY_MS = 86_400_000
TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'retinue workqueue writer'
"""


@pytest.fixture
def schema(postgres: Postgres) -> Iterator[str]:
    name = postgres.schema()
    yield name
    postgres.drop(name)


@asynccontextmanager
async def coordinators(url: str, schema: str, count: int = 2, **options: object) -> AsyncIterator[list[WorkQueue]]:
    engines = [PostgresEngine(url, schema=schema, **options) for _ in range(count)]  # type: ignore[arg-type] # as they are
    queues = [WorkQueue(engine, NoBlobs(), clock=engine.now) for engine in engines]
    try:
        for engine, queue in zip(engines, queues, strict=True):
            engine.on_ready(queue.hear_ready)
            await engine.start()
        yield queues
    finally:
        await asyncio.gather(*(engine.stop() for engine in engines))


async def enqueue(queue: WorkQueue, count: int) -> list[str]:
    results = await queue.enqueue(Enqueue(tuple(NewTask("q") for _ in range(count))))
    return [result.task_id for result in results if result.error is None]


async def until(holds: object, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # type: ignore[operator] # a coroutine function
            await asyncio.sleep(0.02)


# Many coordinators


async def test_no_task_is_leased_twice_by_two_coordinators(postgres: Postgres, schema: str) -> None:
    leased: Counter[str] = Counter()

    async def work(queue: WorkQueue, name: str) -> None:
        while granted := await queue.lease(LeaseAsk("q", name, 7)):
            leased.update(task.row.task_id for task, *_ in granted)
            settled = await queue.settle([Complete(LeaseRef.of(task.row)) for task, *_ in granted])
            assert all(one.error is None for one in settled)

    async with coordinators(postgres.url, schema) as queues:
        ids = await enqueue(queues[0], 300)
        await asyncio.gather(*(work(queue, f"w{i}") for queue in queues for i in range(3)))
        counts = (await queues[1].reports(["q"]))[0].counts
    assert leased == Counter(ids)
    assert counts == {State.SUCCEEDED: 300}


async def test_max_tasks_is_exact_over_coordinators(postgres: Postgres, schema: str) -> None:
    async with coordinators(postgres.url, schema) as queues:
        await queues[0].create_queue("q", SettingsPatch(max_tasks=25))
        taken = await asyncio.gather(*(enqueue(queue, 3) for _ in range(10) for queue in queues))
        counts = (await queues[0].reports(["q"]))[0].counts
    assert sum(map(len, taken)) == 25
    assert counts == {State.READY: 25}


async def test_one_key_is_one_task_however_many_bring_it_at_once(postgres: Postgres, schema: str) -> None:
    asked = Enqueue((NewTask("q", idempotency_key="k"),))
    async with coordinators(postgres.url, schema) as queues:
        results = await asyncio.gather(*(queue.enqueue(asked) for _ in range(10) for queue in queues))
    assert len({result.task_id for (result,) in results}) == 1
    assert sorted(result.existing for (result,) in results) == [False] + [True] * 19


async def test_a_waiting_worker_hears_of_a_task_that_came_to_another_coordinator(
    postgres: Postgres, schema: str
) -> None:
    async with coordinators(postgres.url, schema) as (one, other):
        await one.create_queue("q", SettingsPatch())
        waiting = asyncio.create_task(other.lease(LeaseAsk("q", "w", 1), wait_ms=50_000))
        ids: list[str] = []

        async def leased() -> bool:
            ids.extend(await enqueue(one, 1))
            await asyncio.wait([waiting], timeout=0.5)
            return waiting.done()

        await until(leased)
        assert (await waiting)[0].task.row.task_id in ids


async def test_looking_again_finds_what_no_news_told(postgres: Postgres, schema: str) -> None:
    async with coordinators(postgres.url, schema) as (one, other):
        (task_id,) = await enqueue(one, 1)
        (granted,) = await one.lease(LeaseAsk("q", "w", 1))
        waiting = asyncio.create_task(other.wait(task_id, 50_000))
        await one.settle([Complete(LeaseRef.of(granted.task.row))])

        async def ended() -> bool:
            await other.look_again()
            return waiting.done()

        await until(ended)
        assert (await waiting).row.state == State.SUCCEEDED


async def test_a_paused_queue_gives_nothing_at_any_coordinator(postgres: Postgres, schema: str) -> None:
    async with coordinators(postgres.url, schema) as (one, other):
        await enqueue(one, 1)
        await one.set_queue_state("q", QueueState.PAUSED)
        assert await other.lease(LeaseAsk("q", "w", 1)) == []
        await other.set_queue_state("q", QueueState.ACTIVE)
        assert len(await one.lease(LeaseAsk("q", "w", 1))) == 1


async def test_leases_go_on_when_their_coordinator_is_gone(postgres: Postgres, schema: str) -> None:
    async with coordinators(postgres.url, schema, 1) as (one,):
        await enqueue(one, 1)
        (granted,) = await one.lease(LeaseAsk("q", "w", 1))
    async with coordinators(postgres.url, schema, 1) as (other,):
        await other.recover()
        (settled,) = await other.settle([Complete(LeaseRef.of(granted.task.row))])
        after = await other.get(granted.task.row.task_id)
    assert settled.error is None
    assert after.row.state == State.SUCCEEDED


# What a coordinator knows by heart


async def test_a_cancellation_at_another_coordinator_counts_when_the_lease_ends(
    postgres: Postgres, schema: str
) -> None:
    async with coordinators(postgres.url, schema) as (one, other):
        ids = await enqueue(one, 20)
        granted = await one.lease(LeaseAsk("q", "w", 20))
        await other.cancel(Selection(tuple(ids[:10])))
        failed = [Fail(LeaseRef.of(task.row), Failure("BAD", "it is")) for task, *_ in granted]
        settled = await one.settle(failed)
    assert [one.state for one in settled] == [State.CANCELLED] * 10 + [State.RETRYING] * 10


async def test_a_lease_that_another_coordinator_ended_is_not_ended_again(postgres: Postgres, schema: str) -> None:
    async with coordinators(postgres.url, schema) as (one, other):
        await enqueue(one, 20)
        granted = await one.lease(LeaseAsk("q", "w", 20))
        leases = [LeaseRef.of(task.row) for task, *_ in granted]
        await other.settle([Complete(lease) for lease in leases[:5]])
        await other.settle([Release(lease) for lease in leases[5:10]])
        settled = await one.settle([Fail(lease, Failure("BAD", "it is"), final=True) for lease in leases])
        counts = (await one.reports(["q"]))[0].counts
    errors = [settled_.error.reason if settled_.error else None for settled_ in settled]
    assert errors == [Reason.ALREADY_FINALIZED] * 10 + [None] * 10
    assert counts == {State.SUCCEEDED: 5, State.READY: 5, State.DEAD: 10}


async def test_a_coordinator_that_leased_first_does_not_refuse_who_leased_later(
    postgres: Postgres, schema: str
) -> None:
    async with coordinators(postgres.url, schema) as (one, other):
        await enqueue(one, 1)
        (first,) = await one.lease(LeaseAsk("q", "w", 1))
        await other.settle([Release(LeaseRef.of(first.task.row))])
        (second,) = await other.lease(LeaseAsk("q", "v", 1))
        (late,) = await one.settle([Complete(LeaseRef.of(first.task.row))])
        (extended,) = await one.extend([Extend(LeaseRef.of(second.task.row), 60_000)])
        (settled,) = await one.settle([Complete(LeaseRef.of(second.task.row))])
    assert late.error is not None
    assert late.error.reason == Reason.LEASE_LOST
    assert (extended.error, settled.error, settled.state) == (None, None, State.SUCCEEDED)


async def test_leases_that_two_coordinators_end_at_once_end_once(postgres: Postgres, schema: str) -> None:
    async with coordinators(postgres.url, schema) as (one, other):
        await enqueue(one, 200)
        granted = await one.lease(LeaseAsk("q", "w", 200))
        leases = [LeaseRef.of(task.row) for task, *_ in granted]
        calls = [
            queue.settle([kind(lease) for lease in leases[start : start + 20]])
            for start in range(0, 200, 20)
            for queue, kind in ((one, Complete), (other, Release))
        ]
        settled = [item for items in await asyncio.gather(*calls) for item in items]
        counts = (await one.reports(["q"]))[0].counts
    accepted = Counter(item.state for item in settled if item.error is None)
    assert accepted == {state: count for state, count in counts.items() if count}
    assert accepted.total() == 200


@pytest.mark.parametrize("task_id", ["", "named"])
async def test_a_request_that_was_answered_elsewhere_is_answered_alike(
    task_id: str, postgres: Postgres, schema: str
) -> None:
    asked = Enqueue((NewTask("q", task_id=task_id), NewTask("q")), atomic=True, request_id="r")
    async with coordinators(postgres.url, schema) as queues:
        answers = await asyncio.gather(*(queue.enqueue(asked) for _ in range(5) for queue in queues))
        later = await queues[1].enqueue(asked)
        with pytest.raises(RetinueError) as refused:
            await queues[0].enqueue(replace(asked, fingerprint=b"other"))
        counts = (await queues[0].reports(["q"]))[0].counts
    assert all(answer == later for answer in answers)
    assert refused.value.reason == Reason.REQUEST_CONFLICT
    assert counts == {State.READY: 2}


# Losing the server


@pytest.fixture
def own_server() -> Iterator[Postgres]:
    """A server that the test may hurt."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as where:
        Path(where).chmod(0o755)
        server = Postgres.create(Path(where) / "server")
        yield server
        server.stop("immediate")


async def test_a_server_that_goes_away_is_unavailable_and_is_found_again(own_server: Postgres) -> None:
    async with coordinators(own_server.url, "retinue", 1) as (queue,):
        assert queue.engine.capabilities.durability == Durability.DISK
        (task_id,) = await enqueue(queue, 1)
        for _ in range(5):
            own_server.run(TERMINATE)
            assert len(await enqueue(queue, 1)) == 1
        await asyncio.to_thread(own_server.stop)
        for call in (enqueue(queue, 1), queue.get(task_id), queue.sweep()):
            with pytest.raises(Unavailable) as refused:
                await call
            assert refused.value.reason == Reason.ENGINE_UNAVAILABLE
            assert refused.value.retry_ms > 0
        await asyncio.to_thread(own_server.start)
        assert len(await enqueue(queue, 1)) == 1
        assert (await queue.get(task_id)).row.state == State.READY


# Migrations


async def test_coordinators_that_start_at_once_make_one_schema(postgres: Postgres, schema: str) -> None:
    engines = [PostgresEngine(postgres.url, schema=schema) for _ in range(4)]
    await asyncio.gather(*(engine.start() for engine in engines))
    for engine in engines:
        await engine.stop()
    assert postgres.run(f"SELECT version FROM {schema}.schema_version ORDER BY 1") == [
        (number,) for number in range(1, VERSION + 1)
    ]


async def test_a_newer_schema_is_refused(postgres: Postgres, schema: str) -> None:
    engine = PostgresEngine(postgres.url, schema=schema)
    await engine.start()
    await engine.stop()
    postgres.run(f"INSERT INTO {schema}.schema_version (version) VALUES (99)")
    with pytest.raises(StartError, match="version 99, newer than"):
        await PostgresEngine(postgres.url, schema=schema).start()


@pytest.mark.parametrize("url", ["", "postgresql://u:secret@h:port/x?no=way", "secret"])
def test_a_wrong_url_is_told_without_what_is_in_it(url: str) -> None:
    with pytest.raises(ValueError, match="url") as told:
        PostgresEngine(url)
    assert "secret" not in str(told.value)


def test_a_schema_must_be_a_name() -> None:
    with pytest.raises(ValueError, match="no name for a schema"):
        PostgresEngine("postgresql://h/x", schema="a; DROP")


# History


async def test_what_is_past_is_hidden_and_its_day_dropped(postgres: Postgres, schema: str) -> None:
    async with coordinators(postgres.url, schema, 1) as (queue,):
        await queue.create_queue("q", SettingsPatch(retention_ms=2 * DAY_MS))

        assert isinstance(queue.engine, PostgresEngine)
        await asyncio.to_thread(queue.engine.keep_days)
        assert postgres.run(f"SELECT count(*) > 1 FROM pg_inherits WHERE inhparent = '{schema}.history'::regclass") == [
            (True,)
        ]
        ids = await enqueue(queue, 3)
        await queue.settle([Complete(LeaseRef.of(t.row)) for t, *_ in await queue.lease(LeaseAsk("q", "w", 3))])
        assert postgres.run(f"SELECT count(*) FROM {schema}.history WHERE drop_day > 0") == [(3,)]
        assert (await queue.reports(["q"]))[0].counts == {State.SUCCEEDED: 3}
        postgres.run(f"UPDATE {schema}.history SET delete_ms = 1 WHERE drop_day > 0")
        assert (await queue.reports(["q"]))[0].counts == {}
        with pytest.raises(RetinueError, match="cannot find task"):
            await queue.get(ids[0])
        postgres.run(f"CREATE TABLE {schema}.history_d5 PARTITION OF {schema}.history FOR VALUES FROM (5) TO (6)")
        await asyncio.to_thread(queue.engine.keep_days)
        assert postgres.run(f"SELECT to_regclass('{schema}.history_d5')") == [(None,)]
        assert len(await enqueue(queue, 1)) == 1


async def test_days_of_history_are_analyzed_as_sparingly_as_history_itself(postgres: Postgres, schema: str) -> None:
    gathered = f"""
        SELECT count(DISTINCT attrelid) > 3, array_agg(DISTINCT attstattarget::integer)
        FROM pg_attribute, pg_inherits WHERE inhparent = '{schema}.history'::regclass
        AND attrelid IN (inhparent, inhrelid) AND attnum > 0 AND attname {{}} (
          'seq', 'task_id', 'queue_id', 'drop_day', 'idempotency_key', 'parent_task_id', 'task_type', 'state',
          'create_ms', 'delete_ms', 'input_blob', 'result_blob')
    """
    async with coordinators(postgres.url, schema, 1) as (queue,):
        await queue.create_queue("q", SettingsPatch(retention_ms=DAY_MS, dead_retention_ms=DAY_MS))
        assert isinstance(queue.engine, PostgresEngine)
        await asyncio.to_thread(queue.engine.keep_days)
    for _ in ("as made", "as migrated"):
        assert postgres.run(gathered.format("IN")) == [(True, [10])], "history, what is deleted row by row, two days"
        assert postgres.run(gathered.format("NOT IN")) == [(True, [0])]
        postgres.run(f"ALTER TABLE {schema}.history ALTER seq SET STATISTICS -1, ALTER input SET STATISTICS -1")
        postgres.run(f"DELETE FROM {schema}.schema_version WHERE version >= 3")
        async with coordinators(postgres.url, schema, 1):
            pass


# Texts


@pytest.mark.parametrize("text", ["", "plain", "\x00", "\x1b", "a\x1b0\x00e", 'q"uo\\te', "é{,}", "NULL"])
def test_every_text_comes_back(text: str, postgres: Postgres) -> None:
    assert unescaped(escaped(text)) == text
    with psycopg.connect(postgres.url) as connection:
        cursor = psycopg.RawCursor(connection).execute("SELECT $1::text[]", [texts([text, "other", text])])
        assert [unescaped(item) for item in cursor.fetchone()[0]] == [text, "other", text]  # type: ignore[index] # one row


# Inside the user's own transaction


@pytest.fixture
async def queue(postgres: Postgres, schema: str) -> AsyncIterator[WorkQueue]:
    async with coordinators(postgres.url, schema, 1) as (one,):
        await one.create_queue("q", SettingsPatch())
        yield one


async def payload_of(queue: WorkQueue, postgres: Postgres, call: str) -> task_pb2.Payload:
    [(task_id,)] = postgres.run(f"SELECT {queue.engine._statements.schema}.{call}")  # type: ignore[attr-defined] # the engine's
    (granted,) = await queue.lease(LeaseAsk("q", "w", 1))
    assert granted.task.row.task_id == task_id
    return task_pb2.Payload.FromString(granted.task.body.input)


async def test_json_that_sql_enqueues_is_what_workers_read(queue: WorkQueue, postgres: Postgres) -> None:
    json = '{"b": [1, -2.5, 1e300, "é\\"", true, false, null, [], {}], "a": {"": "x"}, "long": "' + "y" * 300 + '"}'
    payload = await payload_of(queue, postgres, f"retinue_enqueue_v1('q', '{json}'::jsonb, 'resize')")
    assert MessageToDict(payload.json) == {
        "b": [1, -2.5, 1e300, 'é"', True, False, None, [], {}],
        "a": {"": "x"},
        "long": "y" * 300,
    }
    again = task_pb2.Payload()
    again.json.CopyFrom(payload.json)
    assert again.SerializeToString(deterministic=True) == payload.SerializeToString(deterministic=True)


async def test_text_and_bytes_that_sql_enqueues_are_what_workers_read(queue: WorkQueue, postgres: Postgres) -> None:
    assert (await payload_of(queue, postgres, "retinue_enqueue_v1('q', 'grüß'::text)")).text == "grüß"
    payload = await payload_of(queue, postgres, "retinue_enqueue_v1('q', decode(repeat('00ff', 20000), 'hex'))")
    assert payload.data == b"\x00\xff" * 20_000


async def test_a_task_comes_with_the_users_transaction_or_not_at_all(queue: WorkQueue, postgres: Postgres) -> None:
    schema = queue.engine._statements.schema  # type: ignore[attr-defined] # the engine's
    with psycopg.connect(postgres.url) as connection:
        connection.execute(f"SELECT {schema}.retinue_enqueue_v1('q', 'x'::text, idempotency_key => 'k')")
        assert await queue.lease(LeaseAsk("q", "w", 1)) == []
        connection.rollback()
        connection.execute(f"SELECT {schema}.retinue_enqueue_v1('q', 'x'::text, idempotency_key => 'k')")
        connection.commit()
        first = connection.execute(f"SELECT {schema}.retinue_enqueue_v1('q', 'x'::text, idempotency_key => 'k')")
        (task_id,) = first.fetchone() or ("",)
    assert [granted.task.row.task_id for granted in await queue.lease(LeaseAsk("q", "w", 5))] == [task_id]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'-', 'x'::text", "queue_id must be"),
        ("'none', 'x'::text", "cannot find queue none"),
        ("'q', repeat('x', 262145)", "the limit is 262144"),
        ("'q', 'x'::text, priority => 1001", "priority must be"),
        ("'q', 'x'::text, task_id => 'sp ace'", "task_id must be"),
        ("'q', 'x'::text, labels => '{\"a\": 1}'", "labels must be"),
        ("'q', 'x'::text, expire_time => now() - interval '1 s'", "expire_time later"),
        ("'q', 'x'::text, schedule_time => now() + interval '11 years'", "10 years ahead"),
    ],
)
async def test_sql_is_refused_what_the_contract_refuses(
    queue: WorkQueue, postgres: Postgres, arguments: str, message: str
) -> None:
    with pytest.raises(psycopg.Error, match=message):
        postgres.run(f"SELECT {queue.engine._statements.schema}.retinue_enqueue_v1({arguments})")  # type: ignore[attr-defined] # the engine's


async def test_sql_keeps_to_the_state_and_the_room_of_a_queue(queue: WorkQueue, postgres: Postgres) -> None:
    call = f"SELECT {queue.engine._statements.schema}.retinue_enqueue_v1('q', 'x'::text)"  # type: ignore[attr-defined] # the engine's
    await queue.update_queue("q", SettingsPatch(max_tasks=1))
    postgres.run(call)
    with pytest.raises(psycopg.Error, match="holds its 1 unfinished"):
        postgres.run(call)
    await queue.set_queue_state("q", QueueState.DRAINING)
    with pytest.raises(psycopg.Error, match="is draining"):
        postgres.run(call)


GUIDE = Path(__file__).parents[2] / "deploy/workqueue/README.md"
RIGHTS = """
SELECT c.relname, p.name FROM pg_class c,
  unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) p (name)
WHERE c.relnamespace = {schema}::regnamespace AND c.relkind IN ('r', 'p') AND has_table_privilege(c.oid, p.name)
UNION ALL
SELECT c.relname, p.name FROM pg_class c, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) p (name)
WHERE c.relnamespace = {schema}::regnamespace AND c.relkind IN ('r', 'p') AND has_any_column_privilege(c.oid, p.name)
UNION ALL
SELECT c.relname, p.name FROM pg_class c, unnest(ARRAY['USAGE', 'SELECT', 'UPDATE']) p (name)
WHERE c.relnamespace = {schema}::regnamespace AND c.relkind = 'S' AND has_sequence_privilege(c.oid, p.name)
UNION ALL
SELECT DISTINCT p.proname, 'EXECUTE' FROM pg_proc p
WHERE p.pronamespace = {schema}::regnamespace AND has_function_privilege(p.oid, 'EXECUTE')
UNION ALL
SELECT {schema}, 'CREATE' WHERE has_schema_privilege({schema}, 'CREATE')
"""
"""What a role may do in a schema, one right a row."""


@contextmanager
def granted_by_the_guide(postgres: Postgres, schema: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A connection of a role that has what the guide says, and no more."""
    role = f"app_{schema}"
    [block] = [text for text in re.findall(r"```sql\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "GRANT" in text]
    postgres.run(f"CREATE ROLE {role} LOGIN")
    postgres.run(re.sub(r"\bapp\b", role, re.sub(r"\bretinue\b", schema, block)))
    try:
        with psycopg.connect(postgres.url, user=role) as connection:
            yield connection
    finally:
        postgres.run(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_role_with_the_rights_of_the_guide_enqueues_in_its_transaction_and_does_nothing_else(
    queue: WorkQueue, postgres: Postgres
) -> None:
    schema = queue.engine._statements.schema  # type: ignore[attr-defined] # the engine's
    enqueue_under_key = f"SELECT {schema}.retinue_enqueue_v1('q', %s, idempotency_key => 'k')"
    with granted_by_the_guide(postgres, schema) as connection:
        for content in (Jsonb({"a": 1}), "text", b"bytes"):
            connection.execute(f"SELECT {schema}.retinue_enqueue_v1('q', %s)", [content])
        first = connection.execute(enqueue_under_key, ["x"]).fetchone()
        assert await queue.lease(LeaseAsk("q", "w", 1)) == []
        connection.commit()
        assert len(await queue.lease(LeaseAsk("q", "w", 5))) == 4
        assert connection.execute(enqueue_under_key, ["x"]).fetchone() == first
        connection.commit()
        assert connection.execute(RIGHTS.format(schema=f"'{schema}'")).fetchall() == [("retinue_enqueue_v1", "EXECUTE")]
        for forbidden in (
            "SELECT input FROM {}.body",
            "SELECT input, result FROM {}.history",
            "DELETE FROM {}.task",
            "UPDATE {}.task SET priority = 1",
            "UPDATE {}.queue SET state = 2",
            "SELECT {}.enqueue_payload('q', 'no message', 1, '', '', 0, NULL, NULL, NULL, '', '{{}}', '', false)",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
                connection.execute(forbidden.format(schema))


# A connection


@pytest.fixture
def session(postgres: Postgres) -> Iterator[Session]:
    made = Session(Address(postgres.url), "a test", prepared=True)
    yield made
    made.close()


NUMBERS = "SELECT n, n::text FROM generate_series(1, $1::integer) n"


def test_the_first_error_of_a_round_trip_is_told_and_the_connection_is_as_it_was(session: Session) -> None:
    for _ in range(2):
        with pytest.raises(psycopg.errors.DivisionByZero):
            session.run(
                [("SELECT 1", ()), ("SELECT 1 / $1::integer", ("0",)), ("SELECT no_such()", ()), (NUMBERS, ("3",))]
            )
        with pytest.raises(psycopg.errors.UndefinedFunction):
            session.run([("SELECT no_such()", ())])
        assert session.run([(NUMBERS, ("2",)), (NUMBERS, ("1",)), (NUMBERS, ("2",))]) == [(1, "1"), (2, "2")]
        assert session.run([("SELECT 6 / $1::integer", ("3",)), ("SELECT 1 / $1::integer", ("1",))]) == [(1,)]


def test_what_is_prepared_is_prepared_once_and_not_without_end(session: Session) -> None:
    for _ in range(2):
        for number in range(1_010):
            assert session.run([(f"SELECT {number}::bigint", ())]) == [(number,)]
    assert session.run([("SELECT count(*) FROM pg_prepared_statements", ())]) == [(1_000,)]


def test_a_pipeline_may_be_longer_than_what_lies_between(session: Session) -> None:
    text = "x" * 1_000_000
    rows = session.first_rows([("SELECT $1::text || $2::integer", (text, str(n))) for n in range(40)])
    assert [row[0] for row in rows] == [f"{text}{n}" for n in range(40)]


def test_values_come_back_as_they_went(session: Session) -> None:
    values = ("ä", None, b"\x00\xff", 7, b"")
    sql = "SELECT $1::text, $2::text, $3::bytea, $4::integer, $5::bytea, $6::bytea[]"
    assert session.run([(sql, (*values, blobs([b"\x00", None, b""])))]) == [(*values, [b"\x00", None, b""])]
    with pytest.raises(psycopg.DataError):
        session.run([("SELECT $1::text", ("a\x00b",))])
    assert session.run([("COMMIT", ())]) == [("COMMIT",)], "nothing was sent"


def test_a_lost_connection_is_told_with_why_and_opened_again(session: Session) -> None:
    with pytest.raises(psycopg.errors.AdminShutdown):
        session.run([("SELECT 1", ()), ("SELECT pg_terminate_backend(pg_backend_pid())", ()), (NUMBERS, ("1",))])
    assert session.lost
    assert session.run([(NUMBERS, ("1",))]) == [(1, "1")]


# A pooler


@pytest.fixture
def pooler(postgres: Postgres) -> Iterator[str]:
    with pgbouncer(postgres) as url:
        yield url


async def test_behind_a_pooler_of_transactions_everything_works(postgres: Postgres, schema: str, pooler: str) -> None:
    async with coordinators(pooler, schema, prepared_statements=False, listen_url=postgres.url) as queues:
        for _ in range(10):
            await asyncio.gather(*(enqueue(queue, 3) for queue in queues))
        leased = [await queue.lease(LeaseAsk("q", "w", 15)) for queue in (*queues, *queues)]
        ids = Counter(task.row.task_id for granted in leased for task, *_ in granted)
        for granted in leased:
            settled = await queues[0].settle([Complete(LeaseRef.of(task.row)) for task, *_ in granted])
            assert all(one.error is None for one in settled)
        counts = (await queues[0].reports(["q"]))[0].counts
    assert (len(ids), max(ids.values())) == (60, 1)
    assert counts == {State.SUCCEEDED: 60}


# Plans and rows


async def test_tasks_of_all_kinds_keep_their_order_and_all_they_say(postgres: Postgres, schema: str) -> None:
    odd = (
        NewTask("q", idempotency_key="k\x00"),
        NewTask("q", body=TaskBody(task_type="\x1b", labels={"a": "{\x00"}, retry=RetryOverrides(max_attempts=3))),
        NewTask("q", body=TaskBody(b"\x00", traceparent="t"), attempt_ms=5_000, expire_delay_ms=90_000),
    )
    alike = tuple(NewTask("q", body=TaskBody(bytes([n]), traceparent=str(n % 2))) for n in range(9))
    typed = tuple(NewTask("q", body=TaskBody(bytes([n]), task_type='"t'), idempotency_key=f"{n}") for n in range(9))
    told = (*odd, *alike, *odd[1:], *typed, *alike, odd[1])
    async with coordinators(postgres.url, schema, 1) as (queue,):
        await asyncio.gather(*(queue.enqueue(Enqueue(tasks)) for tasks in (told, alike)))
        granted = await queue.lease(LeaseAsk("q", "w", 100))
        found = [await queue.get(task.row.task_id) for task, *_ in granted]
    assert (
        [task.body for task, *_ in granted] == [task.body for task in found] == [task.body for task in (*told, *alike)]
    )
    assert [task.row for task, *_ in granted] == [task.row for task in found]
    assert [task.row.idempotency_key for task in found] == [task.idempotency_key for task in (*told, *alike)]
    assert [task.row.attempt_ms for task in found] == [task.attempt_ms for task in (*told, *alike)]
    assert [task.row.expire_ms is None for task in found] == [task.expire_delay_ms is None for task in (*told, *alike)]


async def test_what_was_leased_before_comes_whole_and_in_its_place(postgres: Postgres, schema: str) -> None:
    async with coordinators(postgres.url, schema, 1) as (queue,):
        ids = await enqueue(queue, 6)
        first = await queue.lease(LeaseAsk("q", "w", 6))
        back = [Release(LeaseRef.of(task.row)) for task, *_ in first[1::2]]
        fails = [Fail(LeaseRef.of(task.row), Failure("why", "it broke"), delay_ms=0) for task, *_ in first[::2]]
        assert all(one.error is None for one in await queue.settle([*back, *fails]))
        await queue.sweep()
        ids += await enqueue(queue, 3)
        again = await queue.lease(LeaseAsk("q", "w", 20))
        found = [await queue.get(task_id) for task_id in ids]
    assert [task for task, *_ in again] == found
    assert [task.row.lease_epoch for task in found] == [2] * 6 + [1] * 3
    assert [task.row.attempt for task in found] == [2, 1] * 3 + [1] * 3
    assert [task.body.failure is None for task in found] == [False, True] * 3 + [True] * 3


SOME = "{1,2,3}"
FOUND_BY_INDEX: dict[str, list[str | None]] = {
    "ready": ["q", "100"],
    "ready_behind": ["q", "100", "0", "0"],
    "by_seq": [SOME],
    "whole": [SOME],
    "due": ["1", "100", "0"],
    "lapsed": ["1", "100", "0"],
    "expired": ["1", "100", "0"],
    "prove": [SOME, SOME, "3"],
    "end": [SOME, "{}", "{}", "{}", SOME, "3", "-1", "5", "1", "1", "2", "q"],
}


async def test_tables_that_were_empty_when_they_were_analyzed_are_looked_up_in(postgres: Postgres, schema: str) -> None:
    """The planner takes a table for empty until it is analyzed again: reading all of it seems as good as looking up."""
    async with coordinators(postgres.url, schema, 1) as (queue,):
        await queue.create_queue("q", SettingsPatch())
        await enqueue(queue, 1_000)
        await queue.purge("q", include_finished=True)
    for table in ("task", "body"):
        postgres.run(f"VACUUM (ANALYZE, TRUNCATE off) {schema}.{table}")
    assert postgres.run(f"SELECT reltuples, relpages > 0 FROM pg_class WHERE oid = '{schema}.body'::regclass") == [
        (0, True)
    ]
    with psycopg.connect(postgres.url, cursor_factory=psycopg.RawCursor) as connection:
        for kind in ("seqscan", "hashjoin", "mergejoin"):
            connection.execute(f"SET enable_{kind} = off")
        for name, values in FOUND_BY_INDEX.items():
            plan = connection.execute(f"EXPLAIN {Statements(schema)[name]}", values).fetchall()
            text = "\n".join(line for (line,) in plan)
            assert "Join Filter" not in text, f"{name}: {text}"
            for index, condition in re.findall(r"using (body_\w+).*\n *Index Cond: (.*)", text):
                assert index == "body_pkey" or "queue_id" in condition, f"{name}: {text}"


async def test_an_extension_changes_nothing_that_an_index_has(postgres: Postgres, schema: str) -> None:
    from retinue_server.workqueue.core.requests import Extend  # noqa: PLC0415 - this claim alone needs it

    async with coordinators(postgres.url, schema, 1) as (queue,):
        await enqueue(queue, 10)
        granted = await queue.lease(LeaseAsk("q", "w", 10))
        sql = f"SELECT n_tup_hot_upd FROM pg_stat_all_tables WHERE schemaname = '{schema}' AND relname = 'task'"
        for _ in range(3):
            await queue.extend([Extend(LeaseRef.of(task.row)) for task, *_ in granted])

        async def counted() -> bool:
            await queue.extend([Extend(LeaseRef.of(granted[0].task.row))])
            hot = postgres.run(sql)[0][0]
            return isinstance(hot, int) and hot >= 20

        await until(counted)


async def test_an_unfinished_row_may_hold_anything(postgres: Postgres, schema: str) -> None:
    engine = PostgresEngine(postgres.url, schema=schema)
    await engine.start()
    await engine.write(lambda tx: tx.save_queue(QueueRow("q", QueueState.ACTIVE, QueueSettings(), 7)))
    row = TaskRow(0, "a", "q", State.LEASED, 0, 100, 100, worker_id="\x00w", lease_request_id="\x1br")
    body = TaskBody(labels={"k": "\x00"}, task_type="\x00")
    await engine.write(lambda tx: tx.insert([Task(row, body)]))
    found = (await engine.read(lambda view: view.by_id(["a"])))["a"]
    assert replace(found, seq=0) == row
    assert (await engine.read(lambda view: view.bodies([found.seq])))[found.seq] == body
    await engine.stop()
