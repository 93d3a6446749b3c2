"""A server with the page whose answers are written down here: what the page makes of them is the page's doing."""

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from maxstack.serve import page

KEY = "sesame"


class Scripted:
    """What was asked, and how it is answered."""

    def __init__(self):
        self.asked: list[dict[str, Any]] = []
        self.answers: dict[str, str] = {}
        """By question; others are answered with what was asked."""
        self.thoughts = ""
        self.gap_s = 0.0
        self.at_a_time = 1
        """Words that come in one event."""
        self.key: str | None = None
        self.fails: tuple[int, str] | None = None
        self.left = 0
        """Clients that went away in the middle."""
        self.url = ""

    @property
    def app(self) -> FastAPI:
        """The application."""
        app = FastAPI()
        app.include_router(page.router())

        @app.get("/v1/models")
        async def models(request: Request):
            if not self.opens(request):
                return JSONResponse({"error": {"message": "no key"}}, 401)
            return {
                "data": [
                    {"id": "scripted-1b"},
                    {"id": "a-model-with-a-name-that-is-longer-than-a-phone-is-wide"},
                ]
            }

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            asked = await request.json()
            if not self.opens(request):
                return JSONResponse({"error": {"message": "no key"}}, 401)
            self.asked.append(asked)
            if self.fails:
                status, message = self.fails
                return JSONResponse({"error": {"message": message}}, status, {"retry-after": "7"})
            return StreamingResponse(self.stream(asked, request), media_type="text/event-stream")

        return app

    def opens(self, request: Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"

    async def stream(self, asked: dict[str, Any], request: Request) -> AsyncIterator[bytes]:
        question = asked["messages"][-1]["content"]
        answer = self.answers.get(question, f"You said: {question}")
        try:
            yield event({"role": "assistant", "content": ""})
            for word in pieces(self.thoughts):
                yield event({"reasoning_content": word}, [])
            words = pieces(answer)
            for i in range(0, len(words), self.at_a_time):
                await asyncio.sleep(self.gap_s)
                some = words[i : i + self.at_a_time]
                tokens = [logprobs(word, i + j) for j, word in enumerate(some)]
                yield event({"content": "".join(some)}, tokens if asked.get("logprobs") else None)
            yield event({}, None, "stop")
            used = {"prompt_tokens": 9, "completion_tokens": len(words)}
            yield b"data: " + json.dumps({"choices": [], "usage": used}).encode() + b"\n\ndata: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += 1
            raise


def pieces(text: str) -> list[str]:
    """Words, each with the space before it."""
    found, at = [], 0
    while at < len(text):
        end = text.find(" ", at + 1)
        end = len(text) if end < 0 else end
        found.append(text[at:end])
        at = end
    return found


def logprobs(word: str, i: int) -> dict[str, Any]:
    share = (0.97, 0.35, 0.81, 0.12, 0.55)[i % 5]
    others = [(word, share), (" other", (1 - share) / 2), ("\n", (1 - share) / 3)]
    top = [{"token": token, "logprob": math.log(p)} for token, p in others]
    return {"token": word, "logprob": math.log(share), "top_logprobs": top}


def event(delta: dict[str, Any], tokens: list[Any] | None = None, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    if tokens is not None:
        choice["logprobs"] = {"content": tokens}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """An application on a free port; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has not started"
            threading.Event().wait(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
