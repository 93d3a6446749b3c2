"""POST /v1/responses."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from maxstack.serve.http.counted import finish_of, note_tokens
from maxstack.serve.http.errors import ApiError
from maxstack.serve.http.front import Front
from maxstack.serve.http.items import as_chat
from maxstack.serve.http.logprobs import chat_logprobs
from maxstack.serve.http.routes.chat import Chat, ready
from maxstack.serve.http.schemas.responses import ResponsesRequest
from maxstack.serve.http.sse import Frame, event
from maxstack.serve.http.streams import closing, event_stream, merged, while_connected, wholes
from maxstack.serve.http.written import Written, named


def response_routes(front: Front) -> APIRouter:
    """The route, for one engine."""
    router = APIRouter(tags=["responses"])

    @router.post("/v1/responses", summary="Answer an input; nothing is stored")
    async def respond(asked: ResponsesRequest, request: Request) -> Response:
        job = await ready(front, as_chat(asked), request.state.seen)
        response = Answering(asked, job)
        if asked.stream:
            return await event_stream(request, response.streamed(), job.seen, front.settings, error_event)
        return JSONResponse(await while_connected(request, response.answered()))

    @router.get("/v1/responses/{response_id}", summary="Not there: nothing is stored")
    async def stored(response_id: str) -> Response:
        raise ApiError(404, "no response is stored here: ask again", param="response_id", code="not_found")

    return router


def error_event(error: ApiError) -> bytes:
    """An error in a stream of this kind: for clients that look for a type, and for those that look for `error`."""
    told = error.body["error"]
    own = {"type": "error", "code": told["code"], "message": told["message"], "param": told["param"]}
    return event({**own, "sequence_number": 0, **error.body}, "error")


class Answering:
    """One response on its way."""

    def __init__(self, asked: ResponsesRequest, job: Chat):
        self._asked, self._job = asked, job
        self._id, self._written, self._number = named("resp"), Written(), 0
        self._frames: dict[str, Frame] = {}

    async def answered(self) -> dict[str, Any]:
        """The whole response."""
        job, parser = self._job, self._job.parser()
        streams = job.open()
        with closing(job.front.engine, streams):
            [output] = await wholes(streams)
        note_tokens(job.seen, len(output.token_ids))
        job.seen.cached_tokens = output.cached_tokens
        job.seen.reasoning_tokens = job.thought_tokens(output)
        reason = finish_of(output.finish_reason, job.seen)
        logprobs = self._logprobs(output.logprobs or [])
        for _ in self._written.take([*parser.feed(output.text), *parser.end()], logprobs):
            pass
        return self._finished(reason)[1]

    async def streamed(self) -> AsyncGenerator[bytes]:
        """The response as events."""
        job, parser, thoughts = self._job, self._job.parser(), self._job.prompt.counter()
        streams = job.open()
        with closing(job.front.engine, streams):
            begun, reason = self._begin(), "stop"
            async for _, delta in merged(streams):
                note_tokens(job.seen, len(delta.token_ids))
                job.seen.reasoning_tokens += thoughts.take(delta.token_ids)
                pieces = [*parser.feed(delta.text), *(parser.end() if delta.finish_reason else ())]
                told = self._written.take(pieces, self._logprobs(delta.logprobs))
                if events := begun + b"".join(map(self._event, told)):
                    yield events
                begun = b""
                if delta.finish_reason is not None:
                    reason = finish_of(delta.finish_reason, job.seen)
            job.seen.cached_tokens = streams[0].answer.output.cached_tokens
            last, response = self._finished(reason)
            last.append({"type": f"response.{response['status']}", "response": response})
            yield b"".join(map(self._event, last))

    def _begin(self) -> bytes:
        kinds = ("response.created", "response.in_progress")
        told = ({"type": kind, "response": self._response("in_progress")} for kind in kinds)
        return b"".join(map(self._event, told))

    def _logprobs(self, found: Any) -> list[dict[str, Any]]:
        return chat_logprobs(found, self._job.front.spelling)["content"] if self._job.wants_logprobs else []

    def _event(self, told: dict[str, Any]) -> bytes:
        number, kind = self._number, told["type"]
        self._number += 1
        if kind == "response.output_text.delta" and not told["logprobs"]:  # nearly all are so
            name = told["item_id"]
            if (frame := self._frames.get(name)) is None:
                text, last = named("text"), named("number")
                frame = Frame({**told, "delta": text, "sequence_number": last}, text, last, name=kind)
                self._frames[name] = frame
            return frame(told["delta"], number)
        return event({**told, "sequence_number": number}, kind)

    def _finished(self, reason: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        status = "incomplete" if reason == "length" else "completed"
        events = list(self._written.finish(status))
        response = self._response(status)
        seen, prompt = self._job.seen, len(self._job.prompt.ids)
        response["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": seen.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": seen.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": seen.reasoning_tokens},
            "total_tokens": prompt + seen.completion_tokens,
        }
        return events, response

    def _response(self, status: str) -> dict[str, Any]:
        asked, plain = self._asked, self._asked.model_dump(exclude_none=True, by_alias=True)
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._job.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": asked.max_tool_calls,
            "metadata": asked.metadata or {},
            "model": self._job.model,
            "output": self._written.items if status != "in_progress" else [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None} | plain.get("reasoning", {}),
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": {"type": "text"}} | plain.get("text", {}),
            "tool_choice": plain.get("tool_choice", "auto"),
            "tools": plain.get("tools", []),
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
        }
