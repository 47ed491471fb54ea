"""A root that breaks a rule in each pool that is named after it: what the checker of scatter/gather must catch.

The rules are broken from here, so that the product has no switch for it; other pools are served as they should be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace

from retinue_server.__main__ import main
from retinue_server.scattergather.core import limits
from retinue_server.scattergather.core.requests import Coverage, Gathered
from retinue_server.scattergather.core.scatter import End, Scatter

Method = Callable[..., Any]
_TOO_LONG = 3.0


def _in_its_pool(name: str, wrong: Method) -> None:
    """Replaces a method of requests to the pool that is named as what is wrong."""
    right: Method = getattr(Scatter, name)

    def chosen(scatter: Scatter, *arguments: Any) -> Any:
        if scatter.ask.pool_id == wrong.__name__.strip("_"):
            return wrong(right, scatter, *arguments)
        return right(scatter, *arguments)

    patch.object(Scatter, name, chosen).start()


def merge_the_loser_too(right: Method, scatter: Scatter, attempt: Any, *ended: Any) -> None:
    """A reply that comes after another has won is merged, beside it."""
    code, _, data = ended
    if attempt.end is End.LOST and not code:
        scatter._merge.add(attempt.part.members[0].place, scatter.ask.question.read(data).payload)
    right(scatter, attempt, *ended)


def leak_losers(right: Method, scatter: Scatter, part: Any) -> None:
    """Who has lost goes on."""
    for attempt in part.open:
        attempt.cancel = None
    right(scatter, part)


def _merge_the_loser_too(right: Method, scatter: Scatter, part: Any) -> None:
    leak_losers(right, scatter, part)


def call_complete_what_is_not(right: Method, scatter: Scatter) -> Gathered:
    """Whatever has answered is all."""
    found: Gathered = right(scatter)
    return found._replace(coverage=Coverage(found.coverage.expected, found.coverage.expected, complete=True))


def repeat_what_must_not_be_repeated(right: Method, scatter: Scatter, *failed: Any) -> Any:
    """A pool that is not idempotent is treated as if it were."""
    pool = scatter._pool
    scatter._pool = replace(pool, idempotent=True)
    try:
        return right(scatter, *failed)
    finally:
        scatter._pool = pool


def ask_the_same_again(right: Method, scatter: Scatter, replicas: Sequence[Any], tried: Sequence[Any]) -> Any:
    """Who has failed may be asked again."""
    return right(scatter, replicas, ()) if len(tried) < 2 else None


def spend_without_end(right: Method, scatter: Scatter) -> bool:
    """There is no budget."""
    return True


def answer_without_the_minimum(right: Method, scatter: Scatter) -> bool:
    """Everything is enough."""
    return True


def wait_too_long(right: Method, scatter: Scatter) -> None:
    """Deadlines are later than they are."""
    scatter._leaf_deadline += scatter.timeout_s * _TOO_LONG
    right(scatter)


def go_on_without_the_caller(right: Method, scatter: Scatter) -> None:
    """A caller that leaves takes nothing along."""


def _expect_who_is_there() -> None:
    """Shards whose endpoints are gone are not expected (pool `expect_who_is_there`)."""
    right = limits.select

    def there(topology: Any, ask: Any, violations: Any) -> Sequence[Any]:
        found = right(topology, ask, violations)
        if ask.pool_id != "expect_who_is_there":
            return found
        return [member for member in found if any(replica.line.connected for replica in member.replicas)]

    patch.object(limits, "select", there).start()


def break_all() -> None:
    """From now on."""
    for name, wrong in (
        ("_done", merge_the_loser_too),
        ("_give_up", _merge_the_loser_too),
        ("_give_up", leak_losers),
        ("_gather", call_complete_what_is_not),
        ("_retry", repeat_what_must_not_be_repeated),
        ("_choose", ask_the_same_again),
        ("_may_add", spend_without_end),
        ("_is_enough", answer_without_the_minimum),
        ("_can_be_enough", answer_without_the_minimum),
        ("begin", wait_too_long),
        ("abandon", go_on_without_the_caller),
    ):
        _in_its_pool(name, wrong)
    _expect_who_is_there()


if __name__ == "__main__":
    break_all()
    sys.exit(main())
