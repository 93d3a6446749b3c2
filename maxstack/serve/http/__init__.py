"""An OpenAI-compatible HTTP front over `AsyncEngine`.

    app = create_app(engine, Settings(model_name="smollm2-135m-instruct"))
    uvicorn.Server(server_config(app, settings)).run()

- `app`: the application; `server`: how uvicorn runs it
- `gate`: what every request passes: id, sizes, key, JSON
- `front`: what the routes share; `routes/`: one file a family; `schemas/`: what requests may hold
- `conversation`, `said`: messages to the prompt, and the answer's text back to messages
- `errors`, `sse`, `logprobs`, `spelling`: how things are spelled
- `operation`: what watches it
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maxstack.serve.http.app import create_app as create_app
    from maxstack.serve.http.errors import ApiError as ApiError
    from maxstack.serve.http.operation import Operation as Operation
    from maxstack.serve.http.operation import Seen as Seen
    from maxstack.serve.http.server import server_config as server_config
    from maxstack.serve.http.settings import Settings as Settings

# FastAPI is imported by the first use of what needs it: a server reads its model meanwhile.
HOME = {
    "ApiError": "maxstack.serve.http.errors",
    "Operation": "maxstack.serve.http.operation",
    "Seen": "maxstack.serve.http.operation",
    "Settings": "maxstack.serve.http.settings",
    "create_app": "maxstack.serve.http.app",
    "server_config": "maxstack.serve.http.server",
}


def __getattr__(name: str):
    if name in HOME:
        import importlib

        return getattr(importlib.import_module(HOME[name]), name)
    raise AttributeError(f"module 'maxstack.serve.http' has no attribute {name!r}")
