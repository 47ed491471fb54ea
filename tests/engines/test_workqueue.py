"""The exercise of the work queue's port: every engine runs every claim. Differences are declared capabilities."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.postgres import Postgres

from retinue_server.runtime.errors import NotFound
from retinue_server.workqueue.engine import (
    Durability,
    Engine,
    Failure,
    QueueRow,
    QueueSettings,
    QueueState,
    RetryOverrides,
    RetryPolicy,
    State,
    Task,
    TaskBody,
    TaskFilter,
    TaskRow,
    Transaction,
)
from retinue_server.workqueue.engines.memory import MemoryEngine
from retinue_server.workqueue.engines.postgres import PostgresEngine
from retinue_server.workqueue.engines.sqlite import SqliteEngine


def no_fatal(error: BaseException) -> None:
    raise AssertionError(error)


@asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    await engine.write(lambda tx: tx.save_queue(QueueRow("q", QueueState.ACTIVE, QueueSettings(), 7)))
    yield engine
    await engine.stop()


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Engine]:
    if request.param == "memory":
        made: Engine = MemoryEngine()
    elif request.param == "sqlite":
        made = SqliteEngine(tmp_path / "queue.db", no_fatal)
    else:
        postgres: Postgres = request.getfixturevalue("postgres")
        made = PostgresEngine(postgres.url, schema=postgres.schema(), connections=1)
    async with started(made):
        yield made


def row(task_id: str, state: State = State.READY, **fields: object) -> TaskRow:
    return replace(TaskRow(0, task_id, "q", state, 0, 100, 100), **fields)


async def put(engine: Engine, *rows: TaskRow, body: TaskBody = TaskBody()) -> None:  # noqa: B008 - frozen
    await engine.write(lambda tx: tx.insert([Task(r, body) for r in rows]))


async def by_id(engine: Engine, *task_ids: str) -> dict[str, TaskRow]:
    return await engine.read(lambda view: view.by_id(task_ids))


async def test_a_task_comes_back_as_it_was_stored(engine: Engine) -> None:
    stored = row(
        "a", State.LEASED, priority=-3, expire_ms=5, attempt_ms=6, attempt=2, lease_expirations=1, lease_epoch=9,
        lease_nonce=1 << 61, lease_ms=30, lease_until=44, attempt_until=45, worker_id="w", lease_request_id="r",
        cancel_requested=True, start_ms=1, end_ms=2, delete_ms=3, idempotency_key="k", parent_task_id="p",
    )  # fmt: skip
    body = TaskBody(
        b"\x00\xff", "type", {"k": "v"}, RetryOverrides(max_attempts=2), "00-1", "b" * 64, b"res", "c" * 64,
        Failure("R", "m", 1, 2),
    )  # fmt: skip
    await put(engine, stored, body=body)
    found = (await by_id(engine, "a"))["a"]
    assert found == replace(stored, seq=found.seq)
    assert await engine.read(lambda view: view.bodies([found.seq])) == {found.seq: body}


async def test_a_batch_of_like_and_unlike_tasks_comes_back_in_order_and_as_it_was_stored(engine: Engine) -> None:
    alike = [Task(row(f"a{i}"), TaskBody(bytes(i % 3), "type", {"k": "v"})) for i in range(20)]
    single = [Task(row("b", priority=1, expire_ms=9), TaskBody(b"b", traceparent="00-1"))]
    others = [Task(row(f"c{i}", idempotency_key=f"k{i}"), TaskBody(b"c", retry=RetryOverrides(i))) for i in range(20)]
    rest = [Task(row(f"d{i}", State.SCHEDULED, attempt_ms=5), TaskBody(result=b"r")) for i in range(20)]
    batch = [*alike, *single, *others, *rest, *[Task(row(f"e{i}"), TaskBody(b"\x00e")) for i in range(9)]]
    await engine.write(lambda tx: tx.insert(batch))
    found = await by_id(engine, *(task.row.task_id for task in batch))
    rows = [found[task.row.task_id] for task in batch]
    assert rows == [replace(task.row, seq=at.seq) for task, at in zip(batch, rows, strict=True)]
    assert sorted(r.seq for r in rows) == [r.seq for r in rows]
    bodies = await engine.read(lambda view: view.bodies([r.seq for r in rows]))
    assert [bodies[r.seq] for r in rows] == [task.body for task in batch]
    assert await engine.read(lambda view: view.counts("q")) == {State.READY: 50, State.SCHEDULED: 20}


async def test_a_queue_comes_back_as_it_was_stored(engine: Engine) -> None:
    queue = QueueRow("other", QueueState.PAUSED, QueueSettings(5, 6, RetryPolicy(1, 2, 3, 1.5), 4, 5, 6, 7), 8)
    await engine.write(lambda tx: tx.save_queue(queue))
    assert await engine.read(lambda view: view.queue("other")) == queue
    assert [q.queue_id for q in await engine.read(lambda view: view.queues("", 10))] == ["other", "q"]
    assert [q.queue_id for q in await engine.read(lambda view: view.queues("other", 10))] == ["q"]


async def test_ready_tasks_come_by_priority_then_by_age(engine: Engine) -> None:
    await put(
        engine, row("old"), row("high", priority=5), row("young"), row("low", priority=-5), row("due", State.SCHEDULED)
    )
    ready = await engine.write(lambda tx: tx.ready("q", 10))
    assert [task.row.task_id for task in ready] == ["high", "old", "young", "low"]
    assert [t.row.task_id for t in await engine.write(lambda tx: tx.ready("q", 2))] == ["high", "old"]


async def test_a_task_that_leaves_ready_and_returns_is_found_once(engine: Engine) -> None:
    await put(engine, row("a"))
    first = (await engine.write(lambda tx: tx.ready("q", 1)))[0].row
    for state in (State.LEASED, State.READY, State.LEASED, State.READY):
        await engine.write(lambda tx, state=state: tx.save([replace(first, state=state)]))  # type: ignore[misc] # bound at once
    assert [t.row.task_id for t in await engine.write(lambda tx: tx.ready("q", 10))] == ["a"]


async def test_a_changed_priority_changes_the_order(engine: Engine) -> None:
    await put(engine, row("a"), row("b"))
    second = (await by_id(engine, "b"))["b"]
    await engine.write(lambda tx: tx.save([replace(second, priority=1)]))
    assert [t.row.task_id for t in await engine.write(lambda tx: tx.ready("q", 10))] == ["b", "a"]


async def test_what_a_step_raises_undoes_it_alone(engine: Engine) -> None:
    def breaks(tx: Transaction) -> None:
        tx.insert([Task(row("lost"), TaskBody())])
        tx.save_queue(QueueRow("lost", QueueState.ACTIVE, QueueSettings(), 1))
        raise NotFound("on purpose")

    await put(engine, row("kept"))
    with pytest.raises(NotFound):
        await engine.write(breaks)
    assert list(await by_id(engine, "kept", "lost")) == ["kept"]
    assert await engine.read(lambda view: view.queue("lost")) is None
    assert await engine.read(lambda view: view.counts("q")) == {State.READY: 1}


async def test_a_savepoint_undoes_what_is_inside_it_alone(engine: Engine) -> None:
    def step(tx: Transaction) -> None:
        tx.insert([Task(row("before"), TaskBody())])
        with pytest.raises(NotFound), tx.savepoint():  # noqa: PT012 - what was written before the error is the point
            tx.insert([Task(row("inside"), TaskBody())])
            raise NotFound("on purpose")
        tx.insert([Task(row("after"), TaskBody())])

    await engine.write(step)
    assert list(await by_id(engine, "before", "inside", "after")) == ["before", "after"]
    assert await engine.read(lambda view: view.counts("q")) == {State.READY: 2}


async def test_times_are_found_when_they_have_come(engine: Engine) -> None:
    await put(
        engine,
        row("due", State.SCHEDULED, ready_ms=10),
        row("retry", State.RETRYING, ready_ms=20),
        row("leased", State.LEASED, lease_until=30),
        row("expiring", expire_ms=40),
        row("old", State.SUCCEEDED, delete_ms=50, expire_ms=1),
    )

    def names(rows: list[TaskRow]) -> list[str]:
        return [r.task_id for r in rows]

    assert names(await engine.write(lambda tx: tx.due(19, 9))) == ["due"]
    assert names(await engine.write(lambda tx: tx.due(20, 9))) == ["due", "retry"]
    assert names(await engine.write(lambda tx: tx.due(20, 1))) == ["due"]
    assert names(await engine.write(lambda tx: tx.lapsed(29, 9))) == []
    assert names(await engine.write(lambda tx: tx.lapsed(30, 9))) == ["leased"]
    assert names(await engine.write(lambda tx: tx.expired(40, 9))) == ["expiring"]
    assert names(await engine.write(lambda tx: tx.deletable(49, 9))) == []
    assert names(await engine.write(lambda tx: tx.deletable(50, 9))) == ["old"]
    assert names(await engine.write(lambda tx: tx.leased(0, 9))) == ["leased"]
    assert await engine.write(lambda tx: tx.next_times()) == (10, 30)


async def test_an_empty_store_has_no_next_time(engine: Engine) -> None:
    assert await engine.write(lambda tx: tx.next_times()) == (None, None)


async def test_counts_follow_every_change(engine: Engine) -> None:
    await put(engine, row("a"), row("b"), row("c", State.SCHEDULED))
    rows = await by_id(engine, "a", "b")
    await engine.write(lambda tx: tx.save([replace(rows["a"], state=State.LEASED, worker_id="w")]))
    await engine.write(lambda tx: tx.delete([rows["b"]]))
    assert await engine.read(lambda view: view.counts("q")) == {State.LEASED: 1, State.SCHEDULED: 1}
    assert await engine.read(lambda view: view.counts("none")) == {}


async def test_totals_tell_the_oldest_ready_and_the_workers(engine: Engine) -> None:
    await put(
        engine,
        row("young", priority=9, ready_ms=900),
        row("old", priority=1, ready_ms=300),
        row("late", priority=1, ready_ms=400),
        row("x", State.LEASED, worker_id="w1", lease_until=1),
        row("y", State.LEASED, worker_id="w1", lease_until=1),
        row("z", State.LEASED, worker_id="w2", lease_until=1),
    )
    totals = await engine.read(lambda view: view.totals("q"))
    assert (totals.oldest_ready_ms, totals.workers) == (300, 2)


async def test_a_page_goes_on_where_the_last_one_ended(engine: Engine) -> None:
    await put(engine, *(row(f"t{i}") for i in range(5)), body=TaskBody(b"in", result=b"out", labels={"a": "b"}))
    first = await engine.read(lambda view: view.page(TaskFilter(queue_id="q"), None, 3))
    rest = await engine.read(lambda view: view.page(TaskFilter(queue_id="q"), first[-1].row.seq, 3))
    assert [t.row.task_id for t in first + rest] == ["t4", "t3", "t2", "t1", "t0"]
    assert {(t.body.input, t.body.result, t.body.labels["a"]) for t in first} == {(b"", b"", "b")}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (TaskFilter(queue_id="q"), ["a", "b"]),
        (TaskFilter(queue_id="none"), []),
        (TaskFilter(states=(State.DEAD,)), ["b"]),
        (TaskFilter(labels={"k.x/y-z": 'quo"te'}), ["a"]),
        (TaskFilter(labels={"k.x/y-z": "other"}), []),
        (TaskFilter(task_type="T"), ["a"]),
        (TaskFilter(created_after_ms=150), ["b"]),
        (TaskFilter(created_before_ms=150), ["a"]),
        (TaskFilter(parent_task_id="p"), ["b"]),
    ],
)
async def test_a_filter_finds_what_matches_in_all_its_fields(
    engine: Engine, wanted: TaskFilter, found: list[str]
) -> None:
    await put(engine, row("a"), body=TaskBody(task_type="T", labels={"k.x/y-z": 'quo"te'}))
    await put(engine, row("b", State.DEAD, create_ms=200, parent_task_id="p"))
    assert [r.task_id for r in await engine.write(lambda tx: tx.matching(wanted, 0, 9))] == found
    assert [t.row.task_id for t in await engine.read(lambda view: view.page(wanted, None, 9))] == found[::-1]


async def test_idempotency_keys_belong_to_a_queue(engine: Engine) -> None:
    await engine.write(lambda tx: tx.save_queue(QueueRow("r", QueueState.ACTIVE, QueueSettings(), 7)))
    await put(engine, row("a", idempotency_key="k"), row("b", idempotency_key="k", queue_id="r"), row("c"), row("d"))
    found = await engine.write(lambda tx: tx.by_key("q", ["k", "none", ""]))
    assert {key: r.task_id for key, r in found.items()} == {"k": "a"}


async def test_a_lease_request_finds_its_live_leases(engine: Engine) -> None:
    await put(
        engine,
        row("a", State.LEASED, lease_request_id="r", lease_until=1),
        row("b", State.LEASED, lease_request_id="r", lease_until=1, priority=1),
        row("c", State.LEASED, lease_request_id="s", lease_until=1),
        row("d", State.READY, lease_request_id=""),
    )
    assert [t.row.task_id for t in await engine.write(lambda tx: tx.by_lease_request("q", "r"))] == ["b", "a"]


async def test_requests_are_remembered_until_their_time(engine: Engine) -> None:
    await engine.write(lambda tx: tx.save_request("r", b"f", b"reply", 10))
    assert await engine.write(lambda tx: tx.request("r")) == (b"f", b"reply")
    assert await engine.write(lambda tx: tx.forget_requests(9, 5)) == 0
    assert await engine.write(lambda tx: tx.forget_requests(10, 5)) == 1
    assert await engine.write(lambda tx: tx.request("r")) is None


async def test_results_and_failures_join_the_body(engine: Engine) -> None:
    await put(engine, row("a"), body=TaskBody(b"in"))
    seq = (await by_id(engine, "a"))["a"].seq
    failure = Failure("R", "m", 5, 1)
    await engine.write(lambda tx: tx.save_result(seq, b"out", "d" * 64))
    await engine.write(lambda tx: tx.save_failure(seq, failure))
    assert (await engine.read(lambda view: view.bodies([seq])))[seq] == TaskBody(
        b"in", result=b"out", result_blob="d" * 64, failure=failure
    )


async def test_blobs_are_referenced_while_a_task_has_them(engine: Engine) -> None:
    await put(engine, row("a"), body=TaskBody(input_blob="a" * 64))
    await put(engine, row("b"), body=TaskBody(result_blob="b" * 64))
    asked = ["a" * 64, "b" * 64, "c" * 64]
    assert await engine.read(lambda view: view.referenced(asked)) == set(asked[:2])
    rows = await by_id(engine, "a")
    await engine.write(lambda tx: tx.delete([rows["a"]]))
    assert await engine.read(lambda view: view.referenced(asked)) == {"b" * 64}


async def test_a_deleted_task_leaves_nothing(engine: Engine) -> None:
    await put(engine, row("a", idempotency_key="k"))
    gone = (await by_id(engine, "a"))["a"]
    await engine.write(lambda tx: tx.delete([gone]))
    assert await by_id(engine, "a") == {}
    assert await engine.write(lambda tx: tx.by_seq([gone.seq])) == {}
    assert await engine.write(lambda tx: tx.by_key("q", ["k"])) == {}
    assert await engine.read(lambda view: view.bodies([gone.seq])) == {}


async def test_a_deleted_queue_is_gone(engine: Engine) -> None:
    await engine.write(lambda tx: tx.delete_queue("q"))
    assert await engine.read(lambda view: view.queue("q")) is None


async def test_steps_take_effect_in_the_order_of_the_calls(engine: Engine) -> None:
    import asyncio  # noqa: PLC0415 - this claim alone needs it

    seen: list[int] = []
    await asyncio.gather(*(engine.write(lambda tx, i=i: seen.append(i)) for i in range(300)))  # type: ignore[misc] # bound at once
    assert seen == list(range(300))


async def test_stop_before_start_and_stop_twice_do_nothing(tmp_path: Path) -> None:
    for engine in (MemoryEngine(), SqliteEngine(tmp_path / "q.db", no_fatal)):
        await engine.stop()
        await engine.start()
        await engine.stop()
        await engine.stop()


async def test_sqlite_keeps_everything_over_a_restart(tmp_path: Path) -> None:
    engine = SqliteEngine(tmp_path / "q.db", no_fatal)
    assert engine.capabilities.durability == Durability.DISK
    await engine.start()
    await engine.write(lambda tx: tx.save_queue(QueueRow("q", QueueState.ACTIVE, QueueSettings(), 7)))
    await put(engine, row("a", idempotency_key="k"))
    await engine.stop()
    again = SqliteEngine(tmp_path / "q.db", no_fatal)
    await again.start()
    assert list(await by_id(again, "a")) == ["a"]
    assert await again.read(lambda view: view.counts("q")) == {State.READY: 1}
    await again.stop()
