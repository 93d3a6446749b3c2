"""GET /v1/models."""

from typing import Any

from fastapi import APIRouter, Request

from maxstack.serve.http.front import Front, adapters_of


def model_routes(front: Front) -> APIRouter:
    """The routes, for one engine."""
    router = APIRouter(tags=["models"])

    def card(name: str) -> dict[str, Any]:
        own = front.names
        return {
            "id": name,
            "object": "model",
            "created": front.created,
            "owned_by": "maxstack",
            "root": name if name not in own else own[0],
            "parent": None if name in own else own[0],
            "max_model_len": front.engine.limits.max_length,
        }

    @router.get("/v1/models", summary="The model, its aliases and its adapters")
    async def models() -> dict[str, Any]:
        names = [*front.names, *adapters_of(front.engine)]
        return {"object": "list", "data": [card(name) for name in names]}

    @router.get("/v1/models/{model:path}", summary="One of them")
    async def model(model: str, request: Request) -> dict[str, Any]:
        front.adapter(model)
        return card(model)

    return router
