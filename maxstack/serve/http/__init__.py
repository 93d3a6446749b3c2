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

from maxstack.serve.http.app import create_app
from maxstack.serve.http.errors import ApiError
from maxstack.serve.http.operation import Operation, Seen
from maxstack.serve.http.server import server_config
from maxstack.serve.http.settings import Settings

__all__ = ["ApiError", "Operation", "Seen", "Settings", "create_app", "server_config"]
