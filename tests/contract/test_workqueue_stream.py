"""StreamTasks: credit, settling in order, extending, and how a stream ends."""

from __future__ import annotations

import signal
import time
from collections import Counter
from typing import Any

import pytest
from contract.client import TIMEOUT, Client, Refused, Stream
from contract.conftest import Serve, new_line
from contract.line import LONG, WORKER, Line, seconds, text
from pace import undisturbed

from retinue.workqueue.v1 import task_pb2


def opened(line: Line, credit: int = 0, timeout: float = TIMEOUT, **fields: Any) -> Stream:
    stream = line.app.stream("StreamTasks", timeout=timeout)
    stream.send(open={"queue_id": line.id, "worker_id": WORKER, **fields}, credit=credit)
    return stream


def granted(stream: Stream, count: int) -> list[task_pb2.Lease]:
    """The next leases, from as many messages as it takes; nothing else may come between."""
    leases: list[task_pb2.Lease] = []
    while len(leases) < count:
        response = stream.read()
        assert response.HasField("leases"), response
        assert len(response.leases.leases) > 0
        leases += response.leases.leases
    return leases


def settled(stream: Stream) -> Any:
    response = stream.read()
    assert response.HasField("settled"), response
    return response.settled


def tokens(leases: list[task_pb2.Lease]) -> list[dict[str, bytes]]:
    return [{"lease_token": lease.lease_token} for lease in leases]


def ended(stream: Stream) -> Refused:
    with pytest.raises(Refused) as error:
        for _ in stream:
            pass
    return error.value


# Credit


def test_a_stream_gets_no_more_leases_than_it_granted_credit_for(line: Line) -> None:
    line.put_many(10)
    with opened(line, credit=3) as stream:
        assert len(granted(stream, 3)) == 3
        stream.send(extend_all=True, sequence=1)
        assert settled(stream).sequence == 1
        assert len(line.tasks(states=[task_pb2.TASK_STATE_LEASED])) == 3
        stream.send(credit=2)
        assert len(granted(stream, 2)) == 2
        stream.send(extend_all=True, sequence=2)
        assert settled(stream).sequence == 2
    assert len(line.tasks(states=[task_pb2.TASK_STATE_READY])) == 5


def test_without_credit_nothing_is_granted(line: Line) -> None:
    line.put()
    with opened(line) as stream:
        stream.send(extend_all=True, sequence=9)
        assert settled(stream).sequence == 9
        assert line.take_one().attempt == 1


def test_leases_come_as_tasks_do(line: Line) -> None:
    with opened(line, credit=10, lease_duration=seconds(7)) as stream:
        for _ in range(3):
            task_id = line.put(input=text("in"))
            [lease] = granted(stream, 1)
            assert (lease.task_id, lease.input, lease.lease_duration) == (task_id, text("in"), seconds(7))


def test_a_stream_may_wait_for_a_queue_that_does_not_exist_yet(line: Line) -> None:
    with opened(line, credit=1) as stream:
        task_id = line.put()
        assert granted(stream, 1)[0].task_id == task_id


def test_higher_priority_goes_first_on_a_stream(line: Line) -> None:
    line.app.EnqueueTasks(tasks=[line.spec(priority=p) for p in (0, 2, 1)])
    with opened(line, credit=3) as stream:
        assert [line.get(x.task_id).spec.priority for x in granted(stream, 3)] == [2, 1, 0]


def test_a_paused_queue_grants_nothing_until_it_is_resumed(line: Line, operator: Client) -> None:
    line.put()
    operator.PauseQueue(queue_id=line.id)
    with opened(line, credit=5) as stream:
        stream.send(extend_all=True, sequence=1)
        assert settled(stream).sequence == 1
        operator.ResumeQueue(queue_id=line.id)
        assert len(granted(stream, 1)) == 1


@pytest.mark.engines("sqlite")
def test_credit_adds_up_to_a_hundred_thousand_and_no_more(line: Line) -> None:
    with opened(line, credit=10_000) as stream:
        for _ in range(9):
            stream.send(credit=10_000)
        stream.send(extend_all=True, sequence=1)
        assert settled(stream).sequence == 1
        stream.send(credit=1)
        error = ended(stream)
        assert (error.code, error.fields) == ("INVALID_ARGUMENT", {"credit"})


def test_large_tasks_come_in_messages_under_3_mib(line: Line) -> None:
    for _ in range(2):
        line.app.EnqueueTasks(tasks=[line.spec(input=text("x" * 250_000))] * 12)
    with opened(line, credit=24) as stream:
        count = 0
        while count < 24:
            response = stream.read()
            assert response.ByteSize() <= 3 * 1024 * 1024
            count += len(response.leases.leases)


def test_tasks_with_wide_labels_come_in_messages_under_3_mib(line: Line) -> None:
    labels = {f"{i:064}": "\U0001f642" * 256 for i in range(16)}
    for _ in range(2):
        line.app.EnqueueTasks(tasks=[line.spec(labels=labels)] * 150)
    with opened(line, credit=300) as stream:
        assert len({lease.task_id for lease in granted(stream, 300)}) == 300


# Settling


def test_a_task_goes_through_a_stream(line: Line) -> None:
    line.put()
    with opened(line, credit=1) as stream:
        [lease] = granted(stream, 1)
        stream.send(sequence=5, completions=[{"lease_token": lease.lease_token, "result": text("out")}])
        answer = settled(stream)
        assert (answer.sequence, list(answer.errors)) == (5, [])
        assert line.get(lease.task_id).result == text("out")


def test_one_request_may_carry_every_kind_of_outcome_and_credit(line: Line) -> None:
    line.put_many(4)
    with opened(line, credit=3) as stream:
        a, b, c = granted(stream, 3)
        failure = {"lease_token": b.lease_token, "final": True}
        stream.send(
            sequence=1, completions=tokens([a]), failures=[failure], releases=tokens([c]), credit=1, extend_all=True
        )
        messages = [stream.read(), stream.read()]
        answer = next(m.settled for m in messages if m.HasField("settled"))
        assert (answer.sequence, list(answer.errors), list(answer.lost_lease_tokens)) == (1, [], [])
        assert [line.state(x.task_id) for x in (a, b)] == ["SUCCEEDED", "DEAD"]
        assert next(m.leases for m in messages if m.HasField("leases")).leases[0].task_id == c.task_id


def test_pipelined_outcomes_are_answered_in_order_after_they_are_durable(line: Line) -> None:
    line.put_many(200)
    with opened(line, credit=200) as stream:
        for sequence, lease in enumerate(granted(stream, 200)):
            stream.send(sequence=sequence, completions=tokens([lease]))
        assert [settled(stream).sequence for _ in range(200)] == list(range(200))
        assert len(line.tasks(states=[task_pb2.TASK_STATE_SUCCEEDED])) == 200


def test_pipelined_outcomes_take_effect_in_order(line: Line) -> None:
    for _ in range(20):
        line.put()
        with opened(line, credit=1) as stream:
            [lease] = granted(stream, 1)
            stream.send(sequence=1, completions=tokens([lease]))
            stream.send(sequence=2, releases=tokens([lease]))
            assert list(settled(stream).errors) == []
            [error] = settled(stream).errors
            assert error.status.reason == "ALREADY_FINALIZED"


def test_a_refused_outcome_is_answered_with_its_token(line: Line) -> None:
    line.put_many(2)
    with opened(line, credit=2) as stream:
        a, b = granted(stream, 2)
        line.release(b)
        stream.send(sequence=1, completions=tokens([a, b]))
        [error] = settled(stream).errors
        assert (error.lease_token, error.status.reason, error.status.code) == (b.lease_token, "ALREADY_FINALIZED", 9)
        assert line.state(a.task_id) == "SUCCEEDED"


def test_a_stream_settles_leases_of_other_calls_and_the_other_way_round(line: Line) -> None:
    line.put_many(2)
    foreign = line.take_one()
    with opened(line, credit=1) as stream:
        [own] = granted(stream, 1)
        stream.send(sequence=1, completions=tokens([foreign]))
        assert list(settled(stream).errors) == []
        assert not line.complete(own).HasField("status")


def test_follow_ups_of_a_stream_are_enqueued(line: Line) -> None:
    line.put()
    other = new_line(line.app)
    with opened(line, credit=1) as stream:
        [lease] = granted(stream, 1)
        stream.send(sequence=1, completions=[{"lease_token": lease.lease_token, "follow_ups": [other.spec()]}])
        assert list(settled(stream).errors) == []
        assert [task.parent_task_id for task in other.tasks()] == [lease.task_id]


def test_a_repeated_outcome_on_a_stream_is_ok(line: Line) -> None:
    line.put()
    with opened(line, credit=1) as stream:
        [lease] = granted(stream, 1)
        for sequence in (1, 2):
            stream.send(sequence=sequence, completions=tokens([lease]))
            assert list(settled(stream).errors) == []


# Extending


def test_extend_all_keeps_the_leases_of_the_stream_alive(line: Line) -> None:
    other = new_line(line.app)

    def kept() -> None:
        own = new_line(line.app)
        own.put_many(2)
        with opened(own, credit=2, lease_duration=seconds(2)) as stream:
            leases = granted(stream, 2)
            for sequence in range(3):
                other.ended(other.put(expire_duration=seconds(1)))
                stream.send(extend_all=True, sequence=sequence)
                assert list(settled(stream).lost_lease_tokens) == []
            stream.send(completions=tokens(leases), sequence=9)
            assert list(settled(stream).errors) == []

    undisturbed(kept, within_s=2)


def test_a_stream_that_does_not_extend_loses_its_leases_and_is_told(line: Line) -> None:
    line.put()
    with line.watch() as watch, opened(line, credit=1, lease_duration=seconds(1)) as stream:
        [lease] = granted(stream, 1)
        watch.until("LEASE_EXPIRED", lease.task_id)
        stream.send(extend_all=True, sequence=1)
        assert list(settled(stream).lost_lease_tokens) == [lease.lease_token]
        stream.send(extend_all=True, sequence=2)
        assert list(settled(stream).lost_lease_tokens) == []


def test_extend_all_extends_by_the_streams_lease_duration(line: Line) -> None:
    other = new_line(line.app)

    def kept() -> None:
        own = new_line(line.app)
        own.put()
        with opened(own, credit=1, lease_duration=seconds(10)) as stream:
            [lease] = granted(stream, 1)
            own.extend(lease, lease_duration=seconds(2))
            stream.send(extend_all=True, sequence=1)
            settled(stream)
            other.ended(other.put(expire_duration=seconds(2.2)))
            assert own.state(lease.task_id) == "LEASED"

    undisturbed(kept, within_s=2)


def test_extend_all_tells_which_tasks_were_cancelled(line: Line) -> None:
    line.put_many(2)
    with opened(line, credit=2) as stream:
        a, b = granted(stream, 2)
        line.app.CancelTasks(task_ids=[a.task_id])
        stream.send(extend_all=True, sequence=1)
        assert list(settled(stream).cancel_requested_task_ids) == [a.task_id]
        stream.send(releases=tokens([a]), extend_all=True, sequence=2)
        assert list(settled(stream).cancel_requested_task_ids) == []
        assert [line.state(x.task_id) for x in (a, b)] == ["CANCELLED", "LEASED"]


def test_extend_all_goes_on_with_a_lease_whose_completion_was_refused(line: Line) -> None:
    other = new_line(line.app)

    def kept() -> None:
        own = new_line(line.app)
        own.put()
        with opened(own, credit=1, lease_duration=seconds(3)) as stream:
            [lease] = granted(stream, 1)
            taken = own.spec(task_id=lease.task_id)
            stream.send(sequence=1, completions=[{"lease_token": lease.lease_token, "follow_ups": [taken]}])
            assert settled(stream).errors[0].status.reason == "TASK_EXISTS"
            for sequence in (2, 3, 4):
                other.ended(other.put(expire_duration=seconds(1.2)))
                stream.send(extend_all=True, sequence=sequence)
                settled(stream)
            stream.send(sequence=5, completions=tokens([lease]))
            assert list(settled(stream).errors) == []

    undisturbed(kept, within_s=3)


# How a stream ends


def test_a_half_closed_stream_answers_what_came_and_ends_with_ok(line: Line) -> None:
    line.put_many(50)
    with opened(line, credit=50) as stream:
        for sequence, lease in enumerate(granted(stream, 50)):
            stream.send(sequence=sequence, completions=tokens([lease]))
        stream.half_close()
        assert [message.settled.sequence for message in stream] == list(range(50))


def test_a_half_closed_stream_grants_nothing_more(line: Line) -> None:
    with opened(line, credit=10) as stream:
        stream.half_close()
        assert list(stream) == []
    task_id = line.put()
    lease = line.take_one()
    assert (lease.task_id, lease.attempt, lease.lease_epoch) == (task_id, 1, 1)


def test_leases_outlive_their_stream(line: Line) -> None:
    line.put()
    with opened(line, credit=1) as stream:
        [lease] = granted(stream, 1)
    assert line.take() == []
    with opened(line) as other:
        other.send(sequence=1, completions=tokens([lease]))
        assert list(settled(other).errors) == []


def test_a_cancelled_stream_gives_back_what_it_did_not_deliver_and_no_more(line: Line) -> None:
    """The worker reads two leases and breaks the stream: these are its own, and no other may stay leased for long."""
    with opened(line, credit=10_000) as stream:
        line.put_many(2)
        kept = {lease.task_id for lease in granted(stream, 2)}
    after = line.put()
    assert line.take_one().task_id == after
    assert {task.task_id for task in line.tasks(states=[task_pb2.TASK_STATE_LEASED])} == kept | {after}


@pytest.mark.engines("sqlite")
def test_a_reader_that_does_not_read_gets_no_more_than_its_credit(line: Line) -> None:
    for _ in range(4):
        line.app.EnqueueTasks(tasks=[line.spec(input=text("x" * 100_000))] * 20)
    with opened(line, credit=40) as stream:
        taken = line.take(80, wait=LONG)
        while more := line.take(80):
            taken += more
        assert len(taken) >= 40
        got = granted(stream, 80 - len(taken))
        assert not {x.task_id for x in got} & {x.task_id for x in taken}


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ({"credit": -1}, {"credit"}),
        ({"credit": 10_001}, {"credit"}),
        ({"open": {"queue_id": "q", "worker_id": "w"}}, {"open"}),
        ({"completions": [{"lease_token": b"x"}]}, {"completions[0].lease_token"}),
        ({"failures": [{}, {}]}, {"failures[0].lease_token", "failures[1].lease_token"}),
        ({"releases": [{"lease_token": b""}], "credit": -5}, {"releases[0].lease_token", "credit"}),
    ],
)
def test_a_bad_message_ends_the_stream_and_changes_nothing(line: Line, message: Any, fields: set[str]) -> None:
    line.put_many(2)
    with opened(line, credit=1) as stream:
        [lease] = granted(stream, 1)
        bad = dict(message)
        kind = next((k for k in ("completions", "failures", "releases") if k in bad), "completions")
        bad[kind] = [*bad.get(kind, ()), {"lease_token": lease.lease_token}]
        stream.send(sequence=1, **bad)
        error = ended(stream)
    assert (error.code, error.reason, error.fields) == ("INVALID_ARGUMENT", "INVALID_FIELD", fields)
    assert line.state(lease.task_id) == "LEASED"
    assert len(line.tasks(states=[task_pb2.TASK_STATE_READY])) == 1


@pytest.mark.engines("sqlite")
def test_a_bad_message_right_after_a_lease_ends_the_stream_and_the_lease_goes_on(line: Line) -> None:
    """The answer to the lease overtakes the end of the server's own write of it."""
    line.put_many(300)
    codes: Counter[str] = Counter()
    for _ in range(300):
        with opened(line, credit=1) as stream:
            granted(stream, 1)
            stream.send(credit=-1)
            codes[ended(stream).code] += 1
    assert codes == {"INVALID_ARGUMENT": 300}
    assert line.take() == []


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(
    ("first", "fields"),
    [
        ({}, {"open"}),
        ({"credit": 5}, {"open"}),
        ({"open": {}}, {"open.queue_id", "open.worker_id"}),
        ({"open": {"queue_id": "!", "worker_id": "w" * 129}}, {"open.queue_id", "open.worker_id"}),
        ({"open": {"queue_id": "q", "worker_id": "w", "lease_duration": seconds(0.5)}}, {"open.lease_duration"}),
        ({"open": {"queue_id": "q", "worker_id": "w", "lease_duration": seconds(0)}}, {"open.lease_duration"}),
        ({"open": {"queue_id": "q", "worker_id": "w", "lease_duration": seconds(43_201)}}, {"open.lease_duration"}),
        ({"open": {"queue_id": "", "worker_id": "w"}, "credit": -1}, {"open.queue_id", "credit"}),
    ],
)
def test_a_first_message_that_is_wrong_is_refused(app: Client, first: Any, fields: set[str]) -> None:
    with app.stream("StreamTasks") as stream:
        stream.send(**first)
        error = ended(stream)
    assert (error.code, error.reason, error.fields) == ("INVALID_ARGUMENT", "INVALID_FIELD", fields)


@pytest.mark.engines("sqlite")
def test_a_stream_without_any_message_lacks_its_open(app: Client) -> None:
    with app.stream("StreamTasks") as stream:
        stream.half_close()
        error = ended(stream)
    assert (error.code, error.fields) == ("INVALID_ARGUMENT", {"open"})


def test_outcomes_before_a_bad_message_are_kept(line: Line) -> None:
    line.put()
    with opened(line, credit=1) as stream:
        [lease] = granted(stream, 1)
        stream.send(sequence=1, completions=tokens([lease]))
        assert settled(stream).sequence == 1
        stream.send(credit=-1)
        assert ended(stream).code == "INVALID_ARGUMENT"
    assert line.state(lease.task_id) == "SUCCEEDED"


def test_a_stopping_server_says_so_and_still_settles(serve: Serve) -> None:
    server = serve(RETINUE_DRAIN_SECONDS="100")
    with Client(server.address) as app:
        line = new_line(app)
        line.put_many(2)
        with opened(line, credit=1) as stream:
            [lease] = granted(stream, 1)
            stream.send(credit=5)
            granted(stream, 1)
            server.process.send_signal(signal.SIGTERM)
            draining = stream.read()
            assert draining.HasField("draining"), draining
            assert 0 < draining.draining.grace_duration.ToMilliseconds() <= 100_000
            stream.send(sequence=1, completions=tokens([lease]))
            answer = settled(stream)
            assert (answer.sequence, list(answer.errors)) == (1, [])
            began = time.monotonic()
            stream.half_close()
            assert list(stream) == []
        assert server.process.wait(60) == 0
        assert time.monotonic() - began < 60, "before the grace is over"
