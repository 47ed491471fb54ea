"""Elections in memory: one process, lost with it. What the other stores are compared with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from retinue_server.leaderelection.engine import (
    TERMS_KEPT,
    Capabilities,
    Claim,
    EndReason,
    Granted,
    Hold,
    Record,
    Refused,
    Scope,
    Term,
)


def boot_ms() -> int:
    """The boot clock."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class MemoryEngine:
    """See engine.Engine."""

    capabilities = Capabilities("memory", Scope.PROCESS)

    def __init__(self, now_ms: Callable[[], int] = boot_ms) -> None:
        self._now_ms = now_ms
        self._domain = f"memory-{os.urandom(8).hex()}"
        self._records: dict[str, Record] = {}
        self._deadlines: dict[str, int] = {}
        self._terms: dict[str, list[Term]] = {}
        self._versions = 0
        self._told: Callable[[str], None] = lambda _: None
        self._watched: set[str] = set()

    async def start(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        """Nothing to do."""

    def listen(self, told: Callable[[str], None]) -> None:
        self._told = told

    def watch(self, election_id: str) -> None:
        self._watched.add(election_id)

    def unwatch(self, election_id: str) -> None:
        self._watched.discard(election_id)

    async def claim(self, claim: Claim, watched: str | None = None) -> Granted | Refused:
        before = await self.read(claim.election_id)
        if before is not None and before.session_id == claim.session_id:
            return Granted(self._put(replace(before, lease_ms=claim.lease_ms), renew=True))
        held = before is not None and bool(before.candidate_id)
        if before is not None and held and before.left_ms and before.version != watched:
            return Refused(before)
        if before is not None and held:
            self._end(before, EndReason.EXPIRED, claim.wall_ms)
        record = self._put(_begun(claim, self._domain, before.epoch + 1 if before else 1), renew=True)
        self._terms.setdefault(claim.election_id, []).append(_term(record))
        del self._terms[claim.election_id][:-TERMS_KEPT]
        self._changed(claim.election_id)
        return Granted(record, before.release_delay_ms if before is not None and held else 0)

    async def withdraw(self, election_id: str, session_id: str) -> None:
        """There is no line."""

    async def renew(self, holds: Sequence[Hold]) -> Sequence[Record | None]:
        return [self._put(record, renew=True) if (record := self._held(hold)) else None for hold in holds]

    async def release(self, hold: Hold, reason: EndReason, wall_ms: int) -> bool:
        record = self._held(hold)
        if record is None:
            return False
        self._end(record, reason, wall_ms)
        self._put(replace(record, candidate_id="", session_id="", value="", step_down=False))
        self._changed(hold.election_id)
        return True

    async def proclaim(self, hold: Hold, value: str) -> Record | None:
        return self._update(self._held(hold), value=value)

    async def ask_step_down(self, election_id: str, epoch: int) -> Record | None:
        record = await self.read(election_id)
        leads = record is not None and record.epoch == epoch and bool(record.candidate_id)
        return self._update(record if leads else None, step_down=True)

    async def read(self, election_id: str) -> Record | None:
        record = self._records.get(election_id)
        if record is None:
            return None
        return replace(record, left_ms=max(self._deadlines[election_id] - self._now_ms(), 0))

    async def records(self, after: str, limit: int) -> Sequence[Record]:
        names = sorted(name for name in self._records if name > after)[:limit]
        return [record for name in names if (record := await self.read(name)) is not None]

    async def terms(self, election_id: str, before: int | None, limit: int) -> Sequence[Term]:
        known = reversed(self._terms.get(election_id, []))
        return [term for term in known if before is None or term.epoch < before][:limit]

    def _held(self, hold: Hold) -> Record | None:
        record = self._records.get(hold.election_id)
        return record if record and (record.session_id, record.epoch) == (hold.session_id, hold.epoch) else None

    def _update(self, record: Record | None, **changes: object) -> Record | None:
        if record is None:
            return None
        changed = self._put(replace(record, **changes))
        self._changed(record.election_id)
        return changed

    def _put(self, record: Record, *, renew: bool = False) -> Record:
        self._versions += 1
        if renew:
            self._deadlines[record.election_id] = self._now_ms() + record.lease_ms
        left = max(self._deadlines[record.election_id] - self._now_ms(), 0)
        stored = replace(record, version=str(self._versions), left_ms=left)
        self._records[record.election_id] = stored
        return stored

    def _end(self, record: Record, reason: EndReason, wall_ms: int) -> None:
        terms = self._terms[record.election_id]
        terms[-1] = replace(terms[-1], end_ms=wall_ms, reason=reason)

    def _changed(self, election_id: str) -> None:
        if election_id in self._watched:
            self._told(election_id)


def _begun(claim: Claim, domain: str, epoch: int) -> Record:
    return Record(
        election_id=claim.election_id,
        domain=domain,
        epoch=epoch,
        version="",
        candidate_id=claim.candidate_id,
        session_id=claim.session_id,
        value=claim.value,
        lease_ms=claim.lease_ms,
        release_delay_ms=claim.release_delay_ms,
        acquire_ms=claim.wall_ms,
    )


def _term(record: Record) -> Term:
    return Term(record.epoch, record.domain, record.candidate_id, record.acquire_ms)
