"""G1: what was answered with OK is there after the server was killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from contract.client import Client, Refused
from contract.conftest import Serve, new_line
from contract.line import Line, seconds, text

from retinue.workqueue.v1 import queue_pb2, task_pb2

if TYPE_CHECKING:
    from servers import RunningServer


class Crash:
    """A server with a client of each role, and a way to crash it and start it anew."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.app, self.operator = Client(server.address), Client(server.control)
        self.line = new_line(self.app)

    def crash(self) -> None:
        """SIGKILL, then a new process on the same port and data."""
        self.server.kill()
        self.server = self.server.restart()

    def end(self) -> None:
        self.app.channel.close()
        self.operator.channel.close()
        self.server.kill()


@pytest.fixture
def it(serve: Serve) -> Iterator[Crash]:
    crash = Crash(serve())
    yield crash
    crash.end()


def test_tasks_of_every_state_survive_a_crash(it: Crash) -> None:
    line = it.line
    done, dead, retrying, leased = (line.lend(input=text(f"in{i}"), labels={"i": str(i)}) for i in range(4))
    line.complete(done, result=text("out"))
    line.fail(dead, final=True, failure={"reason": "WHY"})
    line.fail(retrying, retry_delay_duration=seconds(3600))
    ids = [lease.task_id for lease in (done, dead, retrying, leased)]
    ids += [line.put(delay_duration=seconds(3600)), line.put(priority=5, idempotency_key="k")]
    before = [line.get(task_id) for task_id in ids]
    it.crash()
    assert [line.get(task_id) for task_id in ids] == before
    assert line.put(idempotency_key="k") == ids[-1]
    assert line.take_one().task_id == ids[-1]


def test_settings_and_state_of_a_queue_survive_a_crash(it: Crash) -> None:
    it.operator.CreateQueue(queue_id="made", settings={"lease_duration": seconds(77), "max_tasks": 5})
    before = it.operator.PauseQueue(queue_id="made").queue
    it.crash()
    after = it.app.GetQueue(queue_id="made").queue
    assert after == before
    assert after.state == queue_pb2.QUEUE_STATE_PAUSED


def test_a_request_id_is_remembered_across_a_crash(it: Crash) -> None:
    asked = {"tasks": [it.line.spec()], "request_id": uuid.uuid4().hex}
    first = it.app.EnqueueTasks(**asked)
    it.crash()
    assert it.app.EnqueueTasks(**asked) == first
    assert len(it.line.tasks()) == 1


def test_a_lease_request_id_is_remembered_across_a_crash(it: Crash) -> None:
    it.line.put_many(2)
    [first] = it.line.take(request_id="r")
    it.crash()
    [again] = it.line.take(request_id="r")
    assert again.lease_token == first.lease_token


def test_a_live_lease_survives_a_crash_with_its_token_and_uncounted(it: Crash) -> None:
    leases = [it.line.lend() for _ in range(4)]
    it.crash()
    task = it.line.get(leases[0].task_id)
    assert (task.attempt, task.lease_expirations, task.lease_epoch) == (1, 0, 1)
    assert it.line.take() == []
    assert not it.line.extend(leases[0]).HasField("status")
    assert not it.line.complete(leases[1]).HasField("status")
    assert not it.line.fail(leases[2]).HasField("status")
    assert not it.line.release(leases[3]).HasField("status")


def test_a_lease_that_ran_out_while_the_server_was_down_gets_one_full_term(it: Crash) -> None:
    it.line.put()
    lease = it.line.take_one(lease_duration=seconds(5))
    it.server.kill()
    until = time.monotonic() + 5.1
    time.sleep(max(0, until - time.monotonic()))  # nobody is there to be waited for
    it.server = it.server.restart()
    assert not it.line.extend(lease).HasField("status")
    again = it.line.take_one()
    task = it.line.get(again.task_id)
    assert (task.attempt, task.lease_expirations) == (1, 1)
    assert it.line.complete(lease).status.reason == "LEASE_LOST"


def test_repeated_settlements_are_answered_alike_across_a_crash(it: Crash) -> None:
    done, failed, released, stale = (it.line.lend() for _ in range(4))
    it.line.complete(done, result=text("out"), follow_ups=[it.line.spec(task_id="child", priority=-1)])
    it.line.fail(failed, retry_delay_duration=seconds(3600))
    it.line.release(released, delay_duration=seconds(3600))
    it.line.release(stale)
    it.line.take_one()
    it.crash()
    assert not it.line.complete(done, follow_ups=[it.line.spec()]).HasField("status")
    assert it.line.fail(failed).state == task_pb2.TASK_STATE_RETRYING
    assert not it.line.release(released).HasField("status")
    assert it.line.complete(failed).status.reason == "ALREADY_FINALIZED"
    assert it.line.complete(stale).status.reason == "LEASE_LOST"
    assert it.line.get("child").parent_task_id == done.task_id
    assert len(it.line.tasks()) == 5


def test_time_goes_on_after_a_crash(it: Crash) -> None:
    due = it.line.put(delay_duration=seconds(1))
    expiring = it.line.put(expire_duration=seconds(1), delay_duration=seconds(0.9))
    slow = it.line.put(attempt_duration=seconds(1), retry_policy={"max_attempts": 1}, priority=9)
    assert it.line.take_one().task_id == slow
    it.crash()
    assert it.line.ended(slow).last_failure.reason == "ATTEMPT_DEADLINE"
    assert it.line.ended(expiring).state == task_pb2.TASK_STATE_EXPIRED
    assert it.line.take_one().task_id == due


def acknowledged_until_killed(app: Client, line: Line, server: RunningServer, after: int) -> list[str]:
    """Enqueues task by task, several calls at a time, and kills the server in the middle; what was answered OK."""
    calls = [
        app.begin("EnqueueTasks", tasks=[line.spec(task_id=f"{line.id}.{i}")], timeout=20) for i in range(after * 3)
    ]
    for call in calls[:after]:
        call.result()
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(60)
    acknowledged = []
    for call in calls:
        try:
            acknowledged += [result.task_id for result in call.result().results]
        except Refused:  # not acknowledged: may be there or not
            continue
    return acknowledged


def test_every_acknowledged_task_is_there_after_a_crash_under_load(it: Crash) -> None:
    for round_ in range(3):
        line = new_line(it.app)
        after = 60 + 40 * round_
        acknowledged = acknowledged_until_killed(it.app, line, it.server, after)
        it.server = it.server.restart()
        there = {task.task_id for task in line.tasks()}
        assert set(acknowledged) <= there
        assert len(acknowledged) >= after


def test_no_completion_is_accepted_twice_across_a_crash_under_load(it: Crash) -> None:
    """Each completion brings one follow-up; after the crash all are repeated, and each task has exactly one child."""
    it.line.put_many(200)
    leases = it.line.take(200)
    other = new_line(it.app)
    completions = [{"lease_token": x.lease_token, "follow_ups": [other.spec()]} for x in leases]
    calls = [it.app.begin("CompleteTasks", completions=[c], timeout=60) for c in completions]
    calls[100].result()
    it.crash()
    for call in calls:
        call.cancel()
    for completion in completions:
        [result] = it.app.CompleteTasks(completions=[completion]).results
        assert not result.HasField("status")
    assert sorted(t.parent_task_id for t in other.tasks()) == sorted(x.task_id for x in leases)


def test_a_server_that_is_stopped_in_order_loses_nothing_either(it: Crash) -> None:
    task_id, lease = it.line.put(priority=-1), it.line.lend()
    assert it.server.stop() == 0
    it.server = it.server.restart()
    assert it.line.state(task_id) == "READY"
    assert not it.line.complete(lease).HasField("status")


def test_a_stopping_server_answers_a_long_poll_with_ok_and_nothing(it: Crash) -> None:
    waiting = it.app.begin("LeaseTasks", queue_id=it.line.id, worker_id="w", wait_duration=seconds(30))
    task_id = it.line.put(delay_duration=seconds(3600))
    ending = it.app.begin("WaitTask", task_id=task_id, wait_duration=seconds(30))
    it.app.GetCapabilities()
    it.server.process.send_signal(signal.SIGTERM)
    assert list(waiting.result().leases) == []
    assert ending.result().task.state == task_pb2.TASK_STATE_SCHEDULED
    assert it.server.process.wait(60) == 0


def test_a_restored_backup_takes_no_token_that_was_granted_after_it(it: Crash) -> None:
    """Task numbers and epochs are given out again; what a token fits is told by chance (62 bits) alone."""
    data, backup = it.server.data_dir, it.server.data_dir.with_name("backup")
    held = it.line.lend()
    it.server.kill()
    shutil.copytree(data, backup)
    it.server = it.server.restart()
    lost = it.line.lend()
    it.server.kill()
    shutil.rmtree(data)
    backup.rename(data)
    it.server = it.server.restart()
    again = it.line.lend()
    assert again.lease_epoch == lost.lease_epoch
    assert it.line.complete(lost).status.reason == "LEASE_LOST"
    assert it.line.extend(lost).status.reason == "LEASE_LOST"
    assert it.line.state(again.task_id) == "LEASED"
    assert not it.line.complete(again).HasField("status")
    assert not it.line.complete(held).HasField("status"), "leases of the backup's own time live on"


def test_the_memory_engine_says_that_it_forgets(serve: Serve) -> None:
    it = Crash(serve(RETINUE_WORKQUEUE__ENGINE="memory"))
    try:
        durability = it.app.GetCapabilities().durability
        assert durability == 1
        lease = it.line.lend()
        it.crash()
        assert it.line.tasks() == []
        assert it.line.complete(lease).status.reason == "LEASE_LOST"
    finally:
        it.end()
