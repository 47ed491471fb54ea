"""Calls to leaves over one stream for each endpoint (LeafService.QueryStream): queries are numbered."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from grpc import aio

from retinue_server.runtime.errors import Code
from retinue_server.scattergather.engines.grpc import GrpcLine
from retinue_server.scattergather.varints import field, read_varint, varint

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.scattergather.engine import Done, Metadata

METHOD = "/retinue.scattergather.v1.LeafService/QueryStream"
_QUERY_ID, _QUERY, _TIMEOUT, _CANCEL = b"\x08", b"\x12", b"\x18", b"\x20\x01"
_VARINT, _BYTES = 0, 2
"""Wire types."""
_FIXED = {1: 8, 5: 4}
"""The others, and their sizes."""
_OF_REQUESTS = frozenset({Code.INVALID_ARGUMENT, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED})
"""What ends a request for all leaves; of a stream, it is about one of many that share it, or about none."""
_GONE = "the stream to the leaf broke off"


class Answer(NamedTuple):
    """One message of a leaf."""

    query_id: int = 0
    response: bytes | None = None
    code: int = 0
    message: str = ""


def parse(data: bytes) -> Answer:
    """Of a QueryStreamResponse, whose response stays as it is; raises ValueError."""
    found: dict[int, int | bytes] = {}
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        if tag & 7 == _VARINT:
            found[tag >> 3], at = read_varint(data, at)
        elif tag & 7 == _BYTES:
            size, at = read_varint(data, at)
            if at + size > len(data):
                raise ValueError("a field is longer than the message")
            found[tag >> 3], at = data[at : at + size], at + size
        elif tag & 7 in _FIXED:
            at += _FIXED[tag & 7]  # of a later version
        else:
            raise ValueError("a field has a wire type that messages do not use")
    number, response, code, message = (found.get(key, usual) for key, usual in ((1, 0), (2, None), (3, 0), (4, b"")))
    if not isinstance(number, int) or isinstance(response, int):
        raise ValueError("a field has the wire type of another")  # noqa: TRY004 - of a message, not of an argument
    if not (isinstance(code, int) and isinstance(message, bytes)):
        raise ValueError("a field has the wire type of another")  # noqa: TRY004 - as above
    return Answer(number, response, code, message.decode(errors="replace"))


class _Stream:
    """One stream: what was asked on it, and what waits to be sent."""

    def __init__(self, call: Any, max_reply_bytes: int) -> None:
        self._call, self._max_reply_bytes = call, max_reply_bytes
        self._numbers = itertools.count(1)
        self._asked: dict[int, Done] = {}
        self._unsent: dict[int, bytes] = {}
        """By number; of a cancellation the number negated."""
        self._work = asyncio.Event()
        self._retired = False
        self.over = False
        """Whether nothing can be asked on it any more."""
        self.tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    def ask(self, data: bytes, timeout_s: float, done: Done) -> Callable[[], None]:
        """Sends a query; gives what cancels it."""
        number = next(self._numbers)
        self._asked[number] = done
        micros = max(int(timeout_s * 1_000_000), 1)
        self._unsent[number] = _QUERY_ID + varint(number) + field(_QUERY, data) + _TIMEOUT + varint(micros)
        self._work.set()
        return partial(self._cancel, number)

    def _cancel(self, number: int) -> None:
        """What was not sent is not; of what was, the leaf is told."""
        if self._asked.pop(number, None) is None or self._unsent.pop(number, None) is not None:
            return
        self._unsent[-number] = _QUERY_ID + varint(number) + _CANCEL
        self._work.set()
        self._rest()

    def retire(self) -> None:
        """Ends when what was asked on it is answered."""
        self._retired = True
        self._rest()

    def _rest(self) -> None:
        if self._retired and not self._asked and not self._unsent:
            self._call.cancel()

    async def _write(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._unsent:
                number = next(iter(self._unsent))
                try:
                    await self._call.write(self._unsent.pop(number))
                except (aio.AioRpcError, asyncio.InvalidStateError, aio.UsageError):
                    return  # the reader hears why
            self._rest()

    async def _read(self) -> None:
        code, message = Code.UNAVAILABLE, _GONE
        try:
            while (data := await self._call.read()) is not aio.EOF:
                self._heard(parse(data))
        except aio.AioRpcError as error:
            code, message = Code(error.code().value[0]), error.details() or _GONE
        except ValueError as error:
            code, message = Code.DATA_LOSS, f"the leaf sent no QueryStreamResponse: {error}"
            self._call.cancel()
        except asyncio.CancelledError:
            """The stream was retired, or its line closed."""
        finally:
            self._end(*_of_all(code, message))

    def _heard(self, answer: Answer) -> None:
        done = self._asked.pop(answer.query_id, None)
        if done is None:
            return  # it was cancelled meanwhile
        if answer.code:
            done(answer.code, answer.message, None)
        elif answer.response is None:
            done(Code.DATA_LOSS, "the leaf sent neither a response nor a code", None)
        elif len(answer.response) > self._max_reply_bytes:
            size = len(answer.response)
            done(Code.RESOURCE_EXHAUSTED, f"a reply of {size} bytes is over the {self._max_reply_bytes} allowed", None)
        else:
            done(0, "", answer.response)
        self._rest()

    def _end(self, code: Code, message: str) -> None:
        self.over = True
        self.tasks[1].cancel()
        asked, self._asked = self._asked, {}
        self._unsent.clear()
        for done in asked.values():
            done(int(code), message, None)

    def close(self) -> None:
        """Ends it, and with it what was asked."""
        self._call.cancel()


def _of_all(code: Code, message: str) -> tuple[Code, str]:
    """What a stream's end is to each query that is open."""
    if code in (Code.OK, Code.CANCELLED):
        return Code.UNAVAILABLE, message
    return (
        (Code.INTERNAL, f"the stream to the leaf: {code.name}: {message}") if code in _OF_REQUESTS else (code, message)
    )


class StreamLine(GrpcLine):
    """A line whose queries share a stream, which is opened when it is needed.

    Metadata of single queries has no place on it: pools that forward some say `transport: unary`.
    """

    most_received = 64 * 1024 * 1024
    """What is larger ends the stream, and all that is asked on it; a reply over the target's limit fails alone."""
    _stream: _Stream | None = None

    def _take(self, channel: aio.Channel) -> None:
        if self._stream is not None:
            self._stream.retire()
            self._stream = None
        super()._take(channel)

    def call(self, data: bytes, timeout_s: float, metadata: Metadata, done: Done) -> Callable[[], None]:
        if self._channel is None:
            return super().call(data, timeout_s, metadata, done)
        if self._stream is None or self._stream.over:
            opened: Any = self._channel.stream_stream(METHOD)
            self._stream = _Stream(opened(), self.target.max_reply_bytes)
            for task in self._stream.tasks:
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        return self._stream.ask(data, timeout_s, done)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        super().close()
