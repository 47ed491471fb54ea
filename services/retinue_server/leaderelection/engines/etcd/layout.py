"""Where elections are in etcd, what stands there, and the steps of its transactions.

    PREFIX/ELECTION/LEASE-SESSION  a place in line, of a session under its server's lease (both in hexadecimal); its
                                   value is what the session proclaims. The place with the lowest create revision leads,
                                   as `etcdctl elect --listen PREFIX/ELECTION` shows
    PREFIX/.record/ELECTION        the latest term; under no lease, since the next leader needs it
    PREFIX/.terms/ELECTION/NN      terms that ended, the latest of them in a ring

No election's name begins with a dot.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from retinue_server.leaderelection.engine import TERMS_KEPT, Claim, EndReason, Hold, Record, Term
from retinue_server.leaderelection.engines.etcd import kv_pb2, rpc_pb2

_readings = itertools.count()


class Stored(msgspec.Struct, frozen=True, omit_defaults=True):
    """The latest term of an election."""

    key: str
    """Of its leader, without the prefix."""
    number: int
    """How many terms there were before."""
    candidate_id: str
    session_id: str
    lease_ms: int
    acquire_ms: int
    epoch: int = 0
    """0 = the revision of the write that stored this."""
    release_delay_ms: int = 0
    owed_ms: int = 0
    """The release delay of the term before, if that ran out."""
    step_down: bool = False
    ended: bool = False


class Past(msgspec.Struct, frozen=True, omit_defaults=True):
    """A term that ended."""

    epoch: int
    candidate_id: str
    acquire_ms: int
    end_ms: int
    reason: int


class Seen(NamedTuple):
    """An election as one reading found it."""

    election_id: str
    domain: str
    revision: int
    first: kv_pb2.KeyValue | None
    """Of the line."""
    stored: Stored | None
    mod: int
    """The revision of what is stored; 0 = nothing is."""
    leads: bool
    """Whether the term that is stored has its key, first in line."""
    own: kv_pb2.KeyValue | None
    """The key that was asked for."""

    def is_of(self, hold: Hold) -> bool:
        """Whether that term is the latest and has not been ended."""
        stored = self.stored
        return stored is not None and not stored.ended and (stored.session_id, stored.epoch) == hold[1:]

    def record(self, live_ms: int) -> Record | None:
        """As the port has it; what is left of a lease whose key is there is at least told to be so much."""
        stored = self.stored
        if stored is None:
            return None
        record = Record(
            election_id=self.election_id,
            domain=self.domain,
            epoch=stored.epoch,
            version=f"{self.revision}.{next(_readings)}",
            lease_ms=stored.lease_ms,
            release_delay_ms=stored.release_delay_ms,
            acquire_ms=stored.acquire_ms,
            left_ms=0,
        )
        if stored.ended:
            return record
        return replace(
            record,
            candidate_id=stored.candidate_id,
            session_id=stored.session_id,
            value=self.first.value.decode() if self.leads and self.first is not None else "",
            step_down=stored.step_down,
            left_ms=max(live_ms, stored.lease_ms) if self.leads else 0,
        )


class Step(NamedTuple):
    """What must hold, and what is then written."""

    holds: list[rpc_pb2.Compare]
    writes: list[rpc_pb2.RequestOp]


class Layout:
    """The keys under one prefix, and what is done with them."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._at = f"{prefix}/"

    @property
    def everything(self) -> tuple[bytes, bytes]:
        """The range of all keys."""
        return self._range("")

    def place(self, election_id: str, lease_id: int, session_id: str) -> str:
        """A session's key in line, without the prefix; it does not betray the session's name."""
        return f"{election_id}/{lease_id:x}{_mark(session_id)}"

    def place_of(self, kv: kv_pb2.KeyValue, session_id: str) -> str:
        """The key without the prefix, if it is a place of that session; else empty."""
        name = kv.key.decode(errors="replace")
        return name.removeprefix(self._at) if name.endswith(_mark(session_id)) else ""

    def touched(self, event: kv_pb2.Event) -> str | None:
        """The election that a change may matter to; None for what is written beside other changes, and for a newcomer
        at the end of a line."""
        name = event.kv.key.decode(errors="replace").removeprefix(self._at)
        kind, _, rest = name.partition("/")
        if kind == ".record":
            return rest
        joined = event.type == kv_pb2.Event.PUT and event.kv.create_revision == event.kv.mod_revision
        return None if kind == ".terms" or joined else kind

    # Reading

    def look(self, election_id: str, own: str = "") -> list[rpc_pb2.RequestOp]:
        """The steps that `seen` reads from."""
        key, end = self._range(f"{election_id}/")
        ascending, created = rpc_pb2.RangeRequest.ASCEND, rpc_pb2.RangeRequest.CREATE
        first = rpc_pb2.RangeRequest(key=key, range_end=end, limit=1, sort_order=ascending, sort_target=created)
        steps = [_range(first), self._get(f".record/{election_id}")]
        return [*steps, self._get(own)] if own else steps

    def seen(self, election_id: str, header: rpc_pb2.ResponseHeader, answers: Sequence[rpc_pb2.ResponseOp]) -> Seen:
        """What `look` found."""
        first, record, own = (_only(answers[i]) if i < len(answers) else None for i in range(3))
        stored = msgspec.json.decode(record.value, type=Stored) if record is not None else None
        if stored is not None and record is not None and not stored.epoch:
            stored = replace(stored, epoch=record.mod_revision)
        leads = (
            first is not None
            and stored is not None
            and not stored.ended
            and (first.key, first.create_revision) == (self._key(stored.key), stored.epoch)
        )
        domain = f"etcd-{header.cluster_id:x}-{self.prefix}"
        mod = record.mod_revision if record is not None else 0
        return Seen(election_id, domain, header.revision, first, stored, mod, leads, own)

    def names(self, after: str, limit: int) -> rpc_pb2.RequestOp:
        """Reads the elections behind a name."""
        start, end = self._range(".record/")
        key = self._key(f".record/{after}\0") if after else start
        return _range(rpc_pb2.RangeRequest(key=key, range_end=end, limit=limit))

    def names_of(self, answer: rpc_pb2.ResponseOp) -> list[str]:
        """What `names` found."""
        start = len(self._key(".record/"))
        return [kv.key[start:].decode() for kv in answer.response_range.kvs]

    def past(self, election_id: str) -> rpc_pb2.RequestOp:
        """Reads the terms that ended."""
        key, end = self._range(f".terms/{election_id}/")
        return _range(rpc_pb2.RangeRequest(key=key, range_end=end))

    @staticmethod
    def terms(seen: Seen, answer: rpc_pb2.ResponseOp) -> list[Term]:
        """All terms that are known, the latest first."""
        past = [msgspec.json.decode(kv.value, type=Past) for kv in answer.response_range.kvs]
        terms = [
            Term(one.epoch, seen.domain, one.candidate_id, one.acquire_ms, one.end_ms, EndReason(one.reason))
            for one in past
        ]
        last = seen.stored
        if last is not None and not last.ended:
            terms.append(Term(last.epoch, seen.domain, last.candidate_id, last.acquire_ms))
        return sorted(terms, key=lambda term: term.epoch, reverse=True)

    # Writing

    def join(self, key: str, claim: Claim, lease_id: int) -> Step:
        """A place at the end of the line."""
        return Step([self._created(key, 0)], [self._put(key, claim.value.encode(), lease_id)])

    def begin(self, key: str, claim: Claim, lease_id: int, seen: Seen) -> Step:
        """The term of one who is first in line, or alone."""
        put = self._put(key, claim.value.encode(), lease_id)
        epoch = seen.own.create_revision if seen.own is not None else 0
        first = self._created(key, epoch) if epoch else self._nobody(seen.election_id)
        last = seen.stored
        ran_out = [self._ended(seen, EndReason.EXPIRED, claim.wall_ms)] if last is not None and not last.ended else []
        stored = Stored(
            key=key,
            number=last.number + 1 if last is not None else 0,
            candidate_id=claim.candidate_id,
            session_id=claim.session_id,
            lease_ms=claim.lease_ms,
            acquire_ms=claim.wall_ms,
            epoch=epoch,
            release_delay_ms=claim.release_delay_ms,
            owed_ms=last.release_delay_ms if last is not None and ran_out else 0,
        )
        return Step([first, self._unchanged(seen)], [put, self._store(seen, stored), *ran_out])

    def end(self, seen: Seen, reason: EndReason, wall_ms: int) -> Step:
        """The end of the term that is stored, and of its key."""
        last = _stored(seen)
        stored = replace(last, session_id="", step_down=False, ended=True)
        writes = [self._store(seen, stored), self._ended(seen, reason, wall_ms)]
        if not seen.leads:
            return Step([self._unchanged(seen)], writes)
        return Step([self._unchanged(seen), self._created(last.key, last.epoch)], [self.delete(last.key), *writes])

    def step_down(self, seen: Seen) -> Step:
        """The mark that the leader should step down."""
        last = _stored(seen)
        writes = [self._store(seen, replace(last, step_down=True))]
        return Step([self._unchanged(seen), self._created(last.key, last.epoch)], writes)

    def proclaim(self, key: str, epoch: int, value: str) -> Step:
        """Another value for a leader's key."""
        put = rpc_pb2.PutRequest(key=self._key(key), value=value.encode(), ignore_lease=True)
        return Step([self._created(key, epoch)], [rpc_pb2.RequestOp(request_put=put)])

    def delete(self, key: str) -> rpc_pb2.RequestOp:
        """Takes a place away, if it is there."""
        return rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=self._key(key)))

    def _ended(self, seen: Seen, reason: EndReason, wall_ms: int) -> rpc_pb2.RequestOp:
        last = _stored(seen)
        past = Past(last.epoch, last.candidate_id, last.acquire_ms, wall_ms, int(reason))
        return self._put(f".terms/{seen.election_id}/{last.number % TERMS_KEPT:02}", msgspec.json.encode(past))

    def _store(self, seen: Seen, stored: Stored) -> rpc_pb2.RequestOp:
        return self._put(f".record/{seen.election_id}", msgspec.json.encode(stored))

    def _put(self, key: str, value: bytes, lease_id: int = 0) -> rpc_pb2.RequestOp:
        put = rpc_pb2.PutRequest(key=self._key(key), value=value, lease=lease_id)
        return rpc_pb2.RequestOp(request_put=put)

    def _get(self, key: str) -> rpc_pb2.RequestOp:
        return _range(rpc_pb2.RangeRequest(key=self._key(key)))

    def _created(self, key: str, revision: int) -> rpc_pb2.Compare:
        target = rpc_pb2.Compare.CREATE
        return rpc_pb2.Compare(target=target, key=self._key(key), create_revision=revision)

    def _unchanged(self, seen: Seen) -> rpc_pb2.Compare:
        key = self._key(f".record/{seen.election_id}")
        return rpc_pb2.Compare(target=rpc_pb2.Compare.MOD, key=key, mod_revision=seen.mod)

    def _nobody(self, election_id: str) -> rpc_pb2.Compare:
        key, end = self._range(f"{election_id}/")
        return rpc_pb2.Compare(target=rpc_pb2.Compare.CREATE, key=key, range_end=end, create_revision=0)

    def _key(self, name: str) -> bytes:
        return f"{self._at}{name}".encode()

    def _range(self, name: str) -> tuple[bytes, bytes]:
        """All keys that begin with a name that ends with a slash, or all."""
        key = self._key(name)
        return key, key[:-1] + bytes([key[-1] + 1])


def _mark(session_id: str) -> str:
    return f"-{hashlib.sha256(session_id.encode()).hexdigest()[:16]}"


def _stored(seen: Seen) -> Stored:
    assert seen.stored is not None, "a term is there"
    return seen.stored


def _range(request: rpc_pb2.RangeRequest) -> rpc_pb2.RequestOp:
    return rpc_pb2.RequestOp(request_range=request)


def _only(answer: rpc_pb2.ResponseOp) -> kv_pb2.KeyValue | None:
    return answer.response_range.kvs[0] if answer.response_range.kvs else None
