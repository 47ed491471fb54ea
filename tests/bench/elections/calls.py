"""Retinue on SQLite beside etcd called directly: the same thing by turns, from one blocking client in Python."""

from __future__ import annotations

import queue
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from bench.elections.candidates import ELECTION, PATIENCE, seconds
from bench.elections.engines import store
from bench.elections.players import Figures, times
from retinue.leaderelection.v1 import leaderelection_service_pb2 as api
from retinue.leaderelection.v1.leaderelection_service_pb2_grpc import LeaderElectionServiceStub
from retinue_server.leaderelection.engines.etcd import rpc_pb2
from retinue_server.leaderelection.engines.etcd.rpc_pb2_grpc import KVStub, LeaseStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

DIRECT = "etcd, called directly"
_KEY = b"bench/election"
_TTL = 60
_WARM_UP = 20


@contextmanager
def _both(cell: str) -> Iterator[tuple[grpc.Channel, grpc.Channel]]:
    """Channels to a server with SQLite, and to an etcd."""
    with ExitStack() as stack:
        ours = stack.enter_context(store("sqlite", cell)).serve("one").address
        theirs = stack.enter_context(store("etcd", cell)).address
        yield (
            stack.enter_context(grpc.insecure_channel(ours)),
            stack.enter_context(grpc.insecure_channel(theirs)),
        )


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    answer = call()
    return time.perf_counter() - began, answer


def acquire(name: str, count: int) -> dict[str, Figures]:
    """A leadership that is taken and given up."""
    with _both("acquire") as (ours, theirs):
        stub, kv, lease = LeaderElectionServiceStub(ours), KVStub(theirs), LeaseStub(theirs)
        id_ = lease.LeaseGrant(rpc_pb2.LeaseGrantRequest(TTL=_TTL)).ID
        found = [(_ours(stub), _theirs(kv, id_)) for _ in range(count + _WARM_UP)][_WARM_UP:]
    return {name: _figures([one for one, _ in found]), DIRECT: _figures([two for _, two in found])}


def _figures(found: list[tuple[float, float]]) -> Figures:
    """Of acquiring, and of that with giving up."""
    both = {"both_p50_ms": times([sum(pair) for pair in found])["p50_ms"]}
    return times([taken for taken, _ in found], "acquire_") | both


def _ours(stub: Any) -> tuple[float, float]:
    request = api.TryAcquireRequest(election_id=ELECTION, candidate_id="candidate")
    taking, answer = _timed(lambda: stub.TryAcquire(request, timeout=PATIENCE))
    assert answer.acquired, answer
    given = api.ResignRequest(session_id=answer.leadership.session_id, token=answer.leadership.token)
    giving, answer = _timed(lambda: stub.Resign(given, timeout=PATIENCE))
    assert answer.released, answer
    return taking, giving


def _theirs(kv: Any, lease: int) -> tuple[float, float]:
    is_free = rpc_pb2.Compare(result=rpc_pb2.Compare.EQUAL, target=rpc_pb2.Compare.CREATE, key=_KEY, create_revision=0)
    put = rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=_KEY, value=b"candidate", lease=lease))
    request = rpc_pb2.TxnRequest(compare=[is_free], success=[put])
    taking, answer = _timed(lambda: kv.Txn(request, timeout=PATIENCE))
    assert answer.succeeded, answer
    drop = rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=_KEY))
    gone = rpc_pb2.TxnRequest(success=[drop])
    giving, answer = _timed(lambda: kv.Txn(gone, timeout=PATIENCE))
    assert answer.succeeded, answer
    return taking, giving


class _Line:
    """A stream of requests and answers, from a thread that blocks."""

    def __init__(self, method: Any) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call = method(iter(self._requests.get, None), timeout=10 * PATIENCE)

    def say(self, request: Any) -> Any:
        self._requests.put(request)
        return next(self.call)

    def close(self) -> None:
        self._requests.put(None)
        self.call.cancel()


def keep_alive(name: str, count: int) -> dict[str, Figures]:
    """A leadership that is kept by a message."""
    with _both("keep") as (channel, etcd), ExitStack() as stack:
        ours, theirs = _Line(LeaderElectionServiceStub(channel).Campaign), _Line(LeaseStub(etcd).LeaseKeepAlive)
        stack.callback(ours.close)
        stack.callback(theirs.close)
        start = api.CampaignStart(election_id=ELECTION, candidate_id="candidate", app_lease_duration=seconds(5))
        assert ours.say(api.CampaignRequest(start=start)).HasField("elected")
        id_ = LeaseStub(etcd).LeaseGrant(rpc_pb2.LeaseGrantRequest(TTL=_TTL)).ID
        found = [(_beat(ours, number), _kept(theirs, id_)) for number in range(1, count + _WARM_UP)][_WARM_UP:]
    return {name: times([one for one, _ in found]), DIRECT: times([two for _, two in found])}


def _beat(line: _Line, sequence: int) -> float:
    heartbeat = api.CampaignRequest(heartbeat=api.CampaignHeartbeat(sequence=sequence))
    took, answer = _timed(lambda: line.say(heartbeat))
    assert answer.heartbeat_ack.sequence == sequence, answer
    return took


def _kept(line: _Line, lease: int) -> float:
    took, answer = _timed(lambda: line.say(rpc_pb2.LeaseKeepAliveRequest(ID=lease)))
    assert answer.TTL == _TTL, answer
    return took
