"""Random stories catch rules that break the guarantees; tests/engines plays them with good ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from msgspec.structs import replace
from support.workqueue_machine import QueueMachine

from retinue_server.workqueue.core import rules
from retinue_server.workqueue.engine import Engine, TaskRow
from retinue_server.workqueue.engines.memory import MemoryEngine


class MemoryMachine(QueueMachine):
    def engines(self) -> list[Engine]:
        return [MemoryEngine()]


Broken = tuple[str, Callable[..., Any]]
lease, release = rules.leased, rules.released


def accepts_any_token(row: TaskRow | None, *_: int) -> bool:
    return row is not None


def keeps_the_epoch(row: TaskRow, *args: Any, **kwargs: Any) -> TaskRow:
    return replace(lease(row, *args, **kwargs), lease_epoch=row.lease_epoch)


def refunds_twice(row: TaskRow, *args: Any) -> TaskRow:
    after = release(row, *args)
    return replace(after, attempt=after.attempt - 1)


@pytest.mark.parametrize(
    "broken",
    [("holds", accepts_any_token), ("leased", keeps_the_epoch), ("released", refunds_twice)],
    ids=["any token", "same epoch", "refund twice"],
)
def test_a_broken_rule_is_caught(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, *broken)
    bounds = settings(
        max_examples=1_000,
        stateful_step_count=50,
        deadline=None,
        phases=[Phase.generate],
        database=None,
        derandomize=True,
    )
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(MemoryMachine, settings=bounds)
