"""Clients of the server under test, and a queue for each test."""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from contract import pools
from contract.client import ADAPTER, AMBASSADOR, ELECTION, SCATTER, Client
from contract.line import Line
from contract.plays import Leaves, Play
from servers import RunningServer, start_server

if TYPE_CHECKING:
    from conftest import Target

Serve = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def app(target: Target) -> Iterator[Client]:
    """Calls with the role app."""
    with Client(target.address) as client:
        yield client


@pytest.fixture(scope="session")
def other_app(target: Target) -> Iterator[Client]:
    """Another app, on a connection of its own."""
    with Client(target.address) as client:
        yield client


@pytest.fixture(scope="session")
def elector(target: Target) -> Iterator[Client]:
    """Calls of leader election with the role app."""
    with Client(target.address, services=ELECTION) as client:
        yield client


@pytest.fixture(scope="session")
def election_operator(target: Target) -> Iterator[Client]:
    """Calls of leader election with the role operator."""
    if not target.control:
        pytest.skip("needs the role operator: give --control ADDRESS beside --target")
    with Client(target.control, services=ELECTION) as client:
        yield client


@pytest.fixture(scope="session")
def ambassador(target: Target) -> Iterator[Client]:
    """Calls of the ambassador with the role app."""
    with Client(target.address, services=AMBASSADOR) as client:
        yield client


@pytest.fixture(scope="session")
def ambassador_operator(target: Target) -> Iterator[Client]:
    """Calls of the ambassador with the role operator."""
    if not target.control:
        pytest.skip("needs the role operator: give --control ADDRESS beside --target")
    with Client(target.control, services=AMBASSADOR) as client:
        yield client


@pytest.fixture(scope="session")
def adapter(target: Target) -> Iterator[Client]:
    """Calls of the adapter with the role app."""
    with Client(target.address, services=ADAPTER) as client:
        yield client


@pytest.fixture(scope="session")
def adapter_operator(target: Target) -> Iterator[Client]:
    """Calls of the adapter with the role operator."""
    if not target.control:
        pytest.skip("needs the role operator: give --control ADDRESS beside --target")
    with Client(target.control, services=ADAPTER) as client:
        yield client


@pytest.fixture(scope="session")
def operator(target: Target) -> Iterator[Client]:
    """Calls with the role operator."""
    if not target.control:
        pytest.skip("needs the role operator: give --control ADDRESS beside --target")
    with Client(target.control) as client:
        yield client


@pytest.fixture(scope="session")
def leaves(request: pytest.FixtureRequest) -> Iterator[Leaves]:
    """What the pools of tests/contract/pools.py are made of, played by the suite."""
    named, first = request.config.getoption("--target"), request.config.getoption("--leaves")
    if named and not first:
        pytest.skip("needs leaves that the target knows: see tests/contract/pools.py, and give --leaves HOST:PORT")
    with Leaves(pools.following(first) if first else None) as played:
        yield played


@pytest.fixture(scope="session")
def root(request: pytest.FixtureRequest, leaves: Leaves) -> Iterator[str]:
    """Where the root under test serves: the one that is named, or one of our own."""
    named = request.config.getoption("--target")
    if named:
        yield named
        return
    with tempfile.TemporaryDirectory(prefix="retinue-", ignore_cleanup_errors=True) as where:
        file = Path(where) / "pools.yaml"
        file.write_text(json.dumps(pools.pools(leaves.at, f"unix:{where}/control.sock")))
        server = start_server(Path(where), "scattergather", env={"RETINUE_SCATTERGATHER__POOLS": str(file)})
        try:
            yield server.address
        finally:
            assert server.stop() == 0


@pytest.fixture(scope="session")
def scatterer(root: str) -> Iterator[Client]:
    """Calls of scatter/gather with the role app, once the root has found the leaves."""
    with Client(root, services=SCATTER) as client:
        end = time.monotonic() + 60
        while not _has_found_all(client) and time.monotonic() < end:
            time.sleep(0.05)
        yield client


def _has_found_all(client: Client) -> bool:
    """But where nobody listens."""
    pools = client.ListPools(page_size=1000).pools
    return all(pool.reachable_shards == pool.shards - (pool.pool_id == "away") for pool in pools)


@pytest.fixture
def play(leaves: Leaves) -> Play:
    """What leaves say to this test alone."""
    return leaves.play()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server of what is tested with commands and clients, which share it; none of them ends it."""
    running = start_server(tmp_path_factory.mktemp("server"))
    yield running
    assert running.stop() == 0


@pytest.fixture
def line(app: Client) -> Line:
    """A queue that no other test uses; it springs into being with its first task."""
    return new_line(app)


def new_line(app: Client) -> Line:
    return Line(app, f"q-{uuid.uuid4().hex}")


@pytest.fixture
def made(operator: Client, line: Line) -> Callable[..., Line]:
    """Makes the test's queue with settings of its own."""

    def make(**settings: Any) -> Line:
        operator.CreateQueue(queue_id=line.id, settings=settings)
        return line

    return make


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Serve]:
    """Starts servers for tests that end or configure them; they are killed after the test."""
    if request.config.getoption("--target"):
        pytest.skip("starts and ends servers of its own: run without --target")
    with tempfile.TemporaryDirectory(prefix="retinue-", ignore_cleanup_errors=True) as where, ExitStack() as stack:

        def start(*args: str, **env: str) -> RunningServer:
            server = start_server(Path(where), *args, env=env)
            stack.callback(server.kill)
            return server

        yield start
