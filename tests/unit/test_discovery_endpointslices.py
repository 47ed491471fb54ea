"""Claims about what EndpointSlices mean, as kube-proxy and the API's comments say."""

from __future__ import annotations

from retinue_server.runtime.discovery.endpointslices import (
    SERVICE,
    Conditions,
    Endpoint,
    Metadata,
    Port,
    Reference,
    Slice,
    addresses,
)

GRPC, OTHER = Port("grpc", 9000, "TCP"), Port("other", 9001, "TCP")


def pod(address: str, uid: str = "", **conditions: bool) -> Endpoint:
    return Endpoint((address,), Conditions(**conditions) if conditions else None, Reference(uid) if uid else None)


def piece(*endpoints: Endpoint, ports: tuple[Port, ...] = (GRPC,), family: str = "IPv4") -> Slice:
    return Slice(Metadata("s"), family, endpoints, ports)


def test_all_slices_count_and_each_address_once_sorted() -> None:
    slices = [piece(pod("10.0.0.3"), pod("10.0.0.1")), piece(pod("10.0.0.2"), pod("10.0.0.1")), piece()]
    assert addresses(slices, "grpc") == ["10.0.0.1:9000", "10.0.0.2:9000", "10.0.0.3:9000"]
    assert addresses([], "grpc") == []


def test_what_is_not_told_is_ready() -> None:
    slices = [piece(pod("10.0.0.1"), pod("10.0.0.2", serving=True), pod("10.0.0.3", ready=False))]
    assert addresses(slices, "grpc") == ["10.0.0.1:9000", "10.0.0.2:9000"]


def test_who_goes_away_is_asked_no_more_while_somebody_is_ready() -> None:
    going = pod("10.0.0.1", ready=False, serving=True, terminating=True)
    assert addresses([piece(going, pod("10.0.0.2"))], "grpc") == ["10.0.0.2:9000"]


def test_if_nobody_is_ready_those_are_asked_who_go_away_and_still_serve() -> None:
    going = pod("10.0.0.1", ready=False, serving=True, terminating=True)
    gone = pod("10.0.0.2", ready=False, serving=False, terminating=True)
    starting = pod("10.0.0.3", ready=False, serving=False, terminating=False)
    failing = pod("10.0.0.4", ready=False, serving=True)
    silent = pod("10.0.0.5", ready=False, terminating=True)
    assert addresses([piece(gone, starting), piece(going, failing, silent)], "grpc") == ["10.0.0.1:9000"]


def test_a_named_port_is_the_one_of_its_slice() -> None:
    slices = [piece(pod("10.0.0.1"), ports=(OTHER, GRPC)), piece(pod("10.0.0.2"), ports=(Port("grpc", 7000),))]
    assert addresses(slices, "grpc") == ["10.0.0.1:9000", "10.0.0.2:7000"]


def test_a_port_that_is_not_there_or_is_no_tcp_port_has_no_endpoints() -> None:
    for ports in ((), (OTHER,), (Port("grpc", 9000, "UDP"),), (Port("grpc"),)):
        assert addresses([piece(pod("10.0.0.1"), ports=ports)], "grpc") == []


def test_a_number_is_the_port_whatever_the_slice_says() -> None:
    slices = [piece(pod("10.0.0.1")), piece(pod("10.0.0.2"), ports=()), Slice(Metadata(), "IPv4", (pod("10.0.0.3"),))]
    assert addresses(slices, "80") == ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]


def test_a_pod_of_both_families_is_one_endpoint() -> None:
    four = piece(pod("10.0.0.1", "a"), pod("10.0.0.2", "b"))
    six = piece(pod("2001:db8::1", "a"), pod("2001:db8::3", "c"), family="IPv6")
    for slices in ([four, six], [six, four]):
        assert addresses(slices, "grpc") == ["10.0.0.1:9000", "10.0.0.2:9000", "[2001:db8::3]:9000"]


def test_endpoints_that_are_names_are_left_out() -> None:
    assert addresses([piece(pod("leaf.example"), family="FQDN")], "grpc") == []


def test_an_endpoint_has_the_first_of_its_addresses() -> None:
    assert addresses([piece(Endpoint(("10.0.0.1", "10.0.0.2")), Endpoint())], "grpc") == ["10.0.0.1:9000"]


def test_whose_a_slice_is_stands_in_a_label() -> None:
    assert Slice(Metadata("s", {SERVICE: "leaf"})).service == "leaf"
    assert Slice(Metadata("s", {"x": "y"})).service == ""
    assert Slice().service == ""
