"""What a request may ask: every violation is named, nothing is guessed."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from retinue_server.runtime.errors import FailedPrecondition, InvalidArgument, NotFound, Reason, Violation
from retinue_server.scattergather.core import rules

if TYPE_CHECKING:
    from collections.abc import MutableSequence, Sequence

    from retinue_server.scattergather.core.pool import Member, Topology
    from retinue_server.scattergather.core.requests import Ask, Policy

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_ROUTE_KEYS = 1000
MAX_HASHES = 200_000
"""Route keys times shards: the loop is held for that long, a tenth of a second."""
MAX_PAYLOAD_BYTES = 3 * 1024 * 1024
PAGE_SIZES = 100, 20
"""The largest and the usual, of ListRecentScatters."""
POOL_PAGE_SIZES = 1000, 100


def check_pool_id(pool_id: str, violations: MutableSequence[Violation], field: str = "pool_id") -> None:
    """A name that a pool can have."""
    if not IDENTIFIER.fullmatch(pool_id):
        violations.append(Violation(field, "must be 1 to 128 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"))


def check_policy(policy: Policy, violations: MutableSequence[Violation]) -> None:
    """Ranges."""
    if not 0 <= policy.min_coverage <= 1 or math.isnan(policy.min_coverage):
        violations.append(Violation("policy.min_coverage", "must be from 0 to 1"))
    for name in ("min_shards", "first_k"):
        if getattr(policy, name) < 0:
            violations.append(Violation(f"policy.{name}", "must be 0 or more"))


def page_size(asked: int, sizes: tuple[int, int], violations: MutableSequence[Violation]) -> int:
    """The size of a page."""
    most, usual = sizes
    if not 0 <= asked <= most:
        violations.append(Violation("page_size", f"must be from 0 to {most}"))
    return asked or usual


def refuse(violations: Sequence[Violation], what: str = "scatter") -> None:
    """Raises what is wrong."""
    if violations:
        raise InvalidArgument(f"cannot {what}: {violations[0].field} {violations[0].description}", list(violations))


def unknown_pool(pool_id: str) -> NotFound:
    """POOL_NOT_FOUND."""
    return NotFound(
        f"cannot find pool {pool_id}: the pool file has none of that name",
        reason=Reason.POOL_NOT_FOUND,
        pool_id=pool_id,
    )


def select(topology: Topology, ask: Ask, violations: MutableSequence[Violation]) -> Sequence[Member]:
    """The shards that are asked, in the pool's order; raises what keeps the request from them."""
    if not topology.members:
        refuse(violations)
        raise FailedPrecondition(
            f"cannot scatter: pool {ask.pool_id} has no shards", reason=Reason.POOL_EMPTY, pool_id=ask.pool_id
        )
    _check_selectors(topology, ask, violations)
    refuse(violations)
    wanted = _wanted(topology, ask)
    members = topology.members if wanted is None else [m for m in topology.members if m.shard.shard_id in wanted]
    _check_fit(members, ask, violations)
    refuse(violations)
    if not topology.pool.idempotent and not (ask.policy.strict and ask.policy.first_k == 0):
        raise FailedPrecondition(
            f"cannot answer in part: pool {ask.pool_id} is not idempotent",
            reason=Reason.POOL_NOT_IDEMPOTENT,
            pool_id=ask.pool_id,
        )
    return members


def _check_selectors(topology: Topology, ask: Ask, violations: MutableSequence[Violation]) -> None:
    if ask.route_keys and ask.shard_ids:
        violations.append(Violation("shard_ids", "must be empty where route_keys are given"))
    most = max(1, min(MAX_ROUTE_KEYS, MAX_HASHES // len(topology.members)))
    if len(ask.route_keys) > most:
        violations.append(Violation("route_keys", f"must be at most {most} in this pool"))
    known = {member.shard.shard_id for member in topology.members}
    _check_shards(ask.shard_ids, "shard_ids", "", known, violations)
    if ask.input_ids is not None:
        _check_shards(ask.input_ids, "shard_inputs.inputs", ".shard_id", known, violations)
        if not ask.input_ids:
            violations.append(Violation("shard_inputs.inputs", "must be one or more"))


def _check_shards(
    ids: Sequence[str], field: str, inner: str, known: set[str], violations: MutableSequence[Violation]
) -> None:
    if len(ids) > len(known):  # each of a million names need not be looked at
        violations.append(Violation(field, f"must be at most {len(known)}, the pool's shards"))
        return
    seen: set[str] = set()
    for index, shard_id in enumerate(ids):
        if shard_id not in known:
            violations.append(Violation(f"{field}[{index}]{inner}", "must be a shard of the pool"))
        elif shard_id in seen:
            violations.append(Violation(f"{field}[{index}]{inner}", "must not repeat an earlier one"))
        seen.add(shard_id)


def _wanted(topology: Topology, ask: Ask) -> set[str] | None:
    """The names of the selected shards; None = all."""
    if ask.shard_ids:
        return set(ask.shard_ids)
    if ask.route_keys:
        ids = [member.shard.shard_id for member in topology.members]
        return {rules.route(key, ids) for key in ask.route_keys}
    return set(ask.input_ids) if ask.input_ids is not None else None


def _check_fit(members: Sequence[Member], ask: Ask, violations: MutableSequence[Violation]) -> None:
    """What depends on the selection."""
    selected = {member.shard.shard_id for member in members}
    if ask.input_ids is not None and set(ask.input_ids) != selected:
        violations.append(Violation("shard_inputs.inputs", "must be one for each selected shard"))
    for name in ("min_shards", "first_k"):
        if getattr(ask.policy, name) > len(members):
            violations.append(Violation(f"policy.{name}", f"must be at most {len(members)}, the selected shards"))


def check_depth(ask: Ask, here: str) -> None:
    """Refuses loops, and trees that are too deep."""
    if here not in ask.path and len(ask.path) < rules.MAX_DEPTH:
        return
    why = "this root is above itself" if here in ask.path else f"{len(ask.path)} roots are above this one"
    raise FailedPrecondition(
        f"cannot scatter: {why}; mend the shards of the pools: {' > '.join(ask.path)}",
        reason=Reason.SCATTER_TOO_DEEP,
        path=" > ".join(ask.path),
    )
