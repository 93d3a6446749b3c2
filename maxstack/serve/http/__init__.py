"""An OpenAI-compatible HTTP front over `AsyncEngine`.

    app = create_app(engine, Settings(model_name="smollm2-135m-instruct"))
    uvicorn.Server(server_config(app, settings)).run()

A request passes these, in this order:

- `app`: the application; `server`: how uvicorn runs it; `wire`: the short way back for a stream's chunks
- `gate`: what every request passes: id, sizes, key, JSON
- `routes/`: one file a family; `schemas/`: what requests may hold; `forms`: the form that an answer must have
- `front`: the engine under its names; `manner`: how its model writes calls and thoughts
- `conversation`: messages to the prompt; `said`, `thoughts`: the answer's text back to messages
- `job`: one request on its way, whole or streamed; `streams`: between the engine and a client that may leave
- `written`, `items`: what /v1/responses has of its own
- `errors`, `sse`, `logprobs`, `spelling`, `counted`: how things are spelled and counted
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
