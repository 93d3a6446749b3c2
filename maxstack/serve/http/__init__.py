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

from maxstack.serve.http.app import create_app
from maxstack.serve.http.errors import ApiError
from maxstack.serve.http.operation import Operation, Seen
from maxstack.serve.http.server import server_config
from maxstack.serve.http.settings import Settings

__all__ = ["ApiError", "Operation", "Seen", "Settings", "create_app", "server_config"]
