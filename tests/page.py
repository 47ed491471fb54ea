"""An app that serves a page of metrics over HTTP, for tests that have it collected."""

from __future__ import annotations

import http.server
import threading
from typing import Self


class Page:
    """What it says, with which status, may be changed at any time; a context."""

    def __init__(self, text: str, content_type: str = "text/plain") -> None:
        self.text, self.status, self.asked = text, 200, 0
        page = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page.asked += 1
                body = page.text.encode()
                self.send_response(page.status)
                self.send_header("content-type", content_type)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Not on the tests' stderr."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/metrics"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
