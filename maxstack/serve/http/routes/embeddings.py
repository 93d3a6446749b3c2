"""POST /v1/embeddings."""

import asyncio
import base64
import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from maxstack.serve.embedding import Embedding
from maxstack.serve.http.errors import refused
from maxstack.serve.http.front import Front
from maxstack.serve.http.operation import Seen
from maxstack.serve.http.schemas.completions import as_list
from maxstack.serve.http.schemas.tokens import EmbeddingsRequest
from maxstack.serve.http.streams import while_connected


def embedding_routes(front: Front) -> APIRouter:
    """The route, for one engine."""
    router = APIRouter(tags=["embeddings"])

    @router.post("/v1/embeddings", summary="Texts as vectors")
    async def embed(asked: EmbeddingsRequest, request: Request) -> Response:
        return JSONResponse(await while_connected(request, embedded(front, asked, request.state.seen)))

    return router


async def embedded(front: Front, asked: EmbeddingsRequest, seen: Seen) -> dict[str, Any]:
    """The whole answer."""
    options = front.options(asked, front.adapter(asked.model), seen)
    seen.model = asked.model or front.settings.model_name
    width = front.engine.config.width
    if asked.dimensions not in (None, width):
        raise refused(
            f"dimensions: this model's vectors have {width}, and are not made for fewer", "dimensions"
        )
    inputs = as_list(asked.input)
    front.check_budget(len(inputs), 1, 0)
    prompts = await front.ids_of(inputs, None, False)
    front.check_budget(1, 1, sum(map(len, prompts)))
    seen.opened, seen.choices = time.monotonic(), len(prompts)
    pooling = asked.pooling or "mean"
    found = await asyncio.gather(*(front.engine.embed(ids, pooling, **options) for ids in prompts))
    seen.prompt_tokens = sum(one.tokens for one in found)
    data = [
        {"object": "embedding", "index": i, "embedding": spelled(one, asked)} for i, one in enumerate(found)
    ]
    usage = {"prompt_tokens": seen.prompt_tokens, "total_tokens": seen.prompt_tokens}
    return {"object": "list", "data": data, "model": seen.model, "usage": usage}


def spelled(found: Embedding, asked: EmbeddingsRequest) -> str | list[float]:
    """A vector as it is sent: numbers, or little-endian float32 in base64."""
    vector = found.vector
    if asked.normalize is not False:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if asked.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
