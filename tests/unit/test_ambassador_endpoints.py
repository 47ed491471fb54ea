"""Claims about which addresses may be dialled."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinue_server.ambassador.core.spec import Endpoint
from retinue_server.runtime.endpoints import EndpointPolicy, RuleError, parse_rule, split

DEFAULT = EndpointPolicy()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:80",
        "127.8.9.10:80",
        "[::1]:80",
        "[::ffff:127.0.0.1]:80",
        "[::ffff:169.254.169.254]:80",
        "[2002:7f00:1::]:80",
        "[64:ff9b::a9fe:a9fe]:80",
        "0.0.0.0:80",
        "[::]:80",
        "169.254.169.254:80",
        "100.100.100.200:80",
        "168.63.129.16:80",
        "[fe80::1]:80",
        "[fd00:ec2::254]:80",
        "224.0.0.1:80",
        "255.255.255.255:80",
        "unix:/run/docker.sock",
    ],
)
def test_what_is_dangerous_is_forbidden_by_default(address: str) -> None:
    assert DEFAULT.objection(address)


@pytest.mark.parametrize("address", ["10.0.0.1:80", "192.168.1.1:6379", "93.184.216.34:443", "[2001:db8::1]:80"])
def test_the_addresses_of_other_hosts_are_allowed(address: str) -> None:
    assert DEFAULT.objection(address) == ""


def test_exceptions_are_as_narrow_as_they_are_written() -> None:
    policy = EndpointPolicy([parse_rule("127.0.0.1:6379-6381"), parse_rule("[::1]:80"), parse_rule("unix:/run/app/")])
    allowed = {"127.0.0.1:6379", "127.0.0.1:6381", "[::1]:80", "unix:/run/app/x.sock"}
    others = {"127.0.0.1:6378", "127.0.0.1:6382", "127.0.0.2:6379", "[::1]:81", "unix:/run/x", "unix:/run/app/../x"}
    assert {one for one in allowed | others if not policy.objection(one)} == allowed


def test_only_forbids_all_else_and_allows_nothing_dangerous() -> None:
    policy = EndpointPolicy(only=[parse_rule("10.0.0.0/8"), parse_rule("169.254.0.0/16")])
    assert policy.objection("10.1.2.3:80") == ""
    assert policy.objection("11.1.2.3:80")
    assert policy.objection("169.254.169.254:80")


def test_the_servers_own_addresses_stay_forbidden_whatever_is_allowed() -> None:
    own = (ipaddress.ip_address("127.0.0.1"), 7080)
    policy = EndpointPolicy([parse_rule("127.0.0.0/8")], own=[own])
    assert policy.objection("127.0.0.1:7080") == "it is this server's own"
    assert policy.objection("[::ffff:127.0.0.1]:7080") == "it is this server's own"
    assert policy.objection("127.0.0.1:7081") == ""


def test_the_others_of_a_list_are_kept() -> None:
    permitted, objections = DEFAULT.permitted([Endpoint("10.0.0.1:1"), Endpoint("127.0.0.1:1"), Endpoint("10.0.0.2:1")])
    assert [one.address for one in permitted] == ["10.0.0.1:1", "10.0.0.2:1"]
    assert list(objections) == ["127.0.0.1:1"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "10.0.0.0/33",
        "10.0.0.0/8:x",
        "10.0.0.0/8:2-1",
        "10.0.0.0/8:70000",
        "unix:x",
    ],
)
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(RuleError):
        parse_rule(text)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_every_address_is_read_as_it_is_written(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
    text = f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"
    assert split(text) == (ip, port)


@pytest.mark.parametrize(
    "text",
    [
        "localhost:80",
        "10.0.0.1",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "::1:80",
        "[10.0.0.1]:80",
        "[fe80::1%eth0]:80",
        "1:80",
    ],
)
def test_what_is_no_numeric_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        split(text)
