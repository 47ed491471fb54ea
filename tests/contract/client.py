"""A thin client over the generated stubs: calls by name and keyword, errors as objects."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import grpc
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2, error_details_pb2
from google.rpc.status_pb2 import Status

from retinue.adapter.v1 import adapter_service_pb2, adapter_service_pb2_grpc
from retinue.ambassador.v1 import ambassador_service_pb2, ambassador_service_pb2_grpc
from retinue.leaderelection.v1 import leaderelection_service_pb2, leaderelection_service_pb2_grpc
from retinue.scattergather.v1 import (
    leaf_service_pb2,
    leaf_service_pb2_grpc,
    scattergather_service_pb2,
    scattergather_service_pb2_grpc,
    topology_service_pb2,
    topology_service_pb2_grpc,
)
from retinue.workqueue.v1 import (
    blob_service_pb2,
    blob_service_pb2_grpc,
    workqueue_admin_service_pb2,
    workqueue_admin_service_pb2_grpc,
    workqueue_service_pb2,
    workqueue_service_pb2_grpc,
)

TIMEOUT = 60.0
SERVICES = {
    workqueue_service_pb2.DESCRIPTOR.services_by_name["WorkQueueService"]: workqueue_service_pb2_grpc,
    workqueue_admin_service_pb2.DESCRIPTOR.services_by_name["WorkQueueAdminService"]: workqueue_admin_service_pb2_grpc,
    blob_service_pb2.DESCRIPTOR.services_by_name["BlobService"]: blob_service_pb2_grpc,
}
METHODS = {method.name: method for service in SERVICES for method in service.methods}
ELECTION = {
    leaderelection_service_pb2.DESCRIPTOR.services_by_name["LeaderElectionService"]: leaderelection_service_pb2_grpc
}
ADAPTER = {adapter_service_pb2.DESCRIPTOR.services_by_name["AdapterService"]: adapter_service_pb2_grpc}
AMBASSADOR = {ambassador_service_pb2.DESCRIPTOR.services_by_name["AmbassadorService"]: ambassador_service_pb2_grpc}
SCATTER = {
    scattergather_service_pb2.DESCRIPTOR.services_by_name["ScatterGatherService"]: scattergather_service_pb2_grpc,
    topology_service_pb2.DESCRIPTOR.services_by_name["TopologyService"]: topology_service_pb2_grpc,
    leaf_service_pb2.DESCRIPTOR.services_by_name["LeafService"]: leaf_service_pb2_grpc,
}


@dataclass
class Refused(Exception):
    """A call that did not end with OK; what the error details say is empty where there are none."""

    code: str
    message: str
    reason: str = ""
    domain: str = ""
    metadata: dict[str, str] | None = None
    violations: tuple[tuple[str, str], ...] = ()
    retry_s: float | None = None
    scatter: scattergather_service_pb2.ScatterFailure | None = None
    """What was missing, of requests to leaves."""

    def __str__(self) -> str:
        return f"{self.code} {self.reason}: {self.message} {self.violations or ''}"

    @property
    def fields(self) -> set[str]:
        """The fields that are wrong."""
        return {field for field, _ in self.violations}


def refused(error: grpc.RpcError) -> Refused:
    """What the trailers of a failed call say."""
    call: Any = error
    found = Refused(call.code().name, call.details() or "", metadata={})
    trailing = dict(call.trailing_metadata() or ())
    for detail in Status.FromString(trailing.get("grpc-status-details-bin", b"")).details:
        _read(found, detail)
    return found


def _read(found: Refused, detail: Any) -> None:
    info, fields, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    scatter = scattergather_service_pb2.ScatterFailure()
    if detail.Unpack(info):
        found.reason, found.domain, found.metadata = info.reason, info.domain, dict(info.metadata)
    elif detail.Unpack(fields):
        found.violations = tuple((v.field, v.description) for v in fields.field_violations)
    elif detail.Unpack(retry):
        found.retry_s = retry.retry_delay.ToMilliseconds() / 1000
    elif detail.Unpack(scatter):
        found.scatter = scatter


class Pending:
    """A unary call on its way."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def result(self) -> Any:
        """The response; raises Refused."""
        try:
            return self._future.result()
        except grpc.RpcError as error:
            raise refused(error) from None

    def done(self) -> bool:
        """Whether the answer is there."""
        return bool(self._future.done())

    def cancel(self) -> None:
        """Gives the call up."""
        self._future.cancel()

    def trailing(self) -> dict[str, Any]:
        """The trailing metadata of an answer that is there."""
        return dict(self._future.trailing_metadata())


class Stream:
    """A stream that is open; a context that cancels it when left."""

    def __init__(self, rpc: Any, method: Any, request: Any, timeout: float, metadata: Any = ()) -> None:
        client_streams, self._message = method.client_streaming, GetMessageClass(method.input_type)
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        sent = iter(self._requests.get, None) if client_streams else request
        self._call = rpc(sent, timeout=timeout, metadata=metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self.half_close()

    def send(self, **fields: Any) -> None:
        """Sends one request."""
        self._requests.put(self._message(**fields))

    def half_close(self) -> None:
        """Says that nothing more will be sent."""
        self._requests.put(None)

    def cancel(self) -> None:
        """Breaks the stream."""
        self._call.cancel()

    def read(self) -> Any:
        """The next response; None at the end; raises Refused."""
        try:
            return next(self._call, None)
        except grpc.RpcError as error:
            raise refused(error) from None

    def __iter__(self) -> Iterator[Any]:
        while (response := self.read()) is not None:
            yield response


class Client:
    """One channel to one server. `client.GetTask(task_id="a")` is a call; it raises Refused."""

    def __init__(
        self, address: str, token: str = "", options: Iterable[tuple[str, int]] = (), services: Any = SERVICES
    ) -> None:
        self.channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), *options])
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._stubs = {s: getattr(module, f"{s.name}Stub")(self.channel) for s, module in services.items()}
        self._methods = {method.name: method for service in services for method in service.methods}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def __getattr__(self, name: str) -> Any:
        return lambda timeout=TIMEOUT, **fields: self.begin(name, timeout=timeout, **fields).result()

    def begin(self, name: str, timeout: Any = TIMEOUT, metadata: Any = (), **fields: Any) -> Pending:
        """Starts a unary call; those to a server that restarts wait for it."""
        rpc, request = self._rpc(name), self.request(name, **fields)
        all_metadata = (*self._metadata, *metadata)
        return Pending(rpc.future(request, timeout=timeout, metadata=all_metadata, wait_for_ready=True))

    def stream(self, name: str, timeout: Any = TIMEOUT, metadata: Any = (), **fields: Any) -> Stream:
        """Opens a stream whose server side streams."""
        method = self._methods[name]
        request = None if method.client_streaming else self.request(name, **fields)
        return Stream(self._rpc(name), method, request, timeout, (*self._metadata, *metadata))

    def upload(self, *pieces: Any, timeout: float = TIMEOUT) -> Any:
        """UploadBlob of these messages."""
        try:
            return self._rpc("UploadBlob")(iter(pieces), timeout=timeout)
        except grpc.RpcError as error:
            raise refused(error) from None

    def request(self, name: str, **fields: Any) -> Any:
        """The request message of an RPC."""
        return GetMessageClass(self._methods[name].input_type)(**fields)

    def _rpc(self, name: str) -> Any:
        return getattr(self._stubs[self._methods[name].containing_service], name)


def code(status: Any) -> str:
    """The canonical code of an item, by name."""
    return str(code_pb2.Code.Name(status.code))
