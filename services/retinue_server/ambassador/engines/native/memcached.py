"""memcached, sharded: its ASCII and its meta commands, over one connection to each shard that all apps share.

What an app sends is cut into commands, each goes to the shard of its key, and answers come back in the order of the
app's commands. Shards answer in the order in which they are asked, so that a queue for each says whose answer it is.
`noreply` and quiet flags are taken out on the way, and what they suppress is suppressed here: then there is one answer
to each command, and an error can't be taken for another's. For the same reason we refuse what memcached refuses without
reading the value that follows: it would take the value for a command, and answer twice. What is suppressed is what
memcached 1.6.18 suppresses, with one difference: a quiet `ma` that creates its item is silent, as one that finds it is.

Most of what apps say is `get KEY` and `set` of one value. Those are recognized at a glance and passed on as they came.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from retinue_server.ambassador.engines.native import tcp
from retinue_server.ambassador.engines.native.ketama import Ring

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from retinue_server.ambassador.engines.native.backends import Backend
    from retinue_server.ambassador.engines.native.listening import Served

_LINE, _VALUES, _META, _STATS = range(4)
"""What an answer looks like: a line; values up to END; a line and perhaps a value; lines up to END."""
_MAX_LINE = 1 << 20
_MAX_SENT_LINE = 2046
"""What memcached takes of a command that is neither `get` nor `gets`, without its end."""
_MAX_VALUE = 64 << 20
_AGAIN_S = 0.05, 1.0
"""How soon a shard that can't be reached is dialled again: at first, and at the longest."""
_END, _ERROR = b"END\r\n", b"ERROR\r\n"
_NOBODY = b"SERVER_ERROR no shard is known\r\n"
_BAD_CHUNK, _TOO_LARGE = b"CLIENT_ERROR bad data chunk\r\n", b"SERVER_ERROR object too large for cache\r\n"
_BAD_FORMAT = b"CLIENT_ERROR bad command line format\r\n"
_TOO_MANY_FLAGS = b"CLIENT_ERROR options flags too long\r\n"
_TOO_LONG = b"CLIENT_ERROR line too long\r\n"
_PLAIN = re.compile(
    rb"get ([!-~\x80-\xff]{1,250})\r\n|set ([!-~\x80-\xff]{1,250}) [0-9]{1,9} [0-9]{1,9} ([0-9]{1,7})\r\n"
)
"""What needs no closer look, and no shard refuses unread."""
_VALUE = re.compile(rb"VALUE [^ ]+ [0-9]+ ([0-9]+)\r\n")
_MAX_KEY = 250
_MAX_META_WORDS = 19
"""What memcached takes."""
_STORES = {b"set": 5, b"add": 5, b"replace": 5, b"append": 5, b"prepend": 5, b"cas": 6}
"""Their words, without `noreply`: name key flags exptime bytes [cas]."""
_ONE_KEY = frozenset((b"delete", b"incr", b"decr", b"touch"))
_MANY_KEYS = {b"get": 1, b"gets": 1, b"gat": 2, b"gats": 2}
"""Where their keys begin."""
_TO_ALL = frozenset((b"flush_all", b"verbosity"))
_META_COMMANDS = frozenset((b"mg", b"ms", b"md", b"ma", b"me"))
_SUPPRESSED = {b"mg": (b"EN",), b"ms": (b"HD",), b"md": (b"HD",), b"ma": (b"HD", b"VA"), b"me": (b"EN",)}
"""Answers that a quiet command does not give."""
_FIRST_ONLY = frozenset((b"pid", b"uptime", b"time", b"version", b"libevent", b"pointer_size", b"threads"))
"""Figures of `stats` that are no sums."""


class _Answer(msgspec.Struct, gc=False, eq=False):
    """The place of an answer among those of one app; there is one for each command, so it is made in C."""

    front: Front
    began: float
    kind: int
    suppressed: tuple[bytes, ...] | None = None
    """Beginnings of what is not passed on; empty = nothing is."""
    said: bytes | None = None
    """What the app gets; None until it is all there."""

    def part(self, data: bytes) -> None:
        """A shard has answered."""
        suppressed = self.suppressed
        self.said = data if suppressed is None or (suppressed and not data.startswith(suppressed)) else b""


class _Joined(_Answer, gc=False, eq=False):
    """One that several shards have a part in."""

    left: int = 1
    """Parts that are still to come."""
    data: bytes = b""

    def part(self, data: bytes) -> None:
        self.left -= 1
        if _is_error(data) or _is_error(self.data):
            self.data = self.data if _is_error(self.data) else data
        elif self.kind == _LINE:
            self.data = data
        else:
            self.data += data[: -len(_END)]
        if not self.left:
            super().part(self._whole())

    def _whole(self) -> bytes:
        if self.kind == _LINE or _is_error(self.data):
            return self.data
        return (_summed(self.data) if self.kind == _STATS else self.data) + _END


class Cluster:
    """The shards of one upstream, and the ring over those that are in use."""

    def __init__(self, served: Served, context: Callable[[], ssl.SSLContext | None]) -> None:
        self.served, self.context = served, context
        self._shards: dict[str, Shard] = {}
        self.of: Callable[[bytes], Shard | None] = _nowhere
        """Where a key is; None while there is no shard."""
        self._to_flush: list[Shard] = []
        self._timer: asyncio.TimerHandle | None = None

    def update(self) -> None:
        """As `served` says now; who is gone answers what it was asked, and is asked no more."""
        backends = self.served.backends.all
        for address in self._shards.keys() - {backend.address for backend in backends}:
            self._shards.pop(address).retire()
        for backend in backends:
            if backend.address not in self._shards:
                self._shards[backend.address] = Shard(self, backend)
        self._arrange()

    def _arrange(self) -> None:
        """The ring, without those that are kept off: their keys go to others meanwhile."""
        usable = self.served.backends.usable() or list(self.served.backends.all)
        shards = [(one.endpoint.hashed_name, one.endpoint.weight, self._shards[one.address]) for one in usable]
        self.of = Ring(shards).of if shards else _nowhere
        now = self.served.loop.time()
        returns = [one.ejected_until for one in self.served.backends.all if one.is_ejected(now)]
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.served.loop.call_at(min(returns), self._arrange) if returns else None

    def failed(self, backend: Backend) -> None:
        """A shard did not answer."""
        before = self.served.backends.ejections
        self.served.backends.failed(backend)
        if self.served.backends.ejections != before:
            self._arrange()

    def flush_soon(self, shard: Shard) -> None:
        """What is asked in one turn of the loop goes out together."""
        if not self._to_flush:
            self.served.loop.call_soon(self._flush)
        self._to_flush.append(shard)

    def _flush(self) -> None:
        shards, self._to_flush = self._to_flush, []
        for shard in shards:
            shard.flush()

    def all(self) -> list[Shard]:
        """In their order."""
        return list(self._shards.values())

    def close(self) -> None:
        """Ends every connection to a shard."""
        if self._timer is not None:
            self._timer.cancel()
        for shard in self._shards.values():
            shard.close("the upstream is gone")


class Front(asyncio.Protocol):
    """A connection from an app."""

    transport: asyncio.Transport
    """To the app."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._served = cluster, cluster.served
        self._buffer = b""
        self._answers: deque[_Answer] = deque()
        self._needed = 0
        """Bytes of the buffer without which nothing can go on."""
        self._ends = False
        self._holders: set[object] = set()
        """Who has too much to send: while there is anybody, nothing more is read."""
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._served.open.add(transport)
        self._last = self._served.now()
        self._watch_idle()

    def connection_lost(self, _: Exception | None) -> None:
        self._served.open.discard(self.transport)
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._served.count.received_bytes += len(data)
        if self._ends:
            return
        buffer = self._buffer + data if self._buffer else data
        if len(buffer) < self._needed:
            self._buffer = buffer
            return
        self._buffer, self._needed = buffer, 0
        self._last = self._served.now()
        at = self._commands()
        self._buffer = buffer[at:]
        if self._buffer:
            self._waits(at)
        if self._answers and self._answers[0].said is not None:
            self.flush()

    def _commands(self) -> int:
        """Takes the commands that are all there; gives where the first begins that is not."""
        at, length = 0, len(self._buffer)
        while (at := self._plain(at)) < length and not self._ends:
            end = self._buffer.find(b"\n", at)
            after = self._command(at, end) if end >= 0 else 0
            if not after:
                break
            at = after
        return at

    def _waits(self, used: int) -> None:
        """For the rest of a command, unless that is too long."""
        self._needed = max(0, self._needed - used)
        if len(self._buffer) > _MAX_LINE and not self._needed:
            self._say(_TOO_LONG)
            self._end()

    def _plain(self, at: int) -> int:
        """Takes commands that need no closer look; gives where another one begins."""
        buffer = self._buffer
        length = len(buffer)
        while at < length and (found := _PLAIN.match(buffer, at)) is not None:
            key, end, kind = found[1], found.end(), _VALUES
            if key is None:
                key, kind = found[2], _LINE
                end += int(found[3]) + 2
                if not buffer.startswith(b"\r\n", end - 2):
                    break
            self._ask(key, buffer[at:end], kind)
            at = end
        return at

    def _command(self, at: int, end: int) -> int:
        """Takes one command whose line is buffer[at:end]; gives where the next begins, 0 if it is not all there."""
        buffer = self._buffer
        line = buffer[at : end - 1] if buffer[end - 1 : end] == b"\r" else buffer[at:end]
        if len(line) > _MAX_SENT_LINE and not line.startswith((b"get ", b"gets ")):
            self._say(_TOO_LONG)
            self._end()  # as memcached, which would end the connection that all share
            return end + 1
        words = line.split()
        name = words[0] if words else b""
        least = _STORES.get(name, 0)
        if least and least <= len(words) <= least + 1:
            return self._store(words, end, words[4], least)
        if name == b"ms" and len(words) > 2:  # noqa: PLR2004 - name key bytes
            return self._store(words, end, words[2], 0)
        self._short(name, words, line)
        return end + 1

    def _store(self, words: list[bytes], end: int, size: bytes, noreply_at: int) -> int:
        """A command that a value follows; `noreply_at` is 0 for a meta command."""
        if not size.isdigit() or int(size) > _MAX_VALUE:
            self._say(_TOO_LARGE if size.isdigit() else _BAD_CHUNK)
            self._end()  # where the next command begins is not known
            return end + 1
        if refusal := _refusal(words, noreply_at):
            self._say(refusal)
            return end + 1  # as memcached: the value is taken for a command
        total = end + 1 + int(size) + 2
        if len(self._buffer) < total:
            self._needed = total
            return 0
        value = self._buffer[end + 1 : total]
        if not value.endswith(b"\r\n"):
            self._say(_BAD_CHUNK)
            line_end = self._buffer.find(b"\n", total)  # as memcached: what is left of the line is thrown away
            return line_end + 1 if line_end >= 0 else total
        if not noreply_at:
            self._meta(words, value)
        else:
            silent = words[noreply_at : noreply_at + 1] == [b"noreply"]
            kept = words[:noreply_at] if silent else words
            self._ask(words[1], b" ".join(kept) + b"\r\n" + value, _LINE, () if silent else None)
        return total

    def _short(self, name: bytes, words: list[bytes], line: bytes) -> None:
        """A command that is a line."""
        if name in _MANY_KEYS and len(words) > _MANY_KEYS[name]:
            self._retrieve(words, _MANY_KEYS[name])
        elif name in _ONE_KEY and len(words) > 1:
            silent = words[-1] == b"noreply"
            kept = b" ".join(words[:-1]) if silent else line
            self._ask(words[1], kept + b"\r\n", _LINE, () if silent else None)
        elif name in _META_COMMANDS and len(words) > 1:
            self._meta(words, b"")
        elif name == b"mn":
            self._say(b"MN\r\n")
        elif name in _TO_ALL:
            silent = words[-1] == b"noreply"
            self._ask_all(b" ".join(words[:-1] if silent else words) + b"\r\n", _LINE, () if silent else None)
        elif name == b"stats" and len(words) == 1:
            self._ask_all(b"stats\r\n", _STATS)
        elif name == b"version":
            self._ask(b"", b"version\r\n", _LINE)
        elif name == b"quit":
            self._end()
        else:
            self._say(_ERROR)

    def _retrieve(self, words: list[bytes], first: int) -> None:
        """Of one key, or of many, each from its shard."""
        by_shard: dict[Shard | None, list[bytes]] = {}
        for key in words[first:]:
            by_shard.setdefault(self._cluster.of(key), []).append(key)
        head = b" ".join(words[:first])
        asked = [(shard, head + b" " + b" ".join(keys) + b"\r\n") for shard, keys in by_shard.items()]
        self._ask_each(asked, _VALUES)

    def _meta(self, words: list[bytes], value: bytes) -> None:
        """A meta command, whose quiet flag is ours."""
        name, first = words[0], 3 if words[0] == b"ms" else 2
        quiet = b"q" in words[first:]
        if quiet:
            words = [*words[:first], *(word for word in words[first:] if word != b"q")]
        self._ask(words[1], b" ".join(words) + b"\r\n" + value, _META, _SUPPRESSED[name] if quiet else None)

    def _ask(self, key: bytes, data: bytes, kind: int, suppressed: tuple[bytes, ...] | None = None) -> None:
        answer = _Answer(self, self._last, kind, suppressed)
        self._place(answer)
        shard = self._cluster.of(key)
        if shard is None:
            answer.part(_NOBODY)
        else:
            shard.send(data, answer)

    def _ask_all(self, data: bytes, kind: int, suppressed: tuple[bytes, ...] | None = None) -> None:
        self._ask_each([(shard, data) for shard in self._cluster.all() or (None,)], kind, suppressed)

    def _ask_each(
        self, asked: Sequence[tuple[Shard | None, bytes]], kind: int, suppressed: tuple[bytes, ...] | None = None
    ) -> None:
        answer = _Joined(self, self._last, kind, suppressed, left=len(asked))
        self._place(answer)
        for shard, data in asked:
            if shard is None:
                answer.part(_NOBODY)
            else:
                shard.send(data, answer)

    def _place(self, answer: _Answer) -> None:
        """It is the next."""
        count = self._served.count
        count.requests += 1
        count.active_requests += 1
        self._answers.append(answer)

    def _say(self, data: bytes) -> None:
        """Answers by itself."""
        self._place(_Answer(self, self._last, _LINE, said=data))

    def flush(self) -> None:
        """Sends the answers that are complete, in their order."""
        answers, served = self._answers, self._served
        now, parts = served.now(), []
        while answers and (said := answers[0].said) is not None:
            parts.append(said)
            served.took(now - answers.popleft().began)
        served.count.active_requests -= len(parts)
        transport = self.transport
        if transport.is_closing():
            return
        if data := parts[0] if len(parts) == 1 else b"".join(parts):
            served.count.sent_bytes += len(data)
            transport.write(data)
        if self._ends and not answers:
            transport.close()

    def _end(self) -> None:
        """After what has been asked is answered."""
        self._ends = True
        if not self._answers:
            self.transport.close()

    def eof_received(self) -> bool:
        self._end()
        return True

    def pause_writing(self) -> None:
        self.hold(self)

    def resume_writing(self) -> None:
        self.release(self)

    def hold(self, who: object) -> None:
        """Reads nothing more until all who hold it let it go."""
        self._holders.add(who)
        self.transport.pause_reading()

    def release(self, who: object) -> None:
        """Reads on, unless others hold it."""
        self._holders.discard(who)
        if not self._holders and not self.transport.is_closing():
            self.transport.resume_reading()

    def _watch_idle(self) -> None:
        idle_s = self._served.assignment.spec.policy.timeouts.idle_s
        if idle_s is None:
            return
        left = self._last + idle_s - self._served.now()
        if left <= 0 and not self._answers:
            self.transport.close()
            return
        self._timer = self._served.loop.call_later(max(left, 1.0), self._watch_idle)


class Shard(asyncio.Protocol):
    """The connection to one shard."""

    def __init__(self, cluster: Cluster, backend: Backend) -> None:
        self._cluster, self._served, self._backend = cluster, cluster.served, backend
        self._transport: asyncio.Transport | None = None
        self._asked: deque[_Answer] = deque()
        """Which come next."""
        self._out: list[bytes] = []
        self._buffer = b""
        self._connecting: asyncio.Task[None] | None = None
        self._wait_s = 0.0
        self._not_before = 0.0
        self._flushing = False
        self._held: set[Front] | None = None
        """Apps that wait until it has sent what it has; None while it keeps up."""
        self._timer: asyncio.TimerHandle | None = None
        self._retired = False

    def send(self, data: bytes, answer: _Answer) -> None:
        """Asks."""
        if self._transport is None and self._connecting is None and not self._dial():
            answer.part(self._sorry("it can't be reached"))
            self._served.count.errors += 1
            self._backend.counts.requests += 1
            self._backend.counts.errors += 1
            return
        self._asked.append(answer)
        self._out.append(data)
        if self._held is not None:
            self._held.add(answer.front)
            answer.front.hold(self)
        if not self._flushing:
            self._flushing = True
            self._cluster.flush_soon(self)

    def _sorry(self, why: str) -> bytes:
        return f"SERVER_ERROR shard {self._backend.endpoint.hashed_name}: {why}\r\n".encode()

    def flush(self) -> None:
        """Sends what is asked, once it is connected."""
        self._flushing = False
        if self._transport is None or not self._out:
            return
        data = b"".join(self._taken())
        self._transport.write(data)
        if self._timer is None:
            self._watch()

    def _taken(self) -> list[bytes]:
        """What is to be sent, and counted as asked."""
        out, self._out = self._out, []
        self._backend.counts.requests += len(out)
        return out

    def _watch(self) -> None:
        """A shard that does not answer in time is dialled anew: a late answer can't be told from the next one."""
        self._timer = None
        if not self._asked:
            return
        limit = self._served.assignment.spec.policy.timeouts.request_s or 1.0
        left = self._asked[0].began + limit - self._served.now()
        if left > 0:
            self._timer = self._served.loop.call_later(left, self._watch)
            return
        self._served.count.timeouts += 1
        self.close("it does not answer in time")

    # The connection

    def _dial(self) -> bool:
        """Whether it is worth waiting for."""
        if self._served.now() < self._not_before:
            return False
        self._connecting = self._served.loop.create_task(self._connect())
        return True

    async def _connect(self) -> None:
        served = self._served
        try:
            async with asyncio.timeout(served.assignment.spec.policy.timeouts.connect_s):
                await tcp.connect(served, self._backend, self, self._cluster.context())
        except (OSError, TimeoutError) as error:
            first, longest = _AGAIN_S
            self._wait_s = min(max(self._wait_s * 2, first), longest)
            self._not_before = served.now() + self._wait_s
            self._fail(f"it can't be reached: {getattr(error, 'strerror', None) or 'it does not answer'}")
        finally:
            self._connecting = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._backend.active = 1
        self._wait_s = 0.0
        self._served.backends.succeeded(self._backend)
        self.flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._backend.active = 0
        if self._asked:
            self._fail("the connection broke off" if error is None else f"the connection broke off: {error}")

    def close(self, why: str) -> None:
        """Ends the connection; whoever waits is told why."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        self._backend.active = 0
        self._fail(why)

    def retire(self) -> None:
        """Answers what it was asked, and ends."""
        self._retired = True
        if not self._asked:
            self.close("it is gone")

    def _fail(self, why: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        asked, self._asked = self._asked, deque()
        self._taken()
        self._buffer = b""
        self._release()
        if not asked:
            return
        self._cluster.failed(self._backend)
        self._served.count.errors += len(asked)
        self._backend.counts.errors += len(asked) - 1  # one is counted already
        sorry = self._sorry(why)
        for answer in asked:
            answer.part(sorry)
        for front in {answer.front for answer in asked}:
            front.flush()

    # Answers

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        asked, at, told = self._asked, 0, set()
        while asked:
            answer = asked[0]
            end = _ENDS[answer.kind](buffer, at)
            if end <= at:
                break
            asked.popleft()
            answer.part(buffer[at:end])
            if answer.said is not None:
                told.add(answer.front)
            at = end
        self._buffer = buffer[at:]
        if at:
            self._backend.failures = 0
        for front in told:
            front.flush()
        if self._buffer and not self._asked:
            self.close("it speaks without being asked")
        elif self._retired and not self._asked:
            self.close("it is gone")

    def pause_writing(self) -> None:
        self._held = set()

    def resume_writing(self) -> None:
        self._release()

    def _release(self) -> None:
        held, self._held = self._held, None
        for front in held or ():
            front.release(self)


def _nowhere(_: bytes) -> None:
    return None


def _refusal(words: list[bytes], least: int) -> bytes:
    """What memcached says to a store whose value it does not read then; empty for others. `least` is 0 for `ms`."""
    if len(words[1]) > _MAX_KEY:
        return _BAD_FORMAT
    if not least:
        return _TOO_MANY_FLAGS if len(words) > _MAX_META_WORDS else b""
    flags, expires = words[2], words[3].removeprefix(b"-")
    numbers = (flags, 32), (expires, 31), *((cas, 64) for cas in words[5:least])
    return b"" if all(word.isdigit() and int(word) >> bits == 0 for word, bits in numbers) else _BAD_FORMAT


def _line_end(buffer: bytes, at: int) -> int:
    """Where the line that begins at `at` ends; -1 if it is not all there."""
    end = buffer.find(b"\r\n", at) + 2
    return end if end > 1 else -1


def _meta_end(buffer: bytes, at: int) -> int:
    end = _line_end(buffer, at)
    if end < 0 or not buffer.startswith(b"VA ", at):
        return end
    end += int(buffer[at + 3 : end - 2].split(None, 1)[0]) + 2
    return end if end <= len(buffer) else -1


def _stats_end(buffer: bytes, at: int) -> int:
    end = _line_end(buffer, at)
    while end > 0 and buffer.startswith(b"STAT ", at):
        at, end = end, _line_end(buffer, end)
    return end


def _values_end(buffer: bytes, at: int) -> int:
    if (found := _VALUE.match(buffer, at)) is not None:  # as a rule there is one value
        end = found.end() + int(found[1]) + 2
        if buffer.startswith(_END, end):
            return end + len(_END)
    end = _line_end(buffer, at)
    while end > 0 and buffer.startswith(b"VALUE ", at):
        at = end + int(buffer[at:end].split(None, 4)[3]) + 2
        end = _line_end(buffer, at) if at < len(buffer) else -1
    return end


_ENDS = (_line_end, _values_end, _meta_end, _stats_end)
"""By what an answer looks like: where the one that begins somewhere ends; -1 if it is not all there."""


def _is_error(data: bytes) -> bool:
    return data.startswith((b"SERVER_ERROR", b"CLIENT_ERROR", b"ERROR"))


def _summed(data: bytes) -> bytes:
    """Figures of all shards: sums of those that can be added, the first of others."""
    found: dict[bytes, bytes] = {}
    for line in data.splitlines():
        _, name, value = line.split(None, 2) if line.count(b" ") > 1 else (*line.split(None, 1), b"")
        before = found.get(name)
        if before is None:
            found[name] = value
        elif name not in _FIRST_ONLY and before.isdigit() and value.isdigit():
            found[name] = str(int(before) + int(value)).encode()
    return b"".join(b"STAT " + name + b" " + value + b"\r\n" for name, value in found.items())
