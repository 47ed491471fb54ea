"""What servers log, and what they need not say."""

from __future__ import annotations

import importlib
import logging

import pytest

from retinue_server.runtime import logs

GoneCaller: type[Exception] = importlib.import_module("grpc._cython.cygrpc").ExecuteBatchError


@pytest.mark.parametrize(("kind", "logged"), [(GoneCaller, False), (ValueError, True), (None, True)])
def test_callers_who_went_while_they_were_answered_are_no_news(kind: type[Exception] | None, *, logged: bool) -> None:
    error = kind("it failed") if kind else None
    told = {"exc_info": (kind, error, None) if kind else None, "levelno": logging.ERROR}
    assert logs.is_no_gone_caller(logging.makeLogRecord(told)) == logged
