"""What watches the server from outside: the front tells it what happens, and asks it for leave."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from fastapi import APIRouter

from maxstack.serve.http.errors import ApiError


@dataclass(slots=True)
class Seen:
    """One HTTP request as it goes along; times are of `time.monotonic`. It holds no text of prompt or answer."""

    id: str
    method: str
    path: str
    arrived: float
    client: str = ""
    tenant: str = ""
    """Who asks, by the key: cached prefixes and the queue's share are each tenant's own."""
    model: str = ""
    stream: bool = False
    max_tokens: int = 0
    choices: int = 0
    priority: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """Of those, tokens of thoughts."""
    opened: float | None = None
    """When the engine was asked."""
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    status: int = 0
    """Of the response; 499 where the client left first. What fails after a stream has begun is in `error`."""
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    """The code or type of the error, if there was one."""
    trace: dict[str, str] = field(default_factory=dict)
    """Headers `traceparent` and `tracestate`, where they came."""


@runtime_checkable
class Operation(Protocol):
    """What the front needs of it. It adds `routers` as they are: /health, /ready, /metrics, /version, management."""

    @property
    def routers(self) -> Sequence[APIRouter]:
        """Routes to add. Paths that begin with /manage/ take the management key, and are 404 without one."""
        ...

    def running(self) -> AbstractAsyncContextManager[None]:
        """Entered when the application starts, left when it has ended."""
        ...

    def refusal(self, path: str) -> ApiError | None:
        """Why a request that would begin work is not taken now (draining, dead: a 503), or None."""
        ...

    def began(self, seen: Seen) -> None:
        """A request has come."""
        ...

    def ended(self, seen: Seen) -> None:
        """It is over, however it ended; called once for each that began."""
        ...
