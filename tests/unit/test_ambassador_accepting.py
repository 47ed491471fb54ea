"""Claims about which listeners the kernel has."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from retinue_server.ambassador.core.spec import Listen
from retinue_server.ambassador.engines.envoy import accepting


def no_netlink() -> Iterator[str]:
    raise OSError("not here")


@pytest.fixture(params=["sock_diag", "proc"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "proc":
        monkeypatch.setattr(accepting, "listeners", no_netlink)


def known(listen: Listen) -> bool:
    return accepting.name(listen) in accepting._known()


@pytest.mark.usefixtures("way")
def test_a_port_is_known_while_somebody_listens_and_not_while_it_is_only_bound_or_connected() -> None:
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        listen = Listen(server.getsockname()[1])
        assert not known(listen)
        server.listen()
        assert known(listen)
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        assert not known(Listen(client.getsockname()[1]))
    assert not known(listen), "what it accepted is open still"
    client.close()
    accepted.close()


@pytest.mark.usefixtures("way")
def test_listeners_elsewhere_are_told_apart() -> None:
    with closing(socket.socket()) as bound, closing(socket.socket()) as server:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        server.bind(("127.0.0.2", port))
        server.listen()
        assert not known(Listen(port))


@pytest.mark.usefixtures("way")
def test_a_socket_of_a_path_is_known(tmp_path: Path) -> None:
    path = str(tmp_path / "it.sock")
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(path)
        server.listen()
        assert known(Listen(path=path))
    assert not known(Listen(path=path))


def test_more_listeners_than_one_message_holds_are_all_told() -> None:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(500)]
    try:
        wanted = {accepting.name(Listen(server.getsockname()[1])) for server in servers}
        assert wanted <= set(accepting.listeners())
    finally:
        for server in servers:
            server.close()
