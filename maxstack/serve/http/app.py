"""The application: routes, the gate before them, and what becomes of errors."""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import maxstack
from maxstack.config.errors import RunError, UserError
from maxstack.serve import page
from maxstack.serve.engine import AsyncEngine
from maxstack.serve.http.errors import error_of, validation_error
from maxstack.serve.http.front import Front
from maxstack.serve.http.gate import Gate
from maxstack.serve.http.operation import Operation, Seen
from maxstack.serve.http.routes.chat import chat_routes
from maxstack.serve.http.routes.completions import completion_routes
from maxstack.serve.http.routes.embeddings import embedding_routes
from maxstack.serve.http.routes.models import model_routes
from maxstack.serve.http.routes.responses import response_routes
from maxstack.serve.http.routes.tokens import token_routes
from maxstack.serve.http.settings import Settings
from maxstack.serve.request import Full

log = logging.getLogger(__name__)

ROUTES = (chat_routes, completion_routes, response_routes, embedding_routes, model_routes, token_routes)


def create_app(engine: AsyncEngine, settings: Settings, *, operation: Operation | None = None) -> FastAPI:
    """An OpenAI-compatible front for the engine, which stays its owner's to start and to close.

    Raises UserError for an engine without a tokenizer.
    """
    front = Front(engine, settings, operation)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        if operation is None:
            yield
        else:
            async with operation.running():
                yield

    app = FastAPI(
        title="maxstack",
        version=maxstack.__version__,
        lifespan=lifespan,
        docs_url=None,  # pages that load from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        openapi_url="/openapi.json",
    )
    app.state.front = front
    for routes in ROUTES:
        app.include_router(routes(front))
    app.include_router(page.router())
    for router in operation.routers if operation is not None else ():
        app.include_router(router)
    for kind in (RequestValidationError, HTTPException, UserError, RunError, Full, Exception):
        app.add_exception_handler(kind, answer_error)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, **cors(settings.cors_origins))
    app.add_middleware(Gate, settings=settings, operation=operation)
    return app


async def answer_error(request: Request, error: Exception) -> Response:
    """Any error as OpenAI's clients read them."""
    if isinstance(error, RequestValidationError):
        told = validation_error(list(error.errors()), error.body)
    else:
        told = error_of(error)
    if told.code == "internal_error":
        log.error("%s %s has failed", request.method, request.url.path, exc_info=error)
    seen: Seen = request.state.seen
    seen.error = told.code or told.body["error"]["type"]
    response = told.response
    if told.code == "internal_error":  # sent from outside of the gate, which names the others
        response.headers["x-request-id"] = seen.id
    return response


def cors(origins: Sequence[str]) -> dict[str, Any]:
    """Which pages elsewhere may ask, and how."""
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["authorization", "content-type", "x-request-id"],
        "expose_headers": ["x-request-id"],
        "max_age": 600,
    }
