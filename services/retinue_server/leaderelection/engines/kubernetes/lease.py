"""What a Lease says, and what it becomes. No I/O.

The spec is as client-go leaves and expects it. A change by somebody who does not know the annotations (client-go) shows
in the spec's holder and renewal time, which then differ from what the annotations say: it was a term of its own, which
nobody has a token of.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from retinue_server.leaderelection.engine import Claim, EndReason, Hold, Record, Term

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EPOCH = "leaderelection.retinue/epoch"
TERM = "leaderelection.retinue/term"
TERMS = "leaderelection.retinue/terms"
TERMS_KEPT = 16
"""Every renewal writes the whole object, so it is kept small; the contract promises 16."""

_DEFAULT_LEASE_S = 15
"""Of a holder who says nothing: client-go's default."""


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the annotation TERM says of the present term."""

    holder: str = ""
    """As in the spec when this was written."""
    renew_time: str = ""
    """Likewise."""
    session_id: str = ""
    value: str = ""
    lease_ms: int = 0
    release_delay_ms: int = 0
    wait_ms: int = 0
    acquire_ms: int = 0
    step_down: bool = False


class Past(msgspec.Struct, frozen=True, array_like=True):
    """A term in the annotation TERMS."""

    epoch: int
    candidate_id: str
    acquire_ms: int
    end_ms: int | None = None
    reason: int = 0


class Lease:
    """One Lease; it is never changed, but makes changed ones. Raises ValueError if its annotations were spoiled."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self._meta: Mapping[str, Any] = body.get("metadata") or {}
        self._spec: Mapping[str, Any] = body.get("spec") or {}
        notes = self._meta.get("annotations") or {}
        self.name = str(self._meta.get("name", ""))
        self.version = str(self._meta.get("resourceVersion", ""))
        self.domain = f"kubernetes-{self._meta.get('uid', '')}"
        self.holder: str = self._spec.get("holderIdentity") or ""
        self._noted = int(notes.get(EPOCH, 0))
        self._told = msgspec.json.decode(notes.get(TERM, "{}"), type=Told)
        self._terms: list[Past] = msgspec.json.decode(notes.get(TERMS, "[]"), type=list[Past])

    @classmethod
    def new(cls, name: str) -> Lease:
        """One that does not exist yet."""
        return cls({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}, "spec": {}})

    @property
    def _is_foreign(self) -> bool:
        """Whether somebody else led since Retinue wrote last."""
        return (self._told.holder, self._told.renew_time) != (self.holder, self._spec.get("renewTime") or "")

    @property
    def epoch(self) -> int:
        """The token of the present term or of the last one; that of a foreign one is skipped. 0 = never led."""
        noted = max(self._noted, int(self._spec.get("leaseTransitions") or 0))  # the latter may outlive annotations
        return noted + 1 if self._is_foreign else noted

    def record(self) -> Record | None:
        """As the port has it; None before the first claim."""
        if not self.epoch:
            return None
        told = Told(lease_ms=self._foreign_lease_ms()) if self._is_foreign else self._told
        return Record(
            election_id=self.name,
            domain=self.domain,
            epoch=self.epoch,
            version=self.version,
            candidate_id=self.holder,
            session_id=told.session_id,
            value=told.value,
            lease_ms=told.lease_ms,
            release_delay_ms=told.release_delay_ms,
            acquire_ms=told.acquire_ms,
            step_down=told.step_down,
        )

    def _foreign_lease_ms(self) -> int:
        return 1000 * int(self._spec.get("leaseDurationSeconds") or _DEFAULT_LEASE_S)

    @property
    def wait_ms(self) -> int:
        """What the present leader waits before it acts."""
        return self._told.wait_ms

    def is_held_by(self, hold: Hold) -> bool:
        """Whether that term is the present one."""
        return self.is_led_by(hold.session_id) and hold.epoch == self.epoch

    def is_led_by(self, session_id: str) -> bool:
        """Whether that session leads."""
        return bool(self.holder) and not self._is_foreign and self._told.session_id == session_id

    def is_free(self, watched: str | None) -> bool:
        """Whether somebody may take it who has seen that version unchanged for the whole lease."""
        return not self.holder or self.version == watched

    def terms(self, before: int | None, limit: int) -> Sequence[Term]:
        """Past and present ones, the latest first."""
        known = [past for past in reversed(self._terms) if before is None or past.epoch < before]
        return [
            Term(past.epoch, self.domain, past.candidate_id, past.acquire_ms, past.end_ms, EndReason(past.reason))
            for past in known[:limit]
        ]

    # What it becomes

    def claimed(self, claim: Claim) -> Lease:
        """A new term."""
        epoch = self.epoch + 1
        told = Told(
            session_id=claim.session_id,
            value=claim.value,
            lease_ms=claim.lease_ms,
            release_delay_ms=claim.release_delay_ms,
            wait_ms=self._told.release_delay_ms if self.holder and not self._is_foreign else 0,
            acquire_ms=claim.wall_ms,
        )
        terms = [*self._ended(EndReason.EXPIRED, claim.wall_ms), Past(epoch, claim.candidate_id, claim.wall_ms)]
        spec = {
            "holderIdentity": claim.candidate_id,
            "leaseDurationSeconds": -(-claim.lease_ms // 1000),
            "acquireTime": _now(),
            "leaseTransitions": epoch,
        }
        return self._become(told, spec, epoch, terms)

    def renewed(self, lease_ms: int | None = None) -> Lease:
        """The lease begins again."""
        length = self._told.lease_ms if lease_ms is None else lease_ms
        return self._become(replace(self._told, lease_ms=length), {"leaseDurationSeconds": -(-length // 1000)})

    def released(self, reason: EndReason, wall_ms: int) -> Lease:
        """Nobody leads; as client-go leaves it."""
        spec = {"holderIdentity": "", "leaseDurationSeconds": 1, "acquireTime": _now()}
        return self._become(Told(), spec, terms=self._ended(reason, wall_ms))

    def proclaimed(self, value: str) -> Lease:
        """With another value; the lease does not begin again."""
        return self._become(replace(self._told, value=value), None)

    def asked_to_step_down(self) -> Lease:
        """Marked; the lease does not begin again."""
        return self._become(replace(self._told, step_down=True), None)

    def _ended(self, reason: EndReason, wall_ms: int) -> list[Past]:
        if not self._terms or self._terms[-1].end_ms is not None:
            return self._terms
        return [*self._terms[:-1], _over(self._terms[-1], reason, wall_ms)]

    def _become(
        self, told: Told, spec: Mapping[str, Any] | None, epoch: int | None = None, terms: list[Past] | None = None
    ) -> Lease:
        after = dict(self._spec)
        if spec is not None:
            after |= {**spec, "renewTime": _now()}
        told = replace(told, holder=after.get("holderIdentity") or "", renew_time=after.get("renewTime") or "")
        notes = {
            **(self._meta.get("annotations") or {}),
            EPOCH: str(self.epoch if epoch is None else epoch),
            TERM: msgspec.json.encode(told).decode(),
            TERMS: msgspec.json.encode((self._terms if terms is None else terms)[-TERMS_KEPT:]).decode(),
        }
        meta = {key: part for key, part in self._meta.items() if key != "managedFields"}
        return Lease({**self.body, "metadata": {**meta, "annotations": notes}, "spec": after})


def _over(past: Past, reason: EndReason, wall_ms: int) -> Past:
    return replace(past, end_ms=wall_ms, reason=int(reason))


def _now() -> str:
    """As Kubernetes writes a MicroTime."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
