"""Which server the black-box tests speak to: one that is named, or real processes of our own, one per engine.

pytest tests/contract                                     starts a server for each engine
pytest tests/contract --target HOST:PORT                  any server; tests for operators are skipped and say so
pytest tests/contract --target HOST:PORT --control unix:PATH --leaves HOST:PORT
pytest tests/engines -k kubernetes --kubeconfig PATH      any cluster, in namespaces of the tests' own
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from servers import start_server
from support import etcd as etcds
from support import kubernetes as clusters
from support import names as name_servers
from support.etcd import Etcd
from support.kubernetes import Emulator, emulated
from support.kubernetes.build import are_built
from support.names import Names
from support.postgres import Postgres, shared

ENGINES = ("sqlite", "memory", "postgres")

# How long an example takes is the machine's, no claim of ours.
settings.register_profile("unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


class Target(NamedTuple):
    """A server as its callers know it."""

    address: str
    """Where apps dial."""
    control: str
    """Where operators dial; empty = not known."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", metavar="HOST:PORT", help="test this server instead of starting one per engine")
    parser.addoption(
        "--leaves",
        metavar="HOST:PORT",
        default="",
        help="the first of six ports where the --target looks for leaves that the suite plays: tests/contract/pools.py",
    )
    parser.addoption("--control", metavar="ADDRESS", default="", help="where operators dial the --target")
    parser.addoption(
        "--kubeconfig", type=Path, help="test the engine kubernetes on this cluster, not on one of our own"
    )


def _has_cluster(config: pytest.Config) -> bool:
    """Whether there is a real Kubernetes to try: building an API server takes too long to do it unasked."""
    return bool(config.getoption("--kubeconfig") or are_built())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says on what the engine kubernetes was tried; here, since `-q` prints no header."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    if any("kubernetes" in getattr(report, "nodeid", "") for report in reports):
        terminalreporter.write_line(f"engine kubernetes: tried on {_tried_on(config)}")


def _tried_on(config: pytest.Config) -> str:
    if config.getoption("--kubeconfig"):
        return "the cluster that is named"
    if are_built():
        return "a real API server, and on the EMULATED one"
    return "an EMULATED API server ALONE; make kubernetes builds a real one"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    without = [item for item in items if not _has_what_it_needs(config, item)]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


def _has_what_it_needs(config: pytest.Config, item: pytest.Item) -> bool:
    if item.nodeid.startswith("tests/e2e/"):
        return True  # what is called a cluster there is podman's
    fixtures = set(getattr(item, "fixturenames", ()))
    params = getattr(item, "callspec", None)
    chosen = tuple(params.params.values()) if params and item.nodeid.startswith("tests/engines/") else ()
    wants_names = "names" in fixtures or "dns" in chosen
    if wants_names or name_servers.are_here():
        return wants_names and name_servers.are_here()
    if "own_cluster" in fixtures:
        return are_built()
    if "emulator" in fixtures or "kubernetes-emulated" in chosen:
        return not config.getoption("--kubeconfig")
    return _has_cluster(config) or not ("cluster" in fixtures or "kubernetes" in chosen)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With FORBID_SKIPS, as in CI, a skipped test fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("FORBID_SKIPS") and reporter and reporter.stats.get("skipped") and exitstatus == 0:
        reporter.write_line("skips are forbidden here: see the reasons below", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        named = metafunc.config.getoption("--target")
        marker = metafunc.definition.get_closest_marker("engines")
        engines = marker.args if marker else ENGINES
        metafunc.parametrize("target", ("target",) if named else engines, indirect=True, scope="session")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL that all workers of this run share."""
    with shared(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))) as server:
        yield server


@pytest.fixture(scope="session")
def etcd() -> Iterator[Etcd]:
    """An etcd that all workers of this run share."""
    with etcds.shared(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))) as server:
        yield server


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[clusters.Cluster]:
    """A Kubernetes that all workers of this run share: the one that is named, or a real one of our own."""
    named = request.config.getoption("--kubeconfig")
    if named:
        yield clusters.Cluster(named)
        return
    with clusters.shared(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))) as server:
        yield server


@pytest.fixture(scope="session")
def emulator() -> Iterator[Emulator]:
    """An emulated API server of this worker's own."""
    with emulated() as server:
        yield server


@pytest.fixture(scope="session")
def names() -> Iterator[Names]:
    """The name server that the system's resolver asks, where tests run in namespaces of their own."""
    with name_servers.serving() as server:
        yield server


def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """What tells a server which engines to use."""
    queue = "memory" if request.param == "etcd" else str(request.param)
    chosen = {"RETINUE_WORKQUEUE__ENGINE": queue, "RETINUE_LEADERELECTION__ENGINE": str(request.param)}
    chosen["RETINUE_DRAIN_SECONDS"] = "1"  # tests leave leaders behind that nobody waits for
    chosen |= {"RETINUE_AMBASSADOR__ENDPOINTS__ALLOW": "127.0.0.1:1024-65535", "RETINUE_AMBASSADOR__DATA_PLANE": "auto"}
    if request.param == "postgres":
        postgres: Postgres = request.getfixturevalue("postgres")
        schema = postgres.schema()
        for pattern in ("WORKQUEUE", "LEADERELECTION"):
            chosen[f"RETINUE_{pattern}__POSTGRES__URL"] = postgres.url
            chosen[f"RETINUE_{pattern}__POSTGRES__SCHEMA"] = schema
    elif request.param == "etcd":
        etcd: Etcd = request.getfixturevalue("etcd")
        chosen["RETINUE_LEADERELECTION__ETCD__ENDPOINTS"] = etcd.endpoint
        chosen["RETINUE_LEADERELECTION__ETCD__PREFIX"] = etcd.prefix()
    return chosen


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The server under test."""
    named = request.config.getoption("--target")
    if named:
        yield Target(named, request.config.getoption("--control"))
        return
    with tempfile.TemporaryDirectory(prefix="retinue-", ignore_cleanup_errors=True) as where:
        server = start_server(Path(where), env=environment(request))
        try:
            yield Target(server.address, server.control)
        finally:
            assert server.stop() == 0
