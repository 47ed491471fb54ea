"""Callers of the root that write down what they asked and were told."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import grpc
import msgspec
from contract.client import Refused, refused
from google.rpc.status_pb2 import Status

from retinue.scattergather.v1 import scattergather_service_pb2 as api
from retinue.scattergather.v1 import scattergather_service_pb2_grpc as rpc
from support.history.recorder import boot_ns
from support.scatter_faults.history import LEFT, Asked, Event, Known, Piece, Told
from support.scatter_faults.pools import STRICT, Policy, Pool

_encode = msgspec.json.Encoder().encode
_SLACK = 2.0
"""A caller without a deadline of its own waits so many times as long as the root may take; more is a hang."""


class Notes:
    """The harness's part of a history. Threads may share it."""

    def __init__(self, where: Path) -> None:
        self._file = os.open(where / "history/harness.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, event: Event) -> None:
        os.write(self._file, _encode(event) + b"\n")


class Pending:
    """A request under way."""

    def __init__(self, asked: Asked, future: Any, notes: Notes) -> None:
        self.asked, self._future, self._notes = asked, future, notes
        self.told: Told
        self.error: Refused | None = None
        self._done = threading.Event()
        future.add_done_callback(self._end)

    def leave(self) -> None:
        """Does not wait any longer."""
        self._future.cancel()

    def result(self) -> Told:
        """What the caller was told; it must come."""
        assert self._done.wait(self.asked.timeout_ns / 1e9 * _SLACK + 60), f"nothing is said to {self.asked}"
        return self.told

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def _end(self, future: Any) -> None:
        at = boot_ns()
        if future.cancelled() or _is_broken_off(future.exception()):
            self.told = Told(at, self.asked.request, LEFT)
        elif (error := future.exception()) is None:
            self.told = answer(at, self.asked.request, future.result())
        else:
            self.error = refused(error)
            self.told = failure(at, self.asked.request, error)
        self._notes.add(self.told)
        self._done.set()


def _is_broken_off(error: Any) -> bool:
    """Whether the caller broke its connection: no root says CANCELLED."""
    return error is not None and error.code() is grpc.StatusCode.CANCELLED


class Caller:
    """One app, on a connection of its own; a context that breaks it."""

    _numbers = itertools.count(1)

    def __init__(self, address: str, notes: Notes) -> None:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500))
        self._channel = grpc.insecure_channel(address, options)
        self._stub: Any = rpc.ScatterGatherServiceStub(self._channel)
        self._notes = notes
        self._name = f"c{next(self._numbers)}"
        self._count = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Breaks the connection, and with it what is under way."""
        self._channel.close()

    def begin(
        self,
        pool: Pool,
        policy: Policy = STRICT,
        *,
        mode: str = "",
        shards: Iterable[str] = (),
        deadline_s: float | None = None,
    ) -> Pending:
        """Asks, and does not wait."""
        name = f"{self._name}-{next(self._count)}"
        chosen = list(shards)
        timeout_s = pool.timeout_s if deadline_s is None else min(deadline_s, pool.timeout_s)
        asked = Asked(
            boot_ns(),
            name,
            mode,
            pool.name,
            {shard: weight for shard, weight in pool.shards.items() if not chosen or shard in chosen},
            int(timeout_s * 1e9),
            policy.min_coverage,
            policy.first_k,
            int(policy.soft_s * 1e9),
        )
        self._notes.add(asked)
        request = question(asked, policy, groups=pool.merge == "group_sum", shards=chosen)
        waits = pool.timeout_s * _SLACK + 30 if deadline_s is None else deadline_s
        return Pending(asked, self._stub.Scatter.future(request, timeout=waits, wait_for_ready=True), self._notes)

    def visit(self, pool: Pool, begin: Callable[[api.ScatterRequest], Callable[[], object]]) -> Callable[[], None]:
        """Asks in another way, and gives what leaves: `begin` sends the request, and gives what breaks it off."""
        name = f"{self._name}-{next(self._count)}"
        asked = Asked(boot_ns(), name, "leaves", pool.name, pool.shards, int(pool.timeout_s * 1e9))
        self._notes.add(asked)
        end = begin(question(asked))

        def leave() -> None:
            end()
            self._notes.add(Told(boot_ns(), name, LEFT))

        return leave

    def stream(self, request: api.ScatterRequest) -> Callable[[], object]:
        """Asks ScatterStream, and gives what cancels it."""
        call = self._stub.ScatterStream(api.ScatterStreamRequest(request=request), timeout=60)
        cancel: Callable[[], object] = call.cancel
        return cancel

    def ask(self, pool: Pool, policy: Policy = STRICT, **asked: Any) -> Pending:
        """Asks, and waits."""
        pending = self.begin(pool, policy, **asked)
        pending.result()
        return pending

    def recent(self, **wanted: Any) -> Any:
        """ListRecentScatters."""
        return self._stub.ListRecentScatters(api.ListRecentScattersRequest(**wanted), timeout=30).scatters


def question(
    asked: Asked, policy: Policy = STRICT, *, groups: bool = False, shards: Iterable[str] = ()
) -> api.ScatterRequest:
    """The request; leaves get its name, and in which form they are to reply."""
    return api.ScatterRequest(
        pool_id=asked.pool,
        payload=f"{asked.request} {'groups' if groups else 'text'}".encode(),
        shard_ids=shards,
        policy=api.ScatterPolicy(**policy.said()),
    )


def answer(at: int, request: str, said: api.ScatterResponse) -> Told:
    """A response, as a line of a history."""
    return Told(
        at,
        request,
        0,
        pieces=tuple(pieces(request, said)),
        coverage=known(said.coverage),
        failures={one.shard_id: one.code for one in said.failures},
        failed_by_code=dict(said.failed_by_code),
        attempts=said.stats.attempts,
        hedges=said.stats.hedges,
        retries=said.stats.retries,
    )


def failure(at: int, request: str, error: grpc.RpcError) -> Told:
    """An error, as a line of a history."""
    code = error.code().value[0]
    said = detail(error)
    reason = refused(error).reason
    if said is None:
        return Told(at, request, code, reason)
    return Told(
        at,
        request,
        code,
        reason,
        coverage=known(said.coverage),
        failures={one.shard_id: one.code for one in said.failures},
        failed_by_code=dict(said.failed_by_code),
    )


def detail(error: Any) -> api.ScatterFailure | None:
    """The ScatterFailure of an error; None if it has none."""
    found = api.ScatterFailure()
    trailing = dict(error.trailing_metadata() or ())
    for one in Status.FromString(trailing.get("grpc-status-details-bin", b"")).details:
        if one.Unpack(found):
            return found
    return None


def known(said: Any) -> Known:
    return Known(said.expected, said.answered, said.complete)


def pieces(request: str, said: api.ScatterResponse) -> Iterable[Piece]:
    """The replies that an answer was made of; what is none of our leaves' has -1 for its number."""
    if said.WhichOneof("output") == "json":
        for shard, number in said.json.struct_value.fields.items():
            yield Piece(shard, int(number.number_value))
    elif said.WhichOneof("output") == "collected":
        for one in said.collected.replies:
            yield from _lines(request, one.payload, one.shard_id)
    else:
        yield from _lines(request, said.payload)


def _lines(request: str, payload: bytes, shard: str = "") -> Iterable[Piece]:
    """Of replies one after the other; of one reply, with the shard whose it is."""
    lines = payload.decode(errors="replace").splitlines()
    if shard and len(lines) != 1:
        yield Piece(shard, -1)
        return
    for line in lines:
        words = line.split()
        ours = len(words) == 3 and words[0] == request and words[2].isdigit() and shard in ("", words[1])
        yield Piece(words[1], int(words[2])) if ours else Piece(shard or "?", -1)


def metrics(text: str, pool: str | None = None) -> dict[str, float]:
    """Of `/metrics`: the gauges and counters of scatter/gather by name, over all pools unless one is named."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("retinue_scattergather_") and (pool is None or f'pool="{pool}"' in line):
            series, _, value = line.rpartition(" ")
            name = series.partition("{")[0].removeprefix("retinue_scattergather_")
            found[name] = found.get(name, 0.0) + float(value)
    return found
