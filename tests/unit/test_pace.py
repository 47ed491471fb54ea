"""What claims about time lean on, where the machine may stall."""

from __future__ import annotations

import pytest
from pace import undisturbed, undisturbed_async


class Play:
    """It fails some times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.played = 0

    def __call__(self) -> str:
        self.played += 1
        assert self.played > self.failures, "wrong"
        return "right"

    async def later(self) -> str:
        return self()


def test_a_failure_before_anything_can_have_run_out_counts() -> None:
    play = Play(1)
    with pytest.raises(AssertionError, match="wrong"):
        undisturbed(play, within_s=60)
    assert play.played == 1


async def test_a_later_failure_may_be_the_machines_and_what_is_always_wrong_is_told() -> None:
    assert undisturbed(Play(3), within_s=0) == "right"
    assert await undisturbed_async(Play(3).later, within_s=0) == "right"
    with pytest.raises(AssertionError, match="wrong"):
        undisturbed(Play(1_000), within_s=0)
    with pytest.raises(AssertionError, match="wrong"):
        await undisturbed_async(Play(1_000).later, within_s=0)
