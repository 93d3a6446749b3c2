"""What goes wrong with a request, as OpenAI spells it: a status, and {"error": {message, type, param, code}}."""

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from maxstack.config.errors import UserError
from maxstack.serve.errors import EngineDead, RequestFailed, Unfinished
from maxstack.serve.request import Full, Refused

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 422: "invalid_request_error",
    429: "rate_limit_error", 431: "invalid_request_error", 499: "client_closed_request", 500: "server_error",
    503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(HTTPException):
    """Ends a request with this status and message."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {
            "error": {
                "message": self.detail,
                "type": TYPES.get(self.status_code, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status_code, headers=dict(self.headers or {}))


class ClientGone(ApiError):
    """Nobody waits for the answer any more. Seen in logs and metrics only."""

    def __init__(self):
        super().__init__(499, "the client has closed the connection", code="client_closed_request")


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong."""
    return ApiError(400, message, param=param, code=code)


def ended(reason: str | None) -> ApiError:
    """A request that was over before its answer was."""
    if reason == "deadline":
        return ApiError(504, "the request was not done within its time", code="deadline_exceeded")
    return ApiError(503, f"the request was ended by the server: {reason}", code="cancelled")


def error_of(error: BaseException) -> ApiError:
    """What a client is told of an error. Of a fault of ours it is told nothing: the log has it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Full):
        wait = max(1, round(error.retry_after))
        return ApiError(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": str(wait)})
    if isinstance(error, Refused):
        return refused(str(error), code="context_length_exceeded")
    if isinstance(error, UserError):
        long = "exceed the model's" in str(error) or "context is full" in str(error)
        return refused(str(error), code="context_length_exceeded" if long else None)
    if isinstance(error, EngineDead):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, Unfinished):
        return ended(error.reason)
    if isinstance(error, RequestFailed):
        return ApiError(500, str(error), code="generation_failed")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server failed on this request; its log says how", code="internal_error")


def validation_error(errors: list[Mapping[str, Any]], body: Any) -> ApiError:
    """A request that does not fit its schema: the first fault, and how many more there are."""
    first = _telling(errors)
    where = _where(first["loc"], body)
    kind = first["type"]
    if kind == "extra_forbidden":
        return refused(f"Unknown parameter: '{where}'.", where, "unknown_parameter")
    if kind == "missing":
        return refused(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
    if kind == "json_invalid":
        return refused(
            f"the body is not JSON: {first.get('ctx', {}).get('error', 'malformed')}", code="invalid_json"
        )
    message = first["msg"].removeprefix("Value error, ")
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    told = f"Invalid '{where}': {message}{more}" if where else f"{message}{more}"
    return refused(told, where or None, "invalid_value")


def _telling(errors: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of a union's errors, one a member, the one that got furthest into the input."""
    return max(errors, key=lambda error: (len(error["loc"]), error["type"] != "string_type"))


def _where(loc: tuple[str | int, ...], body: Any) -> str:
    """A place in the body as the client knows it: without the names of a union's members."""
    parts: list[str] = []
    here = body
    for step in loc[1:]:
        if isinstance(here, Mapping) and step in here:
            here = here[step]
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            parts[-1:] = [f"{parts[-1]}[{step}]"] if parts else [f"[{step}]"]
            here = here[step]
            continue
        elif not isinstance(here, Mapping) or step != loc[-1]:
            continue
        parts.append(str(step))
    return ".".join(parts)
