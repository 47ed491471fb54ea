"""The table of counts: what is shown of a latency histogram, and as JSON."""

from __future__ import annotations

import pytest

from retinue.ambassador.v1 import stats_pb2 as pb
from retinue.cli.traffic import quantile, row


@pytest.mark.parametrize(
    ("counts", "share", "found"),
    [
        ([0, 0, 0], 0.5, None),
        ([10, 0, 0], 0.5, 0.001),
        ([10, 10, 0], 0.5, 0.001),
        ([1, 99, 0], 0.5, 0.01),
        ([98, 2, 0], 0.99, 0.01),
        ([0, 0, 5], 0.5, None),
    ],
)
def test_a_quantile_is_the_bound_of_its_bucket(counts: list[int], share: float, found: float | None) -> None:
    assert quantile(pb.LatencyHistogram(bounds_seconds=[0.001, 0.01], counts=counts), share) == found


def test_a_row_has_every_count_of_the_contract_as_a_number() -> None:
    said = row(pb.UpstreamStats(upstream_id="a", requests=1 << 40, endpoints=[pb.EndpointStats(address="x")]))
    names = {field.name for field in pb.UpstreamStats.DESCRIPTOR.fields} - {"latency"}
    assert said.keys() == names
    assert said["requests"] == 1 << 40
    assert said["endpoints"][0].keys() == {field.name for field in pb.EndpointStats.DESCRIPTOR.fields}
