"""What every call passes: a record, the key, leave to begin; and what becomes of errors."""

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
from starlette.datastructures import Headers

from maxstack.config.errors import RunError, UserError
from maxstack.serve.http.errors import ApiError, error_of
from maxstack.serve.http.gate import REQUEST_ID, check_key
from maxstack.serve.http.operation import Operation, Seen
from maxstack.serve.http.settings import Settings
from maxstack.serve.request import Full

log = logging.getLogger(__name__)

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED, 404: grpc.StatusCode.NOT_FOUND, 408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED, 422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED, 499: grpc.StatusCode.CANCELLED, 503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip
OPEN = "/grpc.health.v1.Health/"
"""Needs no key, as /health and /ready do."""
WORK = "/v1/grpc"
"""What the operation is asked leave for: the same as for work over HTTP."""


class Failed(Exception):
    """A call that ends with a status."""

    def __init__(self, error: ApiError):
        super().__init__(error.detail)
        self.error = error


def headers_of(metadata: Any) -> Headers:
    """Metadata of a call, as HTTP's headers."""
    return Headers({key: value for key, value in metadata or () if isinstance(value, str)})


def code_of(error: ApiError) -> grpc.StatusCode:
    """Its status."""
    return CODES.get(error.status_code, grpc.StatusCode.INTERNAL)


def trailing(error: ApiError) -> tuple[tuple[str, str], ...]:
    """What a client may want to know besides the message."""
    told: Mapping[str, str] = error.headers or {}
    told = {"maxstack-error-code": error.code or error.body["error"]["type"]} | {
        k.lower(): v for k, v in told.items()
    }
    return tuple((key, value) for key, value in told.items() if key != "connection")


class Guard(grpc.aio.ServerInterceptor):
    """The one rule for keys, before a call is looked at."""

    def __init__(self, settings: Settings):
        self._settings = settings

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """As grpc has it."""
        details = handler_call_details
        if not details.method.startswith(OPEN):
            try:
                check_key(details.method, headers_of(details.invocation_metadata), self._settings)
            except ApiError as error:
                return _refusing(error)
        return await continuation(details)


def _refusing(error: ApiError) -> grpc.RpcMethodHandler:
    async def refuse(request: Any, context: Any) -> None:
        await context.abort(code_of(error), error.detail, trailing(error))

    return grpc.unary_unary_rpc_method_handler(refuse)


@contextlib.contextmanager
def watched(
    method: str, context: Any, settings: Settings, operation: Operation | None
) -> Iterator[Seen]:  # fmt: skip
    """A call on its way: recorded, refused while the server takes none, its errors as `Failed`."""
    headers = headers_of(context.invocation_metadata())
    asked = headers.get("x-request-id", "")
    name = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
    seen = Seen(
        name, "GRPC", f"/maxstack.v1.Maxstack/{method}", time.monotonic(), client=context.peer(), status=499,
        trace={name: headers[name] for name in ("traceparent", "tracestate") if name in headers},
    )  # fmt: skip
    if operation is not None:
        operation.began(seen)
    try:
        seen.tenant = check_key(seen.path, headers, settings)
        if operation is not None and (no := operation.refusal(WORK)) is not None:
            raise no
        yield seen
        seen.status = 200
    except (ApiError, UserError, RunError, Full) as error:
        raise _failed(seen, error) from error
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, AttributeError) as error:
        log.exception("%s has failed", seen.path)
        raise _failed(seen, error) from error
    finally:
        seen.ended = time.monotonic()
        if operation is not None:
            operation.ended(seen)


def _failed(seen: Seen, error: Exception) -> Failed:
    told = error_of(error)
    seen.status, seen.error = told.status_code, told.code or told.body["error"]["type"]
    return Failed(told)
