"""Apps whose metrics an adapter collects, for tests that know only the contract: threads of the test's own process."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import threading
from typing import Any, Self

PATIENCE = 30.0


class Source:
    """Serves a page over HTTP while it is entered; what it says may be changed at any time."""

    def __init__(self, text: str = "x 1\n", content_type: str = "text/plain; version=0.0.4") -> None:
        self.text, self.content_type, self.status = text, content_type, 200
        self.asked = 0
        self.lets = threading.Event()
        """While it is not set, requests hang."""
        self.lets.set()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"
        self.endpoint = f"http://{self.address}/metrics"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.lets.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: Source

    def do_GET(self) -> None:
        owner = self.owner
        owner.asked += 1
        owner.lets.wait(PATIENCE)
        body = owner.text.encode()
        with contextlib.suppress(OSError):  # who asked may have gone
            self.send_response(owner.status)
            self.send_header("content-type", owner.content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - the library's name

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def page(address: str, path: str = "/metrics", accept: str = "") -> tuple[int, str, str]:
    """Status, content type and text of what a metrics listener answers."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    try:
        connection.request("GET", path, headers={"accept": accept} if accept else {})
        answer = connection.getresponse()
        return answer.status, answer.getheader("content-type", ""), answer.read().decode()
    finally:
        connection.close()
