"""`python -m retinue_server.check ADDRESS [SERVICE]` exits with 0 if the server says SERVING, else with 1.

For container engines whose health checks run a command in the container; Kubernetes asks by gRPC itself.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence


def status(address: str, service: str, timeout: float) -> str:
    """The status's name, or why there is none."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError as error:
            return str(error)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 for SERVING only."""
    parser = argparse.ArgumentParser(prog="python -m retinue_server.check", description=__doc__)
    parser.add_argument("address", help="HOST:PORT of --probe, or unix:PATH")
    parser.add_argument("service", nargs="?", default="", help="its full name (default: the whole process)")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds")
    given = parser.parse_args(arguments)
    found = status(given.address, given.service, given.timeout)
    sys.stdout.write(f"{found}\n")
    return 0 if found == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
