"""What leader election counts, in Prometheus' terms; names and labels are part of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.runtime.metrics import Family, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable

    from retinue_server.leaderelection.core.elections import Elections


def families(elections: Elections) -> Iterable[Family]:
    """Who leads here, who stands, and what ended."""
    leading, valid, standing = [], [], []
    for name, contest in elections.contests.items():
        if contest.idle:
            continue
        label = {"election": name}
        leading.append(Sample(label, int(elections.leads_here(name))))
        valid.append(Sample(label, elections.valid_ms(name) / 1000))
        standing.append(Sample(label, len(contest.line)))
    ended = [Sample({"reason": reason.name.lower()}, count) for reason, count in elections.ended.items()]
    return (
        Family("retinue_leaderelection_leading", "1 while an app of this server leads.", "gauge", leading),
        Family("retinue_leaderelection_valid_seconds", "How long it leads if nothing is renewed.", "gauge", valid),
        Family("retinue_leaderelection_sessions", "Candidates, the leader included.", "gauge", standing),
        Family("retinue_leaderelection_observers", "Open Observe calls.", "gauge", [Sample({}, elections.observers)]),
        Family("retinue_leaderelection_terms_began_total", "Terms won.", "counter", [Sample({}, elections.elected)]),
        Family("retinue_leaderelection_terms_ended_total", "Terms ended, by reason.", "counter", ended),
        Family(
            "retinue_leaderelection_renew_seconds_total",
            "Time spent renewing.",
            "counter",
            [Sample({}, elections.renew_s)],
        ),
        Family("retinue_leaderelection_renewals_total", "Renewals.", "counter", [Sample({}, elections.renewals)]),
    )
