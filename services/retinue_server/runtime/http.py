"""The HTTP face: every method of the table by the Connect protocol in JSON, for curl, scripts and browsers.

Unary calls and server streams; what needs a client's stream is refused, since browsers and curl can't send
one. Besides, a pattern may offer pages, `GET /KEY/NAME`, whose status says yes or no: for load balancers and probes.
Who asks is checked before anything else: the Host header against DNS rebinding, Origin against pages
of other sites.
"""

from __future__ import annotations

import asyncio
import html
import json
import ssl
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from retinue_server.runtime import addresses, connect, tls
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.dispatch import Page, Role
from retinue_server.runtime.errors import (
    Code,
    Reason,
    ResourceExhausted,
    RetinueError,
)
from retinue_server.runtime.status import Refusal, refusal

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from google.protobuf.message import Message

    from retinue_server.runtime.addresses import Tcp
    from retinue_server.runtime.authority import Authority
    from retinue_server.runtime.config import Tls
    from retinue_server.runtime.server import Route


_SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
]


class Rejected(Exception):
    """An answer below the protocol: wrong method, path, type, or asked by the wrong site."""

    def __init__(self, status: HTTPStatus, message: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class HttpCall:
    """The `dispatch.Call` of an HTTP request; its requests have been read before."""

    def __init__(self, metadata: Mapping[str, str], send: Callable[[Any], Awaitable[None]]) -> None:
        self.role = Role.APP
        self.metadata = metadata
        self.trailing: list[tuple[str, str | bytes]] = []
        self.deadline: float | None = None
        self._send = send

    def time_remaining(self) -> float | None:
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    async def read(self) -> Any:
        return None

    async def write(self, response: Any) -> None:
        await self._send(response)

    def set_trailing_metadata(self, key: str, value: str | bytes) -> None:
        self.trailing.append((key, value))


class Hosts:
    """Which Host and Origin headers come from callers that meant this server."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = {"localhost", "127.0.0.1", "::1", *(name.lower() for name in allowed)}

    def check(self, hosts: Sequence[str], origins: Sequence[str]) -> None:
        """Raises Rejected with 403."""
        host = hosts[0] if len(hosts) == 1 else ""
        if _hostname(host) not in self._allowed:
            raise Rejected(
                HTTPStatus.FORBIDDEN,
                f"cannot serve the host {host!r}: dial a loopback name, or add it to allowed_hosts",
            )
        if any(not _same_host(origin, host) for origin in origins):
            raise Rejected(HTTPStatus.FORBIDDEN, "cannot serve a page of another origin")


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _same_host(origin: str, host: str) -> bool:
    scheme, _, authority = origin.partition("://")
    return scheme in ("http", "https") and authority.lower() == host.lower()


class Pages:
    """What patterns let callers look up: `GET /KEY/NAME` by those who may call methods, too."""

    def __init__(self, pages: Mapping[str, Page], authority: Authority, encode: Callable[[Message], bytes]) -> None:
        self.keys = list(pages)
        self._pages, self._authority, self._encode = pages, authority, encode

    async def answer(self, request: _Request) -> bool:
        """Answers what asks for a page; whether it did."""
        key, _, name = request.path.removeprefix("/").partition("/")
        page = self._pages.get(key)
        if page is None:
            return False
        _check_verb(request, "GET", "HEAD")
        try:
            self._authority.role(request.metadata())
        except RetinueError as error:
            await request.fail(refusal(error), ())
            return True
        shown = page(name)
        if shown is None:
            raise Rejected(HTTPStatus.NOT_FOUND, f"cannot show {request.path}: this server has none of that name")
        status = HTTPStatus.OK if shown.holds else HTTPStatus.SERVICE_UNAVAILABLE
        await request.reply(status, connect.UNARY_TYPE.encode(), self._encode(shown.message))
        return True


class ConnectApp:
    """An ASGI application over the method table."""

    def __init__(self, routes: Sequence[Route], pages: Pages, hosts: Hosts, max_request_bytes: int) -> None:
        self._routes = {route.method.path: route for route in routes}
        self._pages = pages
        self._hosts = hosts
        self._max_bytes = max_request_bytes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        request = _Request(scope, receive, send)
        try:
            self._hosts.check(request.all("host"), request.all("origin"))
            await self._answer(request)
        except Rejected as rejected:
            await request.reject(rejected)

    async def _answer(self, request: _Request) -> None:
        if request.path == "/":
            _check_verb(request, "GET", "HEAD")
            await request.reply(HTTPStatus.OK, b"text/html; charset=utf-8", self._index(request))
            return
        if await self._pages.answer(request):
            return
        route = self._routes.get(request.path)
        if route is None:
            raise Rejected(HTTPStatus.NOT_FOUND, f"no method {request.path}; GET / lists them")
        _check_verb(request, "POST")
        if route.method.client_streaming:
            await _refuse_client_stream(request)
        elif route.method.server_streaming:
            _check_type(request, connect.STREAM_TYPE)
            await _Stream(request, route, self._max_bytes).serve()
        else:
            _check_type(request, connect.UNARY_TYPE)
            await _Unary(request, route, self._max_bytes).serve()

    def _index(self, request: _Request) -> bytes:
        rows = "".join(_row(route, request) for route in self._routes.values())
        rows += "".join(_page_row(key, request) for key in self._pages.keys)
        page = (
            "<!doctype html><html lang=en><meta charset=utf-8><title>Retinue</title>"
            "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem}pre{overflow-x:auto}</style>"
            f"<h1>Retinue</h1><p>Methods by the Connect protocol, in JSON.</p>{rows}"
        )
        return page.encode()


def _row(route: Route, request: _Request) -> str:
    method = route.method
    title = f"<h2><code>{html.escape(method.path)}</code></h2>"
    if method.client_streaming:
        return f"{title}<p>Streams from the client: by gRPC only.</p>"
    if method.server_streaming:
        return f"{title}<p>Streams to the client: <code>{connect.STREAM_TYPE}</code>, in envelopes.</p>"
    url = f"{_here(request)}{method.path}"
    return f"{title}<pre>curl -H 'content-type: application/json' -d '{{}}' {html.escape(url)}</pre>"


def _page_row(key: str, request: _Request) -> str:
    title = f"<h2><code>/{html.escape(key)}/NAME</code></h2><p>200 if it is so, 503 if not.</p>"
    return f"{title}<pre>curl -i {html.escape(_here(request))}/{html.escape(key)}/NAME</pre>"


def _here(request: _Request) -> str:
    return f"{request.scheme}://{request.all('host')[0]}"


def _check_verb(request: _Request, *allowed: str) -> None:
    if request.verb not in allowed:
        raise Rejected(
            HTTPStatus.METHOD_NOT_ALLOWED,
            f"cannot {request.verb} {request.path}: use {allowed[0]}",
            (b"allow", ", ".join(allowed).encode()),
        )


def _check_type(request: _Request, wanted: str) -> None:
    kind, _, parameters = request.first("content-type", "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if kind.strip().lower() != wanted or charset not in ("", "utf-8"):
        raise Rejected(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"cannot read the request: its content-type must be {wanted}",
            (b"accept-post", wanted.encode()),
        )


async def _refuse_client_stream(request: _Request) -> None:
    error = Refusal(Code.UNIMPLEMENTED, f"cannot call {request.path} over HTTP: it streams from the client; use gRPC")
    if request.first("content-type", "").startswith(connect.STREAM_TYPE):
        await request.reply(HTTPStatus.OK, connect.STREAM_TYPE.encode(), connect.end_stream(error, ()))
        return
    _check_type(request, connect.UNARY_TYPE)
    await request.fail(error, ())


class _Request:
    """One HTTP request and the way back."""

    def __init__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.verb: str = scope["method"]
        self.path: str = scope["path"]
        self.scheme: str = scope["scheme"]
        self.receive: Callable[[], Awaitable[dict[str, Any]]] = receive
        self.send: Callable[[dict[str, Any]], Awaitable[None]] = send
        self._headers = [(k.decode("latin-1").lower(), v.decode("latin-1")) for k, v in scope["headers"]]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self._headers if key == name]

    def first(self, name: str, default: str) -> str:
        return next(iter(self.all(name)), default)

    def metadata(self) -> dict[str, str]:
        return {key: value for key, value in self._headers if not key.endswith("-bin")}

    async def body(self, limit: int) -> bytes:
        """Raises ResourceExhausted beyond the limit, Refusal when the caller goes away."""
        chunks, size = [], 0
        while True:
            event = await self.receive()
            if event["type"] == "http.disconnect":
                raise Refusal(Code.CANCELLED, "the caller has gone")
            chunks.append(event.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise ResourceExhausted(
                    f"cannot read the request: it has more than {limit} bytes; split it",
                    reason=Reason.MESSAGE_TOO_LARGE,
                    limit=limit,
                )
            if not event.get("more_body"):
                return b"".join(chunks)

    async def gone(self) -> None:
        """Returns when the caller has closed the connection."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, content_type: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        all_headers = [(b"content-type", content_type), *_SAFE, *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": all_headers})

    async def part(self, data: bytes, *, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def reply(
        self, status: int, content_type: bytes, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, content_type, [length, *headers])
        await self.part(b"" if self.verb == "HEAD" else body, more=False)

    async def fail(self, error: Refusal, headers: Iterable[tuple[bytes, bytes]]) -> None:
        body = json.dumps(connect.error_json(error)).encode()
        await self.reply(connect.HTTP_STATUS[error.code], connect.UNARY_TYPE.encode(), body, headers)

    async def reject(self, rejected: Rejected) -> None:
        codes = {403: Code.PERMISSION_DENIED, 404: Code.UNIMPLEMENTED}
        code = codes.get(rejected.status, Code.INVALID_ARGUMENT)
        body = json.dumps(connect.error_json(Refusal(code, str(rejected)))).encode()
        await self.reply(rejected.status, connect.UNARY_TYPE.encode(), body, rejected.headers)


class _Unary:
    """A unary call: one JSON message each way."""

    def __init__(self, request: _Request, route: Route, max_bytes: int) -> None:
        self._request = request
        self._route = route
        self._max_bytes = max_bytes
        self._call = HttpCall(request.metadata(), self._write)

    async def serve(self) -> None:
        try:
            await self._finish(await self._within_deadline())
        except RetinueError as error:
            await self._fail(refusal(error))
        except Refusal as error:
            await self._fail(error)

    async def _within_deadline(self) -> bytes | None:
        _check_plain(self._request)
        timeout = connect.timeout_s(self._request.first("connect-timeout-ms", "") or None)
        if timeout is not None:
            self._call.deadline = asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout(timeout):
                body = self._open(await self._request.body(self._max_bytes))
                return await self._while_connected(body)
        except TimeoutError:
            raise Refusal(Code.DEADLINE_EXCEEDED, "the deadline passed") from None

    async def _while_connected(self, body: bytes) -> bytes | None:
        """Cancels the handler when the caller closes the connection."""
        serving = asyncio.ensure_future(self._route.endpoint(self._call, body))
        gone = asyncio.ensure_future(self._request.gone())
        try:
            await asyncio.wait({serving, gone}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                return serving.result()
            raise Refusal(Code.CANCELLED, "the caller has gone")
        finally:
            gone.cancel()
            await _end(serving)

    def _open(self, body: bytes) -> bytes:
        return body

    async def _write(self, _: Any) -> None:
        raise AssertionError("a unary method writes no stream")

    async def _finish(self, reply: bytes | None) -> None:
        kind = connect.UNARY_TYPE.encode()
        await self._request.reply(HTTPStatus.OK, kind, reply or b"", self._trailers(()))

    async def _fail(self, error: Refusal) -> None:
        await self._request.fail(error, self._trailers(error.trailing))

    def _trailers(self, more: Iterable[tuple[str, str | bytes]]) -> list[tuple[bytes, bytes]]:
        pairs = [*self._call.trailing, *more]
        return [(f"trailer-{k}".encode(), connect.header_value(v).encode("latin-1", "replace")) for k, v in pairs]


class _Stream(_Unary):
    """A server stream: one envelope in, many out, the last with the status. Its HTTP status is always 200."""

    _begun = False

    def _open(self, body: bytes) -> bytes:
        return connect.open_envelope(body)

    async def _write(self, response: Any) -> None:
        data = self._route.codec.encode(response)
        await self._begin()
        await self._request.part(connect.envelope(data), more=True)
        await asyncio.sleep(0)  # the server may take a part without a pause, and then nobody else would run

    async def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            await self._request.start(HTTPStatus.OK, connect.STREAM_TYPE.encode())

    async def _finish(self, _: bytes | None) -> None:
        await self._end(None, ())

    async def _fail(self, error: Refusal) -> None:
        await self._end(error, error.trailing)

    async def _end(self, error: Refusal | None, more: Iterable[tuple[str, str | bytes]]) -> None:
        await self._begin()
        await self._request.part(connect.end_stream(error, [*self._call.trailing, *more]), more=False)


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancels a task and waits for its end, whatever that is."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen: what it says has no reader any more


def _check_plain(request: _Request) -> None:
    """Raises Refusal for what this face of the protocol does not offer."""
    for name in ("content-encoding", "connect-content-encoding"):
        if request.first(name, "identity") != "identity":
            raise Refusal(Code.UNIMPLEMENTED, f"cannot read the request: {name} must be identity")
    if request.first("connect-protocol-version", "1") != "1":
        raise Refusal(Code.INVALID_ARGUMENT, "cannot read the request: connect-protocol-version must be 1")


class HttpListener:
    """Runs the application on uvicorn, in this loop."""

    name = "http"

    def __init__(self, address: Tcp, app: ConnectApp, tls: Tls | None = None) -> None:
        self._address = address
        self._app = app
        self._tls = tls
        self._server: Any = None
        self._sockets: list[socket.socket] = []
        self._loop: asyncio.Task[None] | None = None
        self.bound: list[str] = []

    async def start(self) -> None:
        """Raises StartError for a taken port or a missing package."""
        uvicorn = _uvicorn()
        if self._tls is not None:
            tls.check(self._tls)
        self._sockets = await addresses.listen_everywhere(self._address, "--http")
        self.bound = [str(addresses.of_socket(sock)) for sock in self._sockets]
        config = uvicorn.Config(
            self._app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            **_tls_options(self._tls),
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        await self._server.startup(self._sockets)
        self._loop = asyncio.create_task(self._server.main_loop())

    async def stop(self, grace: float | None = None) -> None:
        server, self._server = self._server, None
        if server is not None and self._loop is not None:
            server.should_exit = True
            server.config.timeout_graceful_shutdown = grace or 0
            await _end(self._loop)  # uvicorn's clock; it only polls should_exit
            await server.shutdown(self._sockets)
        for sock in self._sockets:
            sock.close()
        self._sockets = []


def _uvicorn() -> Any:
    try:
        import uvicorn  # noqa: PLC0415 - optional, and only this listener needs it
    except ImportError:
        raise StartError(
            "cannot serve --http: uvicorn is missing; run `pip install 'retinue-server[http]'`, or give `--http none`"
        ) from None
    return uvicorn


def _tls_options(settings: Tls | None) -> dict[str, Any]:
    if settings is None:
        return {}
    options: dict[str, Any] = {"ssl_certfile": str(settings.cert_file), "ssl_keyfile": str(settings.key_file)}
    if settings.client_ca_file is not None:
        options |= {"ssl_ca_certs": str(settings.client_ca_file), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options
