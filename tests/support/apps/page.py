"""An app with prometheus_client: FORM PORT; `/work` is a request that it counts."""

from __future__ import annotations

import sys
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, Info, generate_latest, make_wsgi_app

REQUESTS = Counter("http_requests", "Requests.", ["code", "method"])
TIMES = Histogram("http_request_duration_seconds", "Their time.", buckets=(0.1, 1))
Gauge("temperature_celsius", "How warm it is.", ["room"]).labels('the "north\\west"\n').set(21.5)
Info("build", "What was built.").info({"version": "1.2"})
REQUESTS.labels("500", "GET").inc(2)
REQUESTS.labels("200", "GET")


def app(environ, start_response):  # type: ignore[no-untyped-def]
    if environ["PATH_INFO"] == "/work":
        REQUESTS.labels("200", "GET").inc()
        TIMES.observe(0.5)
        start_response("200 OK", [])
        return [b""]
    if sys.argv[1] == "text":
        start_response("200 OK", [("Content-Type", CONTENT_TYPE_LATEST)])
        return [generate_latest()]
    return metrics(environ, start_response)


class Quiet(WSGIRequestHandler):
    def log_message(self, *_):  # type: ignore[no-untyped-def]
        pass


metrics = make_wsgi_app()
server = make_server("127.0.0.1", int(sys.argv[2]), app, handler_class=Quiet)
server.serve_forever()
