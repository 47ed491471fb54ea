"""What a server offers, from the server itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

if TYPE_CHECKING:
    import grpc
    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor


class Reflection:
    """The services of one server, by name."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self.pool = DescriptorPool(self._database)
        self.services: list[str] = sorted(self._database.get_services())

    def service(self, name: str) -> ServiceDescriptor:
        """By its full name, or by the end of it where that is unambiguous."""
        found = [full for full in self.services if full == name] or [
            full for full in self.services if f".{full.lower()}".endswith(f".{name.lower()}")
        ]
        if len(found) != 1:
            what = f"several: {', '.join(found)}" if found else f"no such service; it has {', '.join(self.services)}"
            raise click.UsageError(f"cannot find {name}: {what}")
        descriptor: ServiceDescriptor = self.pool.FindServiceByName(found[0])
        return descriptor

    def method(self, path: str) -> MethodDescriptor:
        """By SERVICE/METHOD, or SERVICE.METHOD as grpcurl also takes it."""
        service, separator, name = path.replace("/", ".").rpartition(".")
        if not separator:
            raise click.UsageError(f"{path!r} is not of the form SERVICE/METHOD")
        methods = {method.name: method for method in self.service(service).methods}
        if name not in methods:
            raise click.UsageError(f"{service} has no method {name}; it has {', '.join(sorted(methods))}")
        return methods[name]
