"""`retinue status`: the health of every service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from retinue.cli.common import Server, server_options
from retinue.cli.failures import OUT_OF_TIME
from retinue.cli.reflection import Reflection
from retinue.client.errors import NotFound, from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from retinue.cli import common


@click.command()
@server_options
def status(server: Server) -> int:
    """The health of every service of the server. Ends with 5 if one does not serve."""
    connection = server.for_apps()
    with connection.sync_channel() as channel:
        try:
            rows = list(_rows(channel, connection.metadata(), server.timeout))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
    for row in rows:
        row["address"] = connection.address
    server.show(rows, ["service", "status", "address"])
    return 0 if all(row["status"] == "serving" for row in rows) else OUT_OF_TIME


def _rows(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...], timeout: float) -> Iterator[common.Row]:
    stub = health_pb2_grpc.HealthStub(channel)
    names = ["", *(name for name in Reflection(channel).services if not name.startswith("grpc."))]
    for name in names:
        request = health_pb2.HealthCheckRequest(service=name)
        yield {"service": name or "(server)", "status": _health(stub, request, metadata, timeout)}


def _health(
    stub: Any,
    request: health_pb2.HealthCheckRequest,
    metadata: tuple[tuple[str, str], ...],
    timeout: float,
) -> str:
    try:
        response = stub.Check(request, timeout=timeout, metadata=metadata)
    except grpc.RpcError as raw:
        error = from_rpc_error(raw)
        if isinstance(error, NotFound):
            return "unknown"
        raise error from raw
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status).lower()
