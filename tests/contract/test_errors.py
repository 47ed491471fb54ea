"""retinue.error.v1.ErrorReason: every reason that callers can provoke, with its code and details.

`PROVOKED` is what this file provokes; `ELSEWHERE` is provoked in other files of this suite; `UNREACHABLE` says why a
caller alone can't. Together they are the enum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from contract.client import METHODS, Client, Pending, Refused
from contract.conftest import Serve, new_line
from contract.line import LONG, Line, seconds, text
from workers import eventually

from retinue.error.v1 import error_reason_pb2

if TYPE_CHECKING:
    from pathlib import Path

REASONS = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118 - no dict
LOST = {"blob": {"blob_id": "3" * 64}}


def provoke_task_exists(line: Line, _: Client) -> None:
    line.app.EnqueueTasks(atomic=True, tasks=[line.spec(task_id=line.put())])


def provoke_idempotency_conflict(line: Line, _: Client) -> None:
    line.put(idempotency_key="k", input=text("a"))
    line.app.EnqueueTasks(atomic=True, tasks=[line.spec(idempotency_key="k")])


def provoke_request_conflict(line: Line, _: Client) -> None:
    line.app.EnqueueTasks(request_id=line.id, tasks=[line.spec()])
    line.app.EnqueueTasks(request_id=line.id, tasks=[line.spec(priority=1)])


def provoke_queue_draining(line: Line, operator: Client) -> None:
    line.put()
    operator.DrainQueue(queue_id=line.id)
    line.app.EnqueueTasks(atomic=True, tasks=[line.spec()])


def provoke_queue_full(line: Line, operator: Client) -> None:
    operator.CreateQueue(queue_id=line.id, settings={"max_tasks": 1})
    line.app.EnqueueTasks(atomic=True, tasks=[line.spec()] * 2)


def provoke_queue_exists(line: Line, operator: Client) -> None:
    line.put()
    operator.CreateQueue(queue_id=line.id, settings={"max_tasks": 1})


def provoke_queue_not_empty(line: Line, operator: Client) -> None:
    line.put()
    operator.DeleteQueue(queue_id=line.id)


def provoke_illegal_transition(line: Line, _: Client) -> None:
    line.app.RescheduleTask(task_id=line.lend().task_id, priority=1)


def provoke_page_token_expired(line: Line, operator: Client) -> None:
    line.put_many(2)
    operator.ListQueues(page_token=line.app.ListTasks(page_size=1).next_page_token)


Provocation = Callable[[Line, Client], Any]
PROVOKED: dict[str, tuple[str, Provocation]] = {
    "INVALID_FIELD": ("INVALID_ARGUMENT", lambda line, _: line.app.GetTask()),
    "PAGE_TOKEN_EXPIRED": ("OUT_OF_RANGE", provoke_page_token_expired),
    "ROLE_REQUIRED": ("PERMISSION_DENIED", lambda line, _: line.app.PauseQueue(queue_id=line.id)),
    "QUEUE_NOT_FOUND": ("NOT_FOUND", lambda line, _: line.app.GetQueue(queue_id=line.id)),
    "QUEUE_EXISTS": ("ALREADY_EXISTS", provoke_queue_exists),
    "QUEUE_NOT_EMPTY": ("FAILED_PRECONDITION", provoke_queue_not_empty),
    "QUEUE_DRAINING": ("FAILED_PRECONDITION", provoke_queue_draining),
    "QUEUE_FULL": ("RESOURCE_EXHAUSTED", provoke_queue_full),
    "TASK_NOT_FOUND": ("NOT_FOUND", lambda line, _: line.get("nobody")),
    "TASK_EXISTS": ("ALREADY_EXISTS", provoke_task_exists),
    "IDEMPOTENCY_CONFLICT": ("ALREADY_EXISTS", provoke_idempotency_conflict),
    "REQUEST_CONFLICT": ("ALREADY_EXISTS", provoke_request_conflict),
    "ILLEGAL_TRANSITION": ("FAILED_PRECONDITION", provoke_illegal_transition),
    "PAYLOAD_TOO_LARGE": (
        "RESOURCE_EXHAUSTED",
        lambda line, _: line.app.EnqueueTasks(atomic=True, tasks=[line.spec(input=text("x" * 300_000))]),
    ),
    "BLOB_NOT_FOUND": ("NOT_FOUND", lambda line, _: line.app.StatBlob(blob_id="3" * 64)),
}

ELSEWHERE = {
    "LEASE_LOST": "test_workqueue_settle.py, as an item's",
    "ALREADY_FINALIZED": "test_workqueue_settle.py, as an item's",
    "BLOB_MISMATCH": "test_workqueue_blobs.py",
    "WATCH_TOKEN_EXPIRED": "test_workqueue_watch.py",
    "SHUTTING_DOWN": "test_workqueue_watch.py",
    "CONCURRENCY_LIMIT": "below, with a server of its own",
    "UNAUTHENTICATED": "below, with a server of its own",
}

UNREACHABLE = {
    "UNSPECIFIED": "never sent",
    "INTERNAL": "a defect; whoever finds a way has found one",
    "MESSAGE_TOO_LARGE": "replies are cut before; a request that large is refused by gRPC itself, without details",
    "ENGINE_UNAVAILABLE": "needs an engine that can be cut off",
    "ENGINE_CAPABILITY": "the engines of this release can do everything",
    "DISK_FULL": "needs a disk that can be filled: tests/faults",
    "UPSTREAM_UNAVAILABLE": "needs a relay",
    **dict.fromkeys(
        (
            "ELECTION_NOT_FOUND",
            "CANDIDATE_EXISTS",
            "SESSION_NOT_FOUND",
            "STALE_TOKEN",
            "TOKEN_DOMAIN_MISMATCH",
            "SESSION_MISMATCH",
            "ELECTION_LIMIT",
            "OBSERVER_LIMIT",
            "SESSION_RESUMED",
        ),
        "leader election's: tests/e2e/test_leaderelection_errors.py and test_leaderelection.py",
    ),
    **dict.fromkeys(
        {
            name.removeprefix("ERROR_REASON_")
            for name, number in error_reason_pb2.ErrorReason.items()
            if 100 <= number < 120
        },
        "the ambassador's: test_ambassador_errors.py",
    ),
    **dict.fromkeys(
        {
            name.removeprefix("ERROR_REASON_")
            for name, number in error_reason_pb2.ErrorReason.items()
            if 120 <= number < 140
        },
        "the adapter's: test_adapter_errors.py",
    ),
    **dict.fromkeys(
        (
            "POOL_NOT_FOUND",
            "POOL_EMPTY",
            "POOL_NOT_IDEMPOTENT",
            "SCATTER_TOO_DEEP",
            "SCATTER_LIMIT",
            "GATHER_TOO_LARGE",
            "COVERAGE_NOT_MET",
            "LEAF_REFUSED",
            "MERGE_FAILED",
        ),
        "scatter/gather's: test_scattergather_errors.py",
    ),
}


def test_every_reason_is_provoked_or_said_to_be_unreachable() -> None:
    assert sorted([*PROVOKED, *ELSEWHERE, *UNREACHABLE]) == sorted(REASONS)


@pytest.mark.parametrize("reason", PROVOKED)
def test_a_reason_comes_with_its_code_domain_and_a_message(line: Line, operator: Client, reason: str) -> None:
    code, provoke = PROVOKED[reason]
    with pytest.raises(Refused) as error:
        provoke(line, operator)
    found = error.value
    assert (found.code, found.reason, found.domain) == (code, reason, "retinue")
    assert "cannot" in found.message
    assert bool(found.violations) == (code == "INVALID_ARGUMENT")
    assert bool(found.retry_s) == (reason == "QUEUE_FULL")


METADATA: dict[str, Callable[[Line], dict[str, str]]] = {
    "QUEUE_NOT_FOUND": lambda line: {"queue_id": line.id},
    "QUEUE_NOT_EMPTY": lambda line: {"tasks": "1"},
    "TASK_NOT_FOUND": lambda line: {"task_id": "nobody"},
    "TASK_EXISTS": lambda line: {"task_id": line.tasks()[0].task_id},
    "IDEMPOTENCY_CONFLICT": lambda line: {"task_id": line.tasks()[0].task_id},
    "ILLEGAL_TRANSITION": lambda line: {"state": "LEASED"},
    "BLOB_NOT_FOUND": lambda line: {"blob_id": "3" * 64},
    "ROLE_REQUIRED": lambda line: {"required": "operator", "role": "app"},
}


@pytest.mark.parametrize("reason", METADATA)
def test_a_reason_comes_with_the_metadata_that_its_comment_promises(line: Line, operator: Client, reason: str) -> None:
    with pytest.raises(Refused) as error:
        PROVOKED[reason][1](line, operator)
    assert error.value.metadata is not None
    assert error.value.metadata.items() >= METADATA[reason](line).items()


@pytest.mark.engines("sqlite")
def test_a_request_that_is_no_message_is_refused(app: Client) -> None:
    call: Any = app.channel.unary_unary("/retinue.workqueue.v1.WorkQueueService/GetTask")
    with pytest.raises(grpc.RpcError) as error:
        call(b"\xff\xff", timeout=60)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.engines("sqlite")
def test_an_unknown_method_is_unimplemented(app: Client) -> None:
    call: Any = app.channel.unary_unary("/retinue.workqueue.v1.WorkQueueService/Nothing")
    with pytest.raises(grpc.RpcError) as error:
        call(b"", timeout=60)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.engines("sqlite")
def test_fields_that_the_server_does_not_know_are_ignored(line: Line) -> None:
    call: Any = line.app.channel.unary_unary("/retinue.workqueue.v1.WorkQueueService/EnqueueTasks")
    request = line.app.request("EnqueueTasks", tasks=[line.spec()]).SerializeToString() + b"\xfa\x3f\x02hi"
    assert call(request, timeout=60)
    assert len(line.tasks()) == 1


# Servers of their own


def test_too_many_calls_at_once_are_refused_and_may_be_tried_again(serve: Serve) -> None:
    server = serve(RETINUE_LIMITS__MAX_CONCURRENT_CALLS="2")
    with Client(server.address) as app:
        asked = {"queue_id": "q", "worker_id": "w", "wait_duration": seconds(LONG)}
        calls = [app.begin("LeaseTasks", **asked) for _ in range(3)]
        eventually(lambda: any(call.done() for call in calls), "one is refused")
        [failed] = [_outcome(call) for call in calls if call.done()]
        assert isinstance(failed, Refused)
        assert (failed.code, failed.reason) == ("RESOURCE_EXHAUSTED", "CONCURRENCY_LIMIT")
        assert failed.retry_s


def _outcome(call: Pending) -> Any:
    try:
        return call.result()
    except Refused as error:
        return error


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_call_without_a_known_token_is_unauthenticated_where_one_is_required(
    serve: Serve, tmp_path: Path, token: str
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("app secret\noperator root\n")
    tokens.chmod(0o600)
    server = serve("--token-file", str(tokens), RETINUE_REQUIRE_TOKEN="true")
    with Client(server.address, token=token) as app, pytest.raises(Refused) as error:
        app.GetCapabilities()
    assert (error.value.code, error.value.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
    with Client(server.address, token="secret") as app:
        assert app.GetCapabilities().engine
        with pytest.raises(Refused) as error:
            app.CreateQueue(queue_id="q")
        assert error.value.reason == "ROLE_REQUIRED"
    with Client(server.address, token="root") as app:
        assert app.CreateQueue(queue_id="q").queue.queue_id == "q"


def test_a_strict_server_takes_tasks_for_queues_that_were_made(serve: Serve) -> None:
    server = serve(RETINUE_WORKQUEUE__STRICT_QUEUES="true")
    with Client(server.address) as app, Client(server.control) as operator:
        assert app.GetCapabilities().strict_queues
        line = new_line(app)
        [result] = app.EnqueueTasks(tasks=[line.spec()]).results
        assert (result.status.code, result.status.reason) == (5, "QUEUE_NOT_FOUND")
        assert line.take() == []
        operator.CreateQueue(queue_id=line.id)
        other = new_line(app)
        lease = line.lend()
        assert line.complete(lease, follow_ups=[other.spec()]).status.reason == "QUEUE_NOT_FOUND"
        assert line.state(lease.task_id) == "LEASED"


@pytest.mark.engines("sqlite")
def test_every_method_of_the_contract_is_there(app: Client, operator: Client) -> None:
    for name, method in METHODS.items():
        if not method.client_streaming and not method.server_streaming:
            try:
                getattr(operator, name)()
            except Refused as error:
                assert error.code == "INVALID_ARGUMENT", name  # noqa: PT017 - one of two answers
