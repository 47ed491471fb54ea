"""What writers of a PostgreSQL engine know by heart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from retinue_server.workqueue.engine import State, TaskRow
from retinue_server.workqueue.engines.postgres.leases import Leases


def row(seq: int) -> TaskRow:
    return TaskRow(seq, f"t{seq}", "q", State.LEASED, 0, 0, 0)


def test_what_is_taken_is_no_longer_known() -> None:
    leases = Leases()
    leases.put([row(1), row(2)], 7)
    assert leases.take([1, 3]) == {1: (row(1), 7)}
    assert set(leases.take([2])) == {2}, "another task has nothing to do with it"
    leases.give_back([1, 2])
    assert leases.take([1, 2]) == {}


def test_who_comes_later_waits_for_the_commit_of_who_took_it() -> None:
    leases = Leases()
    order: list[str] = []
    leases.put([row(1)], 7)
    leases.take([1])

    def take_later() -> None:
        assert leases.take([1]) == {}, "it reads the table"
        order.append("b went on")

    with ThreadPoolExecutor(1) as second:
        waiting = second.submit(take_later)
        while not _waiters(leases):
            pass
        order.append("a committed")
        leases.give_back([1])
        waiting.result(10)
    assert order == ["a committed", "b went on"]


def _waiters(leases: Leases) -> object:
    """Who waits, by the condition's own list."""
    return vars(leases._lock)["_waiters"]
