"""How uvicorn runs the application."""

from typing import Any

import uvicorn
from starlette.types import ASGIApp

from maxstack.serve.http.settings import Settings


def server_config(
    app: ASGIApp, settings: Settings, *, host: str = "127.0.0.1", port: int = 8000, **options: Any
) -> uvicorn.Config:
    """Its settings: limits of headers where they are read, no log of its own, no header that says what runs here."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=settings.header_bytes,
        timeout_keep_alive=75,
        backlog=2048,
        **options,
    )
