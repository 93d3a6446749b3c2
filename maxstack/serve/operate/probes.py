"""/health, /ready, /metrics, /version."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from maxstack.serve.operate.operation import Operation


def probes(operation: Operation) -> APIRouter:
    """The routes. The first two take no key, the others the server's."""
    router = APIRouter(tags=["operation"])

    @router.get(
        "/health",
        summary="200 while the engine works or starts, 503 with the reason when it is stuck or dead",
    )
    async def health() -> JSONResponse:
        well, told = operation.health()
        return JSONResponse(told, 200 if well else 503)

    @router.get(
        "/ready", summary="200 when requests should be sent here; 503 while starting, draining, or not well"
    )
    async def ready() -> JSONResponse:
        well, told = operation.ready()
        return JSONResponse(told, 200 if well else 503)

    @router.get("/metrics", summary="Numbers for Prometheus")
    async def metrics() -> Response:
        text, kind = operation.metrics.text()
        return Response(text, media_type=kind)

    @router.get("/version", summary="What runs here")
    async def version() -> dict[str, Any]:
        return operation.version()

    return router
