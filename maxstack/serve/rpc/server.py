"""The gRPC server: the service, health, reflection, and the limits that HTTP has."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from maxstack.config import UserError
from maxstack.serve.http.front import Front
from maxstack.serve.http.settings import Settings
from maxstack.serve.operate.operation import Operation
from maxstack.serve.rpc import maxstack_pb2 as pb
from maxstack.serve.rpc.calls import Guard
from maxstack.serve.rpc.maxstack_pb2_grpc import add_MaxstackServicer_to_server
from maxstack.serve.rpc.service import Service

NAME = pb.DESCRIPTOR.services_by_name["Maxstack"].full_name
MOST_CALLS = 1024
"""Calls of one connection at once."""
LOOK_S = 1.0
GRACE_S = 1.0


class Health:
    """SERVING is what /ready says."""

    def __init__(self, operation: Operation):
        self._operation = operation

    async def Check(self, request: Any, context: Any) -> Any:
        """How it is now."""
        if request.service not in ("", NAME):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r}")
        return self._now()

    async def List(self, request: Any, context: Any) -> Any:
        """How all of it is now."""
        messages: Any = health_pb2  # its stubs lack this one
        return messages.HealthListResponse(statuses={"": self._now(), NAME: self._now()})

    async def Watch(self, request: Any, context: Any) -> None:
        """How it is, whenever that changes."""
        last = None
        while True:
            now = self._now() if request.service in ("", NAME) else _told("SERVICE_UNKNOWN")
            if now != last:
                await context.write(now)
            last = now
            await asyncio.sleep(LOOK_S)

    def _now(self) -> Any:
        return _told("SERVING" if self._operation.ready()[0] else "NOT_SERVING")


def _told(status: str) -> Any:
    values = health_pb2.HealthCheckResponse.ServingStatus
    return health_pb2.HealthCheckResponse(status=values.Value(status))


@contextlib.asynccontextmanager
async def grpc_served(
    front: Front, settings: Settings, operation: Operation, address: str
) -> AsyncGenerator[int]:
    """A server at an address while inside; its port. Raises UserError where the address cannot be had."""
    server = grpc.aio.server(
        interceptors=[Guard(settings)],
        options=[
            ("grpc.max_receive_message_length", settings.body_bytes),
            ("grpc.max_metadata_size", settings.header_bytes),
            ("grpc.absolute_max_metadata_size", settings.header_bytes),
            ("grpc.max_concurrent_streams", MOST_CALLS),
            ("grpc.so_reuseport", 0),
        ],
    )
    add_MaxstackServicer_to_server(Service(front, operation), server)
    health_pb2_grpc.add_HealthServicer_to_server(Health(operation), server)
    names = (NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        if settings.tls is None:
            port = server.add_insecure_port(address)
        else:
            cert, key = (file.read_bytes() for file in settings.tls)
            port = server.add_secure_port(address, grpc.ssl_server_credentials([(key, cert)]))
    except RuntimeError as error:
        raise UserError(
            f"--grpc-port: {address} cannot be listened on: choose another one, or 0 for any"
        ) from error
    await server.start()
    try:
        yield port
    finally:
        await server.stop(GRACE_S)
