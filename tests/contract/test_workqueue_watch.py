"""WatchEvents: what is told, in which order, and how a watch goes on."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from contract.client import Client, Refused
from contract.conftest import Serve, new_line
from contract.line import WORKER, Line, Watch, seconds

if TYPE_CHECKING:
    from conftest import Target


def test_a_watch_tells_the_life_of_a_task(line: Line, operator: Client) -> None:
    with line.watch() as watch:
        task_id = line.put()
        line.release(line.take_one())
        line.fail(line.take_one(), retry_delay_duration=seconds(0.05))
        lease = line.take_one()
        line.fail(lease, final=True)
        operator.RedriveTasks(task_ids=[task_id])
        line.complete(line.take_one())
        operator.DeleteTasks(task_ids=[task_id])
        kinds = "ENQUEUED LEASED READY LEASED RETRYING READY LEASED DEAD READY LEASED SUCCEEDED DELETED"
        assert watch.names(12) == kinds.split()


def test_an_event_tells_what_it_is_about(line: Line) -> None:
    with line.watch() as watch:
        lease = line.lend()
        task = line.get(lease.task_id)
        event = watch.until("LEASED")
        assert (event.task_id, event.queue_id, event.attempt, event.worker_id) == (task.task_id, line.id, 1, WORKER)
        assert event.event_time == task.start_time


def test_expired_leases_and_tasks_and_cancellations_are_told(line: Line) -> None:
    with line.watch() as watch:
        expiring = line.put(expire_duration=seconds(0.05))
        watch.until("EXPIRED", expiring)
        scheduled = line.put(delay_duration=seconds(3600))
        line.app.CancelTasks(task_ids=[scheduled])
        watch.until("CANCELLED", scheduled)
        line.put()
        lease = line.take_one(lease_duration=seconds(1))
        event = watch.until("LEASE_EXPIRED", lease.task_id)
        assert event.worker_id == WORKER
        watch.until("READY", lease.task_id)


def test_a_task_put_off_is_told_as_scheduled(line: Line) -> None:
    with line.watch() as watch:
        lease = line.lend()
        line.release(lease, delay_duration=seconds(3600))
        line.app.RescheduleTask(task_id=lease.task_id, delay_duration=seconds(7200))
        line.app.RescheduleTask(task_id=lease.task_id, delay_duration=seconds(0))
        assert watch.names(5) == ["ENQUEUED", "LEASED", "SCHEDULED", "SCHEDULED", "READY"]


def test_another_priority_alone_tells_of_no_failed_attempt(line: Line) -> None:
    lease = line.lend()
    line.fail(lease, retry_delay_duration=seconds(3600))
    with line.watch() as watch:
        line.app.RescheduleTask(task_id=lease.task_id, priority=5)
        line.app.CancelTasks(task_ids=[lease.task_id])
        assert watch.names(1) == ["CANCELLED"]


def test_a_watch_of_one_queue_tells_nothing_of_others(line: Line) -> None:
    other = new_line(line.app)
    with line.watch() as watch:
        other.put()
        task_id = line.put()
        assert watch.next().task_id == task_id


def test_a_watch_of_all_queues_tells_of_each(line: Line) -> None:
    other = new_line(line.app)
    with Watch(line.app.stream("WatchEvents")) as watch:
        wanted = {line.put(), other.put()}
        while wanted:
            wanted.discard(watch.until("ENQUEUED").task_id)


def test_a_refused_item_is_told_to_no_one(line: Line) -> None:
    with line.watch() as watch:
        lease = line.lend()
        line.complete(lease, follow_ups=[line.spec(), line.spec(task_id=lease.task_id)])
        with pytest.raises(Refused):
            line.app.EnqueueTasks(atomic=True, tasks=[line.spec(), line.spec(task_id=lease.task_id)])
        line.complete(lease)
        assert watch.names(3) == ["ENQUEUED", "LEASED", "SUCCEEDED"]


def test_a_watch_goes_on_after_the_event_of_its_token(line: Line) -> None:
    with line.watch() as watch:
        ids = line.put_many(5)
        assert [watch.next().task_id for _ in range(2)] == ids[:2]
        token = watch.token
    more = line.put()
    with line.watch(resume_token=token) as again:
        assert [again.next().task_id for _ in range(4)] == [*ids[2:], more]


def test_the_token_of_the_opening_goes_on_from_there(line: Line) -> None:
    with line.watch() as watch:
        token = watch.token
    task_id = line.put()
    with line.watch(resume_token=token) as again:
        assert again.next().task_id == task_id


def test_what_was_before_the_watch_is_not_told(line: Line) -> None:
    line.put()
    with line.watch() as watch:
        task_id = line.put()
        assert watch.next().task_id == task_id


def test_an_event_comes_after_it_is_durable_and_visible(line: Line) -> None:
    with line.watch() as watch:
        for _ in range(20):
            call = line.app.begin("EnqueueTasks", tasks=[line.spec()])
            assert line.state(watch.next().task_id) == "READY"
            call.result()


def more_events_than_are_remembered(line: Line, operator: Client) -> int:
    for _ in range(9):
        line.put_many(1_000)
        operator.PurgeQueue(queue_id=line.id)
    return 18_000


@pytest.mark.engines("sqlite")
def test_a_watcher_that_falls_behind_is_told_to_list_anew(line: Line, operator: Client, target: Target) -> None:
    small_window = [("grpc.http2.lookahead_bytes", 4_096), ("grpc.http2.bdp_probe", 0)]
    with Client(target.address, options=small_window) as reader, Line(reader, line.id).watch() as slow:
        missed = more_events_than_are_remembered(line, operator)
        with pytest.raises(Refused) as error:
            slow.names(missed + 1)
    assert (error.value.code, error.value.reason) == ("OUT_OF_RANGE", "WATCH_TOKEN_EXPIRED")


@pytest.mark.engines("sqlite")
def test_a_token_whose_events_are_forgotten_is_expired(line: Line, operator: Client) -> None:
    with line.watch() as watch:
        token = watch.token
    more_events_than_are_remembered(line, operator)
    with pytest.raises(Refused) as error, line.watch(resume_token=token) as watch:
        watch.next()
    assert (error.value.code, error.value.reason) == ("OUT_OF_RANGE", "WATCH_TOKEN_EXPIRED")


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("fields", [{"resume_token": "x"}, {"queue_id": "!"}, {"queue_id": "!", "resume_token": "x"}])
def test_a_malformed_watch_is_refused(app: Client, fields: dict[str, str]) -> None:
    with pytest.raises(Refused) as error, app.stream("WatchEvents", **fields) as stream:
        stream.read()
    assert (error.value.code, error.value.fields) == ("INVALID_ARGUMENT", set(fields))


def test_a_token_of_another_server_process_is_expired(serve: Serve) -> None:
    server = serve()
    with Client(server.address) as app:
        line = new_line(app)
        line.put()
        with line.watch() as watch:
            token = watch.token
        server.kill()
        server = server.restart()
        try:
            line.put()
            with pytest.raises(Refused) as error, line.watch(resume_token=token) as watch:
                watch.next()
            assert (error.value.code, error.value.reason) == ("OUT_OF_RANGE", "WATCH_TOKEN_EXPIRED")
        finally:
            server.kill()


def test_a_stopping_server_ends_its_watches_with_unavailable(serve: Serve) -> None:
    server = serve()
    with Client(server.address) as app, new_line(app).watch() as watch:
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(Refused) as error:
            watch.next()
        assert (error.value.code, error.value.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
        assert error.value.retry_s
        assert server.process.wait(60) == 0
