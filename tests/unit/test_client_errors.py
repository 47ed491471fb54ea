"""Statuses become typed errors."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from retinue.client import errors
from retinue.client.channel import backoff, is_transient
from retinue.workqueue.v1.task_pb2 import ItemStatus


class Raised:
    """What grpc raises, as far as we look at it."""

    def __init__(self, code: grpc.StatusCode, *details: Any) -> None:
        self._code = code
        packed = [any_pb2.Any() for _ in details]
        for into, detail in zip(packed, details, strict=True):
            into.Pack(detail)
        status = status_pb2.Status(code=code.value[0], message="cannot do it", details=packed)
        self._trailer = (("other", "x"), ("grpc-status-details-bin", status.SerializeToString()))

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "cannot do it"

    def trailing_metadata(self) -> Any:
        return self._trailer


def test_every_detail_of_a_status_is_in_the_error() -> None:
    info = error_details_pb2.ErrorInfo(reason="INVALID_FIELD", domain="retinue", metadata={"omitted": "3"})
    wrong = error_details_pb2.BadRequest.FieldViolation(field="tasks[0].priority", description="must be small")
    bad = error_details_pb2.BadRequest(field_violations=[wrong])
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=250_000_000))
    error = errors.from_rpc_error(Raised(grpc.StatusCode.INVALID_ARGUMENT, bad, info, retry))
    assert type(error) is errors.InvalidArgument
    assert (error.reason, error.metadata, error.retry_after) == ("INVALID_FIELD", {"omitted": "3"}, 0.25)
    assert error.violations == (("tasks[0].priority", "must be small"),)
    assert str(error) == "cannot do it [INVALID_FIELD] (tasks[0].priority: must be small)"


def test_a_status_without_details_is_typed_by_its_code() -> None:
    error = errors.from_rpc_error(Raised(grpc.StatusCode.UNAVAILABLE))
    assert type(error) is errors.Unavailable
    assert (error.reason, error.retry_after, error.violations) == ("", None, ())


def test_a_lost_lease_has_a_class_of_its_own_wherever_it_comes_from() -> None:
    info = error_details_pb2.ErrorInfo(reason="LEASE_LOST", domain="retinue")
    assert isinstance(errors.from_rpc_error(Raised(grpc.StatusCode.FAILED_PRECONDITION, info)), errors.LeaseLost)
    item = errors.from_item_status(ItemStatus(code=9, reason="LEASE_LOST", message="gone"))
    assert isinstance(item, errors.LeaseLost)
    assert item.message == "gone"


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_code_has_an_error(code: grpc.StatusCode) -> None:
    assert errors.from_rpc_error(Raised(code)).code is code


def test_only_what_may_pass_by_itself_is_tried_again() -> None:
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1))
    assert is_transient(errors.from_rpc_error(Raised(grpc.StatusCode.UNAVAILABLE)))
    assert is_transient(errors.from_rpc_error(Raised(grpc.StatusCode.RESOURCE_EXHAUSTED, retry)))
    assert not is_transient(errors.from_rpc_error(Raised(grpc.StatusCode.RESOURCE_EXHAUSTED)))
    assert not is_transient(errors.from_rpc_error(Raised(grpc.StatusCode.DEADLINE_EXCEEDED)))


def test_waits_grow_to_two_seconds_and_are_spread() -> None:
    waits = [wait for wait, _ in zip(backoff(), range(20), strict=False)]
    assert 0.025 <= waits[0] <= 0.05
    assert all(1 <= wait <= 2 for wait in waits[7:])
    assert len(set(waits)) == 20
