"""Claims about what may be declared: what is wrong is named by its field, and the address that is dialled is known."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinue_server.adapter.core import limits
from retinue_server.adapter.core.collection import Limits
from retinue_server.adapter.core.spec import Kind, Spec
from retinue_server.runtime.errors import Violation

GOOD = {
    Kind.PROMETHEUS: "http://127.0.0.1:9100/metrics?a=b",
    Kind.JSON: "https://localhost/",
    Kind.REDIS: "[::1]:6379",
    Kind.MEMCACHED: "127.0.0.1:11211",
    Kind.POSTGRESQL: "postgresql://me@127.0.0.1/shop",
    Kind.NGINX: "http://127.0.0.1/status",
    Kind.STATSD: "udp:127.0.0.1:0",
    Kind.REPORT: "",
}


def wrong(**fields: Any) -> set[str]:
    said: dict[str, Any] = {"target_id": "shop", "kind": Kind.PROMETHEUS, "endpoint": GOOD[Kind.PROMETHEUS]}
    found: list[Violation] = []
    limits.check(Spec(**said | fields), found)
    return {one.field for one in found}


@pytest.mark.parametrize("kind", GOOD)
def test_an_endpoint_is_that_of_its_kind(kind: Kind) -> None:
    pack = {"rule_pack": "mine"} if kind is Kind.JSON else {}
    assert not wrong(kind=kind, endpoint=GOOD[kind], **pack)
    others = [
        endpoint for other, endpoint in GOOD.items() if endpoint.partition(":")[0] != GOOD[kind].partition(":")[0]
    ]
    hosts = (Kind.REDIS, Kind.MEMCACHED)
    webs = (Kind.PROMETHEUS, Kind.JSON, Kind.NGINX)
    for endpoint in others:
        if not any(kind in alike and endpoint in [GOOD[one] for one in alike] for alike in (hosts, webs)):
            assert wrong(kind=kind, endpoint=endpoint, **pack) == {"target.endpoint"}, endpoint


@pytest.mark.parametrize(
    ("kind", "endpoint"),
    [
        (Kind.PROMETHEUS, "http://127.0.0.1:99999/"),
        (Kind.PROMETHEUS, "http://127.0.0.1:0/"),
        (Kind.PROMETHEUS, "http://127.0.0.1:x/"),
        (Kind.PROMETHEUS, "http://[::1/"),
        (Kind.PROMETHEUS, "http:///metrics"),
        (Kind.PROMETHEUS, "http://127.0.0.1/a b"),
        (Kind.PROMETHEUS, "http://127.0.0.1/é"),
        (Kind.PROMETHEUS, "http://127.0.0.1/#part"),
        (Kind.PROMETHEUS, "http://me@127.0.0.1/"),
        (Kind.PROMETHEUS, "http://me:secret@127.0.0.1/"),
        (Kind.REDIS, "127.0.0.1"),
        (Kind.REDIS, ":6379"),
        (Kind.REDIS, "127.0.0.1:0"),
        (Kind.REDIS, "me:secret@127.0.0.1:6379"),
        (Kind.POSTGRESQL, "postgresql://me:secret@127.0.0.1/shop"),
        (Kind.POSTGRESQL, "postgresql://127.0.0.1:99999/shop"),
        (Kind.POSTGRESQL, "postgresql://127.0.0.1/shop?host=10.0.0.1"),
        (Kind.STATSD, "udp:127.0.0.1"),
        (Kind.STATSD, "unixgram:relative"),
        (Kind.STATSD, "unixgram:/\0"),
        (Kind.REPORT, "x"),
    ],
)
def test_an_endpoint_that_is_none_is_named(kind: Kind, endpoint: str) -> None:
    assert wrong(kind=kind, endpoint=endpoint) == {"target.endpoint"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_id": "Shop"}, {"target.target_id"}),
        ({"target_id": "a" * 64}, {"target.target_id"}),
        ({"target_id": ""}, {"target.target_id"}),
        ({"rule_pack": "../x"}, {"target.rule_pack"}),
        ({"kind": Kind.JSON}, {"target.rule_pack"}),
        ({"service": "a\nb"}, {"target.service"}),
        ({"credentials_file": "a" * 1025}, {"target.credentials_file"}),
        ({"limits": Limits(max_bytes=(64 << 20) + 1)}, {"target.limits.max_bytes"}),
        ({"limits": Limits(max_series=-1, max_labels=101)}, {"target.limits.max_series", "target.limits.max_labels"}),
    ],
)
def test_what_is_wrong_is_named_by_its_field(fields: dict[str, Any], named: set[str]) -> None:
    assert wrong(**fields) == named


@pytest.mark.parametrize(
    ("kind", "endpoint", "address"),
    [
        (Kind.PROMETHEUS, "http://127.0.0.1/", "127.0.0.1:80"),
        (Kind.PROMETHEUS, "https://[fe80::1]/", "[fe80::1]:443"),
        (Kind.REDIS, "[::1]:6379", "[::1]:6379"),
        (Kind.MEMCACHED, "169.254.169.254:80", "169.254.169.254:80"),
        (Kind.POSTGRESQL, "postgresql://me@10.0.0.1/shop", "10.0.0.1:5432"),
        (Kind.PROMETHEUS, "http://localhost/", ""),
        (Kind.STATSD, "udp:127.0.0.1:8125", ""),
        (Kind.REPORT, "", ""),
    ],
)
def test_the_address_of_an_endpoint_is_known_where_it_has_no_name(kind: Kind, endpoint: str, address: str) -> None:
    assert limits.address(Spec("shop", kind, endpoint)) == address


@given(st.sampled_from(Kind), st.text(max_size=30) | st.text("htp:/[]@.#?0123456789", max_size=20))
def test_whatever_the_endpoint_it_is_wrong_or_has_an_address_or_a_name(kind: Kind, endpoint: str) -> None:
    said = Spec("shop", kind, endpoint, rule_pack="mine")
    found: list[Violation] = []
    limits.check(said, found)
    if not found:
        assert isinstance(limits.address(said), str)
