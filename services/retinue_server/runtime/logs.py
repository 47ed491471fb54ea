"""Logs on stderr: JSON lines with trace ids for machines, plain lines on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

from retinue_server.runtime import telemetry

if TYPE_CHECKING:
    from retinue_server.runtime.config import Log

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "trace_id", "span_id"}


def setup(settings: Log) -> None:
    """Sends what is logged in this process to stderr; a second call replaces the first."""
    handler = logging.StreamHandler(sys.stderr)
    as_text = settings.format == "text" or (settings.format == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    handler.addFilter(add_trace)
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("asyncio").setLevel(max(logging.INFO, logging.getLogger().level))
    logging.getLogger("httpx2").setLevel(max(logging.WARNING, logging.getLogger().level))  # a line for each request
    logging.getLogger("grpc._cython.cygrpc").addFilter(is_no_gone_caller)


def add_trace(record: logging.LogRecord) -> bool:
    """A filter, since it runs where the record is made, in the context of the call."""
    context = telemetry.parse(telemetry.current())
    record.trace_id = context.trace_id if context else ""
    record.span_id = context.span_id if context else ""
    return True


def is_no_gone_caller(record: logging.LogRecord) -> bool:
    """A filter: gRPC calls it an error when a caller goes while it is answered, which callers may."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ != "ExecuteBatchError"


class JsonFormatter(logging.Formatter):
    """One object a line; what was passed as `extra` is among its keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        import json  # noqa: PLC0415 - most servers have nothing to say while they start

        line = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        for key in ("trace_id", "span_id"):
            if value := getattr(record, key, ""):
                line[key] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """For people: time, level, message, then the traceback."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")


def _timestamp(seconds: float) -> str:
    whole, fraction = divmod(seconds, 1)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int(fraction * 1000):03d}Z"
