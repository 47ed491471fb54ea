"""Faults are drawn from a seed alone."""

from __future__ import annotations

from itertools import islice

from support.faults.schedule import Kind, schedule

_OF_DATABASES = {Kind.TERMINATE_BACKENDS, Kind.RESTART_DATABASE, Kind.CRASH_DATABASE}


def test_a_seed_gives_the_same_faults_again_and_another_gives_others() -> None:
    assert list(islice(schedule(7), 100)) == list(islice(schedule(7), 100))
    assert list(islice(schedule(7), 100)) != list(islice(schedule(8), 100))


def test_every_other_fault_kills_a_server_and_all_others_come_too() -> None:
    kinds = [step.kind for step in islice(schedule(1), 1_000)]
    assert set(kinds[::2]) == {Kind.KILL_SERVER}
    assert set(kinds[1::2]) == set(Kind) - {Kind.KILL_SERVER} - _OF_DATABASES


def test_what_an_engine_alone_can_suffer_comes_where_it_is_named() -> None:
    kinds = {step.kind for step in islice(schedule(1, {Kind.CRASH_DATABASE}), 1_000)}
    assert kinds & _OF_DATABASES == {Kind.CRASH_DATABASE}
