"""The server's reasons and the contract's are the same words."""

from __future__ import annotations

from retinue.error.v1 import error_reason_pb2
from retinue_server.runtime.errors import Reason


def test_the_servers_reasons_are_those_of_the_contract() -> None:
    contract = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118 - no dict
    assert {reason.value for reason in Reason} == contract - {"UNSPECIFIED"}
