"""Claims about the HTTP face: the Connect protocol in JSON, and who may ask."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from google.rpc import error_details_pb2
from support import echo
from support.echo import Echo
from support.serving import running, settings

from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.config import Limits
from retinue_server.runtime.dispatch import Shown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from retinue_server.runtime.config import Settings
    from retinue_server.runtime.lifecycle import Process

BASE = f"/{echo.SERVICE}"
JSON = {"content-type": "application/json"}
STREAM = {"content-type": "application/connect+json"}


@pytest.fixture
def servicer() -> echo.EchoServicer:
    return echo.EchoServicer()


@pytest.fixture
async def process(tmp_path: Path, servicer: echo.EchoServicer) -> AsyncIterator[Process]:
    where = settings(tmp_path, http="127.0.0.1:0", limits=Limits(max_message_bytes=65536))
    async with running(where, servicer) as process:
        yield process


@pytest.fixture
async def web(process: Process) -> AsyncIterator[httpx.AsyncClient]:
    base = f"http://{process.addresses['http'][0]}"
    async with httpx.AsyncClient(base_url=base, timeout=60, verify=False) as client:  # loading roots takes time
        yield client
    await asyncio.sleep(0.01)  # lets the server see the end of the connection, for which it would poll


def envelope(message: Any) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack(">BI", 0, len(data)) + data


def envelopes(body: bytes) -> list[tuple[int, Any]]:
    found = []
    while body:
        flags, length = struct.unpack_from(">BI", body)
        found.append((flags, json.loads(body[5 : 5 + length])))
        body = body[5 + length :]
    return found


async def test_a_unary_call_takes_both_forms_of_a_field_name(web: httpx.AsyncClient) -> None:
    for name in ("repeat_count", "repeatCount"):
        reply = await web.post(f"{BASE}/Say", json={"text": "hi", name: 2})
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "application/json"
        assert reply.json() == {"text": "hi", "data": "AAA="}


async def test_trailing_metadata_comes_as_trailer_headers(web: httpx.AsyncClient) -> None:
    assert (await web.post(f"{BASE}/Say", json={})).headers["trailer-role"] == "app"


async def test_request_headers_become_metadata_and_the_timeout_a_deadline(
    web: httpx.AsyncClient, servicer: echo.EchoServicer
) -> None:
    headers = {"X-Colour": "blue", "connect-timeout-ms": "4000", "x-raw-bin": "AA"}
    await web.post(f"{BASE}/Say", json={}, headers=headers)
    assert servicer.metadata["x-colour"] == "blue"
    assert "x-raw-bin" not in servicer.metadata
    assert servicer.remaining is not None
    assert 3 < servicer.remaining <= 4


async def test_a_domain_error_is_a_connect_error_with_readable_details(web: httpx.AsyncClient) -> None:
    reply = await web.post(f"{BASE}/Fail", json={"text": "lease"})
    assert reply.status_code == 400
    error = reply.json()
    assert error["code"] == "failed_precondition"
    assert error["message"] == "cannot complete: the lease is lost"
    (detail,) = error["details"]
    assert detail["type"] == "google.rpc.ErrorInfo"
    assert detail["debug"]["reason"] == "LEASE_LOST"
    assert "=" not in detail["value"]
    data = base64.b64decode(detail["value"] + "=" * (-len(detail["value"]) % 4))
    assert error_details_pb2.ErrorInfo.FromString(data).reason == "LEASE_LOST"


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [("busy", 503, "unavailable"), ("bug", 500, "internal"), ("long", 404, "not_found")],
)
async def test_codes_map_to_http_as_connect_asks(web: httpx.AsyncClient, text: str, status: int, code: str) -> None:
    reply = await web.post(f"{BASE}/Fail", json={"text": text})
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert "secret" not in reply.text


async def test_every_unknown_field_is_named(web: httpx.AsyncClient) -> None:
    reply = await web.post(f"{BASE}/Say", json={"txt": "x", "text": "y", "colour": {"a": 1}})
    assert reply.status_code == 400
    assert reply.json()["code"] == "invalid_argument"
    bad = next(d for d in reply.json()["details"] if d["type"] == "google.rpc.BadRequest")
    assert [v["field"] for v in bad["debug"]["fieldViolations"]] == ["txt", "colour"]


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b"\xff", b'{"repeat_count": "x"}', b'{"text":1}', b"[" * 60000,
             b'{"text":"a","text":"b"}', b'{"text":"\\ud800"}', b'{"\\ud800":1}', '{"text":"a"}'.encode("utf-16"),
             b'{"repeat_count":' + b"9" * 5000 + b"}"]
)  # fmt: skip
async def test_a_body_that_is_no_message_is_an_invalid_argument(web: httpx.AsyncClient, body: bytes) -> None:
    reply = await web.post(f"{BASE}/Say", content=body, headers=JSON)
    assert (reply.status_code, reply.json()["code"]) == (400, "invalid_argument")
    assert (await web.post(f"{BASE}/Say", json={})).status_code == 200


async def test_a_body_over_the_limit_is_refused(web: httpx.AsyncClient) -> None:
    reply = await web.post(f"{BASE}/Say", json={"text": "x" * 70000})
    assert (reply.status_code, reply.json()["code"]) == (429, "resource_exhausted")
    assert reply.json()["details"][0]["debug"]["reason"] == "MESSAGE_TOO_LARGE"


async def test_a_reply_over_three_mebibytes_is_refused(web: httpx.AsyncClient) -> None:
    reply = await web.post(f"{BASE}/Say", json={"repeat_count": 3 * 1024 * 1024})
    assert reply.json()["code"] == "resource_exhausted"


async def test_a_deadline_that_passes_cancels_the_handler(web: httpx.AsyncClient, servicer: echo.EchoServicer) -> None:
    for patience_ms in (50, 1_000, 10_000):
        reply = await web.post(f"{BASE}/Wait", json={}, headers={"connect-timeout-ms": str(patience_ms)})
        assert (reply.status_code, reply.json()["code"]) == (504, "deadline_exceeded")
        if not servicer.events.empty():  # else it was over before the handler began
            break
    assert [servicer.events.get_nowait(), servicer.events.get_nowait()] == ["waits", "wait cancelled"]


async def test_a_caller_that_goes_away_cancels_the_handler(web: httpx.AsyncClient, servicer: echo.EchoServicer) -> None:
    call = asyncio.create_task(web.post(f"{BASE}/Wait", json={}))
    assert await servicer.events.get() == "waits"
    call.cancel()
    async with asyncio.timeout(60):
        assert await servicer.events.get() == "wait cancelled"


async def test_a_server_stream_comes_in_envelopes_with_an_end(web: httpx.AsyncClient) -> None:
    body = envelope({"text": "r", "repeatCount": 2})
    reply = await web.post(f"{BASE}/Repeat", content=body, headers=STREAM)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/connect+json"
    assert envelopes(reply.content) == [(0, {"text": "r", "repeatCount": 2})] * 2 + [(2, {})]


async def test_a_stream_that_fails_says_so_in_its_end(web: httpx.AsyncClient) -> None:
    body = envelope({"text": "lease", "repeatCount": 1})
    reply = await web.post(f"{BASE}/Repeat", content=body, headers=STREAM)
    assert reply.status_code == 200
    (_, first), (flags, end) = envelopes(reply.content)
    assert first["text"] == "lease"
    assert flags == 2
    assert end["error"]["code"] == "failed_precondition"
    assert end["error"]["details"][0]["debug"]["reason"] == "LEASE_LOST"


@pytest.mark.parametrize("body", [b"", b"\0\0", envelope({})[:-1], b"\1" + envelope({})[1:], envelope({}) * 2])
async def test_a_bad_envelope_ends_the_stream_with_invalid_argument(web: httpx.AsyncClient, body: bytes) -> None:
    reply = await web.post(f"{BASE}/Repeat", content=body, headers=STREAM)
    assert envelopes(reply.content)[0][1]["error"]["code"] == "invalid_argument"


async def test_a_slow_reader_of_a_stream_holds_the_handler_back(process: Process, servicer: echo.EchoServicer) -> None:
    host, _, port = process.addresses["http"][0].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    body = envelope({"text": "x" * 10_000, "repeatCount": 10_000})
    head = f"POST {BASE}/Repeat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/connect+json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    await reader.readline()
    seen = -1
    while servicer.written != seen:  # until it writes no more
        seen = servicer.written
        await asyncio.sleep(0.2)
    assert 0 < servicer.written < 9000
    writer.close()
    async with asyncio.timeout(60):
        assert await servicer.events.get() == "repeat cancelled"


@pytest.mark.parametrize("name", ["Join", "Chat"])
async def test_methods_that_need_a_clients_stream_are_unimplemented(web: httpx.AsyncClient, name: str) -> None:
    reply = await web.post(f"{BASE}/{name}", json={})
    assert (reply.status_code, reply.json()["code"]) == (501, "unimplemented")
    reply = await web.post(f"{BASE}/{name}", content=envelope({}), headers=STREAM)
    assert envelopes(reply.content)[0][1]["error"]["code"] == "unimplemented"


@pytest.mark.parametrize("verb", ["GET", "PUT", "DELETE", "OPTIONS"])
async def test_only_post_calls_a_method(web: httpx.AsyncClient, verb: str) -> None:
    reply = await web.request(verb, f"{BASE}/Say")
    assert reply.status_code == 405
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("method", "kind"),
    [("Say", "text/plain"), ("Say", ""), ("Say", "application/proto"), ("Say", "application/connect+json"),
     ("Say", "application/json; charset=latin-1"), ("Repeat", "application/json"), ("Join", "text/plain")],
)  # fmt: skip
async def test_another_content_type_is_415(web: httpx.AsyncClient, method: str, kind: str) -> None:
    reply = await web.post(f"{BASE}/{method}", content=b"{}", headers={"content-type": kind})
    assert reply.status_code == 415


async def test_an_unknown_method_is_404(web: httpx.AsyncClient) -> None:
    reply = await web.post(f"{BASE}/Nope", json={})
    assert (reply.status_code, reply.json()["code"]) == (404, "unimplemented")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7080", "", "localhost.evil.example", "[::1", "0.0.0.0"])
async def test_another_host_is_refused(web: httpx.AsyncClient, servicer: echo.EchoServicer, host: str) -> None:
    reply = await web.post(f"{BASE}/Wait", json={}, headers={"host": host})
    assert (reply.status_code, reply.json()["code"]) == (403, "permission_denied")
    assert servicer.events.empty()


@pytest.mark.parametrize("host", ["localhost", "localhost:99", "127.0.0.1", "[::1]:7080", "LOCALHOST"])
async def test_a_loopback_host_is_served(web: httpx.AsyncClient, host: str) -> None:
    assert (await web.post(f"{BASE}/Say", json={}, headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://localhost:1", "file://", "http://localhost.evil.example"],
)
async def test_a_page_of_another_origin_is_refused(web: httpx.AsyncClient, origin: str) -> None:
    headers = {"origin": origin, "host": "localhost:7080"}
    assert (await web.post(f"{BASE}/Say", json={}, headers=headers)).status_code == 403
    headers["origin"] = "http://localhost:7080"
    assert (await web.post(f"{BASE}/Say", json={}, headers=headers)).status_code == 200


async def test_compression_and_other_versions_are_refused(web: httpx.AsyncClient) -> None:
    reply = await web.post(f"{BASE}/Say", json={}, headers={"content-encoding": "gzip"})
    assert reply.json()["code"] == "unimplemented"
    reply = await web.post(f"{BASE}/Say", json={}, headers={"connect-protocol-version": "2"})
    assert reply.json()["code"] == "invalid_argument"
    reply = await web.post(f"{BASE}/Say", json={}, headers={"connect-timeout-ms": "-1"})
    assert reply.json()["code"] == "invalid_argument"


async def test_what_an_operator_may_do_needs_a_token(web: httpx.AsyncClient) -> None:
    reply = await web.post(f"{BASE}/Operate", json={})
    assert (reply.status_code, reply.json()["code"]) == (403, "permission_denied")


async def test_the_index_lists_the_methods_with_curl_lines(web: httpx.AsyncClient) -> None:
    reply = await web.get("/")
    assert reply.headers["content-type"].startswith("text/html")
    assert f"{BASE}/Say" in reply.text
    assert "curl -H" in reply.text


def light(name: str) -> Shown | None:
    return None if name == "none" else Shown(name == "on", Echo(text=name))


@asynccontextmanager
async def lit(where: Settings, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The echo pattern with a page, and a client of it."""
    async with running(where, echo.EchoServicer(), pages={"light": light}) as process:
        base = f"http://{process.addresses['http'][0]}"
        async with httpx.AsyncClient(base_url=base, timeout=60, verify=False, **options) as client:
            yield client
        await asyncio.sleep(0.01)  # as in `web`


async def test_a_pattern_offers_pages_whose_status_says_yes_or_no(tmp_path: Path) -> None:
    async with lit(settings(tmp_path, http="127.0.0.1:0")) as web:
        for name, status in (("on", 200), ("off", 503)):
            reply = await web.get(f"/light/{name}")
            assert (reply.status_code, reply.json()) == (status, {"text": name})
        missing = await web.get("/light/none")
        assert (missing.status_code, missing.json()["code"]) == (404, "unimplemented")
        assert "curl -i" in (await web.get("/")).text
        assert (await web.post("/light/on", json={})).status_code == 405
        assert (await web.get("/light/on", headers={"host": "evil.example"})).status_code == 403


async def test_a_page_needs_the_token_that_calls_need(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("app a-token\n")
    tokens.chmod(0o600)
    async with lit(settings(tmp_path, http="127.0.0.1:0", token_file=tokens, require_token=True)) as web:
        assert (await web.get("/light/on")).status_code == 401
        assert (await web.get("/light/on", headers={"authorization": "Bearer a-token"})).status_code == 200


async def test_garbage_does_not_stop_the_listener(process: Process, web: httpx.AsyncClient) -> None:
    host, _, port = process.addresses["http"][0].rpartition(":")
    for garbage in (
        b"\x16\x03\x01\x02\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\0" * 70000,
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(garbage)
        writer.write_eof()
        async with asyncio.timeout(60):
            await reader.read()
        writer.close()
    assert (await web.post(f"{BASE}/Say", json={})).status_code == 200


async def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, servicer: echo.EchoServicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(StartError, match=r"pip install 'retinue-server\[http\]'"):
        async with running(settings(tmp_path, http="127.0.0.1:0"), servicer):
            pass


async def test_an_open_stream_ends_with_the_drain(tmp_path: Path, servicer: echo.EchoServicer) -> None:
    where = settings(tmp_path, http="127.0.0.1:0", drain_seconds=0.2)
    async with running(where, servicer) as process:
        host, _, port = process.addresses["http"][0].rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        body = envelope({"text": "wait", "repeatCount": 1})
        head = f"POST {BASE}/Repeat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/connect+json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert await servicer.events.get() == "repeat waits"
        async with asyncio.timeout(60):
            await process.stop()
        assert await servicer.events.get() == "repeat cancelled"
        writer.close()
