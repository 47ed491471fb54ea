"""The scripted proxy does to connections what its modes say."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from support.faults.proxy import Mode, Proxy

PATIENCE_S = 60.0
A_WHILE_S = 0.1
"""For what must not come."""


class Peer:
    """The server behind the proxy: what comes to it, and a way to answer."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"

    def accept(self) -> socket.socket:
        self._listening.settimeout(PATIENCE_S)
        link, _ = self._listening.accept()
        link.settimeout(PATIENCE_S)
        return link

    def close(self) -> None:
        self._listening.close()


class Wire:
    """A connection through a proxy, and both its ends."""

    def __init__(self, proxy: Proxy, peer: Peer) -> None:
        self.proxy, self.peer = proxy, peer
        host, _, port = proxy.address.rpartition(":")
        self.client = socket.create_connection((host, int(port)), PATIENCE_S)
        self.server = peer.accept()

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    peer = Peer()
    with Proxy(peer.address, delay_s=A_WHILE_S) as proxy:
        wire = Wire(proxy, peer)
        yield wire
        wire.close()
    peer.close()


def received(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := end.recv(size - len(data))):
        data += piece
    return data


def nothing_comes(end: socket.socket) -> bool:
    end.settimeout(A_WHILE_S)
    try:
        end.recv(1)
    except TimeoutError:
        end.settimeout(PATIENCE_S)
        return True
    return False


def is_over(end: socket.socket) -> bool:
    """Whether it was closed or reset, after whatever was under way."""
    with contextlib.suppress(ConnectionResetError):
        while end.recv(100):
            pass
    return True


def test_bytes_pass_in_both_directions(wire: Wire) -> None:
    sent = bytes(range(256)) * 4_000
    threading.Thread(target=wire.client.sendall, args=(sent,)).start()
    assert received(wire.server, len(sent)) == sent
    wire.server.sendall(b"answer")
    assert received(wire.client, 6) == b"answer"


def test_a_delay_holds_every_piece_up(wire: Wire) -> None:
    wire.proxy.set(Mode.DELAY)
    began = time.monotonic()
    wire.client.sendall(b"ask")
    assert received(wire.server, 3) == b"ask"
    assert time.monotonic() - began >= A_WHILE_S


def test_late_replies_let_requests_pass_and_hold_answers_up(wire: Wire) -> None:
    wire.proxy.set(Mode.LATE_REPLIES)
    wire.client.sendall(b"ask")
    assert received(wire.server, 3) == b"ask"
    began = time.monotonic()
    wire.server.sendall(b"answer")
    assert received(wire.client, 6) == b"answer"
    assert time.monotonic() - began >= A_WHILE_S


def test_a_trickle_brings_all_a_few_bytes_at_a_time(wire: Wire) -> None:
    wire.proxy.set(Mode.TRICKLE)
    began = time.monotonic()
    wire.client.sendall(b"x" * 1_000)
    assert received(wire.server, 1_000) == b"x" * 1_000
    assert time.monotonic() - began >= 0.1, "a hundred waits of a millisecond"


@pytest.mark.parametrize(
    ("mode", "requests", "replies"),
    [(Mode.REPLIES_ONLY, False, True), (Mode.REQUESTS_ONLY, True, False), (Mode.HALF_OPEN, False, False)],
)
def test_a_direction_that_is_blocked_keeps_what_was_sent_until_it_is_open(
    wire: Wire, mode: Mode, *, requests: bool, replies: bool
) -> None:
    wire.proxy.set(mode)
    wire.client.sendall(b"ask")
    wire.server.sendall(b"tell")
    ends = [(requests, wire.server, b"ask"), (replies, wire.client, b"tell")]
    for passes, end, said in ends:
        assert received(end, len(said)) == said if passes else nothing_comes(end)
    wire.proxy.set(Mode.PASS)
    for passes, end, said in ends:
        assert passes or received(end, len(said)) == said


@pytest.mark.parametrize("mode", [Mode.PASS, Mode.HALF_OPEN, Mode.DELAY])
def test_a_cut_ends_both_halves_at_once(wire: Wire, mode: Mode) -> None:
    wire.proxy.set(mode)
    wire.client.sendall(b"x")
    assert wire.proxy.cut() == 1
    assert is_over(wire.client)
    assert is_over(wire.server)


def test_after_a_cut_new_connections_are_taken(wire: Wire) -> None:
    wire.proxy.cut()
    again = Wire(wire.proxy, wire.peer)
    again.client.sendall(b"ask")
    assert received(again.server, 3) == b"ask"
    again.close()


def test_the_end_of_one_side_is_the_end_of_the_other(wire: Wire) -> None:
    wire.server.close()
    assert is_over(wire.client)
