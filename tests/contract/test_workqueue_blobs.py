"""BlobService, and tasks whose input or result is a blob."""

from __future__ import annotations

import hashlib
import os
import queue
from collections.abc import Iterator
from typing import Any

import pytest
from contract.client import Client, Refused
from contract.conftest import Serve, new_line
from contract.line import Line, seconds

from retinue.workqueue.v1 import task_pb2
from retinue.workqueue.v1.blob_service_pb2 import UploadBlobRequest

MIB = 1024 * 1024


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def upload(app: Client, content: bytes, piece: int = MIB, **first: Any) -> Any:
    """Uploads in pieces; `first` announces id and size."""
    pieces = [UploadBlobRequest(**first)] if first else []
    pieces += [UploadBlobRequest(data=content[i : i + piece]) for i in range(0, len(content), piece)]
    return app.upload(*pieces)


def download(app: Client, blob_id: str, offset: int = 0) -> bytes:
    with app.stream("DownloadBlob", blob_id=blob_id, offset_bytes=offset) as stream:
        pieces = [piece.data for piece in stream]
    assert all(len(piece) <= 256 * 1024 for piece in pieces)
    return b"".join(pieces)


def is_there(app: Client, blob_id: str) -> bool:
    try:
        return bool(app.StatBlob(blob_id=blob_id).blob_id)
    except Refused as error:
        assert (error.code, error.reason) == ("NOT_FOUND", "BLOB_NOT_FOUND")  # noqa: PT017 - one of two answers
        assert error.metadata == {"blob_id": blob_id}  # noqa: PT017 - one of two answers
        return False


def blob(blob_id: str) -> task_pb2.Payload:
    return task_pb2.Payload(blob=task_pb2.BlobRef(blob_id=blob_id))


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 5 * MIB + 3])
def test_a_blob_comes_out_as_it_went_in(app: Client, size: int) -> None:
    content = os.urandom(size)
    kept = upload(app, content, size_bytes=size)
    assert (kept.blob_id, kept.size_bytes) == (sha(content), size)
    assert download(app, kept.blob_id) == content
    assert app.StatBlob(blob_id=kept.blob_id).size_bytes == size


def test_the_first_message_may_carry_data_with_the_announcement(app: Client) -> None:
    content = os.urandom(100)
    first = UploadBlobRequest(blob_id=sha(content), size_bytes=100, data=content[:50])
    assert app.upload(first, UploadBlobRequest(data=content[50:])).blob_id == sha(content)


def test_an_upload_without_announcement_is_kept_under_its_hash(app: Client) -> None:
    content = os.urandom(100)
    assert upload(app, content).blob_id == sha(content)


def test_uploading_again_is_ok_and_keeps_when_it_was_first_kept(app: Client, line: Line) -> None:
    content = os.urandom(100)
    blob_id = upload(app, content).blob_id
    first = app.StatBlob(blob_id=blob_id)
    line.ended(line.put(expire_duration=seconds(0.1)))
    assert upload(app, content).blob_id == blob_id
    assert app.StatBlob(blob_id=blob_id) == first


def test_looking_a_blob_up_does_not_change_when_it_was_first_kept(app: Client, line: Line) -> None:
    blob_id = upload(app, os.urandom(100)).blob_id
    first = app.StatBlob(blob_id=blob_id)
    line.ended(line.put(expire_duration=seconds(0.1)))
    assert app.StatBlob(blob_id=blob_id) == first


@pytest.mark.parametrize(
    ("announced", "fields"),
    [
        ({"blob_id": "0" * 64}, {"blob_id"}),
        ({"size_bytes": 99}, {"size_bytes"}),
        ({"size_bytes": 101}, {"size_bytes"}),
        ({"blob_id": "0" * 64, "size_bytes": 7}, {"blob_id", "size_bytes"}),
    ],
)
def test_other_bytes_than_announced_are_refused_and_not_kept(app: Client, announced: Any, fields: set[str]) -> None:
    content = os.urandom(100)
    with pytest.raises(Refused) as error:
        upload(app, content, **announced)
    assert (error.value.code, error.value.reason) == ("INVALID_ARGUMENT", "BLOB_MISMATCH")
    assert error.value.fields == fields
    assert not is_there(app, sha(content))
    assert not is_there(app, "0" * 64)


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(
    ("first", "fields"),
    [
        ({"blob_id": "xyz"}, {"blob_id"}),
        ({"blob_id": "A" * 64}, {"blob_id"}),
        ({"blob_id": "../../etc/passwd"}, {"blob_id"}),
        ({"size_bytes": -1}, {"size_bytes"}),
        ({"blob_id": "0", "size_bytes": -1}, {"blob_id", "size_bytes"}),
    ],
)
def test_a_malformed_announcement_is_refused(app: Client, first: Any, fields: set[str]) -> None:
    with pytest.raises(Refused) as error:
        app.upload(UploadBlobRequest(**first))
    assert (error.value.code, error.value.reason, error.value.fields) == ("INVALID_ARGUMENT", "INVALID_FIELD", fields)


@pytest.mark.engines("sqlite")
def test_an_announcement_after_the_first_message_is_refused(app: Client) -> None:
    content = os.urandom(10)
    for late in ({"blob_id": sha(content)}, {"size_bytes": 10}):
        with pytest.raises(Refused) as error:
            app.upload(UploadBlobRequest(data=content[:5]), UploadBlobRequest(data=content[5:], **late))
        assert (error.value.code, error.value.fields) == ("INVALID_ARGUMENT", set(late))
    assert not is_there(app, sha(content))


@pytest.mark.engines("sqlite")
def test_a_piece_over_1_mib_is_refused(app: Client) -> None:
    content = os.urandom(MIB + 1)
    with pytest.raises(Refused) as error:
        app.upload(UploadBlobRequest(data=content))
    assert (error.value.code, error.value.fields) == ("INVALID_ARGUMENT", {"data"})
    assert not is_there(app, sha(content))


def test_an_upload_that_breaks_leaves_nothing(app: Client, line: Line) -> None:
    content = os.urandom(1000)
    sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
    call = app._rpc("UploadBlob").future(iter(sent.get, None), timeout=60)
    sent.put(UploadBlobRequest(data=content))
    line.put()  # a call behind it on the same connection
    call.cancel()
    sent.put(None)
    line.ended(line.put(expire_duration=seconds(0.1)))
    assert not is_there(app, sha(content))


def test_an_upload_that_stalls_past_its_deadline_leaves_nothing(app: Client) -> None:
    content = os.urandom(1000)
    sent: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def pieces() -> Iterator[UploadBlobRequest]:
        yield UploadBlobRequest(data=content)
        sent.get()

    with pytest.raises(Exception, match="Deadline"):
        app._rpc("UploadBlob")(pieces(), timeout=0.3)
    sent.put(None)
    assert not is_there(app, sha(content))


# Downloads


@pytest.mark.parametrize("offset", [0, 1, 256 * 1024, 299_999, 300_000])
def test_a_download_begins_where_it_is_asked_to(app: Client, offset: int) -> None:
    content = os.urandom(300_000)
    blob_id = upload(app, content).blob_id
    assert download(app, blob_id, offset) == content[offset:]


@pytest.mark.parametrize("offset", [-1, 101, 1 << 62])
def test_an_offset_beyond_the_end_is_refused(app: Client, offset: int) -> None:
    blob_id = upload(app, os.urandom(100)).blob_id
    with pytest.raises(Refused) as error:
        download(app, blob_id, offset)
    assert (error.value.code, error.value.fields) == ("INVALID_ARGUMENT", {"offset_bytes"})


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("blob_id", ["", "0" * 63, "A" * 64, "../" + "0" * 61])
def test_a_malformed_blob_id_is_refused(app: Client, blob_id: str) -> None:
    for look in (lambda: app.StatBlob(blob_id=blob_id), lambda: download(app, blob_id)):
        with pytest.raises(Refused) as error:
            look()
        assert (error.value.code, error.value.fields) == ("INVALID_ARGUMENT", {"blob_id"})


def test_an_unknown_blob_is_not_found(app: Client) -> None:
    assert not is_there(app, "1" * 64)
    with pytest.raises(Refused) as error:
        download(app, "1" * 64)
    assert (error.value.code, error.value.reason) == ("NOT_FOUND", "BLOB_NOT_FOUND")


# Tasks with blobs


def test_a_blob_may_be_input_and_result(line: Line) -> None:
    blob_id = upload(line.app, os.urandom(300_000)).blob_id
    given = blob(blob_id)
    given.blob.size_bytes = 300_000
    line.put(input=given)
    lease = line.take_one()
    assert lease.input == given
    assert not line.complete(lease, result=given).HasField("status")
    assert line.get(lease.task_id).result == given


def test_a_task_whose_input_is_not_there_is_refused(line: Line) -> None:
    taken, lost, taken_too = line.app.EnqueueTasks(
        tasks=[line.spec(), line.spec(input=blob("2" * 64)), line.spec()]
    ).results
    assert (lost.status.code, lost.status.reason) == (5, "BLOB_NOT_FOUND")
    assert {t.task_id for t in line.tasks()} == {taken.task_id, taken_too.task_id}


def test_an_atomic_batch_with_a_lost_blob_takes_nothing(line: Line) -> None:
    with pytest.raises(Refused) as error:
        line.app.EnqueueTasks(atomic=True, tasks=[line.spec(), line.spec(input=blob("2" * 64))])
    assert (error.value.code, error.value.reason) == ("NOT_FOUND", "BLOB_NOT_FOUND")
    assert error.value.metadata == {"index": "1", "blob_id": "2" * 64}
    assert line.tasks() == []


@pytest.mark.engines("sqlite")
def test_a_malformed_blob_reference_is_named(line: Line) -> None:
    lease = line.lend()
    tasks = [line.spec(input=blob("")), line.spec(input=blob("xyz"))]
    with pytest.raises(Refused) as error:
        line.app.EnqueueTasks(tasks=tasks)
    assert error.value.fields == {"tasks[0].input.blob.blob_id", "tasks[1].input.blob.blob_id"}
    with pytest.raises(Refused) as error:
        line.complete(lease, result=blob("xyz"))
    assert error.value.fields == {"completions[0].result.blob.blob_id"}


def test_a_blob_over_the_servers_limit_is_refused_for_good_and_not_kept(serve: Serve) -> None:
    server = serve(RETINUE_WORKQUEUE__MAX_BLOB_BYTES="1000")
    with Client(server.address) as app:
        assert app.GetCapabilities().max_blob_bytes == 1000
        assert upload(app, b"x" * 1000).size_bytes == 1000
        with pytest.raises(Refused) as error:
            upload(app, b"y" * 1001)
        assert (error.value.code, error.value.reason) == ("RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE")
        assert error.value.retry_s is None
        assert not is_there(app, sha(b"y" * 1001))


def test_blobs_outlive_a_crash(serve: Serve) -> None:
    server = serve()
    content = os.urandom(2 * MIB)
    with Client(server.address) as app:
        line = new_line(app)
        line.put(input=blob(upload(app, content).blob_id))
        server.kill()
        server = server.restart()
        try:
            assert download(app, line.take_one().input.blob.blob_id) == content
        finally:
            server.kill()
