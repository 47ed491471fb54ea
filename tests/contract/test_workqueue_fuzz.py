"""Random well-typed requests and sequences of them: only codes of the contract come back, and the server stays alive.

Bytes that are no messages at all are thrown in tests/faults/test_garbage.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from contract.client import METHODS, Client, Refused, code
from contract.line import Line
from contract.pools import pools
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.engines("sqlite", "postgres")  # those that write down what is sent

ALLOWED = {
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "OUT_OF_RANGE",
}
UNARY = sorted(name for name, m in METHODS.items() if not m.client_streaming and not m.server_streaming)
NAMES = st.sampled_from(["fuzz-a", "fuzz-b", "fuzz.c", "", "!", "a" * 129, "\x00"])
TEXTS = NAMES | st.text(max_size=20)
INTS = st.sampled_from([0, 1, 2, 3, 10, -1, 1000, 1001, (1 << 31) - 1, -(1 << 31)])
LONGS = INTS | st.sampled_from([(1 << 63) - 1, -(1 << 63), 1 << 40])
FLOATS = st.sampled_from([0.0, 1.0, 2.0, -1.0, 1e300, float("nan"), float("inf")])
TOKENS = st.binary(max_size=70) | st.binary(min_size=25, max_size=25).map(lambda b: b"\x01" + b[1:])
DEPTH = 4

SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_STRING: TEXTS,
    FieldDescriptor.CPPTYPE_INT32: INTS,
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 10),
    FieldDescriptor.CPPTYPE_INT64: LONGS,
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 3),
    FieldDescriptor.CPPTYPE_DOUBLE: FLOATS,
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
}
MESSAGES: dict[str, st.SearchStrategy[Any]] = {
    "google.protobuf.Duration": st.fixed_dictionaries(
        {"seconds": st.sampled_from([0, 0, 1, 30, -1, 1 << 62]), "nanos": st.sampled_from([0, 1_000_000, -1, 1 << 30])}
    ),
    "google.protobuf.Timestamp": st.fixed_dictionaries(
        {"seconds": st.sampled_from([0, 1, 4_000_000_000, -(1 << 62), 1 << 62]), "nanos": st.sampled_from([0, -1, 1])}
    ),
    "google.protobuf.Value": st.sampled_from([{}, {"number_value": 1.5}, {"string_value": "x"}, {"null_value": 0}]),
}


POOLS = sorted(pools(str, "")["pools"])
NAMED: dict[str, st.SearchStrategy[Any]] = {
    "pool_id": TEXTS | st.sampled_from(POOLS),
    "shard_id": TEXTS | st.sampled_from("abc"),
    "shard_ids": TEXTS | st.sampled_from("abc"),
    "upstream_id": NAMES,
    "address": TEXTS | st.sampled_from(["127.0.0.1:1", "unix:/nonexistent/x"]),
    "target_id": NAMES,
    "target_ids": NAMES,
    "endpoint": TEXTS | st.sampled_from(["http://127.0.0.1:1/", "127.0.0.1:1", "postgresql://127.0.0.1:1/x"]),
    "credentials_file": st.sampled_from(["", "/nonexistent/x", "\n"]),
    "rule_pack": NAMES | st.sampled_from(["redis", "expvar"]),
    "retinue.ambassador.v1.InvokeRequest.upstream_id": NAMES | st.just("kept"),
    "retinue.ambassador.v1.Listen.port": st.sampled_from([0, -1, 65_536]),
    "retinue.ambassador.v1.UnixSocket.path": st.sampled_from(["", "x", "/nonexistent/x", "/\0"]),
}
"""Fields that lead somewhere, by name or full name: not only nonsense, and nowhere outside of the test."""


def messages(descriptor: Any, depth: int = DEPTH) -> st.SearchStrategy[dict[str, Any]]:
    """Any well-typed message, as keywords; of a oneof one field at most."""
    if descriptor.full_name in MESSAGES:
        return MESSAGES[descriptor.full_name]
    fields = {f.name: values(f, depth) for f in descriptor.fields if depth or f.message_type is None}
    fields.pop("wait_duration", None)  # a fuzz is no place to wait
    oneofs = [[f.name for f in oneof.fields] for oneof in descriptor.oneofs if len(oneof.fields) > 1]
    return st.fixed_dictionaries({}, optional=fields).map(lambda m: _one_of_each(m, oneofs))


def values(field: Any, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return st.dictionaries(TEXTS, TEXTS, max_size=3)
    if field.message_type is not None:
        one: st.SearchStrategy[Any] = messages(field.message_type, depth - 1)
    elif field.full_name in NAMED or field.name in NAMED:
        one = NAMED.get(field.full_name, NAMED.get(field.name, TEXTS))
    elif field.type == FieldDescriptor.TYPE_BYTES:
        one = TOKENS
    else:
        one = SCALARS[field.cpp_type]
    return st.lists(one, max_size=4) if field.is_repeated else one


def _one_of_each(message: dict[str, Any], oneofs: list[list[str]]) -> dict[str, Any]:
    surplus = {name for names in oneofs for name in [n for n in names if n in message][1:]}
    return {name: value for name, value in message.items() if name not in surplus}


PLAIN: Any = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("rpc", UNARY)
def test_any_well_typed_request_is_answered_by_the_contract(app: Client, operator: Client, rpc: str) -> None:
    @settings(max_examples=25, **PLAIN)
    @given(messages(METHODS[rpc].input_type))
    def ask(fields: dict[str, Any]) -> None:
        try:
            getattr(operator, rpc)(**_spared(rpc, fields))
        except Refused as error:
            assert error.code in ALLOWED, error  # noqa: PT017 - one of many answers
            assert error.reason != ""  # noqa: PT017 - one of many answers

    ask()
    assert app.GetCapabilities().engine


def _spared(rpc: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Other tests' tasks are left alone: bulk work by a filter stays in the fuzz's queues and only counts."""
    if rpc in ("CancelTasks", "RedriveTasks", "DeleteTasks"):
        return fields | {"dry_run": True}
    return fields


SETTLING = {
    "ExtendLeases": "extensions",
    "CompleteTasks": "completions",
    "FailTasks": "failures",
    "ReleaseTasks": "releases",
}


def items(rpc: str) -> st.SearchStrategy[tuple[str, int, dict[str, Any]]]:
    """One item about one of four leases: the RPC, which lease, and the rest of it."""
    kind = METHODS[rpc].input_type.fields_by_name[SETTLING[rpc]].message_type
    return st.tuples(st.just(rpc), st.integers(0, 3), messages(kind, 2))


def test_any_sequence_about_real_leases_is_answered_by_the_contract(app: Client, line: Line) -> None:
    @settings(max_examples=25, **PLAIN)
    @given(st.lists(st.one_of([items(rpc) for rpc in SETTLING]), min_size=1, max_size=12))
    def play(sequence: list[tuple[str, int, dict[str, Any]]]) -> None:
        line.put_many(4)
        leases = line.take(4)
        for rpc, which, fields in sequence:
            item = fields | {"lease_token": leases[which % len(leases)].lease_token}
            try:
                [result] = getattr(app, rpc)(**{SETTLING[rpc]: [item]}).results
            except Refused as error:
                assert error.code in ALLOWED, error  # noqa: PT017 - one of many answers
            else:
                assert not result.HasField("status") or code(result.status) in ALLOWED

    play()
    assert line.lend().lease_token


def test_any_messages_on_a_worker_stream_are_answered_by_the_contract(app: Client, line: Line) -> None:
    opened = {"open": {"queue_id": line.id, "worker_id": "w"}, "credit": 2}
    any_message = messages(METHODS["StreamTasks"].input_type).map(lambda m: {k: v for k, v in m.items() if k != "open"})

    @settings(max_examples=25, **PLAIN)
    @given(st.lists(any_message, max_size=6), st.booleans())
    def play(sent: list[dict[str, Any]], begins_well: bool) -> None:  # noqa: FBT001 - drawn
        with app.stream("StreamTasks") as stream:
            for fields in [*([opened] if begins_well else []), *sent]:
                stream.send(**fields)
            stream.half_close()
            try:
                assert all(response.WhichOneof("event") for response in stream)
            except Refused as error:
                assert error.code in ALLOWED, error  # noqa: PT017 - one of many answers

    play()
    assert app.GetCapabilities().engine


@pytest.mark.parametrize("rpc", ["WatchEvents", "DownloadBlob"])
def test_any_request_for_a_stream_is_answered_by_the_contract(app: Client, rpc: str) -> None:
    @settings(max_examples=25, **PLAIN)
    @given(messages(METHODS[rpc].input_type))
    def ask(fields: dict[str, Any]) -> None:
        try:
            with app.stream(rpc, **fields) as stream:
                assert stream.read() is not None
        except Refused as error:
            assert error.code in ALLOWED, error  # noqa: PT017 - one of many answers

    ask()


def test_any_pieces_of_a_blob_are_answered_by_the_contract(app: Client) -> None:
    @settings(max_examples=25, **PLAIN)
    @given(st.lists(messages(METHODS["UploadBlob"].input_type), max_size=4))
    def send(pieces: list[dict[str, Any]]) -> None:
        try:
            assert app.upload(*(app.request("UploadBlob", **piece) for piece in pieces)).blob_id
        except Refused as error:
            assert error.code in ALLOWED, error  # noqa: PT017 - one of many answers

    send()
