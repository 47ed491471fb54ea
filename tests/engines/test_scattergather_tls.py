"""Claims on TLS to leaves, over real connections: who is trusted, what a failure says, and certificates that change."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from grpc import aio
from support.certificates import Authority, Pair

from retinue_server.runtime.errors import Code
from retinue_server.scattergather.engine import Line, Target, Tls
from retinue_server.scattergather.engines.grpc import GrpcLeaves

PATIENCE_S = 60
METHOD = "/leaf.Leaf/Query"


class Ended(NamedTuple):
    """How a call did."""

    code: int
    message: str
    reply: bytes | None


class Leaf:
    """A server whose replies say by which certificate the caller showed itself."""

    def __init__(self) -> None:
        self.port = 0
        self.connections: set[str] = set()
        self.entered, self.go_on = asyncio.Event(), asyncio.Event()
        self._server: aio.Server | None = None

    async def answer(self, request: bytes, context: Any) -> bytes:
        self.connections.add(context.peer())
        if request == b"slow":
            self.entered.set()
            await self.go_on.wait()
        names = context.auth_context().get("x509_common_name", [b"nobody"])
        return bytes(names[0])

    async def start(self, shown: Pair, client_ca: Path | None = None, port: int = 0) -> None:
        trusted = client_ca.read_bytes() if client_ca else None
        pair = [(shown.key_file.read_bytes(), shown.cert_file.read_bytes())]
        credentials = grpc.ssl_server_credentials(pair, trusted, client_ca is not None)
        handler: Any = grpc.unary_unary_rpc_method_handler(self.answer)
        self._server = aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("leaf.Leaf", {"Query": handler})])
        self.port = self._server.add_secure_port(f"0.0.0.0:{port}", credentials)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "other")


@pytest.fixture
async def leaf() -> AsyncIterator[Leaf]:
    made = Leaf()
    yield made
    await made.stop()


@asynccontextmanager
async def leaves() -> AsyncIterator[GrpcLeaves]:
    """Which look at their certificates all the time."""
    made = GrpcLeaves(look_s=0.02)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


def opened(leaves: GrpcLeaves, leaf: Leaf, said: Tls, host: str = "127.0.0.1") -> Line:
    return leaves.open(Target(f"{host}:{leaf.port}", METHOD, 1024, said), lambda: None)


def began(line: Line, data: bytes = b"", timeout_s: float = PATIENCE_S) -> asyncio.Future[Ended]:
    """A call under way."""
    ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
    line.call(data, timeout_s, (), lambda *how: ended.set_result(Ended(*how)))
    return ended


async def until_shown(line: Line, name: bytes) -> None:
    """Calls, of which none may fail, until the leaf sees this certificate."""
    async with asyncio.timeout(PATIENCE_S):
        while (ended := await began(line)).reply != name:
            assert ended.code == 0, ended
            await asyncio.sleep(0.01)


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while text not in caplog.text:
            await asyncio.sleep(0.01)


def install(pair: Pair, directory: Path) -> Tls:
    """Puts a certificate where the root looks for it, as `mv` does."""
    for file, name in ((pair.cert_file, "tls.crt"), (pair.key_file, "tls.key")):
        replace(file, directory / name)
    return Tls(ca_file=str(directory / "ca.crt"), cert_file=f"{directory}/tls.crt", key_file=f"{directory}/tls.key")


def replace(source: Path, target: Path) -> None:
    shutil.copy(source, target.with_suffix(".new"))
    target.with_suffix(".new").rename(target)


@pytest.fixture
def shown(tmp_path: Path, authority: Authority) -> Tls:
    """What the root shows, and whom it trusts, in files of its own."""
    (tmp_path / "root").mkdir()
    replace(authority.file, tmp_path / "root" / "ca.crt")
    return install(authority.issue("first"), tmp_path / "root")


# Who is trusted


async def test_a_leaf_is_asked_over_tls(leaf: Leaf, authority: Authority) -> None:
    await leaf.start(authority.issue("leaf"))
    async with leaves() as made:
        assert await began(opened(made, leaf, Tls(ca_file=str(authority.file)))) == (0, "", b"nobody")


async def test_a_leaf_that_asks_for_a_certificate_is_shown_the_roots(
    leaf: Leaf, authority: Authority, shown: Tls
) -> None:
    await leaf.start(authority.issue("leaf"), authority.file)
    async with leaves() as made:
        assert await began(opened(made, leaf, shown)) == (0, "", b"first")


async def test_a_leaf_of_another_authority_is_not_asked_and_the_message_says_why(
    leaf: Leaf, authority: Authority, other: Authority
) -> None:
    await leaf.start(other.issue("leaf"))
    async with leaves() as made:
        ended = await began(opened(made, leaf, Tls(ca_file=str(authority.file))))
    assert ended.code == Code.UNAVAILABLE
    assert ended.message == (
        "cannot connect to the leaf: its certificate is not trusted, unable to get local issuer certificate; "
        "look at tls.ca_file"
    )
    assert not leaf.connections


async def test_a_leaf_that_wants_another_certificate_is_unavailable(
    leaf: Leaf, authority: Authority, other: Authority, tmp_path: Path
) -> None:
    await leaf.start(authority.issue("leaf"), other.file)
    async with leaves() as made:
        for said in (Tls(ca_file=str(authority.file)), _with(authority, authority.issue("wrong"))):
            ended = await began(opened(made, leaf, said))
            assert ended.code == Code.UNAVAILABLE
            assert "for want of a certificate that it trusts; look at tls.cert_file" in ended.message
    assert not leaf.connections


def _with(authority: Authority, pair: Pair) -> Tls:
    return Tls(ca_file=str(authority.file), cert_file=str(pair.cert_file), key_file=str(pair.key_file))


async def test_a_leaf_must_have_the_name_it_is_called_by_or_the_one_that_is_said(
    leaf: Leaf, authority: Authority
) -> None:
    await leaf.start(authority.issue("leaf"))
    said = Tls(ca_file=str(authority.file))
    async with leaves() as made:
        ended = await began(opened(made, leaf, said, "127.0.0.2"))
        assert ended.code == Code.UNAVAILABLE
        assert "its certificate is for another name; say tls.server_name" in ended.message
        named = Tls(ca_file=str(authority.file), server_name="localhost")
        assert (await began(opened(made, leaf, named, "127.0.0.2"))).code == 0


async def test_a_leaf_that_speaks_plaintext_is_unavailable(authority: Authority) -> None:
    server = aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with leaves() as made:
        line = made.open(Target(f"127.0.0.1:{port}", METHOD, 1024, Tls(ca_file=str(authority.file))), lambda: None)
        ended = await began(line)
    await server.stop(0)
    assert ended.code == Code.UNAVAILABLE
    assert "it does not speak TLS" in ended.message


# Certificates that change


async def test_a_certificate_that_is_replaced_is_shown_and_no_call_is_lost(
    leaf: Leaf, authority: Authority, shown: Tls, tmp_path: Path
) -> None:
    await leaf.start(authority.issue("leaf"), authority.file)
    async with leaves() as made:
        line = opened(made, leaf, shown)
        await until_shown(line, b"first")
        slow = began(line, b"slow")
        await asyncio.wait_for(leaf.entered.wait(), PATIENCE_S)
        for name in ("second", "third"):
            install(authority.issue(name), tmp_path / "root")
            await until_shown(line, name.encode())
            assert line.connected
        leaf.go_on.set()
        assert await slow == (0, "", b"first"), "it ends on the connection on which it began"


async def test_many_leaves_change_together_and_each_once(
    leaf: Leaf, authority: Authority, shown: Tls, tmp_path: Path
) -> None:
    await leaf.start(authority.issue("leaf"), authority.file)
    async with leaves() as made:
        lines = [opened(made, leaf, shown) for _ in range(8)]
        for line in lines:
            await until_shown(line, b"first")
        install(authority.issue("second"), tmp_path / "root")
        for line in lines:
            await until_shown(line, b"second")
        assert len(leaf.connections) == 16


async def test_an_authority_that_changes_is_trusted_without_a_restart(
    leaf: Leaf, authority: Authority, other: Authority, shown: Tls, tmp_path: Path
) -> None:
    await leaf.start(authority.issue("leaf"))
    async with leaves() as made:
        line = opened(made, leaf, shown)
        assert (await began(line)).code == 0
        await leaf.stop()
        await leaf.start(other.issue("new leaf"), port=leaf.port)
        await until_code(line, Code.UNAVAILABLE)
        replace(other.file, tmp_path / "root" / "ca.crt")
        await until_code(line, 0)


async def until_code(line: Line, code: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await began(line)).code != code:
            await asyncio.sleep(0.02)


async def test_what_does_not_work_takes_the_place_of_nothing_that_does(
    leaf: Leaf, authority: Authority, other: Authority, shown: Tls, tmp_path: Path
) -> None:
    await leaf.start(authority.issue("leaf"), authority.file)
    async with leaves() as made:
        line = opened(made, leaf, shown)
        await until_shown(line, b"first")
        replace(other.file, tmp_path / "root" / "ca.crt")
        while (await began(new := opened(made, leaf, shown))).code == 0:
            new.close()  # the other authority has not been read yet
        for _ in range(5):
            assert await began(line) == (0, "", b"first")
        replace(authority.file, tmp_path / "root" / "ca.crt")
        await until_code(new, 0)
        install(authority.issue("second"), tmp_path / "root")
        await until_shown(line, b"second")


async def test_a_pair_that_does_not_match_yet_is_waited_for_and_told_once(
    leaf: Leaf, authority: Authority, shown: Tls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await leaf.start(authority.issue("leaf"), authority.file)
    async with leaves() as made:
        line = opened(made, leaf, shown)
        await until_shown(line, b"first")
        second = authority.issue("second")
        replace(second.cert_file, tmp_path / "root" / "tls.crt")
        await logged(caplog, "the connections stay as they are")
        for _ in range(5):
            assert await began(line) == (0, "", b"first")
            await asyncio.sleep(0.05)
        replace(second.key_file, tmp_path / "root" / "tls.key")
        await until_shown(line, b"second")
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.message.startswith("cannot use the certificate")


async def test_certificates_that_come_later_are_taken(
    leaf: Leaf, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await leaf.start(authority.issue("leaf"))
    async with leaves() as made:
        line = opened(made, leaf, Tls(ca_file=str(tmp_path / "later")))
        ended = await began(line)
        assert ended.code == Code.UNAVAILABLE
        assert ended.message == "there is no connection, since its certificates cannot be used: see the root's log"
        assert f"cannot use the CA {tmp_path / 'later'}: [Errno 2] No such file or directory" in caplog.text
        assert "; there is no connection until then" in caplog.text
        assert not line.connected
        replace(authority.file, tmp_path / "later")
        await until_code(line, 0)


@pytest.mark.parametrize("text", ["", "no certificate"])
async def test_a_file_without_an_authority_is_not_taken_for_the_systems(
    leaf: Leaf, authority: Authority, shown: Tls, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    file = Path(shown.ca_file)
    await leaf.start(authority.issue("leaf"), authority.file)
    async with leaves() as made:
        line = opened(made, leaf, shown)
        await until_shown(line, b"first")
        file.write_text(text)
        await logged(caplog, f"cannot use the CA {file}")
        install(authority.issue("second"), file.parent)
        assert await began(line) == (0, "", b"first")
        replace(authority.file, file)
        await until_shown(line, b"second")


async def test_a_line_that_was_closed_is_not_opened_again(
    leaf: Leaf, authority: Authority, shown: Tls, tmp_path: Path
) -> None:
    await leaf.start(authority.issue("leaf"), authority.file)
    async with leaves() as made:
        gone, stays = opened(made, leaf, shown), opened(made, leaf, shown)
        for line in (gone, stays):
            await until_shown(line, b"first")
        gone.close()
        install(authority.issue("second"), tmp_path / "root")
        await until_shown(stays, b"second")
        assert not gone.connected
        assert (await began(gone)).code == Code.UNAVAILABLE
    assert len(leaf.connections) == 3
