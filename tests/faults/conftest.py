"""Faults are played against the same servers as the contract suite's, and in simulated worlds."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from contract.conftest import serve
from faults.tables import pytest_terminal_summary, row
from support.faults.clients import GO_WORKER, build_go_worker
from support.postgres import locked
from support.scatter_faults.leaves import GO_LEAF, build_go_leaf

__all__ = ["pytest_terminal_summary", "row", "serve"]

SCHEDULES = 1_200
"""As many as CI plays: some 20 s of one core."""
BLOCK = 200
"""Schedules a test: pytest's workers share them out."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulation", "deterministic simulation (tests/faults/test_simulation.py)")
    group.addoption(
        "--schedules",
        type=int,
        default=SCHEDULES,
        metavar="N",
        help=f"play N schedules, one a seed (default {SCHEDULES}); with -n PROCESSES they are shared out",
    )
    group.addoption(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="the first seed (default 0); --seed S --schedules 1 replays one exactly and prints its trace if it fails",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        first, count = metafunc.config.getoption("--seed"), metafunc.config.getoption("--schedules")
        ends = range(first, first + count, BLOCK)
        blocks = [range(start, min(start + BLOCK, first + count)) for start in ends]
        metafunc.parametrize("seeds", blocks, ids=[f"{block.start}-{block.stop - 1}" for block in blocks])


@pytest.fixture(scope="session")
def go_worker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker of the Go client, built by the first who needs it."""
    try:
        return _built_once(tmp_path_factory, GO_WORKER, build_go_worker)
    except LookupError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def leaves(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The program of leaves in Go, which costs a storm the least; without Go it is None, for the one in Python."""
    try:
        return _built_once(tmp_path_factory, GO_LEAF, build_go_leaf)
    except LookupError:
        return None


def _built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], Path]) -> Path:
    mine = factory.getbasetemp()
    directory = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "go"
    directory.mkdir(exist_ok=True)
    with locked(directory):
        program = directory / name
        return program if program.exists() else build(directory)
