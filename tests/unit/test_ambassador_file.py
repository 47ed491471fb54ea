"""The file of upstreams, as the server and the command read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from retinue.ambassador.v1 import policy_pb2
from retinue.cli.upstreamfile import parse
from retinue_server.ambassador import upstreamfile
from retinue_server.ambassador.core.spec import RetryCondition

FILE = """
upstreams:
- upstream_id: web
  protocol: HTTP
  dns: {hostname: web, port: 80}
  policy:
    retry: {%s: [RESET, GATEWAY_ERROR], attempts: 2}
"""


@pytest.mark.parametrize("key", ["on", "'on'"])
def test_the_conditions_of_retries_are_read_though_yaml_takes_their_name_for_true(tmp_path: Path, key: str) -> None:
    path = tmp_path / "upstreams.yaml"
    path.write_text(FILE % key)
    (spec,) = upstreamfile.read(path)
    assert spec.policy.retry is not None
    assert set(spec.policy.retry.on) == {RetryCondition.RESET, RetryCondition.GATEWAY_ERROR}
    (said,) = parse(path.read_text(), path.name)
    assert list(said.policy.retry.on) == [
        policy_pb2.RETRY_CONDITION_RESET,
        policy_pb2.RETRY_CONDITION_GATEWAY_ERROR,
    ]
