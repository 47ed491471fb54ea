"""What a real OTLP endpoint receives of an ambassador and its Envoy, whose descriptors don't disturb the exporter."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from collector import collecting
from engines.test_ambassador_envoy import eventually
from servers import start_server
from support.upstreams import WebServer, envoy_or_skip, get, running

from retinue.client.ambassador import Ambassador, upstream

pytestmark = pytest.mark.timeout(120)

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{'1' * 32}-{PARENT}-00"


@pytest.fixture
def where() -> Iterator[Path]:
    """Short, for paths of sockets."""
    with tempfile.TemporaryDirectory(prefix="amb-") as directory:
        yield Path(directory)


async def test_the_spans_of_envoy_are_in_the_apps_trace_and_the_servers_own_come_too(where: Path) -> None:
    envoy_or_skip()
    web = WebServer("web")
    with collecting() as (found, endpoint):
        env = {
            "RETINUE_AMBASSADOR__DATA_PLANE": "envoy",
            "RETINUE_AMBASSADOR__ENDPOINTS__ALLOW": "127.0.0.1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        }
        server = await asyncio.to_thread(start_server, where, "ambassador", env=env)
        try:
            async with running(web), Ambassador(server.control) as operator:
                declared = await operator.declare(upstream("it", "HTTP", [web.address]), wait=30)
                port = int(declared.status.address.rpartition(":")[2])
                assert (await get(port, "/kept", traceparent=SAMPLED)).text == "web"
                assert (await get(port, "/left", traceparent=UNSAMPLED)).text == "web"
                assert (await get(port, "/none")).text == "web"
                planes = {plane.kind: plane for plane in await operator.data_planes()}
                assert all(plane.live and plane.version for plane in planes.values())
                await eventually(lambda: [span for name, span in found.spans if name == "retinue-ambassador"])
        finally:
            await asyncio.to_thread(server.stop)
    passed = {path: headers.get("traceparent", "") for path, headers in web.requests}
    version, trace, span_id, flags = passed["/kept"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span_id != PARENT
    assert passed["/left"].split("-")[1] == "1" * 32
    spans = {span.span_id.hex(): span for name, span in found.spans if name == "retinue-ambassador"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}, "what the app did not sample, nobody does"
    asked = spans[span_id]
    assert spans[asked.parent_span_id.hex()].parent_span_id.hex() == PARENT
    own = [span.name for name, span in found.spans if name != "retinue-ambassador"]
    assert any("DeclareUpstream" in name for name in own), own
