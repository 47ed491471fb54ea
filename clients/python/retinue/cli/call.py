"""`retinue call`: any method of any server, by reflection alone."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click
import grpc
from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass

from retinue.cli.common import DURATION, HEADER
from retinue.cli.reflection import Reflection
from retinue.client import address as addresses
from retinue.client.channel import Connection
from retinue.client.errors import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
    from google.protobuf.message import Message


@click.command()
@click.argument("method", metavar="[SERVICE[/METHOD]]", required=False)
@click.argument("request", metavar="[JSON|-]", required=False)
@click.option("--address", help="The server: HOST:PORT, unix:PATH or a socket's path.")
@click.option("--control", is_flag=True, help="Dial the control socket, as an operator.")
@click.option("--timeout", type=DURATION, help="The call's deadline; default: 30s, none for streams.")
@click.option("--header", "headers", type=HEADER, multiple=True, help="Metadata to send; may be repeated.")
def call(
    *,
    method: str | None,
    request: str | None,
    address: str | None,
    control: bool,
    timeout: float | None,
    headers: tuple[tuple[str, str], ...],
) -> None:
    """Call METHOD of SERVICE with a JSON request and print the answer.

    SERVICE may be short where that is unambiguous. Without METHOD: what SERVICE has; without SERVICE: what
    the server has. Standard input gives the request for `-`, and one request a line for methods that take a
    stream.

    \b
    retinue call
    retinue call WorkQueueService
    retinue call WorkQueueService/EnqueueTasks '{"tasks": [{"queue_id": "mail", "input": {"text": "hi"}}]}'
    retinue call --control WorkQueueAdminService/PauseQueue '{"queue_id": "mail"}'
    """
    connection = Connection(address or (addresses.control_address() if control else None))
    with connection.sync_channel() as channel:
        try:
            offered = Reflection(channel)
            if method is None or (
                "/" not in method and method.rpartition(".")[2] != "" and _is_service(offered, method)
            ):
                _describe(offered, method)
                return
            metadata = connection.metadata() + headers
            _call(channel, offered.method(method), request, timeout, metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


def _is_service(offered: Reflection, name: str) -> bool:
    return any(f".{full.lower()}".endswith(f".{name.lower()}") for full in offered.services)


def _describe(offered: Reflection, name: str | None) -> None:
    if name is None:
        click.echo("\n".join(offered.services))
        return
    service: ServiceDescriptor = offered.service(name)
    for method in service.methods:
        click.echo(f"{service.full_name}/{method.name}  {_signature(method)}")


def _signature(method: MethodDescriptor) -> str:
    takes = ("stream " if method.client_streaming else "") + method.input_type.name
    gives = ("stream " if method.server_streaming else "") + method.output_type.name
    return f"({takes}) -> {gives}"


def _call(
    channel: grpc.Channel,
    method: MethodDescriptor,
    request: str | None,
    timeout: float | None,
    metadata: tuple[tuple[str, str], ...],
) -> None:
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    invoke = getattr(channel, kind)(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    requests = _requests(method, request)
    limit = timeout or (None if "stream" in kind else 30.0)
    argument: Any = requests if method.client_streaming else _only(requests)
    answer = invoke(argument, timeout=limit, metadata=metadata)
    for message in answer if method.server_streaming else [answer]:
        _print(message)


def _requests(method: MethodDescriptor, request: str | None) -> Iterator[Message]:
    kind = GetMessageClass(method.input_type)
    for text in _texts(request, streaming=method.client_streaming):
        try:
            yield json_format.Parse(text, kind())
        except json_format.ParseError as error:
            raise click.UsageError(f"cannot read the request as {method.input_type.name}: {error}") from error


def _texts(request: str | None, *, streaming: bool) -> Iterable[str]:
    if streaming and request in (None, "-"):
        return (line for line in sys.stdin if line.strip())
    return [sys.stdin.read() if request == "-" else request or "{}"]


def _only(requests: Iterator[Message]) -> Message:
    return next(requests)


def _print(message: Message) -> None:
    row = json_format.MessageToDict(message, preserving_proto_field_name=True)
    click.echo(json.dumps(row, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))
    sys.stdout.flush()
