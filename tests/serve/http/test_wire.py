"""The short way of a stream's chunks: what comes is what the long way gives, for clients of either kind."""

import asyncio
import json

import httpx2
import pytest

from maxstack.serve.http import create_app
from maxstack.serve.http.sse import Frame, event
from tests.serve.http import raw
from tests.serve.http.serving import LETTERS, SETTINGS

TEXTS = ["", "a", 'says "no"\n', "\\", "é 語 🙂", "\u2028\x00\x1f", "{}", "0123456789abcdef"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_frame_with_its_holes_filled_is_the_event_spelled_anew(text):
    def data(text: str, number: str | int) -> dict:
        return {"id": "x", "choices": [{"delta": {"content": text}, "logprobs": None}], "n": number}

    frame = Frame(data("hole", "other"), "hole", "other", name="kind")
    assert frame(text, 7) == event(data(text, 7), "kind")
    assert frame("again", 8) == event(data("again", 8), "kind")


def events_of(body: bytes) -> list:
    """Without what differs from one answer to the next."""
    found = []
    for one in body.decode().split("\n\n")[:-1]:
        _, _, data = one.partition("data: ")
        if data == "[DONE]":
            found.append(data)
            continue
        told = json.loads(data)
        response = told.get("response", {})
        for place in (told, response, told.get("item", {}), *response.get("output", ())):
            for name in ("id", "item_id", "created", "created_at", "sequence_number"):
                place.pop(name, None)
        found.append(told)
    return found


CHAT = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 8,
    "stream_options": {"include_usage": True},
}
ASKED = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "max_tokens": 8, "echo": True, "n": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 8},
}


@pytest.mark.parametrize("path", ASKED)
def test_both_ways_say_the_same(url, engine, path):
    body = ASKED[path] | {"model": "tiny", "stream": True, "seed": 3, "logit_bias": LETTERS}
    short = raw.post(url, body, path=path)
    assert short.headers["transfer-encoding"] == "chunked"

    async def without_a_server() -> bytes:
        app = httpx2.ASGITransport(create_app(engine, SETTINGS))
        async with httpx2.AsyncClient(transport=app, base_url="http://here") as client:
            return (await client.post(path, json=body)).content

    long = asyncio.run(without_a_server())
    assert text_of(events_of(short.body)) == text_of(events_of(long))
    assert events_of(short.body)[-1] == events_of(long)[-1]


def text_of(events: list) -> dict:
    """The texts of each answer joined: how many pieces there are depends on the time."""
    texts: dict = {}
    for told in events:
        for choice in told.get("choices", ()) if isinstance(told, dict) else ():
            said = choice.get("text") or choice.get("delta", {}).get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + said
        if isinstance(told, dict) and told.get("type") == "response.output_text.delta":
            texts["output"] = texts.get("output", "") + told["delta"]
    assert texts
    return texts


def test_an_old_client_gets_its_stream_without_chunks(url):
    """HTTP/1.0 knows none: the body is all until the end."""
    body = json.dumps(ASKED["/v1/completions"] | {"stream": True, "seed": 3}).encode()
    with raw.connected(url) as line:
        head = raw.head(
            "POST", "/v1/completions", "Content-Type: application/json", f"Content-Length: {len(body)}"
        )
        line.sendall(head.replace(b"HTTP/1.1", b"HTTP/1.0") + body)
        answer = raw.read(line)
    assert "transfer-encoding" not in answer.headers
    assert answer.body.startswith(b"data: {")
    assert answer.body.endswith(b"data: [DONE]\n\n")
