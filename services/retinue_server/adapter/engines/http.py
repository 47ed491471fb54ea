"""What apps say over HTTP: Prometheus' formats, JSON, and nginx's stub_status; HTTP/1.1 by h11."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from retinue_server.adapter.core.spec import Kind
from retinue_server.adapter.engine import Answer, SourceError, Unexpected
from retinue_server.adapter.engines.dialling import connected, credentials

if TYPE_CHECKING:
    import asyncio
    import ssl
    from collections.abc import Mapping

    from retinue_server.adapter.core.packs import Pack
    from retinue_server.adapter.core.spec import Spec
    from retinue_server.adapter.engines.dialling import Objection

_ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.7"
_CHUNK = 1 << 16
_OK = 200
_NGINX = re.compile(
    r"Active connections:\s*(?P<active>\d+)\s*"
    r"server accepts handled requests(?P<timed> request_time)?\s*"
    r"(?P<accepted>\d+)\s+(?P<handled>\d+)\s+(?P<requests>\d+)(?:\s+\d+)?\s*"
    r"Reading:\s*(?P<reading>\d+)\s*Writing:\s*(?P<writing>\d+)\s*Waiting:\s*(?P<waiting>\d+)\s*"
)


class HttpSource:
    """One target's page."""

    def __init__(self, spec: Spec, pack: Pack | None, objection: Objection) -> None:
        self._spec, self._objection = spec, objection
        self._url = url = urlsplit(spec.endpoint)
        self._host, self._tls = url.hostname or "", url.scheme == "https"
        self._port = url.port or (443 if self._tls else 80)
        self.use(pack)

    def use(self, pack: Pack | None) -> None:
        """What to ask for from now on."""
        path, query = self._url.path, self._url.query
        usual = pack.path if pack and pack.path and path in ("", "/") else path or "/"
        self._path = usual + (f"?{query}" if query else "")
        self._body = pack.body.encode() if pack else b""

    async def collect(self) -> Answer:
        status, headers, body = await self._ask()
        if status != _OK:
            raise SourceError(f"{self._path} answers {status}")
        if self._spec.kind is Kind.PROMETHEUS:
            return Answer(text=body, content_type=headers.get("content-type", "text/plain"))
        if self._spec.kind is Kind.JSON:
            return Answer(text=body)  # read by the worker: 64 MiB of it take a second
        return Answer(document=_nginx(body))

    async def close(self) -> None:
        """Each collection has a connection of its own."""

    async def _ask(self) -> tuple[int, Mapping[str, str], bytes]:
        import h11  # noqa: PLC0415 - for targets of HTTP

        head = [("host", f"{self._host}:{self._port}"), ("user-agent", "retinue-adapter"), ("connection", "close")]
        head.append(("accept", _ACCEPT if self._spec.kind is Kind.PROMETHEUS else "*/*"))
        if self._spec.credentials_file:
            head.append(("authorization", f"Bearer {await credentials(self._spec.credentials_file)}"))
        if self._body:
            head += [("content-type", "application/json"), ("content-length", str(len(self._body)))]
        link = h11.Connection(h11.CLIENT)
        try:
            request = h11.Request(method="POST" if self._body else "GET", target=self._path, headers=head)
            sent = link.send(request) + (link.send(h11.Data(self._body)) if self._body else b"")
            sent += link.send(h11.EndOfMessage())
            async with connected(self._host, self._port, self._objection, self._context()) as (reader, writer):
                writer.write(sent)
                return await self._read(link, reader)
        except h11.ProtocolError as error:
            left, has_ended = link.trailing_data
            if has_ended and not left:
                raise SourceError("it closed the connection before the end of its answer") from None
            raise Unexpected(f"it does not speak HTTP: {error}") from None

    async def _read(self, link: Any, reader: asyncio.StreamReader) -> tuple[int, Mapping[str, str], bytes]:
        import h11  # noqa: PLC0415 - as above

        status, headers, parts, size = 0, {}, [], 0
        while True:
            event = link.next_event()
            if event is h11.NEED_DATA:
                link.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
            elif isinstance(event, h11.Data):
                parts.append(bytes(event.data))
                size += len(event.data)
                if size > self._spec.limits.max_bytes:
                    raise Unexpected(f"its answer is longer than {self._spec.limits.max_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return status, headers, b"".join(parts)
            elif isinstance(event, h11.ConnectionClosed):
                raise SourceError("it closed the connection without an answer")

    def _context(self) -> ssl.SSLContext | None:
        if not self._tls:
            return None
        import ssl  # noqa: PLC0415 - where it is asked for

        return ssl.create_default_context()


def _nginx(body: bytes) -> dict[str, int]:
    found = _NGINX.fullmatch(body.decode(errors="replace"))
    if found is None:
        raise Unexpected("its answer is not that of stub_status")
    return {name: int(text) for name, text in found.groupdict().items() if name != "timed"}
