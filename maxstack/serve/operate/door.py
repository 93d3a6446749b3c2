"""What answers while the engine is not there yet: /health, /ready, and to everything else "not yet"."""

from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from maxstack.serve.http.errors import ApiError
from maxstack.serve.operate.operation import Operation

AGAIN_S = 5


class Door:
    """An application that becomes another one when that is `opened`."""

    def __init__(self, operation: Operation):
        self._operation = operation
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if self.app is not None and scope["type"] != "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope["path"])(scope, receive, send)

    def _answer(self, path: str) -> JSONResponse:
        if path in ("/health", "/ready"):
            well, told = self._operation.health() if path == "/health" else self._operation.ready()
            return JSONResponse(told, 200 if well else 503, headers={"Cache-Control": "no-store"})
        return ApiError(
            503, f"the server is starting ({self._operation.phases.text()}): ask again soon", code="starting",
            headers={"Retry-After": str(AGAIN_S)},
        ).response  # fmt: skip


async def _live(receive: Receive, send: Send) -> None:
    """The life of the server itself; the application's own begins when it is there."""
    while True:
        message: Any = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
