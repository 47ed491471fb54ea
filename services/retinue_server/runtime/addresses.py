"""Where listeners bind: `HOST:PORT` and `unix:PATH`, taken safely or refused with the owner's name."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import ipaddress
import os
import socket
import stat
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from retinue_server.runtime import owners

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MAX_UNIX_PATH = 106
"""A socket's path has 108 bytes with its closing zero; one more is the mark of a socket being made."""


class StartError(Exception):
    """What keeps the process from starting; the message names it and says what to do."""


class AddressError(ValueError):
    """Text that is no address."""


class Tcp(msgspec.Struct, frozen=True):
    """A host, by name or address, and a port; port 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Unix(msgspec.Struct, frozen=True):
    """The path of a Unix socket."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = Tcp | Unix


def parse(text: str) -> Address:
    """Reads `HOST:PORT`, `[IPV6]:PORT` or `unix:PATH`; raises AddressError."""
    if text.startswith("unix:"):
        return _parse_unix(text.removeprefix("unix:"))
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not bare or not port.isdecimal() or int(port) > 65535 or (":" in bare) != (host != bare):  # noqa: PLR2004 - the last port
        raise AddressError(f"{text!r} is no address: write HOST:PORT, [IPV6]:PORT or unix:PATH")
    return Tcp(bare, int(port))


def _parse_unix(path: str) -> Unix:
    path = path.removeprefix("//") if path.startswith("///") else path
    if not path:
        raise AddressError("'unix:' is no address: write unix:PATH")
    if len(os.fsencode(path)) > _MAX_UNIX_PATH:
        raise AddressError(f"{path!r} is too long for a Unix socket: at most {_MAX_UNIX_PATH} bytes")
    return Unix(Path(path))


async def resolve(address: Tcp) -> list[Tcp]:
    """The numeric addresses of a host, without doubles; raises StartError when there is none."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {error.strerror or error}") from None
    numeric = dict.fromkeys(Tcp(str(entry[4][0]), address.port) for entry in found)
    return [entry for entry in numeric if len(numeric) == 1 or _exists_here(entry)]


def is_loopback(address: Tcp) -> bool:
    """Whether a numeric address can be dialled from this host only."""
    return ipaddress.ip_address(address.host.partition("%")[0]).is_loopback


def _exists_here(address: Tcp) -> bool:
    """False for ::1 on a host without IPv6, which `localhost` may name all the same."""
    with closing(socket.socket(_family(address))) as probe:
        try:
            probe.bind((address.host, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def listen_tcp(address: Tcp, option: str) -> socket.socket:
    """A listening socket; raises StartError that names the owner of a taken port and the option to change."""
    sock = _bound(address, option)
    sock.listen(512)
    return sock


def _bound(address: Tcp, option: str) -> socket.socket:
    sock = socket.socket(_family(address))
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT don't matter
        sock.bind((address.host, address.port))
        sock.settimeout(0)
    except OSError as error:
        sock.close()
        raise refused(address, option, error) from None
    return sock


async def listen_everywhere(address: Tcp, option: str) -> list[socket.socket]:
    """A listening socket, on one port, for each numeric address of a host; raises StartError."""
    sockets: list[socket.socket] = []
    port = address.port
    try:
        for numeric in await resolve(address):
            sockets.append(listen_tcp(Tcp(numeric.host, port), option))
            port = of_socket(sockets[-1]).port
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def of_socket(sock: socket.socket) -> Tcp:
    """Where a socket listens."""
    host, port = sock.getsockname()[:2]
    return Tcp(host, port)


def check_free(address: Tcp, option: str) -> None:
    """Raises StartError when another process holds the port."""
    if address.port:
        _bound(address, option).close()


def refused(address: Tcp, option: str, error: OSError) -> StartError:
    """Why a port can't be taken, and by what it could be helped."""
    if error.errno == errno.EADDRINUSE:
        owner = owners.of_port(address.port)
        return StartError(
            f"cannot listen on {address}: {owner} holds the port; stop it, or choose another with {option} "
            "HOST:PORT (port 0 takes a free one)"
        )
    return StartError(
        f"cannot listen on {address}: {os.strerror(error.errno or 0)}; choose another with {option} HOST:PORT"
    )


def _family(address: Tcp) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


class OwnedSocket(msgspec.Struct, frozen=True):
    """A Unix socket that this process made: where, and which file it is."""

    path: Path
    inode: int

    def unlink(self) -> None:
        """Removes the file unless another process has put its own there."""
        with _directory_lock(self.path.parent):
            if _inode(self.path) == self.inode:
                self.path.unlink()


def claim_unix(address: Unix, mode: int, option: str, bind: Callable[[str], None]) -> OwnedSocket:
    """Makes a socket at the path, by `bind`, which nobody can dial before it has its mode.

    `bind` takes a path and listens there. A path whose owner is alive raises StartError; what a dead owner
    left behind is replaced.
    """
    path = address.path
    making = path.with_name(path.name + "~")
    _make_parent(path.parent, 0o750 if mode & 0o060 else 0o700)
    with _directory_lock(path.parent):
        _check_unowned(path, option)
        making.unlink(missing_ok=True)
        with _umask(0o177):
            bind(str(making))
        making.chmod(mode)
        making.rename(path)
        return OwnedSocket(path, _inode(path))


def _make_parent(directory: Path, mode: int) -> None:
    try:
        directory.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"cannot make the directory {directory}: {error.strerror}") from None


def _check_unowned(path: Path, option: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartError(f"cannot listen on unix:{path}: a file is there, no socket; choose another with {option}")
    with closing(socket.socket(socket.AF_UNIX)) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return  # nobody listens: left behind by a crash
        except OSError as error:
            raise StartError(f"cannot listen on unix:{path}: cannot probe its owner: {error}") from None
        owner = owners.of_unix_socket(probe)
    raise StartError(
        f"cannot listen on unix:{path}: {owner} holds the socket; stop it, or choose another with {option}"
    )


@contextmanager
def _directory_lock(directory: Path) -> Iterator[None]:
    """Between two processes that look at a path and replace it; the lock leaves no file behind."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StartError(f"cannot open the directory {directory}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _inode(path: Path) -> int:
    try:
        return path.lstat().st_ino
    except OSError:
        return -1
