"""Claims about what may be declared: every wrong field is named, in the words of the contract."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from retinue.ambassador.v1 import upstream_pb2 as pb
from retinue_server.ambassador import translate
from retinue_server.ambassador.core.limits import required
from retinue_server.ambassador.core.spec import Balancer, Protocol
from retinue_server.runtime.errors import InvalidArgument

HTTP = {"upstream_id": "it", "protocol": "PROTOCOL_HTTP", "static": {"endpoints": [{"address": "10.0.0.1:80"}]}}
RETRY = {"on": ["RETRY_CONDITION_RESET"]}


def upstream(**fields: Any) -> pb.Upstream:
    return json_format.ParseDict({**HTTP, **fields}, pb.Upstream())


def wrong(**fields: Any) -> set[str]:
    """The fields that are refused."""
    with pytest.raises(InvalidArgument) as refused:
        translate.Reader().upstream(upstream(**fields))
    return {violation.field.removeprefix("upstream.") for violation in refused.value.violations}


def test_defaults_are_filled_in() -> None:
    found = translate.Reader().upstream(upstream())
    assert found.policy.load_balancing.balancer is Balancer.ROUND_ROBIN
    assert (found.policy.timeouts.connect_s, found.policy.timeouts.request_s) == (5.0, None)
    assert found.policy.circuit_breaker.max_connections == 1024


@pytest.mark.parametrize(("protocol", "usual"), [("REDIS", Balancer.MAGLEV), ("MEMCACHED", Balancer.KETAMA)])
def test_sharded_protocols_have_their_own_defaults(protocol: str, usual: Balancer) -> None:
    found = translate.Reader().upstream(upstream(protocol=f"PROTOCOL_{protocol}"))
    assert (found.policy.load_balancing.balancer, found.policy.timeouts.request_s) == (usual, 1.0)


def test_what_is_declared_is_shown_as_it_was_with_its_defaults() -> None:
    said = upstream(
        policy={
            "retry": {**RETRY, "attempts": 2},
            "timeouts": {"request_duration": "2s", "per_try_duration": "0.5s"},
            "hedge": {"enabled": True},
            "splits": [
                {"upstream_id": "b", "percent": 20},
                {"upstream_id": "c", "header": {"name": "x", "value": "y"}},
            ],
            "load_balancing": {"balancer": "LOAD_BALANCER_RING_HASH", "header": "x-user"},
        },
        tls={"server_name": "a.example"},
    )
    once = translate.Reader().upstream(said)
    assert translate.Reader().upstream(translate.declared(once)) == once


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"upstream_id": "Cache"}, {"upstream_id"}),
        ({"upstream_id": "a-"}, {"upstream_id"}),
        ({"protocol": "PROTOCOL_UNSPECIFIED"}, {"protocol"}),
        ({"protocol": 99}, {"protocol"}),
        ({"static": {}}, {"static.endpoints"}),
        ({"static": {"endpoints": [{"address": "redis:80"}]}}, {"static.endpoints[0].address"}),
        ({"static": {"endpoints": [{"address": "10.0.0.1:80"}] * 2}}, {"static.endpoints[1].address"}),
        ({"static": {"endpoints": [{"address": "10.0.0.1:80", "weight": 1001}]}}, {"static.endpoints[0].weight"}),
        ({"listen": {"port": 70000}}, {"listen.port"}),
        (
            {"listen": {"unix_socket": {"path": "x", "mode": 4096}}},
            {"listen.unix_socket.path", "listen.unix_socket.mode"},
        ),
        ({"policy": {"hedge": {"enabled": True}}}, {"policy.hedge"}),
        ({"policy": {"hedge": {"enabled": True}, "retry": RETRY}}, {"policy.hedge"}),
        ({"policy": {"timeouts": {"per_try_duration": "1s"}}}, {"policy.timeouts.per_try_duration"}),
        ({"policy": {"timeouts": {"connect_duration": "0s"}}}, {"policy.timeouts.connect_duration"}),
        ({"policy": {"retry": {}}}, {"policy.retry.on"}),
        ({"policy": {"retry": {"on": ["RETRY_CONDITION_GRPC_INTERNAL"]}}}, {"policy.retry.on"}),
        ({"policy": {"retry": {**RETRY, "attempts": 11}}}, {"policy.retry.attempts"}),
        ({"policy": {"splits": [{"upstream_id": "it", "percent": 1}]}}, {"policy.splits[0].upstream_id"}),
        ({"policy": {"splits": [{"upstream_id": "b", "percent": 60}] * 2}}, {"policy.splits"}),
        ({"policy": {"splits": [{"upstream_id": "b"}]}}, {"policy.splits[0].percent"}),
        ({"policy": {"mirror": {"upstream_id": "it"}}}, {"policy.mirror.upstream_id"}),
        ({"policy": {"rate_limit": {}}}, {"policy.rate_limit.requests", "policy.rate_limit.burst"}),
        ({"policy": {"load_balancing": {"balancer": "LOAD_BALANCER_MAGLEV"}}}, {"policy.load_balancing.hash_on"}),
        ({"policy": {"load_balancing": {"header": "x"}}}, {"policy.load_balancing.hash_on"}),
        (
            {"policy": {"load_balancing": {"balancer": "LOAD_BALANCER_KETAMA"}}},
            {"policy.load_balancing.balancer", "policy.load_balancing.hash_on"},
        ),
        ({"policy": {"health_check": {}}}, {"policy.health_check.path"}),
        ({"policy": {"fault": {"abort_status": 200, "abort_percent": 1}}}, {"policy.fault.abort_status"}),
        ({"tls": {}}, {"tls.server_name"}),
        ({"tls": {"server_name": "a", "cert_file": "x"}}, {"tls.cert_file"}),
        ({"redis_auth": {"password_file": "x"}}, {"redis_auth", "redis_auth.password_file"}),
        ({"etag": "x", "status": {}}, {"etag", "status"}),
        (
            {"protocol": "PROTOCOL_TCP", "policy": {"retry": RETRY, "timeouts": {"request_duration": "1s"}}},
            {"policy.retry", "policy.timeouts.request_duration"},
        ),
        ({"protocol": "PROTOCOL_REDIS", "policy": {"mirror": {"upstream_id": "b"}}}, {"policy.mirror"}),
        (
            {"protocol": "PROTOCOL_REDIS", "policy": {"load_balancing": {"balancer": "LOAD_BALANCER_RANDOM"}}},
            {"policy.load_balancing.balancer"},
        ),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], named: set[str]) -> None:
    assert named <= wrong(**fields)


def test_each_violation_is_named_at_once() -> None:
    said = {"upstream_id": "", "listen": {"port": -1}, "policy": {"retry": {}, "rate_limit": {"burst": 1}}}
    assert {"upstream_id", "listen.port", "policy.retry.on", "policy.rate_limit.requests"} <= wrong(**said)


def test_no_discovery_is_named() -> None:
    said = pb.Upstream(upstream_id="it", protocol=pb.PROTOCOL_TCP)
    with pytest.raises(InvalidArgument) as refused:
        translate.Reader().upstream(said)
    assert [violation.field for violation in refused.value.violations] == ["upstream.discovery"]


@given(st.binary(max_size=200))
def test_whatever_parses_is_taken_or_refused_by_name(data: bytes) -> None:
    said = pb.Upstream()
    with contextlib.suppress(Exception):
        said.ParseFromString(data)
    with contextlib.suppress(InvalidArgument):
        translate.Reader().upstream(said)


def test_what_a_declaration_asks_of_its_data_plane_is_what_it_says() -> None:
    found = translate.Reader().upstream(upstream(policy={"circuit_breaker": {"max_requests": 5}, "retry": RETRY}))
    assert set(required(found)) == {
        "http",
        "policy.retry",
        "policy.circuit_breaker.max_requests",
        "policy.load_balancing.balancer=ROUND_ROBIN",
        "policy.timeouts.idle_duration",
    }
    assert Protocol.HTTP.name.lower() == next(iter(required(found)))
