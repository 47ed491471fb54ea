"""The checkers of histories: what they let pass, and above all what they must reject."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.history import (
    Call,
    Event,
    Fault,
    Grant,
    Item,
    Leased,
    Op,
    Outcome,
    Policy,
    Reply,
    Story,
    TaskRecord,
    encode,
    read,
)
from support.history.checks import CHECKS, check
from support.history.recorder import Recorder

MS = 1_000_000
LEASE = 1_000


class Tale:
    """A history made up by a test; times in milliseconds."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.tasks: list[TaskRecord] = []
        self._last = 0

    def ask(self, op: Op, at: int, *items: Item, answer: str | None = "ok", took: int = 1, stream: int = 0) -> None:
        """A call; `answer` is ok, the reason of a refusal, or None for one that was lost."""
        self._last += 1
        self.events.append(Call(at * MS, "w", self._last, op, items, stream))
        if answer is None:
            self.events.append(Reply((at + took) * MS, "w", self._last, Outcome.UNKNOWN))
        else:
            refused = {} if answer == "ok" else dict.fromkeys(range(len(items)), answer)
            self.events.append(Reply((at + took) * MS, "w", self._last, Outcome.OK, refused))

    def put(self, task: str = "t", answer: str | None = "ok") -> None:
        """Enqueues, at the very beginning."""
        self.ask(Op.ENQUEUE, 0, Item(task), answer=answer)

    def lease(
        self, epoch: int, at: int, *, attempt: int = 1, since: int | None = None, who: str = "w", task: str = "t"
    ) -> None:
        """A lease that came by a call."""
        begin = at - 1 if since is None else since
        self._last += 1
        self.events.append(Call(begin * MS, who, self._last, Op.LEASE))
        self.events.append(Leased(at * MS, who, self._last, begin * MS, (Grant(task, epoch, attempt, LEASE),)))
        self.events.append(Reply(at * MS, who, self._last, Outcome.OK))

    def stream(self, *leases: tuple[int, int], broke: bool) -> int:
        """Leases (epoch, at) that came one by one on a stream; its number."""
        self._last += 1
        number = self._last
        self.events.append(Call(0, "w", number, Op.LEASE))
        for epoch, at in leases:
            self.events.append(Leased(at * MS, "w", number, (at - 1) * MS, (Grant("t", epoch, 1, LEASE),)))
        self.events.append(Reply(9_999 * MS, "w", number, Outcome.UNKNOWN if broke else Outcome.OK))
        return number

    def settle(self, op: Op, epoch: int, at: int, answer: str | None = "ok", **item: int | bool) -> None:
        """Something is asked of a lease."""
        self.ask(op, at, Item("t", epoch, **item), answer=answer)  # type: ignore[arg-type] # fields by name

    def crash(self, killed: int, started: int) -> None:
        """The server is killed and started again."""
        self.events.append(Fault(killed * MS, "h", "kill", "server"))
        self.events.append(Fault(started * MS, "h", "start", "server"))

    def end(self, state: str, attempt: int, epoch: int, expirations: int = 0, task: str = "t") -> None:
        """How a task stands when all is over."""
        self.tasks.append(TaskRecord(task, state, attempt, expirations, epoch))

    def end_with(self, result: str, epoch: int) -> None:
        """It succeeded with this result."""
        self.tasks.append(TaskRecord("t", "SUCCEEDED", 1, epoch - 1, epoch, result=result))

    def child(self, epoch: int, name: str = "c", state: str = "SUCCEEDED") -> None:
        """A follow-up, completed in its turn."""
        self.tasks.append(TaskRecord(name, state, 1, 0, 1, "t", epoch))
        self.lease(1, 9_000, task=name)
        self.ask(Op.COMPLETE, 9_010, Item(name, 1))

    def broken(self, *, renewed_at_start: bool = True) -> set[str]:
        """The names of the checks that find something."""
        read_at = Fault(10_000 * MS, "h", "read", "tasks")
        story = Story([*self.events, read_at], self.tasks, Policy(3, 3, renewed_at_start))
        return {finding.check for finding in check(story)}


@pytest.fixture
def tale() -> Tale:
    """One task, enqueued."""
    tale = Tale()
    tale.put()
    return tale


# Lost and invented


def test_a_task_that_was_done_once_breaks_nothing(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.COMPLETE, 1, at=20, follow_ups=1)
    tale.child(1)
    tale.end("SUCCEEDED", 1, 1)
    assert tale.broken() == set()


def test_an_acknowledged_task_that_is_gone_is_lost(tale: Tale) -> None:
    assert tale.broken() == {"lost"}


def test_a_task_whose_acknowledgement_was_lost_may_be_gone() -> None:
    tale = Tale()
    tale.put(answer=None)
    assert tale.broken() == set()


def test_a_task_that_nobody_asked_for_is_invented() -> None:
    tale = Tale()
    tale.put("a", answer="QUEUE_FULL")
    tale.end("CANCELLED", 0, 0, task="b")
    assert tale.broken() == {"invented"}


@pytest.mark.parametrize("state", ["READY", "DEAD"])
def test_an_accepted_completion_that_is_undone_is_lost(tale: Tale, state: str) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.COMPLETE, 1, at=20)
    tale.end(state, 1, 1)
    assert "lost" in tale.broken()


def test_a_success_that_nobody_can_have_reported_is_invented(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.COMPLETE, 1, at=1_500, answer="LEASE_LOST")
    tale.end("SUCCEEDED", 1, 1)
    assert "invented" in tale.broken()


def test_a_success_whose_answer_was_lost_is_not_invented(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.COMPLETE, 1, at=20, answer=None)
    tale.end("SUCCEEDED", 1, 1)
    assert tale.broken() == set()


# Completions


def test_completions_accepted_under_two_leases_are_rejected(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.lease(2, at=1_100)
    tale.settle(Op.COMPLETE, 2, at=1_200)
    tale.settle(Op.COMPLETE, 1, at=1_300)
    tale.end("SUCCEEDED", 1, 2, expirations=1)
    assert {"completed_once", "not_shared"} <= tale.broken()


def test_a_completion_that_is_repeated_under_its_lease_counts_once(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.COMPLETE, 1, at=20, answer=None, follow_ups=1)
    tale.settle(Op.COMPLETE, 1, at=30, follow_ups=1)
    tale.child(1)
    tale.end("SUCCEEDED", 1, 1)
    assert tale.broken() == set()


def test_a_lost_answer_is_no_second_completion(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.COMPLETE, 1, at=1_020, answer=None)
    tale.lease(2, at=1_100)
    tale.settle(Op.COMPLETE, 2, at=1_200)
    tale.end("SUCCEEDED", 1, 2, expirations=1)
    assert tale.broken() == set()


def test_a_lease_that_ended_in_two_ways_is_rejected(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.RELEASE, 1, at=20)
    tale.settle(Op.FAIL, 1, at=30)
    tale.end("READY", 0, 1)
    assert "ended_once" in tale.broken()


def test_a_result_that_is_not_the_accepted_one_is_rejected(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.lease(2, at=1_100)
    tale.settle(Op.COMPLETE, 2, at=1_200)
    tale.settle(Op.COMPLETE, 1, at=1_300, answer="LEASE_LOST")
    tale.end_with("1", epoch=2)
    assert tale.broken() == {"first_result_stands"}


def test_a_result_may_be_that_of_a_completion_whose_answer_was_lost(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.COMPLETE, 1, at=20, answer=None)
    tale.end_with("1", epoch=1)
    assert tale.broken() == set()


# Second executions


@pytest.mark.parametrize("op", [Op.FAIL, Op.RELEASE])
@pytest.mark.parametrize("answer", ["ok", None])
def test_a_second_execution_is_explained_by_a_lease_that_failed_or_was_released(
    tale: Tale, op: Op, answer: str | None
) -> None:
    tale.lease(1, at=10)
    tale.settle(op, 1, at=20, answer=answer)
    tale.lease(2, at=30, attempt=2 if op == Op.FAIL else 1)
    tale.settle(Op.COMPLETE, 2, at=40)
    tale.end("SUCCEEDED", 2 if op == Op.FAIL else 1, 2)
    assert tale.broken() == set()


def test_a_second_execution_without_a_reason_is_rejected(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.lease(2, at=900)
    tale.end("READY", 0, 2, expirations=2)
    assert "explained" in tale.broken()


def test_a_refused_failure_explains_nothing(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.FAIL, 1, at=20, answer="LEASE_LOST")
    tale.lease(2, at=30, attempt=2)
    tale.end("READY", 1, 2, expirations=1)
    assert "explained" in tale.broken()


def test_a_release_that_was_asked_for_too_late_explains_nothing(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.lease(2, at=30)
    tale.settle(Op.RELEASE, 1, at=40, answer=None)
    tale.end("READY", 0, 2, expirations=1)
    assert "explained" in tale.broken()


def test_an_execution_after_the_accepted_completion_is_rejected(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.COMPLETE, 1, at=20)
    tale.lease(2, at=2_000)
    tale.end("SUCCEEDED", 1, 2, expirations=1)
    assert "explained" in tale.broken()


def test_a_lease_counts_from_the_earliest_moment_it_can_have_been_granted(tale: Tale) -> None:
    tale.lease(1, at=500, since=10)
    tale.lease(2, at=1_020)
    tale.end("READY", 0, 2, expirations=2)
    assert tale.broken() == set()


def test_an_accepted_extension_makes_a_lease_last(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.EXTEND, 1, at=500, lasts_ms=LEASE)
    tale.lease(2, at=1_400)
    tale.end("READY", 0, 2, expirations=2)
    assert "explained" in tale.broken()


@pytest.mark.parametrize("answer", ["LEASE_LOST", None])
def test_an_extension_that_was_not_accepted_does_not(tale: Tale, answer: str | None) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.EXTEND, 1, at=500, answer=answer, lasts_ms=LEASE)
    tale.lease(2, at=1_400)
    tale.end("READY", 0, 2, expirations=2)
    assert tale.broken() == set()


def test_a_restart_gives_a_live_lease_one_full_term(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.crash(500, 900)
    tale.lease(2, at=1_800)
    tale.end("READY", 0, 2, expirations=2)
    assert "explained" in tale.broken()


def test_a_restart_gives_nothing_to_a_lease_that_may_be_over(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.crash(1_020, 1_100)
    tale.lease(2, at=1_500)
    tale.end("READY", 0, 2, expirations=2)
    assert tale.broken() == set()


def test_without_such_renewal_a_restart_changes_nothing(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.crash(500, 900)
    tale.lease(2, at=1_800)
    tale.end("READY", 0, 2, expirations=2)
    assert tale.broken(renewed_at_start=False) == set()


def test_a_lease_that_may_not_have_been_delivered_may_have_been_given_back(tale: Tale) -> None:
    tale.stream((1, 10), broke=True)
    tale.lease(2, at=30)
    tale.settle(Op.COMPLETE, 2, at=40)
    tale.end("SUCCEEDED", 1, 2)
    assert tale.broken() == set()


def test_a_lease_after_which_the_stream_said_more_was_delivered(tale: Tale) -> None:
    stream = tale.stream((1, 10), broke=True)
    tale.ask(Op.EXTEND, 20, Item("t", 1, lasts_ms=LEASE), stream=stream)
    tale.lease(2, at=30)
    tale.settle(Op.COMPLETE, 2, at=40)
    tale.end("SUCCEEDED", 1, 2)
    assert "explained" in tale.broken()


def test_a_lease_on_a_stream_that_ended_in_order_was_delivered(tale: Tale) -> None:
    tale.stream((1, 10), broke=False)
    tale.lease(2, at=30)
    tale.settle(Op.COMPLETE, 2, at=40)
    tale.end("SUCCEEDED", 1, 2)
    assert "explained" in tale.broken()


# Who has it


def test_one_lease_in_two_hands_is_rejected(tale: Tale) -> None:
    tale.lease(1, at=10, who="a")
    tale.lease(1, at=20, who="b")
    tale.end("READY", 0, 1, expirations=1)
    assert tale.broken() == {"not_shared"}


def test_a_lease_that_is_asked_for_again_by_its_worker_is_the_same(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.lease(1, at=20)
    tale.end("READY", 0, 1, expirations=1)
    assert tale.broken() == set()


@pytest.mark.parametrize("op", [Op.EXTEND, Op.FAIL, Op.RELEASE])
def test_a_stale_token_that_is_accepted_is_rejected(tale: Tale, op: Op) -> None:
    tale.lease(1, at=10)
    tale.lease(2, at=1_100)
    tale.settle(op, 1, at=1_200)
    tale.end("READY", 0, 2, expirations=2)
    assert "not_shared" in tale.broken()


def test_a_settlement_that_crossed_the_next_lease_is_no_proof(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.ask(Op.RELEASE, 20, Item("t", 1), took=50)
    tale.lease(2, at=40)
    tale.end("READY", 0, 2, expirations=1)
    assert tale.broken() == set()


def test_a_later_lease_with_a_lower_epoch_is_rejected(tale: Tale) -> None:
    tale.lease(2, at=10)
    tale.lease(1, at=3_000)
    tale.end("READY", 0, 2, expirations=2)
    assert "epochs_rise" in tale.broken()


def test_an_epoch_that_fell_at_the_end_is_rejected(tale: Tale) -> None:
    tale.lease(2, at=10)
    tale.end("READY", 0, 1, expirations=1)
    assert tale.broken() == {"epochs_rise"}


def test_what_is_accepted_after_the_lease_was_said_to_be_lost_is_rejected(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.EXTEND, 1, at=1_050, answer="LEASE_LOST")
    tale.settle(Op.COMPLETE, 1, at=1_100)
    tale.end("SUCCEEDED", 1, 1)
    assert tale.broken() == {"refusals_stand"}


def test_a_restarted_server_may_have_given_a_lost_lease_another_term(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.EXTEND, 1, at=1_050, answer="LEASE_LOST")
    tale.crash(1_060, 1_070)
    tale.settle(Op.COMPLETE, 1, at=1_100)
    tale.end("SUCCEEDED", 1, 1)
    assert tale.broken() == set()


# Follow-ups


@pytest.mark.parametrize("count", [0, 2])
def test_follow_ups_that_are_missing_or_doubled_are_rejected(tale: Tale, count: int) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.COMPLETE, 1, at=20, follow_ups=1)
    for i in range(count):
        tale.child(1, f"c{i}")
    tale.end("SUCCEEDED", 1, 1)
    assert tale.broken() == {"follow_ups"}


def test_follow_ups_of_a_refused_completion_are_rejected(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.lease(2, at=1_100)
    tale.settle(Op.COMPLETE, 1, at=1_200, answer="LEASE_LOST", follow_ups=1)
    tale.settle(Op.COMPLETE, 2, at=1_300)
    tale.child(1)
    tale.end("SUCCEEDED", 1, 2, expirations=1)
    assert tale.broken() == {"follow_ups"}


def test_follow_ups_of_a_task_that_was_never_completed_are_rejected(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.COMPLETE, 1, at=20, answer=None, follow_ups=1)
    tale.child(1)
    tale.end("READY", 0, 1, expirations=1)
    assert tale.broken() == {"follow_ups"}


@pytest.mark.parametrize("winner", [1, 2])
def test_of_completions_whose_answers_were_lost_one_brought_its_follow_ups(tale: Tale, winner: int) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.COMPLETE, 1, at=1_000, answer=None, follow_ups=1)
    if winner == 2:
        tale.lease(2, at=1_100)
        tale.settle(Op.COMPLETE, 2, at=1_200, answer=None, follow_ups=1)
    tale.child(winner)
    tale.end("SUCCEEDED", 1, winner, expirations=winner - 1)
    assert tale.broken() == set()


# Counters


def test_an_attempt_that_is_refunded_twice_is_rejected(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.FAIL, 1, at=20)
    tale.lease(2, at=30, attempt=2)
    tale.settle(Op.RELEASE, 2, at=40)
    tale.lease(3, at=50, attempt=1)
    tale.settle(Op.COMPLETE, 3, at=60)
    tale.end("SUCCEEDED", 1, 3)
    assert tale.broken() == {"counted"}


def test_an_attempt_that_is_not_refunded_is_rejected(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.RELEASE, 1, at=20)
    tale.lease(2, at=30, attempt=2)
    tale.settle(Op.COMPLETE, 2, at=40)
    tale.end("SUCCEEDED", 2, 2)
    assert tale.broken() == {"counted"}


@pytest.mark.parametrize(("attempt", "expirations"), [(1, 0), (0, 0), (0, 2)])
def test_an_expired_lease_that_is_counted_wrongly_is_rejected(tale: Tale, attempt: int, expirations: int) -> None:
    tale.lease(1, at=10)
    tale.end("READY", attempt, 1, expirations=expirations)
    assert tale.broken() == {"counted"}


@pytest.mark.parametrize("expirations", [0, 1])
def test_a_lease_that_reached_nobody_may_have_expired_or_gone_back(tale: Tale, expirations: int) -> None:
    tale.lease(2, at=2_000)
    tale.settle(Op.COMPLETE, 2, at=2_010)
    tale.end("SUCCEEDED", 1, 2, expirations=expirations)
    assert tale.broken() == set()


def test_a_task_dies_of_its_last_attempt_and_of_its_last_lease(tale: Tale) -> None:
    for epoch in (1, 2, 3):
        tale.lease(epoch, at=10 * epoch, attempt=epoch)
        tale.settle(Op.FAIL, epoch, at=10 * epoch + 2)
    tale.end("DEAD", 3, 3)
    tale.put("u")
    for epoch in (1, 2, 3):
        tale.lease(epoch, at=2_000 * epoch, task="u")
    tale.end("DEAD", 0, 3, expirations=3, task="u")
    assert tale.broken() == set()


def test_a_task_that_outlives_its_last_attempt_is_rejected(tale: Tale) -> None:
    for epoch in (1, 2, 3):
        tale.lease(epoch, at=10 * epoch, attempt=epoch)
        tale.settle(Op.FAIL, epoch, at=10 * epoch + 2)
    tale.end("READY", 3, 3)
    assert "counted" in tale.broken()


def test_a_dead_task_is_leased_again_only_after_it_was_redriven(tale: Tale) -> None:
    tale.lease(1, at=10)
    tale.settle(Op.FAIL, 1, at=20, final=True)
    tale.lease(2, at=50)
    tale.settle(Op.COMPLETE, 2, at=60)
    tale.end("SUCCEEDED", 1, 2)
    assert tale.broken() == {"counted"}
    tale.ask(Op.REDRIVE, 30, Item("t"))
    assert tale.broken() == set()


# Files


def test_a_history_is_read_as_it_was_written_but_for_a_line_that_was_cut_short(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "p")
    n = recorder.call(Op.ENQUEUE, [Item("t")])
    recorder.ok(n, {0: "QUEUE_FULL"})
    recorder.leased(n, 5, [Grant("t", 1, 1, LEASE)])
    recorder.fault("kill", "server")
    with (tmp_path / "p.jsonl").open("ab") as file:
        file.write(encode(Fault(1, "p", "kill", "server"))[:-3])
    kinds = [type(event) for event in read(tmp_path)]
    assert kinds == [Call, Reply, Leased, Fault]


def test_every_check_has_a_history_that_it_rejects() -> None:
    here = Path(__file__).read_text()
    assert [one.__name__ for one in CHECKS if f'"{one.__name__}"' not in here] == []
